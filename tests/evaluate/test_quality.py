"""Samples measured while a run trains."""

import json

import numpy as np
import pytest
import torch

from conftest import TINY, flags
from iddpm import checkpoint, storage
from iddpm.cli import main
from iddpm.config import Config, check
from iddpm.data import Images
from iddpm.errors import UserError
from iddpm.evaluate.quality import read_best
from iddpm.log import read_rows
from iddpm.train import train
from test_distributed import torchrun

SETTINGS = dict(
    TINY, class_cond=True, num_classes=3, classes=("across", "disc", "down"), dropout=0.1, random_flip=True,
    schedule_sampler="loss-second-moment", steps=12, save_interval=5, keep=1, sampling_steps="4",
)  # fmt: skip


def run_of(path, pictures, **changed):
    config = Config().updated({**SETTINGS, "path": str(pictures), **changed})
    train(config, Images.open(pictures, (8, 8), 1), path, say=lambda line: None)
    return path


def test_measuring_samples_changes_nothing_of_a_run(pictures, tmp_path):
    plain = run_of(tmp_path / "plain", pictures)
    measured = run_of(tmp_path / "measured", pictures, eval_every=4, eval_samples=8)
    a, b = (checkpoint.load(storage.step_dir(run, 12)) for run in (plain, measured))
    assert a.state == b.state
    assert a.tensors().keys() == b.tensors().keys()
    assert all(torch.equal(tensor, b.tensors()[name]) for name, tensor in a.tensors().items())


def test_the_best_checkpoint_is_kept_and_named(pictures, tmp_path):
    run = run_of(tmp_path / "r", pictures, eval_every=3, eval_samples=8)
    rows = [row for row in read_rows(run) if "kd_lite0_128" in row]
    assert [row["step"] for row in rows] == [3, 6, 9, 12]
    best = min(rows, key=lambda row: row["kd_lite0_128"])
    named = read_best(run)
    assert named and (named.step, named.value, named.metric) == (best["step"], best["kd_lite0_128"], "kd_lite0_128")
    kept = {storage.step_of(folder) for folder in storage.step_dirs(run)}
    assert kept == {best["step"], 12}
    assert storage.verify(storage.step_dir(run, best["step"])) is None


def test_the_measurement_is_that_of_evaluate(pictures, tmp_path):
    """The kernel distance in the log is what `iddpm evaluate` finds for the same checkpoint, seeds and reference."""
    run = run_of(tmp_path / "r", pictures, eval_every=12, eval_samples=8)
    from iddpm.verbs.train import write_config

    write_config(run, Config().updated({**SETTINGS, "path": str(pictures)}))
    assert main(["evaluate", str(run), "--reference", str(pictures), "--num_samples", "8", "--metrics", "kd,fd"]) == 0
    row = next(row for row in read_rows(run) if "kd_lite0_128" in row)
    figures = {f["name"]: f["value"] for f in json.loads((run / "metrics.json").read_text())["figures"]}
    np.testing.assert_allclose(row["kd_lite0_128"], figures["KD-lite0-128"], rtol=1e-6)
    np.testing.assert_allclose(row["fd_lite0_128"], figures["FD-lite0-128"], rtol=1e-6)


def test_a_killed_run_measures_the_same_when_it_goes_on(pictures, tmp_path):
    whole = run_of(tmp_path / "whole", pictures, eval_every=4, eval_samples=8)
    halves = run_of(tmp_path / "halves", pictures, steps=7, eval_every=4, eval_samples=8)
    run_of(tmp_path / "halves", pictures, eval_every=4, eval_samples=8)
    a, b = ([row for row in read_rows(run) if "kd_lite0_128" in row] for run in (whole, halves))
    assert [(row["step"], row["kd_lite0_128"]) for row in a] == [(row["step"], row["kd_lite0_128"]) for row in b]
    assert read_best(whole) == read_best(halves)


@pytest.mark.parametrize("shard", [0, -1])
def test_two_processes_measure_what_one_does(pictures, tmp_path, shard):
    settings = dict(TINY, class_cond=True, steps=4, eval_every=2, eval_samples=7, sampling_steps="4")
    for run, processes in (("one", 1), ("two", 2)):
        sharded = {"shard": shard} if processes == 2 else {}
        process = torchrun(processes, "train", pictures, "--run", tmp_path / run, *flags(**settings, **sharded))
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    one, two = ([row for row in read_rows(tmp_path / run) if "kd_lite0_128" in row] for run in ("one", "two"))
    assert [row["step"] for row in one] == [row["step"] for row in two] == [2, 4]
    for a, b in zip(one, two):  # a level of 255 that rounding turns moves them by as little
        assert b["kd_lite0_128"] == pytest.approx(a["kd_lite0_128"], rel=1e-3)
        assert b["fd_lite0_128"] == pytest.approx(a["fd_lite0_128"], rel=1e-3)


def test_what_draws_nothing_is_not_measured(config):
    with pytest.raises(UserError, match="--eval_every has no effect with --network classifier: it draws samples"):
        check(config.updated(dict(eval_every=5, network="classifier", learn_sigma=False)))


def test_the_best_checkpoint_is_sampled_from_by_name(pictures, run, tmp_path, capsys):
    measured = tmp_path / "measured"
    line = ["train", str(pictures), "--run", str(measured), *flags(**TINY | dict(sampling_steps=4), eval_every=2, eval_samples=8)]
    assert main(line) == 0
    best = read_best(measured)
    capsys.readouterr()
    assert main(["sample", str(measured), "--best", "--num_samples", "2", "--out", str(tmp_path / "s.png")]) == 0
    assert f"2 images of step {best.step}" in capsys.readouterr().out
    for source, flag, said in (
        (run, [], "names no best checkpoint"),
        (measured, ["--checkpoint_step", "2"], "both name a checkpoint"),
    ):
        assert main(["sample", str(source), "--best", *flag, "--out", str(tmp_path / "t.png")]) == 2
        assert said in capsys.readouterr().err
