"""Several processes: the same run as one, to rounding."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import TINY, flags
from iddpm import checkpoint
from iddpm.log import read_rows

RUN = dict(TINY, class_cond=True, schedule_sampler="loss-second-moment", random_flip=True, grad_clip=1, steps=8)


def torchrun(processes: int, *args: object, **settings) -> subprocess.Popen:
    """`torchrun --nproc-per-node N -m -- iddpm ARGS`, as a user would start it."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "--"]
    command = [*launcher, "iddpm", *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **settings)


def trained(processes: int, pictures: Path, run: Path, **settings) -> list[dict]:
    process = torchrun(processes, "train", pictures, "--run", run, *flags(**RUN | settings))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return [row for row in read_rows(run) if "event" not in row]


@pytest.fixture(scope="module")
def alone(pictures, tmp_path_factory) -> list[dict]:
    return trained(1, pictures, tmp_path_factory.mktemp("alone") / "r")


@pytest.mark.parametrize(("processes", "micro"), [(2, 2), (3, -1)])
def test_any_number_of_processes_gives_the_losses_of_one(processes, micro, alone, pictures, tmp_path):
    rows = trained(processes, pictures, tmp_path / "r", microbatch=micro)
    for a, b in zip(alone, rows, strict=True):
        for name in ("loss", "mse", "vb", "grad_norm"):
            assert b[name] == pytest.approx(a[name], rel=1e-5), (name, a["step"])
        assert {k for k in a if "_q" in k} == {k for k in b if "_q" in k}


def test_a_run_saved_on_two_processes_goes_on_alone(alone, pictures, tmp_path):
    trained(2, pictures, tmp_path / "r", steps=4)
    rows = trained(1, pictures, tmp_path / "r")
    assert [r["loss"] for r in rows] == pytest.approx([r["loss"] for r in alone], rel=1e-5)


def test_a_stop_signal_to_one_process_stops_and_saves_all(pictures, tmp_path):
    process = torchrun(2, "train", pictures, "--run", tmp_path / "r", *flags(**RUN | dict(steps=100_000, log_interval=5)))
    for line in process.stdout:
        if line.startswith("step 5/"):
            break
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[1]), signal.SIGTERM)
    process.communicate(timeout=60)
    saved, passed_over = checkpoint.Folder(tmp_path / "r").newest()
    assert saved is not None and saved.step >= 5 and not passed_over
    assert json.loads((tmp_path / "r" / "config.json").read_text())["train"]["steps"] == 100_000


def test_more_processes_than_images_in_a_batch_is_one_line(pictures, tmp_path):
    process = torchrun(2, "train", pictures, "--run", tmp_path / "r", *flags(**RUN | dict(batch_size=1)))
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "at least one image for each of the 2 processes" in err
    assert not (tmp_path / "r" / "checkpoints").exists()


def test_any_number_of_processes_draws_the_images_of_one(run, tmp_path):
    arrays = []
    for processes in (1, 2, 3):
        out = tmp_path / f"{processes}.npz"
        process = torchrun(processes, "sample", run, "--num_samples", 7, "--batch_size", 2, "--out", out)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        with np.load(out) as file:
            arrays.append(file["arr_0"].astype(int))
    assert arrays[0].shape == (7, 8, 8, 1)
    assert all(abs(a - arrays[0]).max() <= 1 for a in arrays[1:])
