"""What the network's output means: each choice gives x0 from (x_t, output), and the output's target from (x0, eps)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from iddpm.diffusion.schedule import Step


class Scalings(NamedTuple):
    """x0 = skip x_t + out output, and the output's target is of_x0 x0 + of_eps eps."""

    skip: Tensor
    out: Tensor
    of_x0: Tensor
    of_eps: Tensor


def eps(s: Step) -> Scalings:
    """The noise (Ho et al. 2020, eq. 11)."""
    zero, one = torch.zeros_like(s.alpha), torch.ones_like(s.alpha)
    return Scalings(1 / s.alpha, -s.sigma / s.alpha, zero, one)


def x0(s: Step) -> Scalings:
    """The clean image."""
    zero, one = torch.zeros_like(s.alpha), torch.ones_like(s.alpha)
    return Scalings(zero, one, one, zero)


def v(s: Step) -> Scalings:
    """v = alpha eps - sigma x0 (Salimans & Ho 2022, appendix D), for chains with alpha^2 + sigma^2 = 1."""
    return Scalings(s.alpha, -s.sigma, -s.sigma, s.alpha)


def previous(s: Step) -> Scalings:
    """The mean of q(x_{t-1} | x_t, x_0)."""
    return Scalings(-s.coef_xt / s.coef_x0, 1 / s.coef_x0, s.coef_x0 + s.coef_xt * s.alpha, s.coef_xt * s.sigma)


PARAMETRIZATIONS: dict[str, Callable[[Step], Scalings]] = {f.__name__: f for f in (eps, x0, v, previous)}
