"""Samples measured while a run trains."""

import json
import os
import shutil
import signal
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from conftest import SLOW, TINY, diagonal, flags
from iddpm.cli.main import main
from iddpm.config import Config, check
from iddpm.data import Images
from iddpm.errors import UserError
from iddpm.measure import quality
from iddpm.measure.metrics.rows import Estimate
from iddpm.store import checkpoint
from iddpm.store import files as storage
from iddpm.store.log import read_rows
from iddpm.training.loop import Stopped, train

SETTINGS = dict(
    TINY, class_cond=True, num_classes=3, classes=("across", "disc", "down"), dropout=0.1, random_flip=True,
    schedule_sampler="loss-second-moment", steps=12, save_interval=5, keep=1, sampling_steps="4",
    lr=0.01,
)  # fmt: skip


def run_of(path, pictures, say=lambda line: None, **changed):
    config = Config().updated({**SETTINGS, "path": str(pictures), **changed})
    train(config, Images.open(pictures, (8, 8), 1), path, say=say)
    return path


def measured(run):
    """step -> the numbers of its samples, but for the time they took."""
    rows = [row for row in read_rows(run) if "kd_lite0_128" in row]
    assert len({row["step"] for row in rows}) == len(rows)
    return {row["step"]: {k: v for k, v in row.items() if k not in ("time", "eval_seconds")} for row in rows}


def named(run):
    """What best.json says."""
    return json.loads((run / "checkpoints" / "best.json").read_text())


def kept(run):
    folders = storage.step_dirs(run)
    assert not [folder for folder in folders if storage.verify(folder)]
    return [storage.step_of(folder) for folder in folders]


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    """An undisturbed run, measured every 3 steps. Its best is neither the first nor the last. Read it; do not change it."""
    run = run_of(tmp_path_factory.mktemp("whole") / "r", pictures, eval_every=3, eval_samples=8)
    assert named(run)["step"] == 6, measured(run)
    return run


def assert_like(run, whole):
    assert (measured(run), named(run), kept(run)) == (measured(whole), named(whole), kept(whole))


def test_measuring_samples_changes_nothing_of_a_run(pictures, whole, tmp_path):
    plain = run_of(tmp_path / "plain", pictures)
    a, b = (checkpoint.load(storage.step_dir(run, 12)) for run in (plain, whole))
    apart = ("measured", "best", "seconds")
    assert {k: v for k, v in a.state.items() if k not in apart} == {k: v for k, v in b.state.items() if k not in apart}
    assert a.tensors().keys() == b.tensors().keys()
    assert all(torch.equal(tensor, b.tensors()[name]) for name, tensor in a.tensors().items())


def test_the_best_checkpoint_is_kept_and_named(whole):
    rows = measured(whole)
    assert list(rows) == [3, 6, 9, 12]
    best = min(rows, key=lambda step: rows[step]["kd_lite0_128"])
    assert (named(whole)["step"], named(whole)["value"]) == (best, rows[best]["kd_lite0_128"])
    assert named(whole)["metric"] == "kd_lite0_128"
    assert storage.best(whole) == best
    assert kept(whole) == [best, 12]
    assert all((row["eval_n"], row["eval_reference_n"]) == (8, 22) for row in rows.values())


def test_the_measurement_is_that_of_evaluate(pictures, tmp_path):
    """The kernel distance in the log is what `iddpm evaluate` finds for the same checkpoint, seeds and reference."""
    run = run_of(tmp_path / "r", pictures, eval_every=12, eval_samples=8)
    from iddpm.training.start import write_config

    write_config(run, Config().updated({**SETTINGS, "path": str(pictures)}))
    out = tmp_path / "evaluated.json"
    line = ["evaluate", str(run), "--reference", str(pictures), "--num_samples", "8", "--metrics", "kd,fd", "--out", str(out)]
    assert main(line) == 0
    row, figures = measured(run)[12], json.loads(out.read_text())["figures"]
    values = {f["name"]: f["value"] for f in figures}
    np.testing.assert_allclose(row["kd_lite0_128"], values["KD-lite0-128"], rtol=1e-6)
    np.testing.assert_allclose(row["fd_lite0_128"], values["FD-lite0-128"], rtol=1e-6)
    ours = json.loads((run / "metrics.json").read_text())["figures"][0]
    same = ("n", "seeds", "solver", "steps", "sampling_steps", "eta", "clip_denoised", "precision", "ema_rate", "checkpoint_step",
            "extractor", "extractor_identity", "reference", "reference_n", "samples")  # fmt: skip
    assert [ours[k] for k in same] == [figures[0][k] for k in same]


def test_the_figures_of_every_measurement_are_in_the_file_of_figures(whole):
    rows = json.loads((whole / "metrics.json").read_text())["figures"]
    found = {(f["name"], f["checkpoint_step"]): f["value"] for f in rows}
    expected = {("KD-lite0-128", step): row["kd_lite0_128"] for step, row in measured(whole).items()}
    expected |= {("FD-lite0-128", step): row["fd_lite0_128"] for step, row in measured(whole).items()}
    assert found == expected and len(rows) == 8


def test_a_file_that_is_none_of_figures_is_refused_at_the_start(pictures, tmp_path):
    (tmp_path / "metrics.json").write_text("[1]")
    with pytest.raises(UserError, match=r"metrics\.json is not a file of figures"):
        run_of(tmp_path, pictures, eval_every=3)
    assert not (tmp_path / "checkpoints").exists()


# ---- what disturbs a run

DIES = """
import os
from iddpm.store import files as storage

whole = storage.WHERE

def dies(*args, **named):  # in the place of what is done of step 6 once it is committed
    if storage.step_of(storage.step_dirs(args[0])[-1]) == 6:
        os._exit(9)
    whole(*args, **named)

storage.WHERE = dies
entry()
"""


@pytest.mark.parametrize("where", ["name_best", SLOW("prune")])
def test_a_run_killed_when_its_best_is_saved_ends_as_one_that_was_not(launcher, pictures, whole, tmp_path, where):
    """The kill comes when the best checkpoint is in its place: before best.json names it, or before the others are pruned."""
    run, flat = tmp_path / "r", {k: v for k, v in SETTINGS.items() if k not in ("num_classes", "classes")}
    line = ["train", str(pictures), "--run", str(run), *flags(**flat, eval_every=3, eval_samples=8)]
    assert launcher.start(*line, said=tmp_path / "said", program=DIES.replace("WHERE", where)).wait() == [9]
    assert named(run)["step"] == (3 if where == "name_best" else 6)
    assert kept(run)[-1] == 6
    checkpoint.Folder(run).newest()
    assert named(run) == named(whole)
    assert main(line) == 0
    assert_like(run, whole)


@pytest.mark.parametrize(("step", "when"), diagonal([6, 12], ["before", "meanwhile"]))
def test_a_stop_is_not_kept_waiting_by_a_measurement_which_is_made_up_for(pictures, whole, tmp_path, monkeypatch, when, step):
    run, settings = tmp_path / "r", dict(eval_every=3, eval_samples=8)
    measure, calls = quality.Quality.__call__, []

    def stops(self, net):
        calls.append(net)
        if when == "meanwhile" and len(calls) == step // 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(self, net)

    def say(line):
        if when == "before" and line.startswith(f"step {step - 1}/"):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(quality.Quality, "__call__", stops)
    with pytest.raises(Stopped, match=f"stopped at step {step}"):
        run_of(run, pictures, say, **settings)
    assert len(calls) == step // 3 - (when == "before")
    assert kept(run)[-1] == step and list(measured(run)) == list(range(3, step, 3))
    monkeypatch.undo()
    run_of(run, pictures, **settings)
    assert_like(run, whole)


def test_a_best_checkpoint_that_is_damaged_is_made_and_named_anew(pictures, whole, tmp_path):
    run = run_of(tmp_path / "r", pictures, steps=6, eval_every=3, eval_samples=8, keep=3)
    assert (named(run)["step"], kept(run)) == (6, [3, 5, 6])
    (storage.step_dir(run, 6) / "weights.safetensors").write_bytes(b"")
    _, passed_over = checkpoint.Folder(run).newest()
    assert len(passed_over) == 1 and passed_over[0].startswith("passed over step_00000006")
    assert named(run)["step"] == 3
    run_of(run, pictures, eval_every=3, eval_samples=8)
    assert_like(run, whole)


def test_a_best_checkpoint_that_is_lost_is_no_longer_named(pictures, whole, tmp_path):
    run, said = shutil.copytree(whole, tmp_path / "r"), []
    shutil.rmtree(storage.step_dir(run, 6))
    run_of(run, pictures, said.append, eval_every=3, eval_samples=8, steps=14)
    assert any(line.startswith("the best checkpoint, of step 6, is lost: incomplete") for line in said)
    assert storage.best(run) is None
    run_of(run, pictures, eval_every=3, eval_samples=8, steps=15)
    assert named(run)["step"] == 15 == kept(run)[-1]


def test_what_was_measured_otherwise_does_not_compete(pictures, tmp_path, monkeypatch):
    """Each measurement of this run is worse than the one before."""
    values = iter(range(100))
    monkeypatch.setattr(quality, "kernel_distance", lambda *args, **settings: Estimate(float(next(values)), None))
    run, settings = tmp_path / "r", dict(eval_every=2, eval_samples=8)
    run_of(run, pictures, steps=4, **settings)
    assert named(run)["step"] == 2
    for step, changed in enumerate(({}, dict(eval_samples=9), dict(sampling_steps="3"), dict(solver="ddim"), {}), start=3):
        settings |= changed
        run_of(run, pictures, steps=2 * step, **settings)
        assert named(run)["step"] == {3: 2, 7: 12}.get(step, 2 * step)
    assert kept(run) == [12, 14]


def test_a_run_whose_checkpoints_know_of_no_best_keeps_the_one_that_is_named(pictures, tmp_path):
    run = run_of(tmp_path / "r", pictures, steps=5)
    storage.name_best(run, dict(step=5))
    run_of(run, pictures, steps=7)
    assert storage.best(run) == 5 and kept(run) == [5, 7]
    run_of(run, pictures, steps=9, eval_every=3, eval_samples=8)
    assert named(run)["step"] == 9 and kept(run) == [9]


def test_measuring_and_drawing_give_signs_of_life_at_each_step(pictures, tmp_path, monkeypatch):
    told = []

    @contextmanager
    def listens(timeout):
        yield lambda step, doing: told.append((step, doing))

    monkeypatch.setattr("iddpm.training.loop.watch", listens)
    run_of(tmp_path / "r", pictures, steps=3, eval_every=3, eval_samples=8, eval_batch=4, sample_interval=3)
    assert told.count((3, "measuring samples")) == 2 * 4
    assert told.count((3, "drawing samples")) == 4


@pytest.mark.parametrize(("shard", "batch"), [SLOW(0, 64), (-1, 3)])
def test_two_processes_measure_what_one_does(launcher, pictures, tmp_path, shard, batch):
    """Of a batch of 64 the second process gets none; of 3 at a time, 1 and none in the last round."""
    settings = dict(TINY, class_cond=True, steps=4, eval_every=2, eval_samples=7, sampling_steps="4", eval_batch=batch)
    for run, processes in (("one", 1), ("two", 2)):
        sharded = {"shard": shard} if processes == 2 else {}
        line = ("train", pictures, "--run", tmp_path / run, *flags(**settings, **sharded))
        launcher.start(*line, said=tmp_path / "said", processes=processes).succeed()
    one, two = (measured(tmp_path / run) for run in ("one", "two"))
    assert list(one) == list(two) == [2, 4]
    for step in one:  # a level of 255 that rounding turns moves them by as little
        assert two[step]["kd_lite0_128"] == pytest.approx(one[step]["kd_lite0_128"], rel=1e-3)
        assert two[step]["fd_lite0_128"] == pytest.approx(one[step]["fd_lite0_128"], rel=1e-3)
    assert named(tmp_path / "one")["conditions"] == named(tmp_path / "two")["conditions"]


# ---- what cannot work


def test_what_draws_nothing_is_not_measured(config):
    with pytest.raises(UserError, match="--eval_every has no effect with --task classify: it belongs to --task images"):
        check(config.updated(dict(eval_every=5, task="classify", learn_sigma=False)))


@pytest.mark.parametrize(
    "changed", [dict(eval_samples=8), dict(eval_reference="x"), dict(eval_extractor="dinov2"), dict(eval_batch=2)]
)
def test_how_to_measure_has_no_effect_without_when(config, changed):
    name, default = next(iter(changed)), Config().flat()[next(iter(changed))]
    with pytest.raises(UserError, match=f"--{name} has no effect without --eval_every; its default is {default!r}"):
        check(config.updated(changed))
    check(config.updated(changed | dict(eval_every=5)))


def test_too_few_real_images_are_refused_at_the_start(pictures, tmp_path, capsys):
    few = tmp_path / "few"
    few.mkdir()
    for k in range(3):
        shutil.copy(pictures / "disc" / f"{3 * k + 1:03d}.png", few)
    line = ["train", str(pictures), "--run", str(tmp_path / "r"), *flags(**TINY, eval_every=2, eval_reference=few)]
    assert main(line) == 2
    said = capsys.readouterr().err.strip()
    assert said.endswith(f"--eval_every: {few} holds fewer than the 4 images it needs: give others by --eval_reference")
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "r" / "checkpoints").exists()


def test_the_best_checkpoint_is_sampled_from_by_name(pictures, run, tmp_path, capsys):
    trained = tmp_path / "trained"
    line = ["train", str(pictures), "--run", str(trained), *flags(**TINY | dict(sampling_steps=4), eval_every=2, eval_samples=8)]
    assert main(line) == 0
    best = storage.best(trained)
    capsys.readouterr()
    assert main(["sample", str(trained), "--best", "--num_samples", "2", "--out", str(tmp_path / "s.png")]) == 0
    assert f"2 images of step {best}" in capsys.readouterr().out
    for source, flag, said in (
        (run, [], "names no best checkpoint"),
        (trained, ["--checkpoint_step", "2"], "both name a checkpoint"),
    ):
        assert main(["sample", str(source), "--best", *flag, "--out", str(tmp_path / "t.png")]) == 2
        assert said in capsys.readouterr().err
