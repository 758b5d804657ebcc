"""Weightings: how much the squared error counts at each level.

Each gives the weight of the squared error of the network's OUTPUT from a level, the scalings there and the pace. The error of x0
is out^2 times as large, so a weight w of it is w out^2 of the output's: finite where 1/out is not. A weight of the error of eps
is snr = alpha^2/sigma^2 times as much of that of x0.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, runtime_checkable

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


@runtime_checkable
class Remembering(Protocol):
    """A weighting that is shown the errors of each step, and is part of the state of a run."""

    def update(self, s: Level, errors: Tensor) -> None: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


class Uncertainty:
    """Each level's squared error over what it usually is there: all count alike, at every time (EDM2, Karras et al. 2024, eq. 21)

    There a small network u is trained along with the loss error / e^u + u, which is least where e^u is the mean error of the
    level. Here that mean is kept: of about the last `uncertainty_memory` errors in each of 64 bins of log(sigma/alpha) from
    -8 to 8, and between their middles on a straight line. It is part of the state that a checkpoint keeps.
    """

    uncertainty_memory: Annotated[int, "errors, of levels alike, that their usual size is the mean of", 10, 1000000] = 1000

    def __init__(self, uncertainty_memory: int = 1000):
        self.memory = uncertainty_memory
        self.middles = (torch.arange(64, dtype=torch.float64) - 31.5) / 4
        self.means, self.counts = torch.zeros(64, dtype=torch.float64), torch.zeros(64, dtype=torch.float64)

    def __call__(self, s: Level, c: Scalings, pace: Pace) -> Tensor:
        seen = self.counts > 0
        if not seen.any():
            return torch.ones_like(s.alpha)
        at, means = self.middles[seen], self.means[seen].log()
        place = _log_ratio(s).clamp(at[0], at[-1])
        after = torch.searchsorted(at, place).clamp(1, max(1, len(at) - 1)).clamp(max=len(at) - 1)
        before = (after - 1).clamp(min=0)
        share = ((place - at[before]) / (at[after] - at[before]).clamp(min=1e-9)).clamp(0, 1)
        return torch.exp(-torch.lerp(means[before], means[after], share))

    def update(self, s: Level, errors: Tensor) -> None:
        """Take note of the whole step's mean squared errors (B,), in global order; those that are not finite are left out."""
        bins = ((_log_ratio(s) + 8) * 4).long().clamp(0, 63)
        for k, error in zip(bins.tolist(), errors.double().tolist()):
            if 0 < error < float("inf"):
                self.counts[k] += 1
                self.means[k] += (error - self.means[k]) / min(float(self.counts[k]), self.memory)

    def state_dict(self) -> dict[str, Tensor]:
        return {"means": self.means, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.means, self.counts = state["means"].clone(), state["counts"].clone()


def _log_ratio(s: Level) -> Tensor:
    """log(sigma/alpha) (B,) float64, of pure noise a large number instead of infinity."""
    return (s.sigma / s.alpha).log().clamp(-100, 100)


WEIGHTINGS: dict[str, Callable[..., Any]] = {
    "uniform": uniform,
    "edm": Edm,
    "flow": flow,
    "min_snr": MinSNR,
    "soft_min_snr": SoftMinSNR,
    "p2": P2,
    "sigmoid": Sigmoid,
    "likelihood": likelihood,
    "uncertainty": Uncertainty,
}
