"""Solvers against closed forms: data that is N(m, s^2), whose best denoiser and probability-flow path are formulas."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import diagonal
from diffusion.rows import CONTINUOUS, DISCRETE, bind, chain, evenly, grid, made
from golden_rules import Stub, noise
from iddpm.diffusion.denoiser import Denoiser, clip, fixed_small, wide
from iddpm.diffusion.grid import GRIDS, Chain, Grid, respace, steps_at
from iddpm.diffusion.parametrization import PARAMETRIZATIONS
from iddpm.diffusion.schedule import SCHEDULES, VE, Cosine, Flow
from iddpm.diffusion.solvers import FAR, SOLVERS, Adaptive, Ddim, Edm, ancestral, ddim_inversion, run

# What is claimed of each solver: a new one is entered here, and in nothing else of this file.
ORDERS = {  # of those that draw nothing: errors fall as steps to the power of minus this
    "ddim": 1, "dpmpp_2m": 2, "dpmpp_3m": 3, "unipc": 3, "heun": 2, "ab2": 2, "ab4": 4,
}  # fmt: skip
ROUGH = {"ipndm"}  # of no order where steps are uneven, for its weights are those of even ones
DRAWS = {"ancestral", "dpmpp_2m_sde"}  # fresh noise at each step but the last
SOMETIMES = {"edm": {"S_churn": 0.0}}  # that draw only with these numbers at other values: without, they are Heun's
LEAPS = {"consistency"}  # for models of another kind, whose x0 is an image: of those of this file it makes none
OWN_STEPS = {"adaptive"}  # which chooses its levels itself
BEYOND = {"ab2", "ab4", "adaptive"}  # the last step is no jump to the guess
CALLS: dict[str, Callable[[Grid], int]] = {  # of the network on a grid, where they are not one a step
    "heun": lambda grid: max(1, 2 * grid.steps - 2),  # one at the last, and one at the step to it
    "edm": lambda grid: 2 * grid.steps - 1 - int((grid.table.sigma > FAR * grid.table.alpha).sum()),  # and far away
}

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
    draw, (denoiser, steps) = seeded(0), world(M, S).exact(spec)
    is_the_data(run(ancestral(denoiser, draw(0), steps, draw)))


@pytest.mark.parametrize("small", [True, False])
def test_ancestral_sampling_of_a_fixed_variance_gives_the_data_in_many_steps(world: Any, small: bool) -> None:
    draw, (denoiser, steps) = seeded(1, (1, 1, 128, 128)), world(M, S).denoiser("500", small)
    is_the_data(run(ancestral(denoiser, draw(0), steps, draw)), S)


def test_few_steps_of_a_fixed_variance_miss_the_data(world: Any) -> None:
    """The tests above could fail: the posterior's variance leaves out what x_t does not tell of x_0."""
    draw, (denoiser, steps) = seeded(2), world(M, S).denoiser("ddim10")
    assert run(ancestral(denoiser, draw(0), steps, draw)).std().item() < 0.97 * S


@pytest.mark.parametrize("schedule", CONTINUOUS)
def test_ancestral_sampling_of_the_true_reversal_needs_few_steps_on_any_schedule(schedule: str) -> None:
    def exact(x: Tensor, s: Any) -> Any:
        unsure = 1 / (1 / S**2 + (s.alpha / s.sigma) ** 2)  # Var[x_0 | x_t]
        between = s.log_max.exp() * (s.sigma_to / s.sigma) ** 2  # Var[x_to | x_t, x_0]
        return best(x, s)._replace(log_var=(between + s.coef_x0**2 * unsure).log())

    draw, walked = seeded(5), grid(schedule, 8)
    alpha, sigma = walked.table.alpha[0], walked.table.sigma[0]
    known = alpha * S / (alpha**2 * S**2 + sigma**2).sqrt()  # the last step gives the mean of x0, which varies less than x0
    is_the_data(run(ancestral(exact, walked.start * draw(0), walked, draw)), S * known.item())


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("schedule", CONTINUOUS)
def test_ddim_with_fresh_noise_gives_the_data_on_any_schedule(schedule: str, eta: float) -> None:
    draw, walked = seeded(6, (1, 1, 128, 128)), grid(schedule, 500)
    is_the_data(run(Ddim(eta)(best, walked.start * draw(0), walked, draw)))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_gives_the_data_for_any_eta(world: Any, eta: float) -> None:
    draw, (denoiser, steps) = seeded(3, (1, 1, 128, 128)), world(M, S).denoiser("250")
    is_the_data(run(Ddim(eta)(denoiser, draw(0), steps, draw)))


def noise_is_not_drawn(k: int) -> Tensor:
    raise AssertionError(f"asked for draw {k}")


def best(x: Tensor, s: Any) -> Any:
    """The denoiser that knows the data, at any level."""
    alpha, sigma = wide((s.alpha, s.sigma), x)
    gain = alpha * S**2 / (alpha**2 * S**2 + sigma**2)
    x0 = M + gain * (x - alpha * M)
    return Denoiser(lambda x, t: x0, PARAMETRIZATIONS["x0"], fixed_small)(x, s)


def fine(schedule: str, steps: int) -> Grid:
    """A grid of so many steps, of a chain out of 4000."""
    if schedule in DISCRETE:
        return chain(schedule, 4000, str(steps))
    return grid(schedule, steps)


@cache
def finest(schedule: str) -> Grid:
    """A grid so fine that its steps can be taken by the hundred."""
    steps = 400_000
    return chain(schedule, steps) if schedule in DISCRETE else evenly(SCHEDULES[schedule](), steps)


def ramped(schedule: str, steps: int) -> list[Any]:
    """Steps where 1/5 < sigma/alpha < 5: very short ones at first, each twice as long as the last, then `steps` to a whole path.

    So the first steps, for which a method that reads several calls has none yet, are too short to matter.
    """
    whole = finest(schedule)
    ratio = whole.table.sigma / whole.table.alpha
    top, low, even = int((ratio < 5).sum()) - 1, int((ratio < 1 / 5).sum()), whole.steps // steps
    short = [2**k for k in range(even.bit_length())]  # from here on
    kept = [top, *(top - sum(short[: k + 1]) for k in range(len(short))), *range(top - 2 * even, low, -even)]
    at = [whole.at(torch.tensor(i)) for i in kept]
    return [s._replace(alpha_to=to.alpha, sigma_to=to.sigma, time_to=to.time) for s, to in zip(at, at[1:])]


@pytest.mark.parametrize(("schedule", "solver"), diagonal(SCHEDULES, ORDERS))
def test_a_solver_is_of_the_order_it_claims(schedule: str, solver: str) -> None:
    """The exact path keeps (x_t - alpha m) / sqrt(alpha^2 s^2 + sigma^2); it is followed in float64.

    An order shows where steps are short: the first and the last ones, infinitely long in log(sigma/alpha), are left out.
    """
    errors = []
    for steps in (200, 400):
        walked = ramped(schedule, steps)
        first = walked[0]
        start = first.sigma * torch.linspace(-2, 2, 64, dtype=torch.float64).reshape(1, 1, 8, 8)
        z = (start - first.alpha * M) / (first.alpha**2 * S**2 + first.sigma**2).sqrt()
        path = made(SOLVERS[solver])(best64, start, walked, noise_is_not_drawn)
        ends = [at.alpha_to * M + z * (at.alpha_to**2 * S**2 + at.sigma_to**2).sqrt() for at in walked]
        errors.append(
            max((state.x - end).abs().max().item() for state, end in list(zip(path, ends))[:-4])
        )  # the last are of lower order
    order = math.log2(errors[0] / errors[1])
    assert -0.61 < order - ORDERS[solver] < 1.4, (errors, order)  # a corrector can be better than it claims


def best64(x: Tensor, s: Any) -> Any:
    """As `best`, all in float64."""
    gain = s.alpha * S**2 / (s.alpha**2 * S**2 + s.sigma**2)
    x0 = M + gain * (x - s.alpha * M)
    return Denoised(x0)


class Denoised:
    """What solvers that draw nothing read of a prediction."""

    def __init__(self, x0: Tensor):
        self.x0 = x0


@pytest.mark.parametrize(("schedule", "solver"), diagonal(SCHEDULES, [*ORDERS, *ROUGH, *OWN_STEPS, "edm without churn"]))
def test_a_solver_that_draws_nothing_turns_noise_into_the_data(schedule: str, solver: str) -> None:
    walked, draw = fine(schedule, 1000 if ORDERS.get(solver) == 1 else 400), seeded(4, (1, 1, 128, 128))
    solve = Edm(S_churn=0.0) if " " in solver else Adaptive(1e-3, 1e-3) if solver in OWN_STEPS else made(SOLVERS[solver])
    is_the_data(run(solve(best, walked.start * draw(0), walked, noise_is_not_drawn)))


@pytest.mark.parametrize("schedule", CONTINUOUS)
def test_solvers_with_fresh_noise_keep_the_mean_and_the_spread(schedule: str) -> None:
    for solver in (SOLVERS["dpmpp_2m_sde"], Edm(S_churn=80.0, S_noise=1.0)):
        draw, walked = seeded(7, (1, 1, 128, 128)), grid(schedule, 200)
        is_the_data(run(solver(best, walked.start * draw(0), walked, draw)))


@pytest.mark.parametrize("solver", [*ORDERS, *ROUGH, *OWN_STEPS])
@pytest.mark.parametrize("name", ["respaced", "karras"])
def test_a_network_that_is_a_little_wrong_ends_a_little_off_in_few_steps(solver: str, name: str) -> None:
    """On a cosine chain, which ends at sigma/alpha = 20,000: no step may multiply an error of x0 by much."""
    whole = Chain(Cosine(1000))
    u = GRIDS[name]()(whole, 8) if name == "karras" else GRIDS["uniform"](whole, 8)
    walked, x = Chain(Cosine(1000), steps_at(u, 1000)), noise(0, (2, 1, 8, 8))
    calls: list[int] = []

    def wrong(x: Tensor, s: Any) -> Any:
        calls.append(1)
        p = best(x, s)
        noisy = wide((s.sigma / (s.alpha + s.sigma),), x)[0]  # where there is little noise, a network gets little wrong
        return p._replace(x0=p.x0 + 0.05 * noisy * noise(100 + len(calls), x.shape))

    solve = made(SOLVERS[solver])
    off = run(solve(wrong, x, walked, noise_is_not_drawn)) - run(solve(best, x, walked, noise_is_not_drawn))
    assert off.square().mean().sqrt() < 4 * 0.05


def test_edm_without_churn_is_the_papers_first_algorithm_and_churn_draws() -> None:
    """Karras et al. 2022, algorithm 1, by hand."""
    walked, x = evenly(VE(), 9), 80.0 * noise(0, (2, 1, 8, 8))
    hand, sigmas = x.double(), [*walked.table.sigma.flip(0).tolist(), 0.0]
    for a, b in zip(sigmas, sigmas[1:]):
        d = (hand - best64(hand, VE()(VE().u_of(torch.tensor(a, dtype=torch.float64)))).x0) / a
        end = hand + (b - a) * d
        if b:
            d = (d + (end - best64(end, VE()(VE().u_of(torch.tensor(b, dtype=torch.float64)))).x0) / b) / 2
        hand = hand + (b - a) * d
    torch.testing.assert_close(run(Edm(S_churn=0.0)(best, x, walked, noise_is_not_drawn)), hand.float(), rtol=1e-4, atol=1e-4)
    draws: list[int] = []
    run(Edm(S_churn=40.0)(best, x, walked, lambda k: draws.append(k) or noise(k, x.shape)))  # type: ignore[func-returns-value]
    ratio = walked.table.sigma.flip(0)
    assert draws == [k + 1 for k, r in enumerate(ratio) if 0.05 <= r <= 50]


def test_adaptive_steps_of_an_image_do_not_depend_on_the_others() -> None:
    walked, x = evenly(Flow(), 9), noise(0, (3, 1, 8, 8)) * torch.tensor([0.2, 1.0, 3.0]).reshape(3, 1, 1, 1)
    solve = Adaptive(1e-3, 1e-3)
    together = run(solve(best, x, walked, noise_is_not_drawn))
    alone = torch.cat([run(solve(best, one[None], walked, noise_is_not_drawn)) for one in x])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", ["flow", "ve", "cosine"])
def test_adaptive_steps_come_as_near_as_they_are_told(schedule: str) -> None:
    walked, x = fine(schedule, 400), noise(0, (2, 1, 8, 8))
    x = walked.start * x
    exact = run(made(SOLVERS["unipc"])(best, x, walked, noise_is_not_drawn))
    errors, calls = [], []
    for tolerance in (0.1, 0.01, 0.001):
        states = list(Adaptive(tolerance, tolerance)(best, x, walked, noise_is_not_drawn))
        errors.append((states[-1].x - exact).abs().max().item())
        calls.append(len(states))
    assert calls == sorted(calls) and errors[2] < errors[0] and errors[2] < 0.02 and calls[0] < 30


def test_a_straight_path_takes_adams_one_step_and_many_alike() -> None:
    """Where all data is one image, rectified flow's slope is constant."""

    def one(x: Tensor, s: Any) -> Any:
        return Denoiser(lambda x, t: torch.full_like(x, M), PARAMETRIZATIONS["x0"], fixed_small)(x, s)

    x = noise(0, (2, 1, 8, 8))
    for solver, steps in (("ab2", 1), ("ab2", 7), ("ab4", 7)):
        end = run(made(SOLVERS[solver])(one, x, evenly(Flow(), steps), noise_is_not_drawn))
        torch.testing.assert_close(end, torch.full_like(x, M), rtol=1e-5, atol=1e-5)


def test_every_solver_is_entered() -> None:
    assert set(SOLVERS) == {*ORDERS, *ROUGH, *DRAWS, *SOMETIMES, *OWN_STEPS, *LEAPS}


def test_ddim_undoes_its_inversion_better_with_more_steps(world: Any) -> None:
    data, images = world(M, S, Cosine(4000)), M + S * noise(0, (1, 1, 16, 16))
    errors = []
    for steps in (25, 50, 100):
        denoiser, walked = data.denoiser(str(steps))
        states = list(ddim_inversion(denoiser, images, walked))
        assert len(states) == steps - 1
        back = run(Ddim()(denoiser, states[-1].x, walked, noise_is_not_drawn))
        errors.append((back - images).abs().max().item())
    assert errors[-1] < 0.1
    assert all(coarse / fine > 1.6 for coarse, fine in zip(errors, errors[1:]))


def test_inverted_data_is_standard_normal(world: Any) -> None:
    images, (denoiser, walked) = M + S * noise(0, SHAPE), world(M, S).denoiser("100")
    z = run(ddim_inversion(denoiser, images, walked))
    assert z.mean().item() == pytest.approx(0, abs=0.03) and z.std().item() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(("steps", "spec"), [(40, ""), (40, "10"), (1000, "50"), (4000, "50")])
@pytest.mark.parametrize("schedule", DISCRETE)
def test_ddim_with_eta_one_is_ancestral_with_fixed_small(schedule: str, steps: int, spec: str) -> None:
    """Step by step, from the same x: the means and the fresh noise."""
    denoiser = Denoiser(Stub(), PARAMETRIZATIONS["x0"], fixed_small)
    for k, s in enumerate(chain(schedule, steps, spec)):
        x, eps = noise(k, (2, 3, 4, 4)), noise(1000 + k, (2, 3, 4, 4))
        ends = []
        for scale in (0.0, 1.0):
            ends.append([run(solver(denoiser, x, [s], lambda k, e=scale * eps: e)) for solver in (ancestral, Ddim(1.0))])
        torch.testing.assert_close(*ends[0], rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(ends[1][0] - ends[0][0], ends[1][1] - ends[0][1], rtol=1e-4, atol=5e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_ddim_step_keeps_the_law_of_x_given_x0(schedule: str) -> None:
    """From N(alpha x0, sigma^2) to N(alpha_to x0, sigma_to^2) for any eta (Song et al. 2021, lemma 1)."""
    x0 = torch.full((1, 1, 64, 64), 0.6)
    denoiser = Denoiser(lambda x, t: x0, PARAMETRIZATIONS["x0"], fixed_small)
    for k, s in enumerate(list(grid(schedule, 20))[:-1]):
        xt = s.alpha * x0 + s.sigma * noise(k, x0.shape)
        for eta in (0.0, 0.4, 1.0):
            x = run(Ddim(eta)(denoiser, xt, [s], lambda n, k=k: noise(100 + k, x0.shape)))
            z = (x - s.alpha_to * x0) / s.sigma_to
            assert abs(z.mean()) < 5 / 64 and abs(z.std() - 1) < 5 / (64 * math.sqrt(2))


@pytest.mark.parametrize("steps", [2, 3, 10])  # two and three: all that comes after pure noise, where alpha is 0
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_path_ends_at_its_last_guess_and_draws_what_it_says(schedule: str, solver: str, steps: int) -> None:
    draws, calls = [], []

    def draw(k: int) -> Tensor:
        draws.append(k)
        return noise(k, (2, 3, 8, 8))

    def denoise(x: Tensor, s: Any) -> Any:
        calls.append(s.sigma)
        return Denoiser(Stub(), PARAMETRIZATIONS["x0"], fixed_small, (clip,))(x, s)

    walked = grid(schedule, steps)
    states = list(made(SOLVERS[solver])(denoise, walked.start * noise(0, (2, 3, 8, 8)), walked, draw))
    assert all(s.x.isfinite().all() and s.x.dtype == torch.float32 for s in states)
    if solver not in OWN_STEPS:
        assert len(states) == steps and len(calls) == CALLS.get(solver, lambda grid: grid.steps)(walked)
    if solver not in BEYOND:
        torch.testing.assert_close(states[-1].x, states[-1].x0)  # the last step adds no noise
    if solver not in SOMETIMES:
        assert draws == (list(range(1, steps)) if solver in DRAWS | LEAPS else [])


def test_ddim_draws_as_ancestral_does_where_eta_is_positive() -> None:
    draws = []

    def draw(k: int) -> Tensor:
        draws.append(k)
        return noise(k, (2, 3, 8, 8))

    walked = Chain(Cosine(40), respace(40, "10"))
    denoiser = Denoiser(Stub(), PARAMETRIZATIONS["eps"], fixed_small, (clip,))
    by_ddim = run(Ddim(1.0)(denoiser, noise(0, (2, 3, 8, 8)), walked, draw))
    by_ancestral = run(ancestral(denoiser, noise(0, (2, 3, 8, 8)), walked, draw))
    assert draws == 2 * list(range(1, 10))
    torch.testing.assert_close(by_ddim, by_ancestral, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", SOLVERS)
def test_respacing_to_every_step_changes_nothing(solver: str) -> None:
    x, ends = noise(0, (2, 3, 8, 8)), []
    for kept in (None, respace(40, "40")):
        denoiser = Denoiser(Stub(), PARAMETRIZATIONS["eps"], fixed_small, (clip,))
        walked = Chain(Cosine(40), kept)
        ends.append(run(made(SOLVERS[solver])(denoiser, x, walked, lambda k: noise(k, (2, 3, 8, 8)))))
    assert torch.equal(*ends)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_grid_of_one_step_jumps_to_the_guess(solver: str, schedule: str) -> None:
    walked = Chain(SCHEDULES[schedule](40), [39]) if schedule in DISCRETE else grid(schedule, 1)
    x = walked.start * noise(0, (2, 3, 8, 8))
    end = run(made(SOLVERS[solver])(Denoiser(Stub(), PARAMETRIZATIONS["x0"]), x, walked, noise_is_not_drawn))
    torch.testing.assert_close(end, Stub()(x, walked.table.time.float().expand(2)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("path", [*SOLVERS, "ddim_inversion"])
def test_the_condition_reaches_the_network_at_every_step(path: str) -> None:
    seen = []

    class Conditional(Stub):
        def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
            seen.append(cond["y"])
            return super().__call__(x, t)

    y, walked = torch.zeros(2), Chain(Cosine(5))
    denoise = bind(Denoiser(Conditional(), PARAMETRIZATIONS["eps"], fixed_small, (clip,)), y=y)
    x = noise(0, (2, 3, 8, 8))
    if path == "ddim_inversion":
        list(ddim_inversion(denoise, x, walked))
    else:
        list(made(SOLVERS[path])(denoise, x, walked, lambda k: noise(k, (2, 3, 8, 8))))
    assert len(seen) >= 4 and all(s is y for s in seen)
