"""Classifier guidance against the published loops, and against a closed form."""

from typing import Any

import pytest
import torch

from diffusion.rows import grid as grid_of
from golden_rules import Stub, load, noise
from iddpm.diffusion.denoiser import Denoiser, Prediction, clip, learned_range
from iddpm.diffusion.grid import Chain, respace
from iddpm.diffusion.guidance import classifier_gradient, guided
from iddpm.diffusion.parametrization import PARAMETRIZATIONS
from iddpm.diffusion.schedule import SCHEDULES, Cosine
from iddpm.diffusion.solvers import SOLVERS, Ddim, ancestral, run

SHAPE = (4, 3, 8, 8)


@pytest.mark.parametrize("golden", load("guided_sampling.json"), ids=lambda g: g["key"])
def test_guided_loops_end_where_the_published_ones_do(golden: dict[str, Any]) -> None:
    chain = Chain(Cosine(golden["T"]), respace(golden["T"], golden["respacing"]), rescale_time=False)
    denoiser = Denoiser(Stub(6), PARAMETRIZATIONS["eps"], learned_range, (clip,))
    solver: Any = Ddim() if golden["respacing"].startswith("ddim") else ancestral

    def draw(k: int) -> torch.Tensor:
        return noise(k, SHAPE)

    def gradient(x: torch.Tensor, step: Any) -> torch.Tensor:
        return golden["guide"] * x.cos() * (1 + step.time / 40)

    x = run(solver(guided(denoiser, gradient), draw(0), chain, draw))
    torch.testing.assert_close(x, torch.from_numpy(load("guided_sampling.npz")[golden["key"]]), atol=1e-5, rtol=1e-5)


def test_the_gradient_of_a_linear_classifier_is_its_closed_form() -> None:
    """logits = W x: the gradient of log softmax is w_y minus the mean of the rows under p; also inside inference mode."""
    w = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    x, y = noise(0, (2, 3, 2, 2)), torch.tensor([1, 4])
    with torch.inference_mode():
        gradient = classifier_gradient(lambda x, t: x.flatten(1) @ w.T, y, scale=3.0)
        got = gradient(x, Chain(Cosine(10)).at(torch.tensor([0, 9])))
    p = (x.flatten(1) @ w.T).softmax(1)
    torch.testing.assert_close(got.flatten(1), 3 * (w[y] - p @ w))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_solver_is_pulled_where_the_gradient_points_on_every_schedule(schedule: str, solver: str) -> None:
    grid, row = grid_of(schedule, 5), SOLVERS[solver]
    made = row() if isinstance(row, type) else row
    denoiser = Denoiser(lambda x, t: torch.zeros_like(x), PARAMETRIZATIONS["x0"])

    def end(pull: float) -> torch.Tensor:
        bent = guided(denoiser, lambda x, step: torch.full_like(x, pull))
        return run(made(bent, grid.start * noise(0, (1, 3, 4, 4)), grid, lambda k: noise(k, (1, 3, 4, 4))))

    assert end(0.1).isfinite().all()
    assert (end(0.1) > end(0.0)).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_guidance_by_the_true_likelihood_gives_the_posteriors_denoiser(schedule: str) -> None:
    """Data N(m, s^2) seen through y = x0 + N(0, r^2): the guided x0 is that of the Gaussian that is left of the data."""
    m, s, r, y = 0.3, 0.4, 0.25, -0.2

    def expected(x: Any, at: Any, m: float, s: float) -> Any:
        gain = at.alpha * s**2 / (at.alpha**2 * s**2 + at.sigma**2)
        return m + gain * (x - at.alpha * m)

    def gradient(x: Any, at: Any) -> Any:  # of log N(y; E[x0 | x_t], Var[x0 | x_t] + r^2)
        both = at.alpha**2 * s**2 + at.sigma**2
        return (y - expected(x, at, m, s)) / (s**2 * at.sigma**2 / both + r**2) * at.alpha * s**2 / both

    def denoise(x: Any, at: Any) -> Prediction:
        x0 = expected(x, at, m, s)
        return Prediction(x0, None, x0, None, None)

    left = 1 / (1 / s**2 + 1 / r**2)
    x = torch.linspace(-2, 2, 64, dtype=torch.float64).reshape(1, 1, 8, 8)
    for at in grid_of(schedule, 7):
        wanted = expected(at.sigma * x, at, left * (m / s**2 + y / r**2), left**0.5) if at.alpha else torch.full_like(x, m)
        torch.testing.assert_close(guided(denoise, gradient)(at.sigma * x, at).x0, wanted)


def test_the_mean_moves_by_the_variance_times_the_gradient() -> None:
    denoiser, x = Denoiser(Stub(), PARAMETRIZATIONS["x0"]), noise(0, SHAPE)
    for step in grid_of("cosine", 5):
        p, bent = denoiser(x, step), guided(denoiser, lambda x, step: x.cos())(x, step)
        torch.testing.assert_close(bent.mean, p.mean + p.log_var.exp() * x.cos())
