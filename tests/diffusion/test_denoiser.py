"""What a network's output stands for: every parametrization of one prediction is the same prediction."""

import pytest
import torch
from torch import Tensor

from golden_rules import Stub, image_tensor, noise
from iddpm.diffusion.denoiser import LEARNED, VARIANCES, Denoiser, fixed_large, fixed_small, learned, learned_range
from iddpm.diffusion.parametrization import PARAMETRIZATIONS, previous
from iddpm.diffusion.schedule import SCHEDULES, Chain, Cosine, Linear, respace

SHAPE = (6, 3, 4, 4)
X0, EPS, GUESS = image_tensor(0, SHAPE), noise(0, SHAPE), image_tensor(1, SHAPE)


def spread(chain: Chain) -> Tensor:
    """Six steps of a chain, its ends among them."""
    return torch.linspace(0, chain.steps - 1, 6).long()


@pytest.mark.parametrize("spec", ["", "10"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_a_network_that_gives_the_exact_target_recovers_x0(name: str, schedule: str, spec: str) -> None:
    """To the rounding of x_t, which is divided by alpha or coef_x0 where the output holds no x0."""
    chain = Chain(SCHEDULES[schedule](100), respace(100, spec))
    i = spread(chain)
    step = chain.at(i, X0)
    denoiser = Denoiser(lambda x, t: target, chain, PARAMETRIZATIONS[name], fixed_small)
    scale = denoiser.scalings(i, X0)
    target = scale.of_x0 * X0 + scale.of_eps * EPS
    p = denoiser(step.alpha * X0 + step.sigma * EPS, i)
    amplified = {"eps": 1 / step.alpha, "previous": 1 / step.coef_x0}.get(name, torch.ones_like(step.alpha))
    assert ((p.x0 - X0).abs() <= 2e-6 * amplified).all()


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_targets_agree_with_their_definitions(name: str) -> None:
    chain = Chain(Linear(100))
    i = spread(chain)
    s = chain.at(i, X0)
    xt = s.alpha * X0 + s.sigma * EPS
    scale = Denoiser(Stub(), chain, PARAMETRIZATIONS[name], fixed_small).scalings(i, X0)
    v, mean = s.alpha * EPS - s.sigma * X0, s.coef_x0 * X0 + s.coef_xt * xt
    defined = {"eps": EPS, "x0": X0, "v": v, "previous": mean}
    torch.testing.assert_close(scale.of_x0 * X0 + scale.of_eps * EPS, defined[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_one_guess_in_any_parametrization_is_one_prediction(name: str) -> None:
    """The output is solved for by hand from x_t and the guess, in float64."""
    chain = Chain(Linear(100))  # alpha stays above 0.006, so that eps says something about x0
    i = spread(chain)
    s = chain.at(i, X0)
    xt = s.alpha * X0 + s.sigma * EPS
    alpha, sigma = s.alpha.double(), s.sigma.double()
    eps = (xt - alpha * GUESS) / sigma
    output = {
        "eps": eps,
        "x0": GUESS,
        "v": alpha * eps - sigma * GUESS,
        "previous": s.coef_x0.double() * GUESS + s.coef_xt.double() * xt,
    }[name].float()
    p = Denoiser(lambda x, t: output, chain, PARAMETRIZATIONS[name], fixed_small)(xt, i)
    amplified = {"eps": 1 / s.alpha, "previous": 1 / s.coef_x0}.get(name, torch.ones_like(s.alpha))
    assert ((p.x0 - GUESS).abs() <= 2e-6 * amplified).all()
    torch.testing.assert_close(p.mean, s.coef_x0 * GUESS + s.coef_xt * xt, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_clipping_holds_x0_in_range_and_moves_the_mean_with_it(name: str) -> None:
    chain = Chain(Cosine(40))
    i = spread(chain)
    s, xt = chain.at(i, X0), 2 * EPS
    plain = Denoiser(Stub(), chain, PARAMETRIZATIONS[name], fixed_small)(xt, i)
    clipped = Denoiser(Stub(), chain, PARAMETRIZATIONS[name], fixed_small, clip=True)(xt, i)
    assert torch.equal(clipped.x0, plain.x0.clamp(-1, 1))
    believed = plain.raw if PARAMETRIZATIONS[name] is previous else s.coef_x0 * clipped.x0 + s.coef_xt * xt
    assert torch.equal(clipped.mean, believed)


def test_the_fixed_variances_are_beta_and_the_posteriors() -> None:
    chain = Chain(Cosine(40))
    step = chain.at(torch.arange(40), torch.arange(40))
    bar = (1 - chain.betas).cumprod(0)
    posterior = chain.betas[1:] * (1 - bar[:-1]) / (1 - bar[1:])
    torch.testing.assert_close(fixed_small(step, None)[1:].exp(), posterior.float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(fixed_large(step, None)[1:].exp(), chain.betas[1:].float(), rtol=1e-5, atol=0)
    assert fixed_large(step, None)[0] == fixed_small(step, None)[0] == fixed_small(step, None)[1]


def test_a_learned_range_runs_from_the_posteriors_variance_to_beta() -> None:
    chain = Chain(Cosine(40))
    i = spread(chain)
    step, one = chain.at(i, X0), torch.ones(SHAPE)
    assert torch.equal(learned_range(step, -one), step.log_min.expand(SHAPE))
    assert torch.equal(learned_range(step, one), step.log_max.expand(SHAPE))
    halfway = (step.log_min.exp() * step.log_max.exp()).sqrt().expand(SHAPE)
    torch.testing.assert_close(learned_range(step, 0 * one).exp(), halfway)
    assert learned(step, GUESS) is GUESS


@pytest.mark.parametrize("name", VARIANCES)
def test_a_learned_variance_doubles_the_channels_and_a_wrong_number_is_refused(name: str) -> None:
    chain, i = Chain(Cosine(40)), torch.zeros(6, dtype=torch.int64)
    right, wrong = (6, 3) if VARIANCES[name] in LEARNED else (3, 6)
    p = Denoiser(Stub(right), chain, PARAMETRIZATIONS["eps"], VARIANCES[name])(X0, i)
    assert p.raw.shape == SHAPE and (p.values is not None) == (right == 6)
    with pytest.raises(ValueError, match="channels"):
        Denoiser(Stub(wrong), chain, PARAMETRIZATIONS["eps"], VARIANCES[name])(X0, i)


def test_the_network_gets_its_time_in_float32_and_half_precision_ends_at_its_output() -> None:
    def net(x: Tensor, t: Tensor) -> Tensor:
        assert t.dtype == torch.float32 and t.tolist() == [0.0, 200.0]
        return x.bfloat16()

    chain = Chain(Cosine(40), respace(40, "ddim5"))
    p = Denoiser(net, chain, PARAMETRIZATIONS["v"], fixed_small)(X0[:2], torch.tensor([0, 1]))
    assert all(part.dtype == torch.float32 for part in (p.raw, p.x0, p.mean, p.log_var))
