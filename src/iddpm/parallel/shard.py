"""Networks on several processes: gradients averaged (DDP), or weights shared out (FSDP2)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from iddpm.errors import UserError
from iddpm.parallel import processes


class Layout(NamedTuple):
    """How a run is spread over devices: `processes` of them, every `shard` of which share one copy of it (1: DDP)."""

    processes: int = 1
    shard: int = 1

    @property
    def copies(self) -> int:
        return self.processes // self.shard


def layout(batch_size: int, shard: int, processes: int) -> Layout:
    """The layout of a --shard; UserError where the processes cannot be divided so, or outnumber a step's images."""
    if batch_size < processes:
        raise UserError(f"--batch_size {batch_size}: at least one image for each of the {processes} processes")
    if shard > 0 and processes % shard:
        raise UserError(f"--shard {shard} does not divide the {processes} processes: give 0 (none), -1 (all) or a divisor")
    return Layout(processes, processes if shard == -1 else max(shard, 1))


def spread(net: nn.Module, shard: int = 0) -> nn.Module:
    """The network as a callable whose gradients are averaged over the processes.

    Each process holds all of it (DistributedDataParallel) where `shard` is 0 or 1, else a share (FSDP2): of `shard`
    processes, a number that divides theirs, or of all of them (-1). Sharding replaces the network's parameters.
    """
    size = processes.world() if shard == -1 else max(shard, 1)
    if processes.world() == 1:
        return net
    device = next(net.parameters()).device
    if size == 1:
        ids = [device.index] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(net, device_ids=ids, gradient_as_bucket_view=True)
    from torch.distributed.fsdp import fully_shard

    assert processes.world() % size == 0, (processes.world(), size)
    kind = "cpu" if device.type == "meta" else device.type  # a network that is only planned is on no device
    shape = (size,) if size == processes.world() else (processes.world() // size, size)
    mesh = dist.init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    for stage in stages(net):
        fully_shard(stage, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


def stages(net: nn.Module) -> list[nn.Module]:
    """The elements of a network's lists of modules, and its other children of their kind: what is gathered at a time."""
    listed = [stage for child in net.children() if isinstance(child, nn.ModuleList) for stage in child]
    kinds = tuple({type(stage) for stage in listed})
    return listed + [child for child in net.children() if isinstance(child, kinds)]


def _sharded(net: nn.Module) -> list[Any]:
    if processes.world() == 1:
        return []
    from torch.distributed.fsdp import FSDPModule

    return [m for m in net.modules() if isinstance(m, FSDPModule)]


@contextmanager
def unsynchronised(net: nn.Module) -> Iterator[None]:
    """While it lasts, gradients of a `parallel` network stay this process's own: for all microbatches but the last."""
    roots = _sharded(net)[:1]
    with net.no_sync() if isinstance(net, nn.parallel.DistributedDataParallel) else nullcontext():
        for root in roots:
            root.set_requires_gradient_sync(False)
        yield
        for root in roots:
            root.set_requires_gradient_sync(True)


@contextmanager
def gathered(net: nn.Module) -> Iterator[None]:
    """While it lasts, each process has all weights of a sharded network, and may use it without the others."""
    modules = _sharded(net)
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for k, module in enumerate(modules):
            module.reshard()
            module.set_reshard_after_forward(k > 0, recurse=False)  # the root's are needed again at once


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This process's part of each tensor, sharing its memory; a tensor that is not sharded itself."""
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded; every process must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds but a part of it."""
    return hasattr(tensor, "full_tensor")


class Placed(NamedTuple):
    """What this process holds of a tensor."""

    own: Tensor  # shares the tensor's memory
    offset: tuple[int, ...]  # where it begins in the whole
    leads: bool  # whether this process is the first of those that hold the same


def placed(tensor: Tensor) -> Placed:
    """This process's part of a tensor, and where it lies; of one that is not sharded, each process holds all."""
    if not is_sharded(tensor):
        return Placed(tensor, (0,) * tensor.dim(), processes.rank() == 0)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # as torch's own checkpoints use it

    sharded: Any = tensor  # a DTensor
    mesh, placements = sharded.device_mesh, sharded.placements
    _, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    leads = all(k == 0 for k, placement in zip(mesh.get_coordinate(), placements) if placement.is_replicate())
    return Placed(sharded.to_local(), tuple(offset), leads)


@torch.no_grad()
def put(source: Any, target: Tensor) -> None:
    """Write all of a tensor, or of what is sliced as one, into one that may be sharded: each process what it holds."""
    own, offset, _ = placed(target)
    own.copy_(source[tuple(slice(a, a + n) for a, n in zip(offset, own.shape))])
