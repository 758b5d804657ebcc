"""dist_util in one process: a group of one, its device, and files that may hold nothing executable."""

import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from iddpm.errors import UserError
from iddpm.interop.openai.python import dist_util


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RANK", *dist_util.MPI_SIZES):
        monkeypatch.delenv(name, raising=False)
    yield
    dist_util._leave()


def test_a_script_alone_is_a_group_of_one_without_a_port() -> None:
    """B22: the original asks the name server for this machine, and takes a port that another may have by then."""
    before = set(os.environ)
    dist_util.setup_dist()
    dist_util.setup_dist()
    assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
    x = torch.ones(2)
    parts = [torch.zeros(2)]
    dist.all_gather(parts, x)
    dist.all_reduce(x)
    dist.barrier()
    assert parts[0].tolist() == x.tolist() == [1, 1]
    dist_util.sync_params([x])
    assert set(os.environ) == before
    dist_util._leave()
    assert not dist.is_initialized()
    dist_util._leave()


@pytest.mark.parametrize("name", dist_util.MPI_SIZES)
def test_processes_of_mpiexec_are_told_of_torchrun(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """B23: each would be a world of its own."""
    monkeypatch.setenv(name, "4")
    with pytest.raises(UserError, match="torchrun --nproc-per-node 4"):
        dist_util.setup_dist()
    assert not dist.is_initialized()


def test_the_device_is_the_cpu_or_this_process_s_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dist_util.dev() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert dist_util.dev() == torch.device("cuda:0")
    monkeypatch.setattr(dist_util, "rank", lambda: 11)
    assert dist_util.dev() == torch.device("cuda:3"), "rank % 8 of 4"
    monkeypatch.setattr(dist_util, "GPUS_PER_NODE", 10)
    assert dist_util.dev() == torch.device("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert dist_util.dev() == torch.device("cuda:2")


def test_files_are_read_as_tensors_and_plain_values_alone(tmp_path: Path) -> None:
    path = str(tmp_path / "a.pt")
    torch.save({"w": torch.arange(3), "n": 1}, path)
    held = dist_util.load_state_dict(path, map_location="cpu")
    assert held["w"].tolist() == [0, 1, 2] and held["n"] == 1
    torch.save({"w": Path("x")}, path)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        dist_util.load_state_dict(path, weights_only=False)
