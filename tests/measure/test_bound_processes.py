"""`iddpm nll` in real processes: killed and started again, or shared among several, the numbers are the same to the last bit."""

import json
import time

import numpy as np
import pytest

from conftest import SLOW
from iddpm.cli.main import main

STEPS = 30


@pytest.fixture(scope="module")
def long_run(config, data, tmp_path_factory):
    """A run with a longer chain."""
    from iddpm.training.loop import train
    from iddpm.training.start import write_config

    config, folder = config.updated(dict(diffusion_steps=STEPS, steps=1)), tmp_path_factory.mktemp("runs") / "long"
    write_config(folder, config)
    train(config, data, folder)
    return folder


def command(run, pictures, folder, **more):
    flags = dict(sampling_steps="all", batch_size=4, out=folder / "n.json", per_image=folder / "each.npz", device="cpu") | more
    return ["nll", str(run), str(pictures), *(str(token) for k, v in flags.items() for token in (f"--{k}", v))]


def numbers(folder):
    """All that was written, and nothing of it half done."""
    assert {p.name for p in folder.iterdir()} == {
        "n.json", "n.svg", "n_vb_terms.npz", "n_mse_terms.npz", "n_xstart_mse_terms.npz", "each.npz", "metrics.json",
    }  # fmt: skip
    result = json.loads((folder / "n.json").read_text())
    with np.load(folder / "each.npz") as file:
        return result, {name: file[name].tolist() for name in file.files}


@pytest.fixture(scope="module")
def undisturbed(long_run, pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert main(command(long_run, pictures, folder)) == 0
    return numbers(folder)


SAVING_EVERY_TERM = "import iddpm.measure.bound as e; e.SAVE_EVERY = e.SAVE_COST = 0; entry()"


def killed(launcher, line, partial, terms):
    """The command, ended once so many terms are in a state file."""
    process = launcher.start(*line, said=partial.parent.with_suffix(".said"), program=SAVING_EVERY_TERM)
    while done(partial) < terms and process.running():
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert partial.exists(), process.said.read_text()


def done(partial):
    """Terms that a state file holds; it is whole whenever one looks."""
    if not partial.exists():
        return 0
    with np.load(partial) as file:
        return int(file["done"].sum())


@pytest.mark.slow  # as that of a curve below
def test_a_killed_measurement_goes_on_to_the_same_numbers(launcher, long_run, pictures, tmp_path, undisturbed, capsys):
    line, partial = command(long_run, pictures, tmp_path), tmp_path / "n.json.partial"
    killed(launcher, line, partial, STEPS * 22 // 4)
    assert STEPS * 22 // 4 <= done(partial) < STEPS * 22
    assert main(line) == 0
    assert "going on: " in capsys.readouterr().out
    assert numbers(tmp_path) == undisturbed


@pytest.mark.parametrize("processes", [2, SLOW(3)])
def test_several_processes_find_the_same_numbers(launcher, long_run, pictures, tmp_path, undisturbed, processes):
    line, said = command(long_run, pictures, tmp_path), tmp_path.with_suffix(".said")
    out = launcher.start(*line, said=said, processes=processes).succeed()
    assert out.count("bits/dim (22 images") == 1
    assert numbers(tmp_path) == undisturbed


def test_a_curve_killed_and_ended_by_two_processes_is_the_undisturbed_one(launcher, long_run, pictures, tmp_path):
    def line(folder):
        settings = dict(curve="10,all", batch_size=4, device="cpu", out=folder / "c.json")
        return ["nll", str(long_run), str(pictures), *(str(token) for k, v in settings.items() for token in (f"--{k}", v))]

    assert main(line(tmp_path / "whole")) == 0
    partial = tmp_path / "cut" / "c.json.all.partial"
    killed(launcher, line(tmp_path / "cut"), partial, STEPS * 22 // 4)
    assert STEPS * 22 // 4 <= done(partial) < STEPS * 22
    out = launcher.start(*line(tmp_path / "cut"), said=tmp_path / "said", processes=2).succeed()
    assert out.count("going on: ") == 2 and out.count(" bits/dim") == 2
    for name in ("c.json", "c.svg"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    figures = json.loads((tmp_path / "cut" / "metrics.json").read_text())["figures"]
    assert [f["steps"] for f in figures] == [k for k in (10, STEPS) for _ in range(3)]
    assert figures[-1]["machine"].startswith("2 processes, each ")


@pytest.mark.slow  # the bound's is the same machinery
def test_the_odes_likelihood_killed_and_ended_by_two_processes_is_the_undisturbed_one(launcher, long_run, pictures, tmp_path):
    def line(folder):
        settings = dict(ode=True, trace="hutchinson", sampling_steps="10", batch_size=2, device="cpu", out=folder / "o.json")
        return ["nll", str(long_run), str(pictures), *(str(token) for k, v in settings.items() for token in (f"--{k}", v))]

    assert main(line(tmp_path / "whole")) == 0
    partial = tmp_path / "cut" / "o.json.partial"
    killed(launcher, line(tmp_path / "cut"), partial, 4)
    assert 4 <= done(partial) < 22
    out = launcher.start(*line(tmp_path / "cut"), said=tmp_path / "said", processes=2).succeed()
    assert out.count("going on: ") == 1 and not partial.exists()
    assert (tmp_path / "cut" / "o.json").read_bytes() == (tmp_path / "whole" / "o.json").read_bytes()
