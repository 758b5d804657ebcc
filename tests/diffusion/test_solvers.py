"""Solvers against closed forms: data that is N(m, s^2), whose best denoiser and DDIM path are formulas."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from golden_rules import Stub, noise
from iddpm.diffusion.denoiser import Denoiser, fixed_small
from iddpm.diffusion.parametrization import PARAMETRIZATIONS
from iddpm.diffusion.schedule import SCHEDULES, Chain, Cosine, respace
from iddpm.diffusion.solvers import SOLVERS, ancestral, ancestral_step, ddim, ddim_inversion, ddim_step, run

SHAPE = (2, 1, 128, 128)  # 32768 pixels: their mean is known to 0.0055 s, their deviation to 0.4 %
M, S = 0.3, 0.4


def seeded(seed: int, shape: tuple[int, ...] = SHAPE) -> Callable[[int], Tensor]:
    """A source of draws."""
    generator = torch.Generator().manual_seed(seed)
    return lambda k: torch.randn(shape, generator=generator)


def is_the_data(x: Tensor, std: float = S) -> None:
    assert x.mean().item() == pytest.approx(M, abs=5 * std / math.sqrt(x.numel()))
    assert x.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * x.numel()))
    quartiles = (x.quantile(torch.tensor([0.25, 0.75])) - M) / std
    torch.testing.assert_close(quartiles, torch.tensor([-0.6745, 0.6745]), atol=0.05, rtol=0)


@pytest.mark.parametrize("spec", ["ddim10", "50"])
def test_ancestral_sampling_of_the_true_reversal_gives_the_data_in_few_steps(world: Any, spec: str) -> None:
    draw = seeded(0)
    is_the_data(run(ancestral(world(M, S).exact(spec), draw(0), draw)))


@pytest.mark.parametrize("small", [True, False])
def test_ancestral_sampling_of_a_fixed_variance_gives_the_data_in_many_steps(world: Any, small: bool) -> None:
    draw = seeded(1, (1, 1, 128, 128))
    is_the_data(run(ancestral(world(M, S).denoiser("500", small), draw(0), draw)), S)


def test_few_steps_of_a_fixed_variance_miss_the_data(world: Any) -> None:
    """The tests above could fail: the posterior's variance leaves out what x_t does not tell of x_0."""
    draw = seeded(2)
    assert run(ancestral(world(M, S).denoiser("ddim10"), draw(0), draw)).std().item() < 0.97 * S


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_gives_the_data_for_any_eta(world: Any, eta: float) -> None:
    draw = seeded(3, (1, 1, 128, 128))
    is_the_data(run(ddim(world(M, S).denoiser("250"), draw(0), draw, eta=eta)))


def test_ddim_is_of_first_order(world: Any) -> None:
    """Its exact path keeps (x_t - alpha m) / sqrt(alpha^2 s^2 + sigma^2) ; errors fall as 1 / steps."""
    data = world(M, S, Cosine(4000))
    errors = []
    for steps in (25, 50, 100):
        denoiser, start = data.denoiser(str(steps)), torch.linspace(-2, 2, 64).reshape(1, 1, 8, 8)
        alpha, sigma = denoiser.chain.table.alpha[-1].item(), denoiser.chain.table.sigma[-1].item()
        path = M + S * (start - alpha * M) / math.sqrt(alpha**2 * S**2 + sigma**2)
        errors.append((run(ddim(denoiser, start, noise_is_not_drawn)) - path).abs().max().item())
    assert errors[-1] < 0.02
    assert all(1.6 < coarse / fine < 2.6 for coarse, fine in zip(errors, errors[1:]))


def noise_is_not_drawn(k: int) -> Tensor:
    raise AssertionError(f"asked for draw {k}")


def test_ddim_undoes_its_inversion_better_with_more_steps(world: Any) -> None:
    data, images = world(M, S, Cosine(4000)), M + S * noise(0, (1, 1, 16, 16))
    errors = []
    for steps in (25, 50, 100):
        denoiser = data.denoiser(str(steps))
        states = list(ddim_inversion(denoiser, images))
        assert [state.i for state in states] == list(range(steps - 1))
        back = run(ddim(denoiser, states[-1].x, noise_is_not_drawn))
        errors.append((back - images).abs().max().item())
    assert errors[-1] < 0.1
    assert all(coarse / fine > 1.6 for coarse, fine in zip(errors, errors[1:]))


def test_inverted_data_is_standard_normal(world: Any) -> None:
    images = M + S * noise(0, SHAPE)
    z = run(ddim_inversion(world(M, S).denoiser("100"), images))
    assert z.mean().item() == pytest.approx(0, abs=0.03) and z.std().item() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(("steps", "spec"), [(40, ""), (40, "10"), (1000, ""), (4000, "")])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim_with_eta_one_is_ancestral_with_fixed_small(schedule: str, steps: int, spec: str) -> None:
    chain = Chain(SCHEDULES[schedule](steps), respace(steps, spec))
    i = torch.arange(chain.steps)
    xt, eps = noise(0, (chain.steps, 3, 2, 2)), noise(1, (chain.steps, 3, 2, 2))
    p = Denoiser(Stub(), chain, PARAMETRIZATIONS["x0"], fixed_small)(xt, i)
    step = chain.at(i, xt)
    mean = ancestral_step(p, xt, step, 0 * eps)
    torch.testing.assert_close(ddim_step(p, xt, step, 0 * eps, eta=1.0), mean, rtol=1e-5, atol=2e-6)
    fresh = ancestral_step(p, xt, step, eps) - mean
    torch.testing.assert_close(ddim_step(p, xt, step, eps, eta=1.0) - mean, fresh, rtol=1e-4, atol=5e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_ddim_step_keeps_the_law_of_x_given_x0(schedule: str) -> None:
    """From N(alpha x0, sigma^2) to N(alpha_prev x0, sigma_prev^2) for any eta (Song et al. 2021, lemma 1)."""
    chain, x0 = Chain(SCHEDULES[schedule](40)), torch.full((39, 1, 64, 64), 0.6)
    i = torch.arange(1, 40)
    step = chain.at(i, x0)
    denoiser = Denoiser(lambda x, t: x0, chain, PARAMETRIZATIONS["x0"], fixed_small)
    xt = step.alpha * x0 + step.sigma * noise(0, x0.shape)
    p = denoiser(xt, i)
    for eta in (0.0, 0.4, 1.0):
        z = (ddim_step(p, xt, step, noise(1, x0.shape), eta) - step.alpha_prev * x0) / step.sigma_prev
        assert z.mean((1, 2, 3)).abs().max() < 5 / 64
        assert (z.std((1, 2, 3)) - 1).abs().max() < 5 / (64 * math.sqrt(2))


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_path_counts_the_chain_down_and_ends_at_its_last_guess(solver: str) -> None:
    draws = []

    def draw(k: int) -> Tensor:
        draws.append(k)
        return noise(k, (2, 3, 8, 8))

    chain = Chain(Cosine(40), respace(40, "10"))
    denoiser = Denoiser(Stub(), chain, PARAMETRIZATIONS["eps"], fixed_small, clip=True)
    states = list(SOLVERS[solver](denoiser, noise(0, (2, 3, 8, 8)), draw))
    assert [s.i for s in states] == list(range(9, -1, -1))
    torch.testing.assert_close(states[-1].x, states[-1].x0)  # the last step adds no noise
    assert draws == (list(range(1, 10)) if solver == "ancestral" else [])


def test_ddim_draws_as_ancestral_does_where_eta_is_positive() -> None:
    draws = []

    def draw(k: int) -> Tensor:
        draws.append(k)
        return noise(k, (2, 3, 8, 8))

    chain = Chain(Cosine(40), respace(40, "10"))
    denoiser = Denoiser(Stub(), chain, PARAMETRIZATIONS["eps"], fixed_small, clip=True)
    by_ddim = run(ddim(denoiser, noise(0, (2, 3, 8, 8)), draw, eta=1.0))
    by_ancestral = run(ancestral(denoiser, noise(0, (2, 3, 8, 8)), draw))
    assert draws == 2 * list(range(1, 10))
    torch.testing.assert_close(by_ddim, by_ancestral, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", SOLVERS)
def test_respacing_to_every_step_changes_nothing(solver: str) -> None:
    x, ends = noise(0, (2, 3, 8, 8)), []
    for kept in (None, respace(40, "40")):
        denoiser = Denoiser(Stub(), Chain(Cosine(40), kept), PARAMETRIZATIONS["eps"], fixed_small, clip=True)
        ends.append(run(SOLVERS[solver](denoiser, x, lambda k: noise(k, (2, 3, 8, 8)))))
    assert torch.equal(*ends)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_chain_of_one_step_jumps_to_the_guess(solver: str) -> None:
    denoiser = Denoiser(Stub(), Chain(Cosine(40), [39]), PARAMETRIZATIONS["x0"], fixed_small)
    x = noise(0, (2, 3, 8, 8))
    end = run(SOLVERS[solver](denoiser, x, noise_is_not_drawn))
    torch.testing.assert_close(end, Stub()(x, torch.full((2,), 975.0)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("path", [ancestral, ddim, ddim_inversion])
def test_the_condition_reaches_the_network_at_every_step(path: Callable[..., Any]) -> None:
    seen = []

    class Conditional(Stub):
        def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
            seen.append(cond["y"])
            return super().__call__(x, t)

    y = torch.zeros(2)
    denoiser = Denoiser(Conditional(), Chain(Cosine(5)), PARAMETRIZATIONS["eps"], fixed_small, clip=True)
    rest = () if path is ddim_inversion else (lambda k: noise(k, (2, 3, 8, 8)),)
    states = list(path(denoiser, noise(0, (2, 3, 8, 8)), *rest, {"y": y}))
    assert len(seen) == len(states) and all(s is y for s in seen)
