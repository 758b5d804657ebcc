"""Noise schedules: how much of the image is left, and how much noise there is, at each level.

A discrete one is a list of betas, which `grid.Chain` makes a chain of; a continuous one maps u in [0, 1) to its level.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, Protocol

import torch
from torch import Tensor

MAX_BETA = 0.999  # a larger one would lose x0 in a single step: alpha would vanish


class Level(NamedTuple):
    """x_t = alpha x_0 + sigma eps, at what the network is told as `time`. float64: (B,) in training, 0-dim in a walk."""

    time: Tensor
    alpha: Tensor
    sigma: Tensor


class Discrete(Protocol):
    """`steps` variances, one per step of a chain, each in (0, 1)."""

    @property
    def steps(self) -> int: ...

    def betas(self) -> Tensor: ...


class Schedule(Protocol):
    """What training and solvers need of a schedule: a continuous one, or a chain."""

    @property
    def steps(self) -> int:
        """Those of a chain; for a continuous one 1000, where something is counted by steps."""
        ...

    def __call__(self, u: Tensor) -> Any:
        """The levels of u (B,) float64 in [0, 1), 1 the noisiest: each a Level, or the Step of a chain."""
        ...

    def u_of(self, ratio: Tensor) -> Tensor:
        """The u (B,) whose sigma/alpha is nearest to `ratio` (B,)."""
        ...


@dataclass(frozen=True)
class Linear:
    """beta_i rises linearly from 0.1/T to 20/T (Ho et al. 2020, section 4, rescaled to any T)."""

    steps: int = 1000

    def betas(self) -> Tensor:  # (T,) float64
        return torch.linspace(0.1 / self.steps, 20 / self.steps, self.steps, dtype=torch.float64).clamp(max=MAX_BETA)


@dataclass(frozen=True)
class Cosine:
    """alpha_bar(u) = cos^2((u + s) / (1 + s) pi / 2), u = i / T (Nichol & Dhariwal 2021, eq. 17)."""

    steps: int = 4000
    s: float = 0.008

    def betas(self) -> Tensor:  # (T,) float64
        bar = [math.cos((i / self.steps + self.s) / (1 + self.s) * math.pi / 2) ** 2 for i in range(self.steps + 1)]
        betas = [min(1 - after / before, MAX_BETA) for before, after in zip(bar, bar[1:])]
        return torch.tensor(betas, dtype=torch.float64)


@dataclass(frozen=True)
class Flow:
    """A straight line from image to noise: alpha = 1 - u, sigma = u (Liu et al. 2023, rectified flow; Lipman et al. 2023)."""

    @property
    def steps(self) -> int:
        return 1000

    def __call__(self, u: Tensor) -> Level:
        return Level(1000 * u, 1 - u, u)

    def walk(self, steps: int) -> Tensor:
        """The u of a grid of so many steps, ascending; the last is pure noise."""
        return torch.arange(1, steps + 1, dtype=torch.float64) / steps

    def u_of(self, ratio: Tensor) -> Tensor:
        return below_one(ratio / (1 + ratio))


@dataclass(frozen=True)
class VE:
    """Noise is added to the whole image: alpha = 1, sigma^(1/rho) linear in u (Karras et al. 2022, eq. 5)."""

    sigma_min: Annotated[float, "least noise of the schedule, in units of the image's [-1, 1]", 1e-6, 1.0] = 0.002
    sigma_max: Annotated[float, "most noise of the schedule", 1.0, 1e4] = 80.0
    rho: Annotated[float, "how much finer the schedule is where there is little noise", 1.0, 100.0] = 7.0

    @property
    def steps(self) -> int:
        return 1000

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} must be positive and below sigma_max {self.sigma_max}")

    @property
    def _ends(self) -> tuple[float, float]:
        return self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)

    def __call__(self, u: Tensor) -> Level:
        low, high = self._ends
        sigma = (low + u * (high - low)) ** self.rho
        return Level(1000 * u, torch.ones_like(u), sigma)

    def walk(self, steps: int) -> Tensor:
        """The u of a grid of so many steps, ascending, from sigma_min to sigma_max (eq. 5)."""
        if steps == 1:
            return torch.ones(1, dtype=torch.float64)
        return torch.arange(steps, dtype=torch.float64) / (steps - 1)

    def u_of(self, ratio: Tensor) -> Tensor:
        low, high = self._ends
        return below_one(((ratio ** (1 / self.rho) - low) / (high - low)).clamp(min=0))


def below_one(u: Tensor) -> Tensor:
    """u held below 1, where schedules and grids are no longer defined."""
    return u.clamp(max=1 - 2**-53)


SCHEDULES: dict[str, Callable[..., Any]] = {"linear": Linear, "cosine": Cosine, "flow": Flow, "ve": VE}
