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
class Adjusted:
    """A discrete schedule with `shift` times as much noise beside the image, or one whose last step is pure noise.

    shift: sigma/alpha is so many times as large at every step, as larger images need (Hoogeboom et al. 2023, eq. 3).
    zero_terminal: sqrt(alpha_bar) is moved and stretched so that it ends at 0 (Lin et al. 2024, algorithm 1). Needs two steps.
    """

    schedule: Discrete
    shift: float = 1.0
    zero_terminal: bool = False

    @property
    def steps(self) -> int:
        return self.schedule.steps

    def betas(self) -> Tensor:  # (T,) float64; the last one is 1 with zero_terminal
        bar = (1 - self.schedule.betas()).cumprod(0)
        bar = bar / (bar + self.shift**2 * (1 - bar))
        if self.zero_terminal:
            root = bar.sqrt()
            bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        return 1 - bar / torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])


class Continuous:
    """What continuous schedules share. Those that end in pure noise have alpha = 0 at u = 1."""

    steps = 1000  # their networks are told 1000 u


@dataclass(frozen=True)
class Shifted(Continuous):
    """A continuous schedule at other u: sigma/alpha is `shift` times as large at each u; for those that end in pure noise.

    Hoogeboom et al. 2023, eq. 3; of `Flow` it is the shift of Esser et al. 2024, eq. 23. Levels keep their time.
    """

    schedule: Schedule
    shift: float

    def __call__(self, u: Tensor) -> Level:
        level = self.schedule(u)
        found: Level = self.schedule(torch.where(u < 1, self.schedule.u_of(self.shift * level.sigma / level.alpha), u))
        return found

    def u_of(self, ratio: Tensor) -> Tensor:
        return self.schedule.u_of(ratio / self.shift)


@dataclass(frozen=True)
class Flow(Continuous):
    """A straight line from image to noise: alpha = 1 - u, sigma = u (Liu et al. 2023, rectified flow; Lipman et al. 2023)."""

    def __call__(self, u: Tensor) -> Level:
        return Level(1000 * u, 1 - u, u)

    def u_of(self, ratio: Tensor) -> Tensor:
        return below_one(1 / (1 + 1 / ratio))


@dataclass(frozen=True)
class CosineVP(Continuous):
    """alpha = cos(u pi / 2), sigma = sin(u pi / 2): the cosine schedule in continuous time (Salimans & Ho 2022, section 3)."""

    def __call__(self, u: Tensor) -> Level:
        return Level(1000 * u, torch.sin((1 - u) * math.pi / 2), torch.sin(u * math.pi / 2))

    def u_of(self, ratio: Tensor) -> Tensor:
        return below_one(ratio.atan() * 2 / math.pi)


@dataclass(frozen=True)
class Sigmoid(Continuous):
    """alpha^2 falls along a sigmoid: less of the schedule is spent at its ends (Jabri et al. 2023; Chen 2023, algorithm 1)."""

    sigmoid_start: Annotated[float, "where on the sigmoid the image begins", -20.0, 20.0] = -3.0
    sigmoid_end: Annotated[float, "where on it the noise ends", -20.0, 20.0] = 3.0
    tau: Annotated[float, "above 1: more like a straight line", 0.01, 100.0] = 1.0

    def __post_init__(self) -> None:
        if self.sigmoid_start >= self.sigmoid_end:
            raise ValueError(f"sigmoid_start {self.sigmoid_start} must be below sigmoid_end {self.sigmoid_end}")

    def _between(self) -> tuple[Tensor, Tensor]:
        first, last = torch.tensor([self.sigmoid_start, self.sigmoid_end], dtype=torch.float64).div(self.tau).sigmoid()
        return first, last

    def __call__(self, u: Tensor) -> Level:
        first, last = self._between()
        at = torch.sigmoid((self.sigmoid_start + u * (self.sigmoid_end - self.sigmoid_start)) / self.tau)
        at = torch.where(u < 1, at, last)  # exactly pure noise at the end
        return Level(1000 * u, ((last - at) / (last - first)).sqrt(), ((at - first) / (last - first)).clamp(min=0).sqrt())

    def u_of(self, ratio: Tensor) -> Tensor:
        first, last = self._between()
        at = torch.logit(first + (last - first) / (1 + ratio**-2))
        u = (self.tau * at - self.sigmoid_start) / (self.sigmoid_end - self.sigmoid_start)
        return below_one(u.clamp(min=0))


@dataclass(frozen=True)
class SigmoidChain:
    """The same as a chain, of which step i ends at u = (i + 1) / T: denoising-diffusion-pytorch's (betas at most 0.999)."""

    steps: int = 1000
    sigmoid_start: Annotated[float, "where on the sigmoid the image begins", -20.0, 20.0] = -3.0
    sigmoid_end: Annotated[float, "where on it the noise ends", -20.0, 20.0] = 3.0
    tau: Annotated[float, "above 1: more like a straight line", 0.01, 100.0] = 1.0

    def betas(self) -> Tensor:  # (T,) float64
        u = torch.arange(self.steps + 1, dtype=torch.float64) / self.steps
        bar = Sigmoid(self.sigmoid_start, self.sigmoid_end, self.tau)(u).alpha ** 2
        return (1 - bar[1:] / bar[:-1]).clamp(max=MAX_BETA)


@dataclass(frozen=True)
class VE(Continuous):
    """Noise is added to the whole image: alpha = 1, sigma^(1/rho) linear in u (Karras et al. 2022, eq. 5)."""

    sigma_min: Annotated[float, "least noise of the schedule, in units of the image's [-1, 1]", 1e-6, 1.0] = 0.002
    sigma_max: Annotated[float, "most noise of the schedule", 1.0, 1e4] = 80.0
    rho: Annotated[float, "how much finer the schedule is where there is little noise", 1.0, 100.0] = 7.0

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

    def u_of(self, ratio: Tensor) -> Tensor:
        low, high = self._ends
        return below_one(((ratio ** (1 / self.rho) - low) / (high - low)).clamp(min=0))


def below_one(u: Tensor) -> Tensor:
    """u held below 1, where schedules and grids are no longer defined."""
    return u.clamp(max=1 - 2**-53)


SCHEDULES: dict[str, Callable[..., Any]] = {
    "linear": Linear,
    "cosine": Cosine,
    "flow": Flow,
    "ve": VE,
    "cosine_vp": CosineVP,
    "sigmoid": Sigmoid,
    "sigmoid_chain": SigmoidChain,
}
