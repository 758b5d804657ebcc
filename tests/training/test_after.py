"""Averages by powers of time, made after the training: against the averages themselves, and integrals worked out by force."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import TINY, flags
from iddpm.cli.main import main
from iddpm.store import averages
from iddpm.training.after import search
from iddpm.training.ema import EMA, combination, gamma_of, width_of

POWER = dict(TINY, ema_power="0.05,0.10", steps=70)


def test_the_widths_of_the_paper_have_its_gammas():
    """Karras et al. 2024, section 3.1: 0.05 and 0.10 are gamma 16.97 and 6.94."""
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005) and gamma_of(0.1) == pytest.approx(6.94, abs=0.005)
    for width in (0.011, 0.2, 0.28):
        assert width_of(gamma_of(width)) == pytest.approx(width)
    for width in (0.0, 0.29, -1.0):
        with pytest.raises(ValueError, match="relative width"):
            gamma_of(width)


def walked(width, updates=400, seed=0):
    """The power average of a walk of weights, update by update, and the walk."""
    w, rng = torch.zeros(3, dtype=torch.float64), torch.Generator().manual_seed(seed)
    ema, path, kept = EMA({"w": w}, (), widths=(width,)), [], []
    for _ in range(updates):
        w += torch.randn(3, generator=rng, dtype=torch.float64)
        ema.update()
        path.append(w.clone())
        kept.append(ema.powers[width]["w"].clone())
    return torch.stack(path), torch.stack(kept)


@pytest.mark.parametrize("width", [0.05, 0.1, 0.25])
def test_the_weights_of_update_n_count_as_the_integral_of_the_power_over_it(width):
    """In closed form: sum over n of (n^(g+1) - (n-1)^(g+1)) / N^(g+1) times the weights after update n."""
    path, kept = walked(width)
    n, g = torch.arange(1, 401, dtype=torch.float64), gamma_of(width)
    share = (n / 400) ** (g + 1) - ((n - 1) / 400) ** (g + 1)
    torch.testing.assert_close(kept[-1], (share[:, None] * path).sum(0), rtol=1e-10, atol=1e-10)


def profile(gamma, n, times):
    """A power's density over time, 0 from n on."""
    return np.where(times <= n, (gamma + 1) * (times / n) ** gamma / n, 0.0)


@pytest.mark.parametrize("wanted", [0.03, 0.075, 0.15])
def test_a_combination_is_the_least_squares_fit_of_the_profiles(wanted):
    """Against numbers on a fine grid of times, solved by numpy."""
    times = (np.arange(200_000) + 0.5) / 200_000 * 100
    snapshots = [(gamma_of(w), float(n)) for n in range(10, 101, 10) for w in (0.05, 0.1)]
    shares, missed = combination(snapshots, (gamma_of(wanted), 100.0))
    a, b = np.stack([profile(*p, times) for p in snapshots], 1), profile(gamma_of(wanted), 100.0, times)
    basis = np.linalg.svd(np.ones((1, len(snapshots))))[2][1:].T  # of shares that add up to 0
    first = np.full(len(snapshots), 1 / len(snapshots))
    found = first + basis @ np.linalg.lstsq(a @ basis, b - a @ first, rcond=None)[0]
    off = np.linalg.norm(a @ found - b) / np.linalg.norm(b)
    assert np.linalg.norm(a @ np.array(shares) - b) / np.linalg.norm(b) == pytest.approx(off, abs=2e-4)
    assert missed == pytest.approx(off, abs=2e-3) and sum(shares) == pytest.approx(1, abs=1e-9)


def test_a_kept_average_is_itself_and_another_is_what_training_would_have_kept():
    snapshots, at = [], range(20, 401, 20)
    walks = {width: walked(width) for width in (0.05, 0.1)}
    for n in at:
        snapshots += [(gamma_of(width), float(n)) for width in walks]
    kept = torch.stack([walks[width][1][n - 1] for n in at for width in walks])
    shares, missed = combination(snapshots, (gamma_of(0.1), 400.0))
    assert missed < 1e-6 and shares[-1] == pytest.approx(1, abs=1e-6)
    for width in (0.07, 0.12):
        shares, missed = combination(snapshots, (gamma_of(width), 400.0))
        direct, path = walked(width)[1][-1], walks[0.1][0]
        made = (torch.tensor(shares, dtype=torch.float64)[:, None] * kept).sum(0)
        assert missed < 0.02 and (made - direct).norm() < 0.02 * (path[-1] - direct).norm()


def test_snapshots_are_a_bounded_number_evenly_over_the_run():
    for most in (8, 32):
        for step in (1, 100, 5_000, 10**6):
            due = averages.interval(step, most)
            assert most / 2 <= step // due <= most or (due == averages.FINEST and step // due <= most)


def test_the_search_closes_in_on_the_least():
    asked = []

    def distance(width):
        asked.append(width)
        return abs(np.log(width / 0.06))

    found = search(distance)
    assert len(asked) == len(set(asked)) == len(found)
    assert min(found, key=lambda width: found[width]) == pytest.approx(0.06, rel=0.1)


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    run = tmp_path_factory.mktemp("ema") / "run"
    assert main(["train", str(pictures), "--run", str(run), *flags(**POWER)]) == 0
    return run


@pytest.mark.slow
def test_a_killed_run_keeps_the_same_snapshots(run, pictures, tmp_path):
    again = tmp_path / "again"
    command = [
        sys.executable,
        "-m",
        "iddpm",
        "train",
        str(pictures),
        "--run",
        str(again),
        *flags(**POWER | dict(save_interval=20)),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    )
    while process.poll() is None and not list((again / "averages").glob("step_*")):
        time.sleep(0.02)
    process.kill()
    process.wait()
    (again / "averages" / "step_00000069-0.05.safetensors").write_bytes(b"of a later step, before the kill")
    assert main(command[3:]) == 0
    files = sorted(path.name for path in (run / "averages").iterdir())
    assert files == [f"step_{step:08d}-{width}.safetensors" for step in (32, 64, 70) for width in ("0.05", "0.1")]
    assert files == sorted(path.name for path in (again / "averages").iterdir())
    for name in files:
        a, b = load_file(run / "averages" / name), load_file(again / "averages" / name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_width_is_made_and_every_verb_takes_it(run, tmp_path, capsys):
    assert main(["ema", str(run), "--std", "0.1"]) == 0
    path = run / "ema-0.1.safetensors"
    assert f"next: iddpm sample {path}" in capsys.readouterr().out
    kept, made = load_file(run / "averages" / "step_00000070-0.1.safetensors"), load_file(path)
    for name, tensor in kept.items():
        torch.testing.assert_close(made[name], tensor, rtol=1e-5, atol=1e-6)
    assert main(["sample", str(path), "--num_samples", "2", "--out", str(tmp_path / "x.npz"), "--device", "cpu"]) == 0
    assert main(["ema", str(run), "--std", "0.08", "--step", "64", "--out", str(tmp_path / "w.safetensors")]) == 0
    assert "at step 64" in capsys.readouterr().out


def test_the_best_width_is_searched_by_a_distance(run, pictures, capsys):
    command = [
        "ema",
        str(run),
        "--best",
        "--reference",
        str(pictures),
        "--num_samples",
        "4",
        "--device",
        "cpu",
        "--sampling_steps",
        "2",
    ]
    assert main(command) == 0
    out = capsys.readouterr().out
    tried = {float(line.split()[1]): float(line.split()[3]) for line in out.splitlines() if line.startswith("--std")}
    chosen = min(tried, key=lambda width: tried[width])
    assert f"the best: --std {chosen:g}" in out and len(tried) >= 3
    assert not list(run.glob(".ema*"))
    assert {path.name for path in run.glob("ema-*")} == {"ema-0.1.safetensors", f"ema-{chosen:g}.safetensors"}


@pytest.mark.parametrize(("words", "line"), [
    (["--std", "0.4"], "relative width"), (["--std", "0.012"], "take one nearer"), ([], "which average?"),
    (["--std", "0.1", "--best"], "which average?"), (["--std", "0.1", "--num_samples", "3"], "without --best"),
    (["--best"], "--reference DATA"),
    (["--best", "--reference", "x", "--out", "x.pt"], "ends in .safetensors"),
    (["--best", "--reference", "x", "--metrics", "prdc"], "one distance"),
    (["--std", "0.1", "--step", "9"], "no snapshots of averages up to step 9"),
])  # fmt: skip
def test_what_cannot_be_made_is_one_line(run, words, line, capsys):
    assert main(["ema", str(run), *words]) == 2
    assert line in capsys.readouterr().err


def test_a_damaged_snapshot_and_a_run_without_any_are_named(run, tmp_path, pictures, capsys):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    file = copy / "averages" / "step_00000064-0.05.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert main(["ema", str(copy), "--std", "0.1"]) == 2
    assert file.name in capsys.readouterr().err
    shutil.rmtree(copy / "averages")
    assert main(["ema", str(copy), "--std", "0.1"]) == 2
    assert "--ema_power 0.05,0.10" in capsys.readouterr().err


def test_the_state_holds_the_averages_and_export_leaves_them(run, tmp_path):
    state = load_file(run / "checkpoints" / "step_00000070" / "state" / "optimizer.safetensors")
    assert sum(name.startswith("power.0.05.") for name in state) == sum(name.startswith("power.0.1.") for name in state) > 50
    assert main(["export", str(run), "--out", str(tmp_path / "theirs")]) == 0
    assert json.loads((run / "config.json").read_text())["train"]["ema_power"] == "0.05,0.10"
