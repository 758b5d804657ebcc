"""Grids of few steps that are found for a model, by dynamic programming over a fine grid: which of its levels to keep."""

from collections.abc import Callable

import torch
from torch import Tensor

from iddpm.diffusion.bound import Noise
from iddpm.diffusion.denoiser import Denoise
from iddpm.diffusion.grid import Grid
from iddpm.diffusion.solvers import Slopes, velocity


def cheapest(cost: Tensor, steps: int) -> list[int]:
    """The path of so many steps from node 0 to the last, ascending, whose costs (N, N) [from, to] have the least sum.

    All its nodes, the ends included. ValueError where there are fewer nodes.
    """
    n = len(cost)
    if not 1 <= steps < n:
        raise ValueError(f"no path of {steps} steps among {n} levels: ask for 1 to {n - 1}")
    forward = torch.where(torch.ones_like(cost).triu(1) > 0, cost.double(), torch.inf)
    least, came = torch.full((n,), torch.inf, dtype=torch.float64), []
    least[0] = 0.0
    for _ in range(steps):
        least, before = (least[:, None] + forward).min(dim=0)
        came.append(before)
    path = [n - 1]
    for before in reversed(came):
        path.append(int(before[path[-1]]))
    return path[::-1]


def deviations(denoise: Denoise, x: Tensor, fine: Grid, tick: Callable[[], object] = lambda: None) -> Tensor:
    """The cost (N + 1, N + 1) of one DDIM step from level i of the N of a fine grid, noisiest first, to j; N is the image.

    The distance to where the fine path is at j, of x / (alpha + sigma), averaged over the images x (B, C, H, W), noise times
    fine.start (Chen et al. 2024, GITS, section 3.3, there in x / alpha).
    """
    path: list[Slopes] = []
    for s in fine:
        here = velocity(x, denoise(x, s).x0, s)
        path.append(here)
        y = here.y + (s.sigma_to / (s.alpha_to + s.sigma_to) - here.z) * here.slope
        x = (s.alpha_to + s.sigma_to) * y
        tick()
    ends = torch.stack([*(at.y for at in path), x])
    z = torch.stack([*(at.z for at in path), torch.zeros((), dtype=torch.float64)]).to(x)
    cost = torch.zeros(len(ends), len(ends), dtype=torch.float64)
    for i, at in enumerate(path):
        there = at.y + (z - z[i]).reshape(-1, *(1,) * x.ndim) * at.slope
        cost[i] = (there - ends).flatten(2).norm(dim=2).mean(1).cpu()
    return cost


def bounds(denoise: Denoise, x0: Tensor, fine: Grid, noise: Noise, tick: Callable[[], object] = lambda: None) -> Tensor:
    """The cost (N, N) in nats of the bound's term from level i to j: half the gain in snr times the error of x0 at i.

    Kingma et al. 2021, eq. 13; the search is that of Watson et al. 2021. x0 (B, C, H, W) are real images.
    """
    errors, snr = [], []
    for k, s in enumerate(fine):
        p = denoise(s.alpha * x0 + s.sigma * noise(k), s)
        errors.append((p.x0 - x0).square().flatten(1).sum(1).mean().double().cpu())
        snr.append((s.alpha / s.sigma) ** 2)
        tick()
    of = torch.stack(snr)
    return 0.5 * (of[None] - of[:, None]) * torch.stack(errors)[:, None]
