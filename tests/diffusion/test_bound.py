"""The bound and its parts against torch.distributions, the normal CDF, and data of known code length."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from diffusion.rows import CONTINUOUS, DISCRETE, columns, evenly
from diffusion.rows import grid as grid_of
from golden_rules import Stub, image_tensor, noise
from iddpm.diffusion.bound import bound_terms, discretized_log_likelihood, gaussian_kl, mean_flat, prior_term, vlb_term
from iddpm.diffusion.denoiser import Denoiser, Prediction, clip, fixed_large, fixed_small, wide
from iddpm.diffusion.grid import Chain, Step
from iddpm.diffusion.parametrization import PARAMETRIZATIONS
from iddpm.diffusion.schedule import SCHEDULES, Cosine, Flow

LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1  # every 8-bit value
SHAPE = (4, 3, 8, 8)


def test_the_kl_between_gaussians_is_the_librarys() -> None:
    mean1, mean2, log_var1, log_var2 = noise(0, (4, 1000)).double()
    ours = gaussian_kl(mean1, log_var1, mean2, log_var2)
    library = kl_divergence(Normal(mean1, (log_var1 / 2).exp()), Normal(mean2, (log_var2 / 2).exp()))
    torch.testing.assert_close(ours, library)
    assert (gaussian_kl(mean1, log_var1, mean1, log_var1).abs() < 1e-12).all()


def bins(mean: float, std: float) -> Tensor:
    """The mass in each level's bin (256,), in float64."""
    m, s = torch.tensor([mean, std], dtype=torch.float64)
    return discretized_log_likelihood(LEVELS, m, s.log()).exp()


@pytest.mark.parametrize("std", [0.001, 0.01, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("mean", [-1.2, -1.0, -0.3, 0.0, 0.7, 1.0])
def test_the_256_bins_share_out_all_of_the_mass(mean: float, std: float) -> None:
    assert bins(mean, std).sum().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("std", [0.001, 0.01, 0.1, 1.0])
@pytest.mark.parametrize("mean", [-1.0, -0.3, 0.0, 0.7])
def test_a_bins_mass_is_the_normal_distributions(mean: float, std: float) -> None:
    """Within 4e-4: the published tanh approximation is off by at most 2e-4 at either edge."""
    edges = torch.cat([torch.tensor([-torch.inf]), (LEVELS[1:] + LEVELS[:-1]) / 2, torch.tensor([torch.inf])])
    exact = torch.special.ndtr((edges - mean) / std).diff()
    torch.testing.assert_close(bins(mean, std), exact, rtol=0, atol=4e-4)


def test_a_bin_far_from_the_mean_costs_much_but_not_infinity() -> None:
    far = discretized_log_likelihood(LEVELS[:1].float(), torch.tensor(1.0), torch.tensor(0.001).log())
    assert far.item() == pytest.approx(math.log(1e-12))


def test_float32_is_enough_for_the_bins() -> None:
    mean, log_std = torch.tensor(0.1), torch.tensor(0.05).log()
    single = discretized_log_likelihood(LEVELS.float(), mean, log_std)
    double = discretized_log_likelihood(LEVELS, mean.double(), log_std.double())
    likely = double > math.log(1e-4)
    torch.testing.assert_close(single[likely].double(), double[likely], rtol=0, atol=5e-3)


@pytest.mark.parametrize("steps", [1, 10, 1000])
@pytest.mark.parametrize("schedule", DISCRETE)
def test_the_prior_term_is_the_kl_of_the_last_step_to_the_standard_normal(schedule: str, steps: int) -> None:
    chain, x0 = Chain(SCHEDULES[schedule](steps)), image_tensor(0, SHAPE)
    bar = (1 - chain.betas).prod().item()
    end = Normal(math.sqrt(bar) * x0.double(), math.sqrt(1 - bar))
    kl = kl_divergence(end, Normal(torch.tensor(0.0).double(), 1.0))
    bits = (mean_flat(kl) / math.log(2)).float()
    torch.testing.assert_close(prior_term(chain, x0), bits, rtol=1e-3, atol=2e-7)


def test_a_term_is_the_decoder_at_step_0_and_the_kl_to_the_posterior_after_it() -> None:
    chain, x0, eps = Chain(Cosine(40)), image_tensor(0, SHAPE), noise(0, SHAPE)
    at = chain.at(torch.tensor([0, 1, 20, 39]))
    step = columns(at, x0)
    xt = step.alpha * x0 + step.sigma * eps
    p = Denoiser(Stub(), PARAMETRIZATIONS["x0"], fixed_large)(xt, at)
    ours = vlb_term(p, x0, xt, at) * math.log(2)
    model = Normal(p.mean, (p.log_var / 2).exp().expand(SHAPE))
    posterior = Normal(step.coef_x0 * x0 + step.coef_xt * xt, (step.log_min / 2).exp().expand(SHAPE))
    torch.testing.assert_close(ours[1:], mean_flat(kl_divergence(posterior, model))[1:], rtol=1e-4, atol=1e-5)
    decoder = discretized_log_likelihood(x0, model.mean, model.stddev.log())
    torch.testing.assert_close(ours[0], -mean_flat(decoder)[0], rtol=1e-4, atol=1e-5)


def test_a_perfect_prediction_with_the_posteriors_variance_costs_nothing_but_the_decoder() -> None:
    chain, x0 = Chain(Cosine(40)), image_tensor(0, SHAPE)
    perfect = Denoiser(lambda x, t: x0, PARAMETRIZATIONS["x0"], fixed_small)
    terms = list(bound_terms(perfect, x0, chain, lambda k: noise(k, SHAPE)))
    assert max(term.vb.abs().max().item() for term in terms[:-1]) < 1e-5
    assert all((term.x0_mse == 0).all() and (term.eps_mse < 1e-5).all() for term in terms)
    assert (terms[-1].vb > 0).all()


def test_the_squared_errors_are_the_predictions() -> None:
    """A guess that is off by d misses x0 by d^2 and eps by (d alpha / sigma)^2."""
    chain, x0, d = Chain(Cosine(40)), image_tensor(0, SHAPE), 0.25
    off = Denoiser(lambda x, t: x0 + d, PARAMETRIZATIONS["x0"], fixed_small)
    terms = list(bound_terms(off, x0, chain, seeded(SHAPE)))
    ratio = (chain.table.alpha / chain.table.sigma).flip(0)
    torch.testing.assert_close(torch.stack([t.x0_mse for t in terms]), torch.full((40, 4), d**2))
    expected = (d * ratio).float().square()[:, None].expand(40, 4)
    torch.testing.assert_close(torch.stack([t.eps_mse for t in terms]), expected, rtol=1e-4, atol=1e-9)


def seeded(shape: tuple[int, ...]) -> Any:
    generator = torch.Generator().manual_seed(0)
    return lambda k: torch.randn(shape, generator=generator)


def eight_bit(x: Tensor) -> Tensor:
    return (((x + 1) * 127.5).round().clamp(0, 255)) / 127.5 - 1


@pytest.mark.parametrize("spec", ["ddim10", "25", "100"])
def test_the_bound_of_the_true_reversal_is_the_datas_own_code_length(world: Any, spec: str) -> None:
    """It is tight for any number of steps: log p(x_0) is then the whole of it."""
    shape = (4, 1, 128, 128)
    data = world(0.05, 0.2)
    x0 = eight_bit(0.05 + 0.2 * noise(0, shape))
    exact, chain = data.exact(spec)
    bound = sum((term.vb for term in bound_terms(exact, x0, chain, seeded(shape))), prior_term(chain, x0))
    assert bound.mean().item() == pytest.approx(data.bits(x0).mean().item(), abs=0.02)


def test_the_bound_of_a_worse_model_is_looser(world: Any) -> None:
    shape = (2, 1, 64, 64)
    data, other = world(0.05, 0.2), world(0.05, 0.3)
    x0 = eight_bit(0.05 + 0.2 * noise(0, shape))
    best = data.bits(x0).mean().item()
    for denoiser, chain in (data.denoiser("ddim10"), other.exact("ddim10")):
        total = sum((t.vb for t in bound_terms(denoiser, x0, chain, seeded(shape))), prior_term(chain, x0))
        assert total.mean().item() > best + 0.05


def test_the_bound_counts_down_and_uses_the_draws_in_order() -> None:
    draws = []

    def draw(k: int) -> Tensor:
        draws.append(k)
        return noise(k, SHAPE)

    denoiser = Denoiser(Stub(), PARAMETRIZATIONS["eps"], fixed_small, (clip,))
    assert [term.i for term in bound_terms(denoiser, image_tensor(0, SHAPE), Chain(Cosine(10)), draw)] == list(range(9, -1, -1))
    assert draws == list(range(10))


@pytest.mark.parametrize("schedule", CONTINUOUS)
def test_on_a_continuous_schedule_a_perfect_prediction_costs_nothing_but_the_decoder(schedule: str) -> None:
    x0, grid = image_tensor(0, SHAPE), grid_of(schedule, 12)
    perfect = Denoiser(lambda x, t: x0, PARAMETRIZATIONS["x0"], fixed_small)
    terms = list(bound_terms(perfect, x0, grid, lambda k: noise(k, SHAPE)))
    assert max(term.vb.abs().max().item() for term in terms[:-1]) < 1e-4
    assert [term.i for term in terms] == list(range(11, -1, -1))


def test_the_prior_of_flow_is_nothing_and_that_of_ve_what_is_left_of_the_image() -> None:
    x0 = image_tensor(0, SHAPE)
    assert torch.equal(prior_term(evenly(Flow(), 5), x0), torch.zeros(4))
    kl = kl_divergence(Normal(x0.double(), 80.0), Normal(torch.tensor(0.0).double(), 80.0))
    bits = (mean_flat(kl) / math.log(2)).float()
    torch.testing.assert_close(prior_term(evenly(SCHEDULES["ve"](), 5), x0), bits, rtol=1e-3, atol=1e-7)


def test_the_bins_of_16_bits_hold_all_mass() -> None:
    levels = torch.arange(65536, dtype=torch.float64) / 32767.5 - 1
    for mean, scale in ((0.2, 0.01), (-0.9999, 0.003), (1.0, 0.3)):
        found = discretized_log_likelihood(levels, torch.tensor(mean), torch.tensor(scale).log(), 1 / 65535)
        # the floor of 1e-12, of bins far away, adds at most 65536 times that
        assert found.exp().sum().item() == pytest.approx(1, abs=2e-7)


@pytest.mark.parametrize(("half_bin", "bits"), [(1 / 255, 8), (1 / 65535, 16)])
def test_noise_of_all_levels_costs_as_many_bits_as_it_has(half_bin: float, bits: int) -> None:
    """Of uniform noise x0 given x_t is a normal cut at -1 and 1, of known mean and variance; no model is shorter than noise."""
    chain = Chain(SCHEDULES["linear"](1000))
    draw = torch.Generator().manual_seed(0)
    x0 = torch.randint(0, 2**bits, (16, 1, 16, 16), generator=draw) * 2 * half_bin - 1

    def denoise(x: Tensor, step: Any) -> Prediction:
        mean, spread = x.double() / step.alpha, step.sigma / step.alpha
        low, high = (-1 - mean) / spread, (1 - mean) / spread
        at_low, at_high = (torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) for z in (low, high))
        inside = (torch.special.ndtr(high) - torch.special.ndtr(low)).clamp(min=1e-30)
        shift = (at_low - at_high) / inside
        share = (1 + (low * at_low - high * at_high) / inside - shift**2).clamp(min=1e-4)  # of the variance that is left
        best, s = (mean + spread * shift).clamp(-1, 1), Step(*wide(step, x))
        variance = (1 - s.last) * s.log_min.exp() + s.coef_x0**2 * spread**2 * share
        return Prediction(best.float(), None, best.float(), s.coef_x0 * best.float() + s.coef_xt * x, variance.log().float())

    def drawn(k: int) -> Tensor:
        return torch.randn(x0.shape, generator=draw)

    terms = sum(term.vb.double() for term in bound_terms(denoise, x0.float(), chain, drawn, half_bin))
    found = (terms + prior_term(chain, x0.float())).mean().item()
    assert bits <= found < bits + 0.1
