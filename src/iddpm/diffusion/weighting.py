"""Weightings: how much the squared error counts at each level.

Each gives the weight of the squared error of the network's OUTPUT from a level and the scalings there. The squared error of x0
is out^2 times as large, so a weight w of x0's is w out^2 of the output's: finite where 1/out is not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from iddpm.diffusion.parametrization import Scalings
from iddpm.diffusion.schedule import Level

Weighting = Callable[[Level, Scalings], Tensor]  # float64 (B,)


def uniform(s: Level, c: Scalings) -> Tensor:
    """Every level alike, in the space of what the network predicts"""
    return torch.ones_like(s.alpha)


@dataclass(frozen=True)
class Edm:
    """Such that EDM's network has a loss of 1 at every level before training (Karras et al. 2022, table 1)."""

    sigma_data: Annotated[float, "deviation of the images' pixels, in units of [-1, 1]", 0.01, 10.0] = 0.5

    def __call__(self, s: Level, c: Scalings) -> Tensor:
        h, d = s.sigma / s.alpha, self.sigma_data
        return (h**2 + d**2) / (h * d) ** 2 * c.out**2


def flow(s: Level, c: Scalings) -> Tensor:
    """The squared error of the velocity eps - x0, whatever the network predicts (Esser et al. 2024, section 2)."""
    return ((s.alpha + s.sigma) / s.sigma) ** 2 * c.out**2


WEIGHTINGS: dict[str, Callable[..., Any]] = {"uniform": uniform, "edm": Edm, "flow": flow}
