"""What a training run needs, without its hardware: the step's own code, run on tensors that have shapes but no data.

Storages are watched as they come and go in the forward and backward pass of one batch of a prime number of images. A storage has
as many bytes for any batch, or so many for each image: divisibility tells which, and so the needs of every other batch. Weights,
optimizer, averages and communication follow from the shapes. This file and `memory` alone use torch's private modules:
FakeTensorMode, dispatch, and a process group of any number of processes of which only this one exists.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from iddpm import build
from iddpm.config import Config, ema_rates, ema_widths
from iddpm.parallel import shard
from iddpm.parallel.shard import Layout
from iddpm.training.memory import ACTIVATION, BUFFER, COPY, GRADIENT, IMAGES, Live, Profile
from iddpm.training.step import method_of
from iddpm.training.trial import example

FLOAT = 4  # bytes: weights, gradients, optimizer and averages are float32
Shape = Sequence[int]

# ---- a pass through the network


class Pass(NamedTuple):
    """What a forward and backward pass takes."""

    profile: Profile  # of memory
    forward: float  # floating-point operations of one image in products, convolutions, attention; a product and a sum are two
    both: float  # forward and backward
    calls: list[tuple[str, int]]  # collective operations, and the bytes of the largest tensor in each


def watch(config: Config, layout: Layout, cuda: bool) -> tuple[list[list[Shape]], dict[bool, Pass]]:
    """The shapes of a network's weights, by what is gathered together, and its passes without and with --use_checkpoint."""
    with ExitStack() as stack:
        if sharded := layout.shard > 1:
            stack.enter_context(pretended(layout.processes))
        with torch.device("meta"):
            net = build.network(config.updated({"use_checkpoint": True})).train()
        shapes = groups(net)
        stages: list[Any] = [m for m in net.modules() if getattr(m, "recompute", False)]
        if sharded:  # while still on the meta device: fake tensors take ten times as long to be cut into 1,024 parts
            shard.spread(net, layout.shard)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        net.to_empty(device="cpu")
        if sharded:
            _pass(config, net, cuda)  # FSDP makes some of its storages in the first pass, and only resizes them from then on
        passes = {}
        for recompute in (False, True):
            for stage in stages:
                stage.recompute = recompute
            passes[recompute] = _pass(config, net, cuda)
    return shapes, passes


def _pass(config: Config, net: nn.Module, cuda: bool) -> Pass:
    """What `training.step.train_step` does between a batch and its gradient, watched."""
    batch, live = example(config, IMAGES), Live(copies=not cuda)
    u, weight = torch.zeros(IMAGES, dtype=torch.float64), torch.ones(IMAGES)
    _, denoiser, schedule, objective = method_of(config, net)
    live.ignore([*net.parameters(), batch.x0, batch.eps, *batch.cond.values(), u, weight])
    with live.watching(), _as_on_cuda() if cuda else nullcontext():
        loss = (objective(denoiser, schedule, batch.x0, batch.eps, u, batch.cond)["loss"] * weight).sum()
        forward = live.flops
        loss.backward()
    for p in net.parameters():
        if p.grad is not None:
            live.parts[live.number(p.grad)] = GRADIENT
    found = Pass(live.profile(), forward / IMAGES, live.flops / IMAGES, live.calls)
    net.zero_grad(set_to_none=True)  # only now: it would be noted as well
    return found


@contextmanager
def _as_on_cuda() -> Iterator[None]:
    """What autocast and dropout keep there and not on a CPU: norms are taken in float32, and a dropout mask is of bytes."""
    norm, dropout = F.group_norm, F.dropout

    def group_norm(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return norm(x.float() if torch.is_autocast_enabled("cpu") else x, *args, **kwargs)

    def native_dropout(x: Tensor, p: float, training: bool, inplace: bool) -> Tensor:
        return torch.native_dropout(x, p, training)[0] if p else x

    F.group_norm, F.dropout = group_norm, native_dropout  # type: ignore[assignment]
    try:
        yield
    finally:
        F.group_norm, F.dropout = norm, dropout


@contextmanager
def pretended(processes: int) -> Iterator[None]:
    """A process group of which this process is the first and the others never come."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        yield
    finally:
        dist.destroy_process_group()


def groups(net: nn.Module) -> list[list[Shape]]:
    """The shapes of the weights that FSDP gathers together, the innermost stage's first; last those outside of any."""
    found: list[list[Shape]] = []
    seen: set[nn.Parameter] = set()
    for module in (*shard.stages(net), net):
        own = [p for p in module.parameters() if p not in seen]
        found.append([p.shape for p in own])
        seen.update(own)
    return found


# ---- memory


def shard_size(shape: Shape, degree: int) -> int:
    """Elements of the largest of `degree` parts of a tensor, cut along its first dimension: one row where it has fewer."""
    return math.ceil(shape[0] / degree) * math.prod(shape[1:])


@dataclass(frozen=True)
class Need:
    """The bytes of one device, the fullest one, as a function of the images it takes at a time."""

    layout: Layout
    cuda: bool
    share: int  # images of a step
    averages: int  # of the weights
    shapes: list[Shape]
    image: int  # bytes of one image, its noise and what else the network sees of it
    profile: Profile

    def parts(self, micro: int) -> dict[str, int]:
        """Each part at its largest."""
        sizes = [FLOAT * shard_size(s, self.layout.shard) for s in self.shapes]
        # Gradients of microbatches before the last are whole: they add up outside of DDP's buckets, or before FSDP shares them.
        whole = FLOAT * sum(math.prod(s) for s in self.shapes)
        return {
            "weights": sum(sizes),
            "gradients": sum(sizes),
            "optimizer": 2 * sum(sizes),
            "averages": self.averages * sum(sizes),
            "batch": self.image * (min(micro, self.share) if self.cuda else self.share),  # the rest waits in the host's memory
            "unreduced": 0 if self.layout.processes == 1 or micro >= self.share else whole,
            "activations": self.profile.most(ACTIVATION, micro),
            "copies": self.profile.most(COPY, micro),
            "gathered": self.profile.most(BUFFER, micro),
            "temporaries": sum(sizes) if self.cuda else 2 * max(sizes),  # AdamW's: on CUDA it takes all weights at once
        }

    def peak(self, micro: int) -> int:
        """The bytes at the fullest moment: in the passes, where gradients come as activations go, or in the optimizer."""
        parts, (processes, degree) = self.parts(micro), self.layout
        held = sum(parts[name] for name in ("weights", "optimizer", "averages", "batch"))
        later = min(micro, self.share - micro)
        if later > 0:
            reduced = parts["gradients"] if degree > 1 else 0  # FSDP has these only after the last microbatch
            passes = max(self.profile.first_pass(micro), self.profile.later_pass(later) - reduced) + parts["unreduced"]
        elif processes > 1 and degree == 1:  # DDP's gradients are views of buckets that stay: there from the start
            passes = self.profile.later_pass(micro)
        else:
            passes = self.profile.first_pass(micro)
        return held + max(passes, parts["gradients"] + parts["temporaries"])

    def largest(self, room: float) -> int:
        """The most images at a time that `room` bytes can take; 0 where one does not fit."""
        return bisect_right(range(1, 2**20), room, key=self.peak)


# ---- communication


class Traffic(NamedTuple):
    """One kind of communication in a step: bytes of the whole tensors, and what each device sends of them in a ring."""

    what: str
    payload: int
    sent: int


def communication(shapes: Sequence[Sequence[Shape]], layout: Layout, microbatches: int) -> list[Traffic]:
    """The collective operations of a step over the groups of `shapes`, of which the last is the root's.

    A ring of n sends (n-1)/n of the whole to gather or reduce-scatter it, and twice that to all-reduce it. FSDP2 gathers a
    group for the forward and again for the backward pass, the root's once, padded to whole rows for each device; gradients
    are reduced after the last microbatch.
    """
    n, d = layout.processes, layout.shard
    if n == 1:
        return []
    if d == 1:
        whole = FLOAT * sum(math.prod(s) for group in shapes for s in group)
        return [Traffic("all-reduce", whole, _ring(2 * whole, n))]
    *stages, root = [FLOAT * d * sum(shard_size(s, d) for s in group) for group in shapes]
    gathered, reduced = microbatches * (2 * sum(stages) + root), sum(stages) + root
    traffic = [
        Traffic("all-gather", gathered, _ring(gathered, d)),
        Traffic("reduce-scatter", reduced, _ring(reduced, d)),
    ]
    if layout.copies > 1:
        traffic.append(Traffic("all-reduce", reduced // d, _ring(2 * reduced // d, layout.copies)))
    return traffic


def _ring(size: int, n: int) -> int:
    return size * (n - 1) // n


# ---- all of it


class Plan(NamedTuple):
    """What a run on a layout needs."""

    layout: Layout
    parameters: int
    passes: dict[bool, Pass]  # without and with --use_checkpoint
    need: dict[bool, Need]
    traffic: list[Traffic]
    images: int  # of a step, on the fullest device
    micro: int  # of them at a time


def plan(config: Config, processes: int = 1, cuda: bool = True) -> Plan:
    """Work a run out; `cuda`: as CUDA's kernels would keep things, rather than a CPU's. UserError where it cannot be laid out.

    Nothing of the network is allocated.
    """
    settings = config.train
    layout = shard.layout(settings.batch_size, settings.shard, processes)
    share = math.ceil(settings.batch_size / processes)
    micro = min(settings.microbatch, share) if settings.microbatch > 0 else share
    gathered, passes = watch(config, layout, cuda)
    shapes, one = [s for group in gathered for s in group], example(config, 1, "meta")
    image = sum(v.numel() * v.element_size() for v in (one.x0, one.eps, *one.cond.values()))
    averages = len(ema_rates(settings)) + len(ema_widths(settings))
    need = {on: Need(layout, cuda, share, averages, shapes, image, p.profile) for on, p in passes.items()}
    traffic = communication(gathered, layout, math.ceil(share / micro))
    return Plan(layout, sum(math.prod(s) for s in shapes), passes, need, traffic, share, micro)
