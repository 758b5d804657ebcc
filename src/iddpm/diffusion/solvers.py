"""Solvers walk a grid of levels from noise to images: (denoise, x, grid, noise) -> a generator of (x, x0): watch it, or `run` it.

x (B, C, H, W) is standard normal times grid.start; noise(k) is the k-th draw like it: noise(0) made x, and step k, counted from
0, takes noise(k + 1). A solver that draws nothing never calls it.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from iddpm.diffusion.bound import Noise
from iddpm.diffusion.denoiser import Denoise, beside, wide
from iddpm.diffusion.grid import Grid, Step
from iddpm.diffusion.schedule import Level


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


# ---- in log(alpha/sigma): the noise is moved exactly, x0 follows a polynomial through the last calls

Seen = Sequence[tuple[Tensor, Tensor]]  # (log(alpha/sigma), x0) of calls, the newest first


def exponential(x: Tensor, s: Step, seen: Seen) -> Tensor:
    """x at the end of a step: sigma_to/sigma x + sigma_to times the integral of e^l x0(l) (Lu et al. 2022, DPM-Solver++, eq. 8).

    x0(l) goes through what was `seen`, the first of it at the step's start. One call is DDIM, two are weighted as in the paper's
    algorithm 2 (and in UniPC's B2). From pure noise and to the image a step is infinitely wide in l: only the first call counts.
    """
    l, h = _lambda(s), (s.alpha_to / s.sigma_to).log() - _lambda(s)
    nodes = sound([((at - l) / h, x0) for at, x0 in seen if torch.isfinite(at)] if torch.isfinite(h) else [])
    first = seen[0][1]
    kept, whole = s.sigma_to / s.sigma * x, -s.alpha_to * torch.expm1(-h)
    if len(nodes) < 2:
        return kept + whole * first
    if len(nodes) == 2:
        other, x0 = nodes[1]
        return kept + whole * (first + (x0 - first) / (2 * other))
    at = torch.stack([at for at, _ in nodes])
    weights = torch.linalg.solve(at[None] ** torch.arange(len(nodes))[:, None], _moments(h, len(nodes)))
    return kept + s.alpha_to * sum(w * x0 for w, (_, x0) in zip(weights, nodes))


NEAR = 0.24  # of a step


def sound(nodes: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """The nodes, in units of the step, up to the first that lies nearer than `NEAR` to the one before.

    A step much longer than those before it would follow their polynomial far beyond them, and multiply what is wrong with it.
    """
    for k, ((before, _), (at, _)) in enumerate(pairwise(nodes), 1):
        if abs(at - before) < NEAR:
            return nodes[:k]
    return nodes


def _moments(h: Tensor, count: int) -> Tensor:
    """h times the integrals over t in [0, 1] of e^(-h (1 - t)) t^k, k = 0 .. count - 1."""
    if h < 1:  # the recursion subtracts nearly equal numbers: h times the sum over j of (-h)^j k! / (j + k + 1)!
        j = torch.arange(20, dtype=torch.float64)
        return torch.stack(
            [h * ((-h) ** j * torch.exp(math.lgamma(k + 1) - torch.lgamma(j + k + 2))).sum() for k in range(count)]
        )
    found = [-torch.expm1(-h)]
    for k in range(1, count):
        found.append(1 - k / h * found[-1])
    return torch.stack(found)


def _lambda(s: Step) -> Tensor:
    return (s.alpha / s.sigma).log()


def _left(grid: Iterable[Step]) -> Iterator[tuple[int, Step]]:
    """The steps, each with how many are left: near the image, where steps are long, an order is no higher than that."""
    steps = list(grid)
    return zip(range(len(steps), 0, -1), steps)


class Multistep:
    """One call a step, which reads the x0 of the last `order` calls."""

    order = 2

    def __call__(self, denoise: Denoise, x: Tensor, grid: Grid, noise: Noise) -> Iterator[State]:
        seen: list[tuple[Tensor, Tensor]] = []
        for left, s in _left(grid):
            p = denoise(x, s)
            seen = [(_lambda(s), p.x0), *seen][: self.order]
            x = exponential(x, s, seen[:left])
            yield State(x, p.x0)


class Dpmpp2M(Multistep):
    """DPM-Solver++ of order 2, multistep: one call a step (Lu et al. 2022, algorithm 2)"""


class Dpmpp3M(Multistep):
    """DPM-Solver++ of order 3, multistep: one call a step, x0 along a parabola (Lu et al. 2022, appendix B)"""

    order = 3


@dataclass(frozen=True)
class UniPC:
    """Predicts a step, and corrects it by the call at its end, which the next one needs anyway (Zhao et al. 2023, algorithm 1)"""

    order: Annotated[int, "calls of the network that a step reads", 1, 4] = 3

    def __call__(self, denoise: Denoise, x: Tensor, grid: Grid, noise: Noise) -> Iterator[State]:
        seen: list[tuple[Tensor, Tensor]] = []
        before: tuple[Tensor, Step] | None = None
        for left, s in _left(grid):
            p = denoise(x, s)
            here = (_lambda(s), p.x0)
            if before:
                x = exponential(*before, [*seen, here])
            before, seen = (x, s), [here, *seen][: min(self.order, left)]
            x = exponential(x, s, seen)
            yield State(x, p.x0)


def dpmpp_2m_sde(denoise: Denoise, x: Tensor, grid: Grid, noise: Noise) -> Iterator[State]:
    """DPM-Solver++ 2M with as much fresh noise as the reverse process has (Lu et al. 2022, SDE-DPM-Solver++)"""
    old: tuple[Tensor, Tensor] | None = None  # x0 and the width in log(alpha/sigma) of the step before
    for k, s in enumerate(grid):
        p, h = denoise(x, s), (s.alpha_to / s.sigma_to).log() - _lambda(s)
        d = p.x0 if old is None or s.last else p.x0 + (p.x0 - old[0]) * h / (2 * old[1])
        x, old = s.sigma_to / s.sigma * torch.exp(-h) * x - s.alpha_to * torch.expm1(-2 * h) * d, (p.x0, h)
        if not s.last:
            x = x + s.sigma_to * (-torch.expm1(-2 * h)).sqrt() * noise(k + 1)
        yield State(x, p.x0)


# ---- along the path's slope, between levels


class Slopes(NamedTuple):
    """The straight line that a path is followed along: y = x / (alpha + sigma) moves with the slope eps - x0 of z in [0, 1]."""

    y: Tensor
    slope: Tensor
    z: Tensor  # sigma / (alpha + sigma)


def velocity(x: Tensor, x0: Tensor, s: Level | Step) -> Slopes:
    """Where x_t stands on rectified flow's line, whatever the schedule is, and the velocity there (Liu et al. 2023)."""
    return Slopes(x / (s.alpha + s.sigma), (x - s.alpha * x0) / s.sigma - x0, s.sigma / (s.alpha + s.sigma))


def heun(denoise: Denoise, x: Tensor, grid: Grid, noise: Noise) -> Iterator[State]:
    """Of order 2, two calls a step: the mean of the flow's velocity at both of its ends

    In sigma/alpha, where Karras et al. 2022 take it (solver edm, without churn), a chain's first step, from 20,000, is nearly all
    of the path, and what the network gets wrong at that step's end counts as much. The step to the least noisy level is Euler's:
    there a network hardly sees the noise that the velocity needs, and images came out grainy (both measured: docs/log.md).
    """
    steps = list(grid)
    for s, to in zip(steps, [*steps[1:], None]):
        p = denoise(x, s)
        here, total = velocity(x, p.x0, s), s.alpha_to + s.sigma_to
        width = s.sigma_to / total - here.z
        x = total * (here.y + width * here.slope)  # Euler's step
        if to is not None and not to.last:
            x = total * (here.y + width * (here.slope + velocity(x, denoise(x, to).x0, to).slope) / 2)
        yield State(x, p.x0)


FAR = 100.0  # sigma/alpha; EDM begins at 80


def _heun(denoise: Denoise, x: Tensor, x0: Tensor, s: Step, to: Step | None) -> Tensor:
    """A step of Heun's in sigma/alpha from x, where x0 was guessed, to the level `to`; to the image and from far away Euler's."""
    eps = (x - s.alpha * x0) / s.sigma
    x_to = s.alpha_to * x0 + s.sigma_to * eps  # Euler's step
    if to is None or s.sigma > FAR * s.alpha:
        return x_to
    eps_to = (x_to - to.alpha * denoise(x_to, to).x0) / to.sigma
    # alpha_to (x / alpha + (sigma_to / alpha_to - sigma / alpha) (eps + eps_to) / 2), as what it adds to Euler's
    return x_to + (s.sigma_to - s.alpha_to / s.alpha * s.sigma) * (eps_to - eps) / 2


@dataclass(frozen=True)
class Edm:
    """Heun's steps in sigma/alpha, each from a little more noise than the last ended with (Karras et al. 2022, algorithm 2)"""

    S_churn: Annotated[float, "noise added over the whole path, shared out among its steps", 0.0, 1000.0] = 40.0
    S_tmin: Annotated[float, "only where sigma/alpha is at least this", 0.0, 1e4] = 0.05
    S_tmax: Annotated[float, "and at most this", 0.0, 1e4] = 50.0
    S_noise: Annotated[float, "deviation of the added noise", 0.5, 2.0] = 1.003

    def __call__(self, denoise: Denoise, x: Tensor, grid: Grid, noise: Noise) -> Iterator[State]:
        churn = min(self.S_churn / grid.steps, math.sqrt(2) - 1)
        steps = list(grid)
        for k, (s, to) in enumerate(zip(steps, [*steps[1:], None])):
            ratio = s.sigma / s.alpha
            if churn and self.S_tmin <= ratio <= self.S_tmax and (level := grid.level(ratio * (1 + churn))).sigma > 0:
                added = ((level.sigma / level.alpha) ** 2 - ratio**2).clamp(min=0).sqrt()  # 0 where a chain has no step between
                x = level.alpha * (x / s.alpha + self.S_noise * added * noise(k + 1))
                s = s._replace(time=level.time, alpha=level.alpha, sigma=level.sigma)
            p = denoise(x, s)
            x = _heun(denoise, x, p.x0, s, to)
            yield State(x, p.x0)


class Adams:
    """Adams-Bashforth in the velocity of the flow: one call a step, the slope along a polynomial through the last `order`."""

    order = 2

    def __call__(self, denoise: Denoise, x: Tensor, grid: Grid, noise: Noise) -> Iterator[State]:
        seen: list[Slopes] = []
        for s in grid:
            p = denoise(x, s)
            seen = [velocity(x, p.x0, s), *seen][: self.order]
            width = s.sigma_to / (s.alpha_to + s.sigma_to) - seen[0].z
            nodes = sound([((one.z - seen[0].z) / width, one.slope) for one in seen])
            at, order = torch.stack([at for at, _ in nodes]), torch.arange(len(nodes), dtype=torch.float64)
            weights = torch.linalg.solve(at[None] ** order[:, None], 1 / (order + 1))
            y = seen[0].y + width * sum(w * slope for w, (_, slope) in zip(weights, nodes))
            x = (s.alpha_to + s.sigma_to) * y
            yield State(x, p.x0)


class AB2(Adams):
    """Adams-Bashforth of order 2 in the velocity of the flow: one call a step"""


class AB4(Adams):
    """Adams-Bashforth of order 4 in the velocity of the flow: one call a step"""

    order = 4


BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


@dataclass(frozen=True)
class Ipndm:
    """Adams-Bashforth in sigma/alpha with the weights of even steps, whatever the grid (Zhang & Chen 2023, section 3.3)"""

    order: Annotated[int, "calls of the network that a step reads", 1, 4] = 3

    def __call__(self, denoise: Denoise, x: Tensor, grid: Grid, noise: Noise) -> Iterator[State]:
        seen: list[Tensor] = []
        for s in grid:
            p = denoise(x, s)
            seen = [(x - s.alpha * p.x0) / s.sigma, *seen][: self.order]
            eps = seen[0] if s.last else sum(w * one for w, one in zip(BASHFORTH[len(seen) - 1], seen))
            # x / alpha + (sigma_to/alpha_to - sigma/alpha) eps, times alpha_to; by way of x0 where alpha may be 0
            x = s.alpha_to * p.x0 + s.sigma_to * eps + (s.alpha_to / s.alpha * s.sigma * (seen[0] - eps) if s.alpha else 0)
            yield State(x, p.x0)


LEAST_WIDTH = 1e-3  # of a step in z, taken whatever its error: so that every path ends


@dataclass(frozen=True)
class Adaptive:
    """Heun's steps in the velocity of the flow, as long as each image allows: the grid only says where to begin and end"""

    own_steps = True  # how many it takes, it finds out

    rtol: Annotated[float, "error of a step allowed, relative to the image", 1e-6, 1.0] = 0.02
    atol: Annotated[float, "and absolute", 1e-6, 1.0] = 0.02

    def __call__(self, denoise: Denoise, x: Tensor, grid: Grid, noise: Noise) -> Iterator[State]:
        first = grid.at(torch.full((len(x),), grid.steps - 1))
        level, least = Level(*first[:3]), grid.table.sigma[0] / grid.table.alpha[0]
        width, done = torch.full((len(x),), 0.1, dtype=torch.float64), torch.zeros(len(x), dtype=torch.bool)
        while not done.all():
            x0 = denoise(x, level).x0
            y, slope, _ = velocity(x, x0, Level(*wide(level, x)))
            now = level.sigma / (level.alpha + level.sigma)
            aim = (now - width).clamp(min=0)
            to = grid.level((aim / (1 - aim)).maximum(least))
            last = (aim / (1 - aim) < least) | (to.sigma / to.alpha >= level.sigma / level.alpha)  # from here on to the image
            then = torch.where(last, 0.0, to.sigma / (to.alpha + to.sigma))
            step = beside((then - now).float(), x)
            wide_to = Level(*wide(to, x))
            euler = y + step * slope
            x_to = euler * (wide_to.alpha + wide_to.sigma)
            bent = velocity(x_to, denoise(x_to, to).x0, wide_to).slope
            better = torch.where(beside(last, x), euler, y + step * (slope + bent) / 2)
            allowed = self.atol + self.rtol * y.abs().maximum(better.abs())
            error = ((better - euler) / allowed).square().flatten(1).mean(1).sqrt().double().cpu()
            good = ((error <= 1) | (width <= LEAST_WIDTH)) & ~done
            moved = beside(torch.where(last, torch.ones_like(then), to.alpha + to.sigma).float(), x) * better
            x = torch.where(beside(good, x), moved, x)
            level = Level(*(torch.where(good & ~last, b, a) for a, b in zip(level, to)))
            done = done | (good & last)
            width = (width * (0.9 / error.clamp(min=1e-6).sqrt()).clamp(0.2, 5)).clamp(min=LEAST_WIDTH)
            yield State(x, x0)


@dataclass(frozen=True)
class Leaps:
    """The image in one call, noised anew to the next level, by models of that objective (Song et al. 2023, algorithm 1)"""

    leaps: ClassVar[bool] = True  # it needs a model that does

    def __call__(self, denoise: Denoise, x: Tensor, grid: Grid, noise: Noise) -> Iterator[State]:
        for k, s in enumerate(grid):
            x0 = denoise(x, s).x0
            x = x0 if s.last else s.alpha_to * x0 + s.sigma_to * noise(k + 1)
            yield State(x, x0)


# ---- the way back


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


SOLVERS: dict[str, Any] = {
    "ancestral": ancestral,
    "ddim": Ddim,
    "dpmpp_2m": Dpmpp2M,
    "dpmpp_3m": Dpmpp3M,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "unipc": UniPC,
    "heun": heun,
    "edm": Edm,
    "ipndm": Ipndm,
    "ab2": AB2,
    "ab4": AB4,
    "adaptive": Adaptive,
    "consistency": Leaps,
}
