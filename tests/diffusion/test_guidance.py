"""Guidance: by a classifier, against the published loops and a closed form; by a poorer guess, against each paper's formula."""

from typing import Any

import pytest
import torch

from diffusion.rows import evenly
from diffusion.rows import grid as grid_of
from golden_rules import Stub, load, noise
from iddpm.diffusion.denoiser import Denoiser, Prediction, Threshold, clip, learned_range
from iddpm.diffusion.grid import Chain, respace
from iddpm.diffusion.guidance import (
    Apg,
    CfgZero,
    Steering,
    Taught,
    autoguided,
    cfg,
    classifier_free,
    classifier_gradient,
    first_known,
    guided,
    limited,
    told,
)
from iddpm.diffusion.objective import simple
from iddpm.diffusion.parametrization import PARAMETRIZATIONS
from iddpm.diffusion.schedule import SCHEDULES, VE, Cosine, Flow
from iddpm.diffusion.solvers import SOLVERS, Ddim, ancestral, run

SHAPE = (4, 3, 8, 8)
MEANS = {0: 0.5, 1: -0.1}  # of a class, and 1 stands for no class
ASKED, NOTHING = {"y": torch.tensor([0, 0])}, {"y": torch.tensor([1, 1])}
X = noise(3, (2, 3, 8, 8))


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
    if solver not in ("ab2", "ab4"):  # these go on along the huge pull of the noisiest steps, and past the image
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


# ---- trained in


def knowing(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The network that has learned all: of scale 1 that of the class or of none, else guided, as `Taught` asks for."""
    at = torch.tensor([MEANS[0], MEANS[1]])
    return 0.5 * x + (at[1] + scale * (at[y] - at[1])).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("parametrization", ["x0", "flow", "v"])
def test_what_guidance_trained_in_asks_for_is_what_two_calls_make(parametrization: str) -> None:
    """The target's addition is (scale - 1) (output with - output without); with the x0 of all outputs it is that of x0."""
    denoiser = Denoiser(knowing, PARAMETRIZATIONS[parametrization])
    level, scale = SCHEDULES["cosine_vp"]()(torch.tensor([0.3, 0.8], dtype=torch.float64)), torch.tensor([1.0, 2.5])
    added = Taught(none=1)(denoiser, X, level, ASKED | {"scale": scale})
    torch.testing.assert_close(added, ((scale - 1) * (MEANS[0] - MEANS[1])).reshape(-1, 1, 1, 1).expand_as(X))
    told_of = told(denoiser, ASKED, 2.5)(X, level).x0
    without = NOTHING | {"scale": torch.ones(2)}
    twice = classifier_free(denoiser, ASKED | {"scale": torch.ones(2)}, without, Steering(cfg(2.5)))(X, level).x0
    torch.testing.assert_close(told_of, twice)


def test_its_network_is_at_the_minimum_of_the_loss_and_one_that_ignores_the_scale_is_not() -> None:
    x0, scale = torch.full((2, 3, 8, 8), MEANS[0]), torch.tensor([1.0, 2.5])
    u, eps = torch.tensor([0.4, 0.4], dtype=torch.float64), torch.zeros(2, 3, 8, 8)
    shown = 0.6 * x0  # x_t; a network of x0 that has learned this one image of the class
    right = Denoiser(lambda x, t, y, scale: knowing(x - shown[0], t, y, scale)[..., :8, :8], PARAMETRIZATIONS["x0"])
    loss = simple(right, Flow(), x0, eps, u, ASKED | {"scale": scale}, toward=Taught(none=1))["loss"]
    torch.testing.assert_close(loss, torch.zeros(2), atol=1e-10, rtol=0)
    plain = Denoiser(lambda x, t, y, scale: two(x - shown.repeat(len(x) // 2, 1, 1, 1), t, y), PARAMETRIZATIONS["x0"])
    missed = simple(plain, Flow(), x0, eps, u, ASKED | {"scale": scale}, toward=Taught(none=1))["loss"]
    torch.testing.assert_close(missed, torch.tensor([0.0, (1.5 * (MEANS[0] - MEANS[1])) ** 2]))


# ---- by a poorer guess: two Gaussians, of which the network knows each by its class


def two(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A network whose x0 depends on x and on the class, and which counts its calls."""
    two.calls += 1  # type: ignore[attr-defined]
    return 0.5 * x + torch.tensor([MEANS[0], MEANS[1]])[y].reshape(-1, 1, 1, 1)


two.calls = 0  # type: ignore[attr-defined]


def bent(steering: Steering) -> Any:
    return classifier_free(Denoiser(two, PARAMETRIZATIONS["x0"]), ASKED, NOTHING, steering)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_classifier_free_guidance_goes_on_past_the_class_in_one_call(scale: float) -> None:
    for step in grid_of("cosine", 5):
        two.calls = 0  # type: ignore[attr-defined]
        p = bent(Steering(cfg(scale)))(X, step)
        assert two.calls == 1  # type: ignore[attr-defined]
        torch.testing.assert_close(p.x0, 0.5 * X + MEANS[1] + scale * (MEANS[0] - MEANS[1]))
        torch.testing.assert_close(p.mean, (step.coef_x0 * p.x0 + step.coef_xt * X).float())


def test_the_scale_1_of_every_kind_is_the_class_itself_and_levels_may_differ() -> None:
    for levels in (evenly(Flow(), 5).at(torch.tensor([1, 3])), Flow()(torch.tensor([0.2, 0.7], dtype=torch.float64))):
        for row in (cfg, Apg()):
            torch.testing.assert_close(bent(Steering(row(1.0)))(X, levels).x0, 0.5 * X + MEANS[0])


def test_outside_its_interval_guidance_is_not_even_asked_for() -> None:
    for step in grid_of("ve", 9):
        inside = 0.1 <= step.sigma / step.alpha <= 2
        x0 = bent(Steering(cfg(2.0), 0.1, 2.0))(X, step).x0
        torch.testing.assert_close(x0, 0.5 * X + (MEANS[0] + (MEANS[0] - MEANS[1]) if inside else MEANS[0]))
    levels = VE()(torch.tensor([0.3, 0.999], dtype=torch.float64))  # of which the first is inside
    x0 = bent(Steering(cfg(2.0), 0.0, 2.0))(X, levels).x0
    torch.testing.assert_close(x0[1], 0.5 * X[1] + MEANS[0])
    torch.testing.assert_close(x0[0], 0.5 * X[0] + 2 * MEANS[0] - MEANS[1])


def test_rescaled_guidance_has_the_spread_of_the_class() -> None:
    step = next(iter(grid_of("cosine", 5)))
    x0 = bent(Steering(lambda better, poorer, x, level: 3 * better, rescale=1.0))(X, step).x0
    torch.testing.assert_close(x0.flatten(1).std(1), (0.5 * X).flatten(1).std(1))
    half = bent(Steering(lambda better, poorer, x, level: 3 * better, rescale=0.5))(X, step).x0
    torch.testing.assert_close(half, (x0 + 3 * (0.5 * X + MEANS[0])) / 2)


def test_projected_guidance_moves_at_right_angles_no_farther_than_told_and_remembers() -> None:
    """Sadat et al. 2025, algorithm 1, by hand."""
    better, poorer, level = noise(0, SHAPE), noise(1, SHAPE), None
    d = better - poorer
    along = (d * better).flatten(1).sum(1) / better.flatten(1).square().sum(1)
    right = d - along.reshape(-1, 1, 1, 1) * better
    combine = Apg(apg_momentum=0.0)(2.5)
    torch.testing.assert_close(combine(better, poorer, better, level), better + 1.5 * right)
    torch.testing.assert_close(Apg(apg_parallel=1.0)(2.5)(better, poorer, better, level), better + 1.5 * d)
    short = Apg(apg_norm=0.1, apg_parallel=1.0)(2.0)(better, poorer, better, level) - better
    torch.testing.assert_close(short.flatten(1).norm(dim=1), torch.full((4,), 0.1))
    combine = Apg(apg_parallel=1.0, apg_momentum=-0.5)(2.0)
    steps = [combine(better, poorer, better, level) - better for _ in range(3)]
    torch.testing.assert_close(steps[1], 0.5 * d)
    torch.testing.assert_close(steps[2], 0.75 * d)


def test_cfg_zero_scales_the_poorer_velocity_to_fit_and_stands_still_at_first() -> None:
    """Fan et al. 2025, algorithm 1, in the velocities of the flow."""
    better, poorer, level = noise(0, SHAPE), noise(1, SHAPE), Flow()(torch.tensor(0.6, dtype=torch.float64))
    x = noise(2, SHAPE)
    good, poor = (x - better) / 0.6, (x - poorer) / 0.6  # eps - x0, where x = 0.4 x0 + 0.6 eps
    fit = (good * poor).flatten(1).sum(1) / poor.square().flatten(1).sum(1)
    wanted = (1 - 2.0) * fit.reshape(-1, 1, 1, 1) * poor + 2.0 * good
    x0 = CfgZero()(2.0)(better, poorer, x, level)
    torch.testing.assert_close((x - x0) / 0.6, wanted, rtol=1e-5, atol=1e-5)
    first = Flow()(torch.tensor(0.97, dtype=torch.float64))
    torch.testing.assert_close(CfgZero()(2.0)(better, poorer, x, first), x)


def test_autoguidance_goes_away_from_the_weak_model_and_stacks_on_the_other() -> None:
    step = next(iter(grid_of("cosine", 5)))
    weak: Any = Denoiser(lambda x, t: 0.3 * x, PARAMETRIZATIONS["x0"])
    inner = bent(Steering(cfg(2.0)))
    p = autoguided(inner, weak, Steering(cfg(1.5)))(X, step)
    torch.testing.assert_close(p.x0, 0.3 * X + 1.5 * (inner(X, step).x0 - 0.3 * X))
    torch.testing.assert_close(p.mean, (step.coef_x0 * p.x0 + step.coef_xt * X).float())


def test_limits_come_after_guidance_and_move_the_mean() -> None:
    step = next(iter(grid_of("cosine", 5)))
    p = limited(bent(Steering(cfg(9.0))), clip)(X, step)
    assert p.x0.abs().max() == 1
    torch.testing.assert_close(p.mean, (step.coef_x0 * p.x0 + step.coef_xt * X).float(), rtol=1e-4, atol=1e-5)


def test_a_dynamic_threshold_divides_by_the_quantile_where_it_is_above_1() -> None:
    x0 = torch.stack([torch.linspace(-0.5, 0.5, 101), torch.linspace(-4, 4, 101)]).reshape(2, 1, 1, 101)
    kept = Threshold(0.5)(x0)
    torch.testing.assert_close(kept[0], x0[0])
    torch.testing.assert_close(kept[1], (x0[1] / 2).clamp(-1, 1))


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_first_call_can_be_left_out(solver: str) -> None:
    """Where all data is black, x0 = 0, it changes nothing but the calls."""
    grid, row, ends, calls = grid_of("ve", 6), SOLVERS[solver], [], [0, 0]
    made = row() if isinstance(row, type) else row
    for k in (0, 1):

        def net(x: torch.Tensor, t: torch.Tensor, k: int = k) -> torch.Tensor:
            calls[k] += 1
            return torch.zeros_like(x)

        denoise: Any = Denoiser(net, PARAMETRIZATIONS["x0"])
        denoise = first_known(denoise) if k else denoise
        ends.append(run(made(denoise, grid.start * noise(0, SHAPE), grid, lambda k: noise(k, SHAPE))))
    assert calls[0] == calls[1] + 1
    torch.testing.assert_close(*ends, atol=1e-6, rtol=0)


def test_the_first_call_is_left_out_only_where_all_is_noise() -> None:
    denoise: Any = Denoiser(lambda x, t: 0.5 * x, PARAMETRIZATIONS["x0"])
    for step in grid_of("cosine", 5):
        x0 = first_known(denoise)(X, step).x0
        torch.testing.assert_close(x0, torch.zeros_like(X) if step.alpha**2 <= 0.02 else 0.5 * X)
