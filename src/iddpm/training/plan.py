"""What a training run needs, without its hardware: the step's own code, run on tensors that have shapes but no data.

Storages are watched as they come and go in the forward and backward pass of a batch. A storage has as many bytes for any batch,
or so many for each image, so one batch, of a prime number of images, tells those of every other. Weights, optimizer, averages
and communication follow from the shapes. This file and
`live` alone use torch's private modules: FakeTensorMode, dispatch, and a process group of any number of processes of which only
this one exists.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from iddpm import build
from iddpm.config import Config, ema_rates
from iddpm.nn.layers import Stage
from iddpm.parallel import shard
from iddpm.parallel.shard import Layout
from iddpm.training.memory import ACTIVATION, BUFFER, COPY, GRADIENT, IMAGES, Live, Profile
from iddpm.training.trial import example

FLOAT = 4  # bytes: weights, gradients, optimizer and averages are float32


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


# ---- the network, pretended


class Sketch:
    """A config's network without data, laid out over processes; what a pass takes, without and with --use_checkpoint."""

    def __init__(self, config: Config, layout: Layout, cuda: bool):
        self.config, self.cuda = config, cuda
        with ExitStack() as stack:
            if sharded := layout.shard > 1:
                stack.enter_context(pretended(layout.processes))
            with torch.device("meta"):
                self.net = build.network(config.updated({"use_checkpoint": True})).train()
            self.groups = groups(self.net)
            recomputed = [m for m in self.net.modules() if isinstance(m, Stage) and m.recompute]
            if sharded:
                shard.spread(
                    self.net, layout.shard
                )  # on the meta device: cutting into 1,024 is ten times as slow on fake tensors
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            self.net.to_empty(device="cpu")
            if sharded:
                self._watch()  # FSDP makes some of its storages in the first pass, and only resizes them from then on
            self.flops: dict[bool, Flops] = {}
            self.profiles: dict[bool, Profile] = {}
            for recompute in (False, True):
                for stage in recomputed:
                    stage.recompute = recompute
                self.profiles[recompute], self.flops[recompute] = self._watch()

    def _watch(self) -> tuple["Profile", "Flops"]:
        """A forward and backward pass of iddpm.training.step.train_step."""
        batch, live = example(self.config, IMAGES), Live(copies=not self.cuda)
        i, w = torch.zeros(IMAGES, dtype=torch.int64), torch.ones(IMAGES)
        run = build.in_precision(self.net, torch.device("cpu"), self.config.train.precision)
        denoiser, objective = build.denoiser(self.config.diffusion, run), build.objective(self.config)
        live.ignore([*self.net.parameters(), batch.x0, batch.eps, *batch.cond.values(), i, w])
        with live.watching():
            with _as_on_cuda() if self.cuda else nullcontext():
                loss = (objective(denoiser, batch.x0, batch.eps, i, batch.cond)["loss"] * w).sum()
                forward = live.flops
                loss.backward()
        for p in self.net.parameters():
            if p.grad is not None:
                live.parts[live.number(p.grad)] = GRADIENT
        profile, self.calls = live.profile(), live.calls
        self.net.zero_grad(set_to_none=True)
        return profile, Flops(forward / IMAGES, live.flops / IMAGES)


class Flops(NamedTuple):
    """Floating-point operations of one image in matrix products, convolutions and attention; a product and a sum are two."""

    forward: float
    both: float  # forward and backward


@contextmanager
def pretended(processes: int) -> Iterator[None]:
    """A process group of which this process is the first and the others never come."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        yield
    finally:
        dist.destroy_process_group()


def groups(net: nn.Module) -> list[list[torch.Size]]:
    """The shapes of the weights that FSDP gathers together, the innermost stage's first; last those outside of any."""
    found, seen = [], set()
    for module in (*shard.stages(net), net):
        own = [p for p in module.parameters() if p not in seen]
        found.append([p.shape for p in own])
        seen.update(own)
    return found


# ---- memory


def shard_size(shape: Sequence[int], degree: int) -> int:
    """Elements of the largest of `degree` parts of a tensor, cut along its first dimension: one row where it has fewer."""
    return math.ceil(shape[0] / degree) * math.prod(shape[1:])


class Need:
    """The bytes of one device, the fullest one, as a function of the images it takes at a time."""

    def __init__(self, config: Config, layout: Layout, shapes: Sequence[Sequence[int]], profile: Profile, cuda: bool):
        self.layout, self.profile, self.cuda = layout, profile, cuda
        self.share = math.ceil(config.train.batch_size / layout.processes)
        self.averages = len(ema_rates(config.train))
        self.whole = FLOAT * sum(math.prod(s) for s in shapes)
        self.weights = FLOAT * sum(shard_size(s, layout.shard) for s in shapes)
        self.largest_weight = FLOAT * max(shard_size(s, layout.shard) for s in shapes)
        batch = example(config, 1, "meta")
        self.image = sum(v.numel() * v.element_size() for v in (batch.x0, batch.eps, *batch.cond.values()))

    def parts(self, micro: int) -> dict[str, int]:
        """Each part at its largest."""
        alone = self.layout.processes == 1 or micro >= self.share
        return {
            "weights": self.weights,
            "gradients": self.weights,
            "optimizer": 2 * self.weights,
            "averages": self.averages * self.weights,
            "batch": self.image * (min(micro, self.share) if self.cuda else self.share),  # the rest waits in the host's memory
            # microbatches but the last add theirs up outside of DDP's buckets, or before FSDP shares them out
            "unreduced": 0 if alone else self.whole,
            "activations": self.profile.most(ACTIVATION, micro),
            "copies": self.profile.most(COPY, micro),
            "gathered": self.profile.most(BUFFER, micro),
            "temporaries": self.weights if self.cuda else 2 * self.largest_weight,  # AdamW's, all weights at once on CUDA
        }

    def peak(self, micro: int) -> int:
        """The bytes at the fullest moment: in the passes, where gradients come as activations go, or in the optimizer."""
        parts = self.parts(micro)
        held = sum(parts[name] for name in ("weights", "optimizer", "averages", "batch"))
        ddp, fsdp = self.layout.processes > 1 and self.layout.shard == 1, self.layout.shard > 1
        later = min(micro, self.share - micro)
        if later > 0:
            reduced = parts["gradients"] if fsdp else 0  # which are not there before the last microbatch
            passes = max(self.profile.first_pass(micro), self.profile.later_pass(later) - reduced) + parts["unreduced"]
        elif ddp:  # its gradients are views of buckets that stay: as if they were there from the start
            passes = self.profile.later_pass(micro)
        else:
            passes = self.profile.first_pass(micro)
        return held + max(passes, parts["gradients"] + parts["temporaries"])

    def largest(self, room: float) -> int:
        """The most images at a time that `room` bytes can take; 0 where one does not fit."""
        low, high = 0, 1
        while self.peak(high) <= room and high < 2**20:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.peak(middle) <= room else (low, middle)
        return low


# ---- communication


class Traffic(NamedTuple):
    """One kind of communication in a step: bytes of the whole tensors, and what each device sends of them in a ring."""

    what: str
    payload: int
    sent: int


def communication(shapes: Sequence[Sequence[Sequence[int]]], layout: Layout, microbatches: int) -> list[Traffic]:
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
    flops: dict[bool, Flops]  # without and with --use_checkpoint
    need: dict[bool, Need]
    traffic: list[Traffic]
    images: int  # of a step, on the fullest device
    micro: int  # of them at a time


def plan(config: Config, processes: int = 1, cuda: bool = True) -> Plan:
    """Work a run out; `cuda`: as CUDA's kernels would keep things, rather than a CPU's. UserError where it cannot be laid out.

    Nothing of the network is allocated.
    """
    layout = shard.layout(config.train.batch_size, config.train.shard, processes)
    sketch = Sketch(config, layout, cuda)
    shapes = [s for group in sketch.groups for s in group]
    need = {on: Need(config, layout, shapes, sketch.profiles[on], cuda) for on in (False, True)}
    share = math.ceil(config.train.batch_size / processes)
    micro = min(config.train.microbatch, share) if config.train.microbatch > 0 else share
    traffic = communication(sketch.groups, layout, math.ceil(share / micro))
    return Plan(layout, sum(math.prod(s) for s in shapes), sketch.flops, need, traffic, share, micro)
