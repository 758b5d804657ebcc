"""A network, a chain and what its output means: together they say which x0, and which p(x_{t-1} | x_t), it predicts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from iddpm.diffusion.parametrization import Scalings, previous
from iddpm.diffusion.schedule import Chain, Step, Table

Network = Callable[..., Tensor]  # (x_t, time, **cond) -> output; twice x_t's channels where the variance is learned
Cond = Mapping[str, Tensor]  # what else the network sees: y (B,) classes, low_res (B, C, h, w)


class Prediction(NamedTuple):
    """What the network says of x_t. All (B, C, H, W); log_var may broadcast."""

    raw: Tensor  # its output, without the variance channels
    values: Tensor | None  # its variance channels
    x0: Tensor  # clipped to [-1, 1] where the denoiser clips
    mean: Tensor  # of p(x_{t-1} | x_t)
    log_var: Tensor  # of p(x_{t-1} | x_t)


# ---- variance: (step, the network's variance channels) -> log variance of p(x_{t-1} | x_t)


def fixed_large(s: Step, values: Tensor | None) -> Tensor:
    """beta, and at step 0 the smallest posterior variance, for a better decoder likelihood (Ho et al. 2020, 3.2)."""
    return s.log_max + s.first * (s.log_min - s.log_max)


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
    """p(x_{t-1} | x_t) of a network on a chain.

    `clip` holds the predicted x0 in [-1, 1]: for sampling and likelihood, not for training.
    """

    net: Network
    chain: Chain
    parametrization: Callable[[Step], Scalings]
    variance: Variance
    clip: bool = False
    project: Callable[[Tensor], Tensor] | None = None  # of x0, onto what is known of it, after clipping

    @cached_property
    def _look_up(self) -> Table:  # worked out in float64: 1/alpha reaches 1e5 at the noisy end
        return Table(self.parametrization(self.chain.table))

    def scalings(self, i: Tensor, like: Tensor) -> Scalings:
        """The parametrization's factors at steps i (B,), shaped to broadcast over `like`."""
        return Scalings(*self._look_up(i, like.ndim))

    def __call__(self, xt: Tensor, i: Tensor, cond: Cond = {}) -> Prediction:
        """Predict from x_t (B, C, H, W) at steps i (B,) int64 of the chain."""
        time = self.chain.at(i, i).time
        return self.read(self.net(xt, time, **cond).float(), xt, i)

    def read(self, output: Tensor, xt: Tensor, i: Tensor) -> Prediction:
        """The prediction that a network's output (B, C or 2C, H, W) stands for."""
        raw, values = output.chunk(2, dim=1) if self.variance in LEARNED else (output, None)
        if raw.shape != xt.shape:
            raise ValueError(f"the network gave {tuple(output.shape)} for images {tuple(xt.shape)}: wrong channels or size")
        step, scale = self.chain.at(i, xt), self.scalings(i, xt)
        x0 = scale.skip * xt + scale.out * raw
        x0 = x0.clamp(-1, 1) if self.clip else x0
        x0 = self.project(x0) if self.project else x0
        # a network that predicts the mean is believed even where its x0 is clipped, as in the published code
        mean = raw if self.parametrization is previous else step.coef_x0 * x0 + step.coef_xt * xt
        return Prediction(raw, values, x0, mean, self.variance(step, values))
