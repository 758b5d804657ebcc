"""Weightings: how much the squared error counts at each level.

Each gives the weight of the squared error of the network's OUTPUT from a level, the scalings there and the pace. The error of x0
is out^2 times as large, so a weight w of it is w out^2 of the output's: finite where 1/out is not. A weight of the error of eps
is snr = alpha^2/sigma^2 times as much of that of x0.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from iddpm.diffusion.grid import Grid
from iddpm.diffusion.parametrization import Scalings
from iddpm.diffusion.schedule import Level, Schedule, below_one

Pace = Callable[[], Tensor]  # how fast log(snr) falls with u at the levels (B,), float64: worked out for the weightings that ask
Weighting = Callable[[Level, Scalings, Pace], Tensor]  # float64 (B,)


def pace(schedule: Schedule, u: Tensor) -> Tensor:
    """-d log(snr) / du (B,) float64, from levels a little to both sides; of a chain, from the steps beside."""
    h = 1 / schedule.steps if isinstance(schedule, Grid) else 1e-5
    less, more = (u - h).clamp(min=h / 2), below_one(u + h)
    a, b = schedule(less), schedule(more)
    return 2 * ((b.sigma / b.alpha).log() - (a.sigma / a.alpha).log()) / (more - less)


def uniform(s: Level, c: Scalings, pace: Pace) -> Tensor:
    """Every level alike, in the space of what the network predicts"""
    return torch.ones_like(s.alpha)


@dataclass(frozen=True)
class Edm:
    """Such that EDM's network has a loss of 1 at every level before training (Karras et al. 2022, table 1)."""

    sigma_data: Annotated[float, "deviation of the images' pixels, in units of [-1, 1]", 0.01, 10.0] = 0.5

    def __call__(self, s: Level, c: Scalings, pace: Pace) -> Tensor:
        h, d = s.sigma / s.alpha, self.sigma_data
        return (h**2 + d**2) / (h * d) ** 2 * c.out**2


def flow(s: Level, c: Scalings, pace: Pace) -> Tensor:
    """The squared error of the velocity eps - x0, whatever the network predicts (Esser et al. 2024, section 2)."""
    return ((s.alpha + s.sigma) / s.sigma) ** 2 * c.out**2


@dataclass(frozen=True)
class MinSNR:
    """The error of x0 times the smaller of snr and gamma: little noise counts no more than some (Hang et al. 2023, eq. 6)"""

    snr_gamma: Annotated[float, "the snr from which levels count alike", 0.01, 1e6] = 5.0

    def __call__(self, s: Level, c: Scalings, pace: Pace) -> Tensor:
        return ((s.alpha / s.sigma) ** 2).clamp(max=self.snr_gamma) * c.out**2


@dataclass(frozen=True)
class SoftMinSNR:
    """As min_snr, with a smooth bend: snr gamma / (snr + gamma) (Crowson et al. 2024, HDiT, section 4.6)"""

    snr_gamma: Annotated[float, "the snr from which levels count alike", 0.01, 1e6] = 5.0

    def __call__(self, s: Level, c: Scalings, pace: Pace) -> Tensor:
        return c.out**2 / ((s.sigma / s.alpha) ** 2 + 1 / self.snr_gamma)


@dataclass(frozen=True)
class P2:
    """The error of eps over (k + snr)^gamma: the coarse counts more than the fine (Choi et al. 2022, eq. 8)"""

    p2_gamma: Annotated[float, "how much less little noise counts; 0: not less", 0.0, 4.0] = 1.0
    p2_k: Annotated[float, "the snr below which levels count alike", 0.01, 1e6] = 1.0

    def __call__(self, s: Level, c: Scalings, pace: Pace) -> Tensor:
        snr = (s.alpha / s.sigma) ** 2
        return snr / (self.p2_k + snr) ** self.p2_gamma * c.out**2


@dataclass(frozen=True)
class Sigmoid:
    """The likelihood's weight times sigmoid(b - log snr): what the eye does not see counts less (SiD2, Hoogeboom et al. 2024)"""

    sigmoid_bias: Annotated[float, "b: a larger one weighs the fine more", -20.0, 20.0] = -1.0

    def __call__(self, s: Level, c: Scalings, pace: Pace) -> Tensor:
        snr = (s.alpha / s.sigma) ** 2
        return 0.5 * pace() * torch.sigmoid(self.sigmoid_bias - snr.log()) * snr * c.out**2


def likelihood(s: Level, c: Scalings, pace: Pace) -> Tensor:
    """The bound in nats, of levels even in u: half the rate at which snr falls (Kingma et al. 2021, eq. 17)"""
    return 0.5 * pace() * (s.alpha / s.sigma) ** 2 * c.out**2


WEIGHTINGS: dict[str, Callable[..., Any]] = {
    "uniform": uniform,
    "edm": Edm,
    "flow": flow,
    "min_snr": MinSNR,
    "soft_min_snr": SoftMinSNR,
    "p2": P2,
    "sigmoid": Sigmoid,
    "likelihood": likelihood,
}
