"""Several processes: the same run as one, to rounding."""

import json
import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

from conftest import TINY, flags, torchrun
from iddpm.parallel import processes as parallel
from iddpm.parallel import watch
from iddpm.store import checkpoint

RUN = dict(TINY, class_cond=True)


def worker(launcher: subprocess.Popen, rank: int) -> int:
    """The process number of a rank under torchrun."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return next(int(c) for c in children if f"\0RANK={rank}\0" in "\0" + Path(f"/proc/{c}/environ").read_text())


def test_a_stop_signal_to_one_process_stops_and_saves_all(pictures, tmp_path):
    process = torchrun(2, "train", pictures, "--run", tmp_path / "r", *flags(**RUN | dict(steps=100_000, log_interval=5)))
    for line in process.stdout:
        if line.startswith("step 5/"):
            break
    os.kill(worker(process, 1), signal.SIGTERM)
    process.communicate(timeout=60)
    saved, passed_over = checkpoint.Folder(tmp_path / "r").newest()
    assert saved is not None and saved.step >= 5 and not passed_over
    assert json.loads((tmp_path / "r" / "config.json").read_text())["train"]["steps"] == 100_000


def test_a_process_that_hangs_is_named_and_the_others_end(launcher, pictures, tmp_path):
    settings = RUN | dict(steps=100_000, log_interval=5, save_interval=5, timeout=3)
    line = ("train", pictures, "--run", tmp_path / "r", *flags(**settings))
    process = launcher.start(*line, said=tmp_path / "said", processes=2)
    process.until("saved ")
    process.kill(1, signal.SIGSTOP)
    process.until("iddpm: waited")
    process.kill(1)
    ended, _ = process.wait()
    assert ended > 0
    told = process.said.read_text()
    assert f"waited 3 s (--timeout) for rank 1 (process {process.pids[1]} on " in told and "gives no sign of life" in told
    assert checkpoint.newest(tmp_path / "r")[0] is not None


def test_the_process_that_is_behind_is_blamed():
    def sign(calls: int, doing: str) -> dict:
        return dict(beats=9, calls=calls, step=4, doing=doing, host="h", pid=7)

    now = {0: sign(12, "training"), 1: sign(11, "reading data"), 2: sign(12, "training")}
    before = {k: s | dict(beats=5) for k, s in now.items()}
    assert watch._guilty(before, now, 3) == ({1: "process 7 on h, at step 4, reading data"}, "which does not go on")
    assert list(watch._guilty(before | {2: now[2]}, now, 3)[0]) == [2]
    assert watch._guilty({}, {0: now[0]}, 2)[0] == {1: "never seen"}


def test_more_processes_than_images_in_a_batch_is_one_line(launcher, pictures, tmp_path):
    line = ("train", pictures, "--run", tmp_path / "r", *flags(**RUN | dict(batch_size=1)))
    process = launcher.start(*line, said=tmp_path / "said", processes=2)
    assert process.wait() == [2, 2]
    assert "at least one image for each of the 2 processes" in process.said.read_text()
    assert not (tmp_path / "r" / "checkpoints").exists()


def test_any_number_of_processes_draws_the_images_of_one(launcher, run, tmp_path):
    arrays = []
    for processes in (1, 2, 3):
        out = tmp_path / f"{processes}.npz"
        line = ("sample", run, "--num_samples", 7, "--batch_size", 2, "--out", out)
        launcher.start(*line, said=tmp_path / "said", processes=processes).succeed()
        with np.load(out) as file:
            arrays.append(file["arr_0"].astype(int))
    assert arrays[0].shape == (7, 8, 8, 1)
    assert all(abs(a - arrays[0]).max() <= 1 for a in arrays[1:])


def rounds_of(monkeypatch, world: int, n: int, batch_size: int, **how: bool) -> list[list[parallel.Round]]:
    """The rounds of each rank."""
    monkeypatch.setattr(parallel, "world", lambda: world)
    found = []
    for rank in range(world):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        found.append(list(parallel.rounds(n, batch_size, **how)))
    return found


@pytest.mark.parametrize("evenly", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [0, 1, 2, 4, 6, 7, 12, 13, 31])
def test_rounds_share_out_each_item_once_in_order_and_as_many_calls_to_each(monkeypatch, world, n, evenly):
    of_ranks = rounds_of(monkeypatch, world, n, 3, evenly=evenly)
    assert len({len(of_rank) for of_rank in of_ranks}) == 1
    gathered: list[int] = []
    for together in zip(*of_ranks):
        assert len({r.every for r in together}) == 1
        assert [k for r in together for k in r.mine] == list(together[0].every)
        assert all(r.call == (r.mine or r.every[:1]) and 1 <= len(r.call) <= 3 for r in together)
        if evenly:
            assert max(len(r.mine) for r in together) - min(len(r.mine) for r in together) <= 1
        gathered += together[0].every
    assert gathered == list(range(n))


@pytest.mark.parametrize("world", [2, 3, 5])
def test_the_batches_of_rounds_do_not_depend_on_the_number_of_processes(monkeypatch, world):
    alone = [r.mine for r in rounds_of(monkeypatch, 1, 31, 4)[0]]
    shared = rounds_of(monkeypatch, world, 31, 4)
    assert [r.mine for together in zip(*shared) for r in together if r.mine] == alone
