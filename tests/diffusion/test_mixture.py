"""Solvers, likelihood and losses on a mixture of three Gaussians in the plane, whose best denoiser is known and not linear."""

import math
from functools import cache
from typing import Any

import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from conftest import SLOW, diagonal
from diffusion import mixture
from diffusion.mixture import COVARIANCE, MEAN, SHARES, best
from diffusion.rows import DISCRETE, as_column, chain, made, meaning
from diffusion.test_solvers import ORDERS, fine, noise_is_not_drawn, ramped
from iddpm.diffusion.denoiser import Denoiser
from iddpm.diffusion.grid import GRIDS, Chain, steps_at, walk
from iddpm.diffusion.objective import simple
from iddpm.diffusion.ode import log_density
from iddpm.diffusion.parametrization import PARAMETRIZATIONS
from iddpm.diffusion.schedule import SCHEDULES
from iddpm.diffusion.solvers import SOLVERS, Ddim, Edm, ancestral, dpmpp_2m_sde, run
from iddpm.diffusion.weighting import WEIGHTINGS


@cache
def path() -> Any:
    """The exact paths of 32 points in y = x_t / alpha over r = sigma / alpha, dy/dr = (y - x0) / r, by scipy's DOP853."""
    start = 6 * torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).numpy()

    def slope(r: float, y: Any) -> Any:
        x = torch.from_numpy(y).reshape(32, 2, 1, 1)
        return ((x - mixture.best_x0(x, 1.0, r)) / r).flatten().numpy()

    return solve_ivp(slope, (6.0, 0.15), start, method="DOP853", rtol=1e-12, atol=1e-12, dense_output=True, max_step=0.05).sol


def exact(alpha: Tensor, sigma: Tensor) -> Tensor:
    """Where the 32 points are at a level."""
    return alpha * torch.from_numpy(path()(float(sigma / alpha))).reshape(32, 2, 1, 1)


@pytest.mark.parametrize(("schedule", "solver"), diagonal(SCHEDULES, ORDERS))
def test_a_solver_is_of_the_order_it_claims_where_paths_part(schedule: str, solver: str) -> None:
    found = []  # of the coarse and the fine walk: level reached -> error there
    for steps in (100, 200):
        walked = ramped(schedule, steps)
        states = made(SOLVERS[solver])(best, exact(walked[0].alpha, walked[0].sigma), walked, noise_is_not_drawn)
        off = {
            float(s.sigma_to): float((state.x - exact(s.alpha_to, s.sigma_to)).abs().max()) for state, s in zip(states, walked)
        }
        found.append(dict(list(off.items())[:-4]))  # the last are of lower order
    both = [level for level in found[0] if level in found[1]]
    assert len(both) > 20
    errors = [max(off[level] for level in both) for off in found]
    order = math.log2(errors[0] / errors[1])
    assert -0.3 < order - ORDERS[solver] < 1.1, (errors, order)  # a corrector can be better than it claims


def sides(schedule: str) -> Any:
    return chain(schedule, 100) if schedule in DISCRETE else SCHEDULES[schedule]()


DRAWING = {
    "ancestral": ancestral, "ddim, eta 0.5": Ddim(0.5), "ddim, eta 1": Ddim(1.0), "dpmpp_2m_sde": dpmpp_2m_sde,
    "edm": Edm(S_churn=40.0, S_noise=1.0),
}  # fmt: skip


@pytest.mark.parametrize(("schedule", "solver"), diagonal(["cosine", "flow", "ve"], [*DRAWING, "unipc"]))
def test_samples_have_the_mean_the_covariance_and_the_shares_of_the_mixture(schedule: str, solver: str) -> None:
    """Within four standard errors of 4,000 draws; in 100 steps, solvers of order 1 are at five.

    Other schedules do the same at the same sigma/alpha. A part's share is the mean of how likely each draw is of it.
    """

    def noise(k: int) -> Tensor:
        return torch.randn(n, 2, 1, 1, generator=draws)

    n, whole = 4000, chain(schedule, 1000) if schedule in DISCRETE else SCHEDULES[schedule]()
    u = GRIDS["karras"]()(whole, 60 if solver in ("unipc", "edm", "dpmpp_2m_sde") else 300)
    grid = Chain(SCHEDULES[schedule](1000), steps_at(u, 1000)) if schedule in DISCRETE else walk(whole, u)
    draws = torch.Generator().manual_seed(0)
    solve = DRAWING.get(solver) or made(SOLVERS[solver])
    x = run(solve(best, grid.start * noise(0), grid, noise)).double()
    of, apart = mixture.parts(x, 1.0, 0.0).softmax(1), x.flatten(1) - MEAN
    products = apart[:, :, None] * apart[:, None]
    for found, true in ((apart, 0 * MEAN), (products, COVARIANCE), (of, SHARES)):
        assert ((found.mean(0) - true).abs() < 4 * found.std(0) / math.sqrt(n)).all()


@pytest.mark.parametrize("schedule", [name if name in ("cosine", "flow", "ve") else SLOW(name) for name in SCHEDULES])
def test_the_likelihood_by_the_ode_is_the_mixtures(schedule: str) -> None:
    """To 1e-3 bits a dimension; of the mixture with the noise of the least noisy level."""
    grid = (
        fine(schedule, 300) if schedule in DISCRETE else walk(SCHEDULES[schedule](), GRIDS["logsnr"](SCHEDULES[schedule](), 300))
    )
    x, least = mixture.draw(64, 1), grid.table.sigma[0] / grid.table.alpha[0]
    exact = mixture.log_density(x, 1.0, least) / 2
    off = (log_density(best, x, grid) - exact) / math.log(2)
    assert off.mean().abs() < 1e-3
    assert off.abs().mean() < (2e-3 if schedule == "ve" else 1e-3)  # whose end, N(0, 80^2), leaves out the data's mean


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize(
    ("schedule", "parametrization"),
    [("cosine", name) for name in PARAMETRIZATIONS] + [("cosine_vp", name) for name in PARAMETRIZATIONS if name != "previous"],
)
def test_every_loss_is_least_at_the_mixtures_denoiser(schedule: str, parametrization: str, weighting: str) -> None:
    """The gradient to a scale and to a shift of its x0 is 0, within four standard errors; beside it, it is not."""
    n, where = 4000, sides(schedule)
    generator = torch.Generator().manual_seed(0)
    x0, eps = mixture.draw(n, 2).float(), torch.randn(n, 2, 1, 1, generator=generator)
    u = 0.1 + 0.8 * torch.rand(n, dtype=torch.float64, generator=generator)
    level = where(u)
    c = meaning(parametrization)(level)
    skip, out = as_column(c.skip, x0).double(), as_column(c.out, x0).double()

    def z(scale: float, shift: float) -> Tensor:
        """The mean gradient to both, in its own standard errors, at a denoiser that is so much off."""
        knobs = torch.tensor([scale, shift], dtype=torch.float64).expand(n, 2).clone().requires_grad_()
        k, b = knobs.T.reshape(2, n, 1, 1, 1)

        def net(x: Tensor, t: Tensor) -> Tensor:
            xt = x.double() if c.inp is None else x.double() / as_column(c.inp, x)
            known = mixture.best_x0(xt, level.alpha[:, None], level.sigma[:, None])
            return (((1 + k) * known + b - skip * xt) / out).float()

        loss = simple(Denoiser(net, meaning(parametrization)), where, x0, eps, u, weighting=made(WEIGHTINGS[weighting]))["loss"]
        (each,) = torch.autograd.grad(loss.double().sum(), knobs)
        return each.mean(0) / (each.std(0) / math.sqrt(n))

    assert z(0.0, 0.0).abs().max() < 4 and z(0.2, 0.0)[0] > 10 and z(0.0, 0.1)[1] > 10
