"""Solvers walk a grid of levels from noise to images: (denoise, x, grid, noise) -> a generator of (x, x0): watch it, or `run` it.

x (B, C, H, W) is standard normal times grid.start; noise(k) is the k-th draw like it: noise(0) made x, and step k, counted from
0, takes noise(k + 1). A solver that draws nothing never calls it.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from iddpm.diffusion.bound import Noise
from iddpm.diffusion.denoiser import Denoise
from iddpm.diffusion.grid import Grid, Step


class State(NamedTuple):
    """Where a solver stands after a step: x is what the next step starts from, x0 the network's present guess."""

    x: Tensor
    x0: Tensor


Solver = Callable[[Denoise, Tensor, Grid, Noise], Iterator[State]]


def ancestral(denoise: Denoise, x: Tensor, grid: Grid, noise: Noise) -> Iterator[State]:
    """Draws from p(x_{t-1} | x_t); the last step gives its mean (Ho et al. 2020, algorithm 2)"""
    for k, s in enumerate(grid):
        p = denoise(x, s)
        assert p.mean is not None and p.log_var is not None  # as every denoiser gives them at a step
        x = p.mean if s.last else p.mean + torch.exp(0.5 * p.log_var) * noise(k + 1)
        yield State(x, p.x0)


@dataclass(frozen=True)
class Ddim:
    """Without fresh noise, or with a share eta of the chain's (Song et al. 2021, DDIM, eq. 12)"""

    eta: Annotated[float, "share of fresh noise; 1 has the variance of the posterior", 0.0, 1.0] = 0.0

    def __call__(self, denoise: Denoise, x: Tensor, grid: Grid, noise: Noise) -> Iterator[State]:
        for k, s in enumerate(grid):
            p = denoise(x, s)
            x = self.step(p.x0, x, s)
            if self.eta and not s.last:
                x = x + self.eta * torch.exp(0.5 * s.log_min) * noise(k + 1)
            yield State(x, p.x0)

    def step(self, x0: Tensor, x: Tensor, s: Step) -> Tensor:
        """The mean of x_to. Its variance is written so that no nearly equal numbers are subtracted."""
        kept = ((1 - self.eta**2) * s.sigma_to**2 + (self.eta * s.coef_xt * s.sigma) ** 2).sqrt()
        return s.alpha_to * x0 + kept * ((x - s.alpha * x0) / s.sigma)


def dpmpp_2m(denoise: Denoise, x: Tensor, grid: Grid, noise: Noise) -> Iterator[State]:
    """DPM-Solver++ of order 2, multistep: one call a step (Lu et al. 2022, algorithm 2)"""
    old: tuple[Tensor, Tensor] | None = None  # x0 and the width in log(alpha/sigma) of the step before
    for s in grid:
        p, h = denoise(x, s), (s.alpha_to / s.sigma_to).log() - (s.alpha / s.sigma).log()
        # in log(alpha/sigma) the first step from pure noise and the last to the image are infinitely wide: of order 1
        d = p.x0 if old is None or s.last else p.x0 + (p.x0 - old[0]) * h / (2 * old[1])
        x, old = s.sigma_to / s.sigma * x - s.alpha_to * torch.expm1(-h) * d, (p.x0, h)
        yield State(x, p.x0)


def heun(denoise: Denoise, x: Tensor, grid: Grid, noise: Noise) -> Iterator[State]:
    """Of order 2, two calls a step: the mean of the noise seen at both of its ends (Karras et al. 2022, algorithm 1)"""
    steps = list(grid)
    for s, to in zip(steps, [*steps[1:], None]):
        p = denoise(x, s)
        eps = (x - s.alpha * p.x0) / s.sigma
        x_to = s.alpha_to * p.x0 + s.sigma_to * eps  # Euler's step
        if to is not None and s.alpha:  # in pure noise, sigma/alpha, in which the step is taken, is infinite
            eps_to = (x_to - to.alpha * denoise(x_to, to).x0) / to.sigma
            # alpha_to (x / alpha + (sigma_to / alpha_to - sigma / alpha) (eps + eps_to) / 2), as what it adds to Euler's
            x_to = x_to + (s.sigma_to - s.alpha_to / s.alpha * s.sigma) * (eps_to - eps) / 2
        x = x_to
        yield State(x, p.x0)


def ddim_inversion(denoise: Denoise, x: Tensor, grid: Grid) -> Iterator[State]:
    """The noise from which DDIM (eta = 0) comes back to the images x (B, C, H, W), in [-1, 1], up to the step size.

    The images are taken as x at the least noisy level; the last of the K - 1 states is what `ddim` starts from.
    """
    steps = list(grid)[::-1]
    for s, to in zip(steps, steps[1:]):
        p = denoise(x, s)
        x = to.alpha * p.x0 + to.sigma * ((x - s.alpha * p.x0) / s.sigma)
        yield State(x, p.x0)


def run(path: Iterable[State]) -> Tensor:
    """The x that a path ends at."""
    (last,) = deque(path, maxlen=1)
    return last.x


SOLVERS: dict[str, Any] = {"ancestral": ancestral, "ddim": Ddim, "dpmpp_2m": dpmpp_2m, "heun": heun}
