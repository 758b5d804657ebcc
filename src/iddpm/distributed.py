"""Many processes: the only file that knows of them. Without torchrun there is one, and every function here is then free."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

TIMEOUT = timedelta(minutes=30)


def place(device: torch.device) -> torch.device:
    """This process's device: under torchrun, cuda means cuda:LOCAL_RANK."""
    if device.type != "cuda" or "LOCAL_RANK" not in os.environ:
        return device
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())


@contextmanager
def session(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that torchrun started, if it did; yields this one's device. gloo on a CPU, NCCL beside it on CUDA."""
    device = place(device)
    if "RANK" not in os.environ or dist.is_initialized():
        yield device
        return
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # a restarted worker would read the old addresses
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, 0 .. world() - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(n: int) -> range:
    """This process's consecutive part of n things; the parts differ by one at the most."""
    return range(rank() * n // world(), (rank() + 1) * n // world())


def parallel(net: nn.Module) -> nn.Module:
    """The network as a callable whose gradients are averaged over the processes (DistributedDataParallel)."""
    if world() == 1:
        return net
    device = next(net.parameters()).device
    ids = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(net, device_ids=ids, gradient_as_bucket_view=True)


def unsynchronised(net: nn.Module) -> AbstractContextManager:
    """While it lasts, gradients of a `parallel` network stay this process's own: for all microbatches but the last."""
    return net.no_sync() if isinstance(net, nn.parallel.DistributedDataParallel) else nullcontext()


def any_(value: bool) -> bool:
    """Whether it is true on any process."""
    flag = torch.tensor(float(value))
    sum_(flag)
    return bool(flag)


def sum_(*tensors: Tensor) -> None:
    """Add up each tensor over the processes, in place."""
    if world() > 1:
        for t in tensors:
            dist.all_reduce(t)


def gather(rows: Tensor) -> Tensor:
    """The rows (n, ...) of every process, in the order of their ranks; n may differ."""
    if world() == 1:
        return rows
    counts = torch.zeros(world(), dtype=torch.int64, device=rows.device)
    counts[rank()] = len(rows)
    dist.all_reduce(counts)
    longest = int(counts.max())
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(world())]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts.tolist())])


def same(value: Any) -> Any:
    """Rank 0's value (anything JSON can hold), on every process."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def barrier() -> None:
    """Wait for all processes."""
    if world() > 1:
        dist.barrier()
