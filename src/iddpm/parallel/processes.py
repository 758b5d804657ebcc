"""Many processes: the only file that knows of them. Without torchrun there is one, and every function here is then free."""

import ctypes
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from iddpm.errors import UserError

T = TypeVar("T")
LAUNCHERS = {"OMPI_COMM_WORLD_SIZE": "mpiexec", "PMI_SIZE": "mpiexec", "SLURM_STEP_NUM_TASKS": "srun"}  # and how they count
KEEP = {-3: 2**30, -1: 2**31 - 1}  # of malloc.h: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, in bytes
TIMEOUT = 1800.0  # seconds that processes wait for each other


def own_device(device: torch.device) -> torch.device:
    """This process's device, made ready: under torchrun, cuda means cuda:LOCAL_RANK; on a CPU, freed memory is kept."""
    if device.type == "cpu":
        _keep_memory()
    if device.type != "cuda" or "LOCAL_RANK" not in os.environ:
        return device
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())


@cache
def _keep_memory() -> None:
    """Have glibc keep what is freed, for the next step: a step that takes its memory anew of the system is an eighth slower."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt and not any(name.startswith("MALLOC_") for name in os.environ):
        for option, value in KEEP.items():
            mallopt(option, value)


@contextmanager
def session(device: torch.device, timeout: float = TIMEOUT) -> Iterator[torch.device]:
    """Join the processes that torchrun started, if it did; yields this one's device. gloo on a CPU, NCCL beside it on CUDA.

    They wait for each other for `timeout` seconds (and a little, so that a `Watch` can first say for whom).
    """
    device = own_device(device)
    if "RANK" not in os.environ or dist.is_initialized():
        if "RANK" not in os.environ:
            _refuse_to_be_alone()
        yield device
        return
    if absent := [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(f"RANK is set and {absent[0]} is not: start by torchrun, which sets all, or unset RANK")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend, patience = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timedelta(seconds=1.2 * timeout + 20)
    joining: dict[str, Any] = {}
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        k, n = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        joining = dict(store=_meet(k, n, patience), rank=k, world_size=n)
    dist.init_process_group(backend, timeout=patience, **joining)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _refuse_to_be_alone() -> None:
    """UserError where another launcher started several processes: each would be alone, and write the others' files."""
    for name, launcher in LAUNCHERS.items():
        if (size := int(os.environ.get(name, 1))) > 1:
            raise UserError(
                f"{launcher} started {size} processes that do not know of each other: start them by torchrun --nproc-per-node "
                f"{size} -m -- iddpm ..., or, if each is to be alone, unset {name}"
            )


def _meet(rank: int, world: int, patience: timedelta) -> Any:
    """A fresh part of the key-value store in which torchrun's agent lets its workers meet.

    The store outlives them: those started after a death would find the addresses of the dead in it, and wait for them. So process
    0 makes up a name for a part, and tells it to each other process in answer to a word that process has made up.
    """
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store, word = dist.TCPStore(*address, is_master=False, timeout=patience), uuid.uuid4().hex
    end = time.monotonic() + patience.total_seconds()
    if rank:
        store.set(f"ask/{rank}", word)
        name = store.get(f"answer/{word}").decode()  # waits for it
        store.set(f"met/{name}/{rank}", "")
        return dist.PrefixStore(name, store)
    absent = set(range(1, world))
    while absent:
        for k in sorted(absent):
            if store.check([f"ask/{k}"]):  # maybe that of a dead process: the living one will overwrite it
                store.set(f"answer/{store.get(f'ask/{k}').decode()}", word)
        absent = {k for k in absent if not store.check([f"met/{word}/{k}"])}
        if time.monotonic() > end:
            raise TimeoutError(f"no sign of rank {', '.join(map(str, sorted(absent)))} in {patience.total_seconds():.0f} s")
        time.sleep(0.02)
    return dist.PrefixStore(word, store)


def rank() -> int:
    """This process's number, 0 .. world() - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(n: int) -> range:
    """This process's consecutive part of n things; the parts differ by one at the most."""
    return range(rank() * n // world(), (rank() + 1) * n // world())


class Round(NamedTuple):
    """Consecutive items that the processes put through a network at the same time."""

    every: range  # of all processes together, in the order of their ranks: what `gather` of their results is of
    mine: range  # this process's own; empty where it has none
    call: range  # what it puts through the network: its own, or the first of `every` where it has none


def rounds(n: int, batch_size: int, evenly: bool = False) -> Iterator[Round]:
    """n items in rounds of up to `batch_size` for each process. Every process gets as many rounds, and nothing empty to call.

    The items are cut in batches that do not depend on how many processes there are, so that neither do the results, to the
    bit; in a short last round some processes have then nothing. `evenly` shares each round out instead, which is faster
    where there are fewer batches than processes.
    """
    together = batch_size * world()
    for start in range(0, n, together):
        every = range(start, min(start + together, n))
        own = share(len(every)) if evenly else range(rank() * batch_size, (rank() + 1) * batch_size)
        mine = every[own.start : own.stop]
        yield Round(every, mine, mine or every[:1])


# ---- numbers and tensors of all processes


def parts(n: int, size: int) -> list[slice]:
    """This process's share of n things in slices of up to `size`; on every process as many, so the last may be empty."""
    mine, longest = len(share(n)), -(-n // world())
    return [slice(min(a, mine), min(a + size, mine)) for a in range(0, longest, size)]


def count(*values: int) -> list[int]:
    """On how many processes each is true; of whole numbers, their sum."""
    flags = torch.tensor(values, dtype=torch.int64)
    sum_(flags)
    return cast(list[int], flags.tolist())


def every(value: Any) -> list[Any]:
    """Each process's value (anything JSON can hold), in the order of their ranks."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def together(work: Callable[[], T]) -> T:
    """work() of each process; where one raises UserError, all do, for none may wait for one that is gone."""
    result, fault = None, ""
    try:
        result = work()
    except UserError as e:
        fault = str(e)
    if fault := next(filter(None, every(fault)), ""):
        raise UserError(fault)
    return cast(T, result)


def sum_(*tensors: Tensor) -> None:
    """Add up each tensor over the processes, in place."""
    if world() > 1:
        for t in tensors:
            dist.all_reduce(t)


def gather(rows: Tensor) -> Tensor:
    """The rows (n, ...) of every process, in the order of their ranks; n may differ."""
    if world() == 1:
        return rows
    if rows.dtype == torch.uint16:  # which gloo does not carry
        return gather(rows.flatten(1).contiguous().view(torch.uint8)).view(torch.uint16).unflatten(1, rows.shape[1:])
    counts = every(len(rows))
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, counts)])


def same(value: Any) -> Any:
    """Rank 0's value (anything JSON can hold), on every process."""
    return every(value)[0]


def of_first(work: Callable[[], T]) -> T:
    """What work() gives (anything JSON can hold) on rank 0, on every process; a UserError of it too."""
    return cast(T, same(together(lambda: work() if rank() == 0 else None)))


def barrier() -> None:
    """Wait for all processes."""
    if world() > 1:
        dist.barrier()
