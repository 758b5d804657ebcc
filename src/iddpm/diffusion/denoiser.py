"""A network and what its output means: together they say which x0, and which p(x_{t-1} | x_t), it predicts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iddpm.diffusion.grid import Step
from iddpm.diffusion.parametrization import Scalings
from iddpm.diffusion.schedule import Level

Network = Callable[..., Tensor]  # (x_t, time (B,), **cond) -> output; twice x_t's channels where the variance is learned
Cond = Mapping[str, Tensor]  # what else the network sees: y (B,) classes, given (B, G, h, w)


class Prediction(NamedTuple):
    """What the network says of x_t. All (B, C, H, W); log_var may broadcast."""

    raw: Tensor  # its output, without the variance channels
    values: Tensor | None  # its variance channels
    x0: Tensor  # clipped to [-1, 1] where the denoiser clips
    mean: Tensor | None  # of p(x_to | x_t); None at a bare level, which knows no next one
    log_var: Tensor | None  # of p(x_to | x_t); None likewise


Denoise = Callable[[Tensor, Any], Prediction]  # (x_t, level or step): a denoiser with its conditions, and guidance, bound into it


def wide(columns: Sequence[Any], x: Tensor) -> tuple[Any, ...]:
    """float64 columns (B,) as float32 (B, 1, ...) beside images x (B, ...), on their device; 0-dim ones as float32.

    All go over in one copy, which does not wait for what the GPU still has to do.
    """
    columns = [c.float() if isinstance(c, Tensor) else c for c in columns]
    many = [c for c in columns if isinstance(c, Tensor) and c.ndim]
    if not many:
        return tuple(columns)
    rows = _moved(torch.stack(many, dim=1), x.device).reshape(len(x), -1, *(1,) * (x.ndim - 1)).unbind(1)
    moved = iter(rows)
    return tuple(next(moved) if isinstance(c, Tensor) and c.ndim else c for c in columns)


def beside(values: Tensor, x: Tensor) -> Tensor:
    """A number for each image (B,), or one for all, as what broadcasts over images x (B, ...), on their device."""
    return values.to(x.device).reshape(-1, *(1,) * (x.ndim - 1))


def times(level: Level | Step | Scalings, x: Tensor) -> Tensor:
    """The time of each of the images x (B, ...), as a network is given it: (B,) float32 on their device."""
    return _moved(level.time.float(), x.device).flatten().expand(len(x))


def _moved(x: Tensor, device: torch.device) -> Tensor:
    return x.to(device, non_blocking=device.type == "cuda")  # safe: CUDA has read pageable memory before the call returns


def moved(p: Prediction, x0: Tensor, x: Tensor, level: Level | Step) -> Prediction:
    """The prediction with another x0, and its mean moved along with it."""
    if p.mean is None or not isinstance(level, Step):
        return p._replace(x0=x0)
    return p._replace(x0=x0, mean=p.mean + wide((level.coef_x0,), x)[0] * (x0 - p.x0))


# ---- variance: (step, the network's variance channels) -> log variance of p(x_{t-1} | x_t)


def fixed_large(s: Step, values: Tensor | None) -> Tensor:
    """beta, and at step 0 the smallest posterior variance, for a better decoder likelihood (Ho et al. 2020, 3.2)."""
    return s.log_max + s.last * (s.log_min - s.log_max)


def fixed_small(s: Step, values: Tensor | None) -> Tensor:
    """The variance of q(x_{t-1} | x_t, x_0)."""
    return s.log_min


def learned(s: Step, values: Tensor | None) -> Tensor:
    """The channels are the log variance."""
    assert values is not None
    return values


def learned_range(s: Step, values: Tensor | None) -> Tensor:
    """The channels, in [-1, 1], interpolate between the two fixed ones (Nichol & Dhariwal 2021, eq. 15)."""
    assert values is not None
    share = (values + 1) / 2
    return share * s.log_max + (1 - share) * s.log_min


Variance = Callable[[Step, Tensor | None], Tensor]
VARIANCES: dict[str, Variance] = {f.__name__: f for f in (fixed_large, fixed_small, learned, learned_range)}
LEARNED = (learned, learned_range)  # these double the network's output channels


@dataclass(frozen=True)
class Denoiser:
    """p(x_to | x_t) of a network, at any level.

    `after` is done to the predicted x0 in turn: `clip`, for sampling and likelihood, not for training; a projection onto what is
    known of the image.
    """

    net: Network
    parametrization: Callable[[Any], Scalings]
    variance: Variance = fixed_large
    after: tuple[Callable[[Tensor], Tensor], ...] = ()
    half_bin: float = 1 / 255  # half the width of a pixel's bin, in units of [-1, 1], of which the bound is

    def __call__(self, x: Tensor, level: Level | Step, cond: Cond = {}) -> Prediction:
        """Predict from x_t (B, C, H, W) at a level, or a step, whose entries are (B,) or 0-dim."""
        c = self._scalings(level, x)
        seen = x if c.inp is None else c.inp * x
        return self.read(self.net(seen, times(c, x), **cond).float(), x, level, c)

    def read(self, output: Tensor, x: Tensor, level: Level | Step, c: Scalings | None = None) -> Prediction:
        """The prediction that a network's output (B, C or 2C, H, W) stands for."""
        raw, values = output.chunk(2, dim=1) if self.variance in LEARNED else (output, None)
        if raw.shape != x.shape:
            raise ValueError(f"the network gave {tuple(output.shape)} for images {tuple(x.shape)}: wrong channels or size")
        c = c or self._scalings(level, x)
        x0 = reduce(lambda x0, f: f(x0), self.after, c.skip * x + c.out * raw)
        if not isinstance(level, Step):
            return Prediction(raw, values, x0, None, None)
        step = Step(*wide(level, x))
        mean = raw if c.is_mean else step.coef_x0 * x0 + step.coef_xt * x
        return Prediction(raw, values, x0, mean, self.variance(step, values))

    def _scalings(self, level: Level | Step, x: Tensor) -> Scalings:
        return Scalings(*wide(self.parametrization(level), x))  # worked out in float64: 1/alpha reaches 1e5 at the noisy end


def clip(x0: Tensor) -> Tensor:
    """x0 held in the range of images."""
    return x0.clamp(-1, 1)


@dataclass(frozen=True)
class Threshold:
    """x0 divided by the `share`-quantile of its |values| where that is above 1 (Saharia et al. 2022, Imagen, section 2.3)."""

    share: float

    def __call__(self, x0: Tensor) -> Tensor:
        limit = x0.abs().flatten(1).quantile(self.share, dim=1).clamp(min=1)
        return x0.clamp(-beside(limit, x0), beside(limit, x0)) / beside(limit, x0)
