"""What the network's output means: each choice gives x0 from (x_t, output) at a level, and so the output's target."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from iddpm.diffusion.grid import Step, as_step
from iddpm.diffusion.schedule import Level


class Scalings(NamedTuple):
    """x0 = skip x_t + out net(inp x_t, time); the output's target is of_x0 x0 + of_eps eps. Shaped as the level."""

    skip: Tensor
    out: Tensor
    of_x0: Tensor
    of_eps: Tensor
    time: Tensor
    inp: Tensor | None = None  # None: 1
    is_mean: bool = False  # the output is the mean of p(x_to | x_t) itself, and is believed even where its x0 is clipped


def eps(s: Level) -> Scalings:
    """The noise (Ho et al. 2020, eq. 11)."""
    zero, one = torch.zeros_like(s.alpha), torch.ones_like(s.alpha)
    return Scalings(1 / s.alpha, -s.sigma / s.alpha, zero, one, s.time)


def x0(s: Level) -> Scalings:
    """The clean image."""
    zero, one = torch.zeros_like(s.alpha), torch.ones_like(s.alpha)
    return Scalings(zero, one, one, zero, s.time)


def v(s: Level) -> Scalings:
    """v = alpha eps - sigma x0 (Salimans & Ho 2022, appendix D), for schedules with alpha^2 + sigma^2 = 1."""
    return Scalings(s.alpha, -s.sigma, -s.sigma, s.alpha, s.time)


def previous(s: Level | Step) -> Scalings:
    """The mean of q(x_{t-1} | x_t, x_0), on a chain."""
    s = as_step(s, "parametrization previous")
    to_x0, to_eps = s.coef_x0 + s.coef_xt * s.alpha, s.coef_xt * s.sigma
    return Scalings(-s.coef_xt / s.coef_x0, 1 / s.coef_x0, to_x0, to_eps, s.time, is_mean=True)


def flow(s: Level) -> Scalings:
    """The velocity eps - x0 of the straight line (Liu et al. 2023, eq. 1; their time runs the other way)."""
    one, both = torch.ones_like(s.alpha), s.alpha + s.sigma
    return Scalings(1 / both, -s.sigma / both, -one, one, s.time)


@dataclass(frozen=True)
class Edm:
    """EDM's preconditioning: input and target of unit variance at every level (Karras et al. 2022, table 1)."""

    sigma_data: Annotated[float, "deviation of the images' pixels, in units of [-1, 1]", 0.01, 10.0] = 0.5

    def __call__(self, s: Level) -> Scalings:
        d, h = self.sigma_data, s.sigma / s.alpha  # of x_t / alpha = x0 + h eps, in which the paper is written
        both = h**2 + d**2
        of_x0, of_eps = h / (d * both.sqrt()), -d / both.sqrt()
        inp = 1 / both.sqrt() / s.alpha
        return Scalings(d**2 / both / s.alpha, h * d / both.sqrt(), of_x0, of_eps, time=h.log() / 4, inp=inp)


PARAMETRIZATIONS: dict[str, Callable[..., Any]] = {"eps": eps, "x0": x0, "v": v, "previous": previous, "flow": flow, "edm": Edm}
