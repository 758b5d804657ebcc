"""Pieces of networks, under the original's names."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from iddpm.diffusion import bound as likelihood
from iddpm.nn import layers

linear, zero_module = nn.Linear, layers.zeroed
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


def mean_flat(tensor: Tensor) -> Tensor:
    """The mean over all but the first dimension."""
    return likelihood.mean_flat(tensor)


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    """Cosines, then sines, of the times (B,): (B, dim)."""
    return layers.timestep_embedding(timesteps, dim, max_period)


class SiLU(nn.Module):
    """x sigmoid(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(x)


class GroupNorm32(layers.GroupNorm):
    """Group normalisation in float32, whatever the type of x."""

    def __init__(self, num_groups: int, num_channels: int, **settings: Any):
        nn.GroupNorm.__init__(self, num_groups, num_channels, **settings)

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        return super().forward(x.float(), scale, shift).to(x.dtype)


def normalization(channels: int) -> GroupNorm32:
    """Normalisation in 32 groups, or as many as divide the channels."""
    return GroupNorm32(math.gcd(32, channels), channels)


def conv_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """A convolution of 1, 2 or 3 dimensions; ValueError for others."""
    return _of(CONVOLUTIONS, dims)(*args, **kwargs)


def avg_pool_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """Average pooling in 1, 2 or 3 dimensions; ValueError for others."""
    return _of(POOLS, dims)(*args, **kwargs)


def _of(table: dict[int, Any], dims: int) -> Any:
    if dims not in table:
        raise ValueError(f"unsupported dimensions: {dims}; there are 1, 2 and 3")
    return table[dims]


@torch.no_grad()
def update_ema(target_params: Iterable[Tensor], source_params: Iterable[Tensor], rate: float = 0.99) -> None:
    """target <- rate target + (1 - rate) source, in place."""
    targets = list(target_params)
    torch._foreach_lerp_(targets, [s.to(t) for s, t in zip(source_params, targets)], 1 - rate)


@torch.no_grad()
def scale_module(module: nn.Module, scale: float) -> nn.Module:
    """The module with its weights times `scale`."""
    for p in module.parameters():
        p.mul_(scale)
    return module


def checkpoint(func: Callable[..., Any], inputs: Sequence[Tensor], params: Iterable[Tensor], flag: bool) -> Any:
    """func(*inputs); with `flag` what it keeps for the backward pass is computed again there, from the same random numbers."""
    return recompute(func, *inputs, use_reentrant=False) if flag else func(*inputs)


class CheckpointFunction:
    """`checkpoint` by its older name."""

    @staticmethod
    def apply(run_function: Callable[..., Any], length: int, *args: Tensor) -> Any:
        """run_function of the first `length` args, recomputed in the backward pass; the rest are its parameters."""
        return checkpoint(run_function, args[:length], args[length:], True)
