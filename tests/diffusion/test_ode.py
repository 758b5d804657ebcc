"""The likelihood by the ODE against a Gaussian's own, on every continuous schedule and on chains."""

import math

import pytest
import torch
from torch import Tensor

from conftest import SLOW
from diffusion.rows import CONTINUOUS, chain, evenly
from iddpm.diffusion.bound import HALF_BIN as BIN
from iddpm.diffusion.denoiser import Prediction
from iddpm.diffusion.grid import GRIDS, Grid, walk
from iddpm.diffusion.ode import log_density, truncated_normal, uniform
from iddpm.diffusion.schedule import SCHEDULES, Flow

M, S = 0.1, torch.linspace(0.2, 0.8, 12, dtype=torch.float64).reshape(1, 3, 2, 2)

DENSE = [*CONTINUOUS, "cosine"]


def best(x: Tensor, s) -> Prediction:
    """The denoiser of N(M, S^2), whose spread differs from pixel to pixel."""
    alpha, sigma = s.alpha, s.sigma
    x0 = M + alpha * S**2 / (alpha**2 * S**2 + sigma**2) * (x - alpha * M)
    return Prediction(x0, None, x0, None, None)


def grid_of(name: str, steps: int) -> Grid:
    if name in CONTINUOUS:
        schedule = SCHEDULES[name]()
        return walk(schedule, GRIDS["logsnr"](schedule, steps))
    whole = chain(name, 4000)
    return whole if steps >= 4000 else chain(name, 4000, str(steps))


@pytest.mark.parametrize(
    ("name", "exactly"),
    [(name, False) for name in DENSE] + [(name, True) if name == "cosine" else SLOW(name, True) for name in DENSE],
)
def test_the_density_is_the_gaussians(name: str, exactly: bool) -> None:
    x = M + S * torch.randn(16, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grid = grid_of(name, 500)
    least = grid.table.sigma[0] / grid.table.alpha[0]
    spread = (S**2 + least**2).sqrt()  # what the least noisy level adds
    exact = (-0.5 * ((x - M) / spread) ** 2 - (spread * math.sqrt(2 * math.pi)).log()).flatten(1).mean(1)
    probe = None if exactly else torch.ones_like(x)  # this Jacobian is diagonal, so any signs give the exact trace
    off = (log_density(best, x, grid, probe) - exact) / math.log(2)
    assert off.mean().abs() < 1e-3
    assert off.abs().max() < (2e-3 if name == "ve" else 1e-3)  # whose end, N(0, 80^2), leaves out the data's mean


def test_a_probe_is_right_on_average_where_pixels_mix() -> None:
    mix = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]

    def mixed(x: Tensor, s) -> Prediction:
        x0 = (best((x.flatten(1) @ mix).reshape(x.shape), s).x0.flatten(1) @ mix.T).reshape(x.shape)
        return Prediction(x0, None, x0, None, None)

    x, grid = torch.zeros(400, 3, 2, 2, dtype=torch.float64), evenly(Flow(), 20)
    exact = log_density(mixed, x[:1], grid)
    signs = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).sign()
    found = log_density(mixed, x, grid, signs)
    assert abs(found.mean() - exact) < 4 * found.std() / 20 and found.std() > 1e-3


def test_errors_fall_with_the_square_of_the_steps() -> None:
    x = M + 0.5 * S.expand(2, -1, -1, -1)
    coarse, fine, finest = (log_density(best, x, grid_to(steps)) for steps in (51, 101, 201))
    ratio = (coarse - fine).abs().max() / (fine - finest).abs().max()  # 4, of a method of order 2
    assert 3.2 < ratio < 5


def grid_to(steps: int) -> Grid:
    """All from one level on, so that they differ in nothing but their steps."""
    return walk(Flow(), torch.linspace(0.05, 1, steps, dtype=torch.float64))


@pytest.mark.parametrize("row", [uniform, truncated_normal])
@pytest.mark.parametrize("level", [0.0005, 0.003, 0.05])
def test_noise_stays_within_the_bin_and_q_is_a_density(row, level: float) -> None:
    x0 = torch.zeros(1, 1, 1, 200_001, dtype=torch.float64)
    u = torch.linspace(0, 1, 200_001, dtype=torch.float64).reshape(x0.shape)
    at = Flow()(torch.tensor(level, dtype=torch.float64))
    noisy = row(x0, u, at).x0.flatten()
    assert noisy.abs().max() <= BIN * (1 + 1e-6)
    each = torch.stack([row(x0[..., :1], u[..., k : k + 1], at).log_q[0] for k in (20_000, 100_000, 170_000)])
    density = torch.stack([2e-5 / (noisy[k + 2] - noisy[k - 2]) for k in (20_000, 100_000, 170_000)])  # du / dx
    torch.testing.assert_close(each.exp(), density, rtol=2e-3, atol=0)
