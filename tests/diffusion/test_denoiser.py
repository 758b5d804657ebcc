"""What a network's output stands for: every parametrization of one prediction is the same prediction."""

import pytest
import torch
from torch import Tensor

from diffusion.rows import CONTINUOUS, DISCRETE, as_column, chain, columns, meaning
from golden_rules import Stub, image_tensor, noise
from iddpm.diffusion.denoiser import (
    LEARNED,
    VARIANCES,
    Denoiser,
    clip,
    fixed_large,
    fixed_small,
    learned,
    learned_range,
    times,
    wide,
)
from iddpm.diffusion.grid import Chain, Step, respace
from iddpm.diffusion.parametrization import PARAMETRIZATIONS, Scalings, previous
from iddpm.diffusion.schedule import SCHEDULES, Cosine, Level, Linear

SHAPE = (6, 3, 4, 4)
X0, EPS, GUESS = image_tensor(0, SHAPE), noise(0, SHAPE), image_tensor(1, SHAPE)


def spread(chain: Chain) -> Step:
    """Six steps of a chain, its ends among them."""
    return chain.at(torch.linspace(0, chain.steps - 1, 6).long())


def target(c: Scalings) -> Tensor:
    """What the network is asked for."""
    return as_column(c.of_x0, X0) * X0 + as_column(c.of_eps, X0) * EPS


@pytest.mark.parametrize("spec", ["", "10"])
@pytest.mark.parametrize("schedule", DISCRETE)
@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_a_network_that_gives_the_exact_target_recovers_x0(name: str, schedule: str, spec: str) -> None:
    """To the rounding of x_t, which is divided by alpha or coef_x0 where the output holds no x0."""
    step = spread(chain(schedule, 100, spec))
    s, exact = columns(step, X0), target(meaning(name)(step))
    p = Denoiser(lambda x, t: exact, meaning(name), fixed_small)(s.alpha * X0 + s.sigma * EPS, step)
    amplified = {"eps": 1 / s.alpha, "edm": 1 / s.alpha, "previous": 1 / s.coef_x0}.get(name, torch.ones_like(s.alpha))
    assert ((p.x0 - X0).abs() <= 2e-6 * amplified).all()


@pytest.mark.parametrize("schedule", CONTINUOUS)
@pytest.mark.parametrize("name", [name for name in PARAMETRIZATIONS if name not in ("previous", "v")])
def test_so_it_does_at_the_levels_of_continuous_schedules(name: str, schedule: str) -> None:
    level = SCHEDULES[schedule]()(torch.linspace(0.02, 0.98, 6, dtype=torch.float64))
    alpha, sigma = as_column(level.alpha, X0), as_column(level.sigma, X0)
    exact = target(meaning(name)(level))
    p = Denoiser(lambda x, t: exact, meaning(name))(alpha * X0 + sigma * EPS, level)
    assert ((p.x0 - X0).abs() <= 4e-7 * (alpha + 4 * sigma) / alpha + 2e-6).all()
    assert p.mean is None and p.log_var is None  # a level knows no next one


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_targets_agree_with_their_definitions(name: str) -> None:
    step = spread(Chain(Linear(100)))
    s = columns(step, X0)
    xt = s.alpha * X0 + s.sigma * EPS
    h, d = s.sigma / s.alpha, 0.5
    defined = {
        "eps": EPS,
        "x0": X0,
        "v": s.alpha * EPS - s.sigma * X0,
        "previous": s.coef_x0 * X0 + s.coef_xt * xt,
        "flow": EPS - X0,
        # Karras et al. 2022, eq. 8, of x = x_t / alpha: (y - c_skip x) / c_out
        "edm": (X0 - d**2 / (h**2 + d**2) * xt / s.alpha) / (h * d / (h**2 + d**2).sqrt()),
    }
    torch.testing.assert_close(target(meaning(name)(step)), defined[name], rtol=1e-5, atol=5e-5 if name == "edm" else 1e-6)


def test_the_target_of_eps_is_the_noise_to_the_bit() -> None:
    assert torch.equal(target(meaning("eps")(spread(Chain(Cosine(4000))))), EPS)


def test_edms_input_and_target_have_unit_variance_for_data_of_its_deviation() -> None:
    x0, eps = 0.5 * noise(2, (6, 3, 64, 64)), noise(3, (6, 3, 64, 64))
    level = SCHEDULES["ve"]()(torch.linspace(0, 0.99, 6, dtype=torch.float64))
    c = meaning("edm")(level)
    seen = as_column(c.inp, x0) * (as_column(level.alpha, x0) * x0 + as_column(level.sigma, x0) * eps)
    wanted = as_column(c.of_x0, x0) * x0 + as_column(c.of_eps, x0) * eps
    for each in (seen, wanted):
        torch.testing.assert_close(each.flatten(1).std(1), torch.ones(6), rtol=0.03, atol=0)
    torch.testing.assert_close(c.time, level.sigma.log() / 4)


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_one_guess_in_any_parametrization_is_one_prediction(name: str) -> None:
    """The output is solved for from x_t and the guess, in float64, by x0 = skip x_t + out output."""
    step = spread(Chain(Linear(100)))  # alpha stays above 0.006, so that eps says something about x0
    s, c = columns(step, X0), meaning(name)(step)
    xt = s.alpha * X0 + s.sigma * EPS
    skip, out = (v.reshape(-1, 1, 1, 1) for v in (c.skip, c.out))
    output = ((GUESS.double() - skip * xt.double()) / out).float()
    p = Denoiser(lambda x, t: output, meaning(name), fixed_small)(xt, step)
    amplified = {"eps": 1 / s.alpha, "edm": 1 / s.alpha, "previous": 1 / s.coef_x0}.get(name, torch.ones_like(s.alpha))
    assert ((p.x0 - GUESS).abs() <= 2e-6 * amplified).all()
    torch.testing.assert_close(p.mean, s.coef_x0 * GUESS + s.coef_xt * xt, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_clipping_holds_x0_in_range_and_moves_the_mean_with_it(name: str) -> None:
    step = spread(Chain(Cosine(40)))
    s, xt = columns(step, X0), 2 * EPS
    plain = Denoiser(Stub(), meaning(name), fixed_small)(xt, step)
    clipped = Denoiser(Stub(), meaning(name), fixed_small, (clip,))(xt, step)
    assert torch.equal(clipped.x0, plain.x0.clamp(-1, 1))
    believed = plain.raw if PARAMETRIZATIONS[name] is previous else s.coef_x0 * clipped.x0 + s.coef_xt * xt
    assert torch.equal(clipped.mean, believed)


def test_the_fixed_variances_are_beta_and_the_posteriors() -> None:
    chain = Chain(Cosine(40))
    step = chain.table
    bar = (1 - chain.betas).cumprod(0)
    posterior = chain.betas[1:] * (1 - bar[:-1]) / (1 - bar[1:])
    torch.testing.assert_close(fixed_small(step, None)[1:].exp(), posterior, rtol=1e-5, atol=0)
    torch.testing.assert_close(fixed_large(step, None)[1:].exp(), chain.betas[1:], rtol=1e-5, atol=0)
    assert fixed_large(step, None)[0] == fixed_small(step, None)[0] == fixed_small(step, None)[1]


def test_a_learned_range_runs_from_the_posteriors_variance_to_beta() -> None:
    step, one = columns(spread(Chain(Cosine(40))), X0), torch.ones(SHAPE)
    assert torch.equal(learned_range(step, -one), step.log_min.expand(SHAPE))
    assert torch.equal(learned_range(step, one), step.log_max.expand(SHAPE))
    halfway = (step.log_min.exp() * step.log_max.exp()).sqrt().expand(SHAPE)
    torch.testing.assert_close(learned_range(step, 0 * one).exp(), halfway)
    assert learned(step, GUESS) is GUESS


@pytest.mark.parametrize("name", VARIANCES)
def test_a_learned_variance_doubles_the_channels_and_a_wrong_number_is_refused(name: str) -> None:
    step = Chain(Cosine(40)).at(torch.zeros(6, dtype=torch.int64))
    right, wrong = (6, 3) if VARIANCES[name] in LEARNED else (3, 6)
    p = Denoiser(Stub(right), PARAMETRIZATIONS["eps"], VARIANCES[name])(X0, step)
    assert p.raw.shape == SHAPE and (p.values is not None) == (right == 6)
    with pytest.raises(ValueError, match="channels"):
        Denoiser(Stub(wrong), PARAMETRIZATIONS["eps"], VARIANCES[name])(X0, step)


def test_the_network_gets_its_time_in_float32_and_half_precision_ends_at_its_output() -> None:
    def net(x: Tensor, t: Tensor) -> Tensor:
        assert t.dtype == torch.float32 and t.tolist() == [0.0, 200.0]
        return x.bfloat16()

    chain = Chain(Cosine(40), respace(40, "ddim5"))
    p = Denoiser(net, PARAMETRIZATIONS["v"], fixed_small)(X0[:2], chain.at(torch.tensor([0, 1])))
    assert all(part.dtype == torch.float32 for part in (p.raw, p.x0, p.mean, p.log_var))


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_the_network_sees_the_scaled_image_its_time_and_the_condition(name: str) -> None:
    step, seen = spread(Chain(Cosine(40))), []

    def net(x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        seen.extend([x, t, cond["y"]])
        return x

    c, y = meaning(name)(step), torch.arange(6)
    Denoiser(net, meaning(name))(X0, step, {"y": y})
    x, t, cond = seen
    assert torch.equal(x, X0 if c.inp is None else as_column(c.inp, X0) * X0)
    assert torch.equal(t, c.time.float()) and cond is y


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_one_level_for_all_images_is_as_a_level_for_each(name: str) -> None:
    step = spread(Chain(Linear(100)))
    denoiser = Denoiser(Stub(), meaning(name), fixed_small)
    together = denoiser(X0, step)
    for b, row in enumerate(zip(*step)):
        alone = denoiser(X0[b : b + 1], Step(*row))
        torch.testing.assert_close(alone.x0, together.x0[b : b + 1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(alone.mean, together.mean[b : b + 1], rtol=1e-5, atol=1e-5)
        assert alone.log_var == together.log_var[b]


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_a_bare_level_gives_the_x0_of_a_step_or_says_that_it_cannot(name: str) -> None:
    step = spread(Chain(Linear(100)))
    level, denoiser = Level(step.time, step.alpha, step.sigma), Denoiser(Stub(), meaning(name), fixed_small)
    if PARAMETRIZATIONS[name] is previous:
        with pytest.raises(ValueError, match="previous needs the steps of a chain"):
            denoiser(X0, level)
    else:
        assert torch.equal(denoiser(X0, level).x0, denoiser(X0, step).x0)


def test_what_is_done_to_x0_is_done_in_turn() -> None:
    denoiser = Denoiser(lambda x, t: 5 * X0, meaning("x0"), after=(clip, lambda x0: x0 / 2))
    assert torch.equal(denoiser(X0, spread(Chain(Cosine(40)))).x0, (5 * X0).clamp(-1, 1) / 2)


def test_columns_of_a_batch_stand_beside_its_images_and_numbers_stay_numbers() -> None:
    table, one = Chain(Cosine(40)).table, torch.tensor(0.1, dtype=torch.float64)
    column, nothing, number, flag = wide((table.sigma[:6], None, one, True), X0)
    assert torch.equal(column, as_column(table.sigma[:6], X0)) and column.dtype == number.dtype == torch.float32
    assert nothing is None and flag is True and number == one.float() and number.ndim == 0


def test_every_image_has_a_time() -> None:
    chain = Chain(Cosine(40))
    assert times(next(iter(chain)), X0).tolist() == [975.0] * 6
    assert times(chain.at(torch.arange(6)), X0).tolist() == [0.0, 25.0, 50.0, 75.0, 100.0, 125.0]
