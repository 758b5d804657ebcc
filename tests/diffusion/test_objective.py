"""Training losses: what the published code computes on the same numbers, and where their gradients go."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion.rows import CONTINUOUS, as_column, made, meaning, middle
from golden_rules import Stub, image_tensor, load, noise
from iddpm.diffusion.denoiser import LEARNED, VARIANCES, Denoiser, fixed_large, learned, learned_range
from iddpm.diffusion.grid import Chain
from iddpm.diffusion.objective import (
    CHAIN_ONLY,
    LEARN_VARIANCE,
    OBJECTIVES,
    Consistency,
    Path,
    hybrid,
    hybrid_unscaled,
    simple,
    vlb,
    vlb_unscaled,
)
from iddpm.diffusion.parametrization import PARAMETRIZATIONS
from iddpm.diffusion.schedule import SCHEDULES, VE, Cosine, CosineVP, Flow
from iddpm.diffusion.weighting import WEIGHTINGS, Edm, Uncertainty, flow, likelihood, pace, uniform

MEANS = {"EPSILON": "eps", "START_X": "x0", "PREVIOUS_X": "previous"}
LOSSES = {  # with a learned variance, and without
    "MSE": (hybrid_unscaled, simple),
    "RESCALED_MSE": (hybrid, hybrid),
    "KL": (vlb_unscaled, vlb_unscaled),
    "RESCALED_KL": (vlb, vlb),
}
ENTRIES = [e for e in load("process.json") if e["kind"] == "training_losses"]
SHAPE = (5, 3, 8, 8)
STEPS = torch.tensor([0, 1, 7, 20, 39])
CHAIN, U = Chain(Cosine(40)), middle(STEPS, 40)


def target_of(parametrization: str, x0: Tensor, eps: Tensor) -> Tensor:
    c = meaning(parametrization)(CHAIN(U))
    return as_column(c.of_x0, x0) * x0 + as_column(c.of_eps, x0) * eps


class Watched(Stub):
    """The stub network, which remembers the times it was given."""

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        self.seen = t
        return super().__call__(x, t, **cond)


@pytest.mark.parametrize("e", ENTRIES, ids=lambda e: e["key"])
def test_losses_are_the_published_ones(e: dict) -> None:
    golden = {name: torch.from_numpy(array) for name, array in load("process.npz").items()}
    variance = VARIANCES[e["var"].lower()]
    net = Watched(6 if variance in LEARNED else 3)
    chain = Chain(SCHEDULES[e["schedule"]](e["T"]), rescale_time=e["rescale_timesteps"])
    objective = LOSSES[e["loss"]][variance not in LEARNED]
    denoiser = Denoiser(net, PARAMETRIZATIONS[MEANS[e["mean"]]], variance)
    terms = objective(denoiser, chain, golden["x0"], golden["eps"], middle(golden["t"], e["T"]))
    for name in e["terms"]:
        holds_bound = name != "mse" and e["terms"] != ["loss", "mse"]
        rtol, atol = (1e-4, 0.0) if holds_bound else (1e-5, 1e-5)
        torch.testing.assert_close(terms[name], golden[f"{e['key']}_{name}"], rtol=rtol, atol=atol)
    assert torch.equal(net.seen.double(), golden[f"{e['key']}_t_seen"])


def test_the_golden_entries_are_all_here() -> None:
    assert len(ENTRIES) == 96 and {e["loss"] for e in ENTRIES} == set(LOSSES)
    assert {f for pair in LOSSES.values() for f in pair} == set(OBJECTIVES.values()) - {Consistency, Path}


def gradients(objective: Any, parametrization: str, variance: Any = learned_range) -> tuple[Tensor, Tensor]:
    """d loss / d output, for the mean channels and the variance channels."""
    output = image_tensor(1, (5, 6, 8, 8)).requires_grad_()
    denoiser = Denoiser(lambda x, t: output, meaning(parametrization), variance)
    objective(denoiser, CHAIN, image_tensor(0, SHAPE), noise(0, SHAPE), U)["loss"].sum().backward()
    assert output.grad is not None
    mean, values = output.grad.chunk(2, dim=1)
    return mean, values


@pytest.mark.parametrize("variance", [learned, learned_range])
@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_in_hybrid_the_bound_pulls_only_at_the_variance(parametrization: str, variance: Any) -> None:
    mean, values = gradients(hybrid, parametrization, variance)
    mean_simple, values_simple = gradients(simple, parametrization, variance)
    assert torch.equal(mean, mean_simple) and mean.abs().sum() > 0
    assert (values_simple == 0).all() and (values.abs().flatten(1).sum(1) > 0).all()


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_the_bound_itself_pulls_at_both(parametrization: str) -> None:
    mean, values = gradients(vlb_unscaled, parametrization)
    hybrid_values = gradients(hybrid_unscaled, parametrization)[1]
    assert (mean.abs().flatten(1).sum(1) > 0).all()
    torch.testing.assert_close(values, hybrid_values)


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_the_gradient_of_the_squared_error_is_twice_the_error(parametrization: str) -> None:
    output = image_tensor(1, SHAPE).requires_grad_()
    denoiser = Denoiser(lambda x, t: output, meaning(parametrization), fixed_large)
    x0, eps = image_tensor(0, SHAPE), noise(0, SHAPE)
    simple(denoiser, CHAIN, x0, eps, U)["loss"].sum().backward()
    target = target_of(parametrization, x0, eps)
    torch.testing.assert_close(output.grad, 2 * (output.detach() - target) / x0[0].numel())


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_a_network_that_gives_the_target_has_no_squared_error(parametrization: str) -> None:
    x0, eps = image_tensor(0, SHAPE), noise(0, SHAPE)
    exact = target_of(parametrization, x0, eps)
    perfect = Denoiser(lambda x, t: exact, meaning(parametrization), fixed_large)
    assert torch.equal(simple(perfect, CHAIN, x0, eps, U)["loss"], torch.zeros(5))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_image_has_its_own_loss(name: str) -> None:
    denoiser = Denoiser(Stub(6), PARAMETRIZATIONS["eps"], learned_range)
    x0, eps = image_tensor(0, SHAPE), noise(0, SHAPE)
    together = made(OBJECTIVES[name])(denoiser, CHAIN, x0, eps, U)
    assert all(term.shape == (5,) for term in together.values())
    alone = made(OBJECTIVES[name])(denoiser, CHAIN, x0[2:3], eps[2:3], U[2:3])
    torch.testing.assert_close(together["loss"][2:3], alone["loss"])


def test_the_scales_of_the_bound_are_t_and_a_thousandth_of_t() -> None:
    denoiser = Denoiser(Stub(6), PARAMETRIZATIONS["eps"], learned_range)
    of = {
        name: f(denoiser, CHAIN, image_tensor(0, SHAPE), noise(0, SHAPE), U)
        for name, f in OBJECTIVES.items()
        if f not in (Consistency, Path)
    }
    torch.testing.assert_close(of["vlb"]["loss"], 40 * of["vlb_unscaled"]["loss"])
    torch.testing.assert_close(of["hybrid_unscaled"]["vb"], of["vlb_unscaled"]["loss"])
    torch.testing.assert_close(of["hybrid"]["vb"], 0.04 * of["vlb_unscaled"]["loss"])
    assert all(torch.equal(of[name]["mse"], of["simple"]["loss"]) for name in ("hybrid", "hybrid_unscaled"))


def test_without_a_learned_variance_hybrid_is_simple() -> None:
    denoiser = Denoiser(Stub(), PARAMETRIZATIONS["eps"], fixed_large)
    arguments = denoiser, CHAIN, image_tensor(0, SHAPE), noise(0, SHAPE), U
    assert torch.equal(hybrid(*arguments)["loss"], simple(*arguments)["loss"])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_condition_reaches_the_network(name: str) -> None:
    class Conditional(Stub):
        def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
            return super().__call__(x, t) + cond["y"].view(-1, 1, 1, 1)

    x0, eps = image_tensor(0, SHAPE), noise(0, SHAPE)
    denoiser = Denoiser(Conditional(6), PARAMETRIZATIONS["eps"], learned_range)
    conds = [{"y": torch.arange(5) * scale} for scale in (0.0, 0.1)]
    a, b = (made(OBJECTIVES[name])(denoiser, CHAIN, x0, eps, U, cond)["loss"] for cond in conds)
    assert ((a != b) == (torch.arange(5) > 0)).all()


# ---- weightings


X0, EPS, GUESS = image_tensor(0, SHAPE), noise(0, SHAPE), image_tensor(1, SHAPE)
V = torch.tensor([0.05, 0.2, 0.5, 0.8, 0.95], dtype=torch.float64)


def loss_of_guess(schedule: Any, parametrization: str, weighting: Any) -> Tensor:
    """The loss where the prediction is GUESS at every level, in whatever the network predicts."""
    level = schedule(V)
    c = meaning(parametrization)(level)
    alpha, sigma, skip, out = (v.reshape(-1, 1, 1, 1) for v in (level.alpha, level.sigma, c.skip, c.out))
    xt = (alpha.float() * X0 + sigma.float() * EPS).double()
    denoiser = Denoiser(lambda x, t: ((GUESS - skip * xt) / out).float(), meaning(parametrization))
    return simple(denoiser, schedule, X0, EPS, V, weighting=weighting)["loss"]


SQUARE = ((GUESS - X0) ** 2).flatten(1).mean(1)  # of x0's error


@pytest.mark.parametrize("schedule", CONTINUOUS)
@pytest.mark.parametrize("name", [name for name in WEIGHTINGS if name not in ("uniform", "uncertainty")])
def test_a_weighting_means_the_same_whatever_the_network_predicts(name: str, schedule: str) -> None:
    row = SCHEDULES[schedule]()
    losses = [loss_of_guess(row, parametrization, made(WEIGHTINGS[name])) for parametrization in ("x0", "eps", "flow", "edm")]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=2e-3, atol=0)


def test_uncertainty_makes_every_level_count_alike_after_errors_of_very_different_sizes() -> None:
    """The minimum of E[error] / e^u + u over u, in closed form: e^u = E[error] of the level."""
    weighting, rng = Uncertainty(uncertainty_memory=500), torch.Generator().manual_seed(0)

    def usual(level: Any) -> Tensor:
        return 1e-3 + (level.sigma / level.alpha) ** 1.5

    for _ in range(400):
        level = Flow()(torch.rand(64, generator=rng, dtype=torch.float64))
        weighting.update(level, usual(level) * torch.empty(64, dtype=torch.float64).exponential_(generator=rng))
    level = Flow()(torch.linspace(0.03, 0.97, 50, dtype=torch.float64))
    weighted = weighting(level, None, None) * usual(level)  # type: ignore[arg-type]
    assert (weighted.log().abs() < 0.3).all() and weighted.log().abs().mean() < 0.08
    before = weighting.means.clone()
    weighting.update(level, torch.full((50,), torch.nan))
    assert torch.equal(weighting.means, before)


def test_the_uniform_weighting_leaves_the_error_of_the_output_as_it_is() -> None:
    torch.testing.assert_close(loss_of_guess(Flow(), "x0", uniform), SQUARE)


def test_edms_loss_is_the_papers() -> None:
    """Karras et al. 2022, eq. 2 and table 1: lambda(sigma) |D - y|^2, lambda = (sigma^2 + d^2) / (sigma d)^2."""
    sigma, d = VE()(V).sigma, 0.6
    weight = (sigma**2 + d**2) / (sigma * d) ** 2
    torch.testing.assert_close(loss_of_guess(VE(), "edm", Edm(d)), (weight * SQUARE).float(), rtol=1e-4, atol=0)


def test_edms_weighting_is_uniform_in_edms_own_space() -> None:
    torch.testing.assert_close(loss_of_guess(VE(), "edm", Edm()), loss_of_guess(VE(), "edm", uniform), rtol=1e-5, atol=0)


def test_flows_loss_is_the_squared_error_of_the_velocity() -> None:
    """v = eps - x0; where x0 is missed by d, eps is missed by -alpha / sigma d, and v by their difference."""
    level = Flow()(V)
    missed = SQUARE * ((1 + level.alpha / level.sigma) ** 2).float()
    for weighting in (flow, uniform):
        torch.testing.assert_close(loss_of_guess(Flow(), "flow", weighting), missed, rtol=1e-4, atol=0)


SNR = (CosineVP()(V).alpha / CosineVP()(V).sigma) ** 2


@pytest.mark.parametrize(
    ("name", "weight_of_x0"),
    [
        ("min_snr", SNR.clamp(max=5)),  # Hang et al. 2023, eq. 6
        ("soft_min_snr", SNR * 5 / (SNR + 5)),  # Crowson et al. 2024
        ("p2", SNR / (1 + SNR)),  # Choi et al. 2022, eq. 8, of the error of eps: snr times that of x0
        ("likelihood", math.pi / (2 * CosineVP()(V).alpha * CosineVP()(V).sigma) * SNR),  # -dlog(snr)/du = pi / (alpha sigma)
        ("sigmoid", math.pi / (2 * CosineVP()(V).alpha * CosineVP()(V).sigma) * SNR / (1 + SNR * math.e)),
    ],
)
def test_a_weighting_is_the_papers(name: str, weight_of_x0: Tensor) -> None:
    found = loss_of_guess(CosineVP(), "v", made(WEIGHTINGS[name]))
    torch.testing.assert_close(found, (weight_of_x0 * SQUARE).float(), rtol=1e-4, atol=0)


def test_the_likelihoods_weight_on_a_chain_is_about_the_bounds() -> None:
    """Half the fall of snr from one step to the next, times the number of steps (Kingma et al. 2021, eq. 13)."""
    chain = Chain(Cosine(1000))
    i = torch.tensor([100, 500, 900])
    u, step = (i + 0.5) / 1000, chain.at(i)
    fall = 1000 * 0.5 * ((step.alpha_to / step.sigma_to) ** 2 - (step.alpha / step.sigma) ** 2)
    one = torch.ones(3, dtype=torch.float64)
    c = meaning("x0")(step)
    torch.testing.assert_close(likelihood(step, c, lambda: pace(chain, u.double())) * one, fall, rtol=0.05, atol=0)


@pytest.mark.parametrize("parametrization", ["x0", "eps", "flow", "edm", "v"])
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_the_best_denoiser_is_where_every_loss_is_least(name: str, parametrization: str) -> None:
    """Data of two values: where the net knows E[x0 / x_t], the gradient to a scale and a shift of its x0 is 0 on average."""
    generator = torch.Generator().manual_seed(0)
    n = 40_000
    x0 = torch.randint(0, 2, (n, 1, 1, 1), generator=generator) * 1.0 - 0.5
    eps = torch.randn(x0.shape, generator=generator)
    u = torch.full((n,), 0.5, dtype=torch.float64)
    schedule = CosineVP()
    level = schedule(u[:1])
    alpha, sigma = float(level.alpha), float(level.sigma)
    knob = torch.zeros(2, requires_grad=True)
    c = meaning(parametrization)(level)

    def net(x: Tensor, t: Tensor) -> Tensor:
        xt = x if c.inp is None else x / c.inp.float()
        best = 0.5 * torch.tanh(0.5 * alpha * xt / sigma**2)
        return ((1 + knob[0]) * best + knob[1] - c.skip.float() * xt) / c.out.float()

    terms = simple(Denoiser(net, meaning(parametrization)), schedule, x0, eps, u, weighting=made(WEIGHTINGS[name]))
    (gradient,) = torch.autograd.grad(terms["loss"].mean(), knob)
    assert (gradient.abs() < 0.02 * terms["loss"].mean().item()).all()
    knob.data[1] = 0.2
    terms = simple(Denoiser(net, meaning(parametrization)), schedule, x0, eps, u, weighting=made(WEIGHTINGS[name]))
    (gradient,) = torch.autograd.grad(terms["loss"].mean(), knob)
    assert gradient[1] > 0.2 * terms["loss"].mean()  # the test could fail


def test_what_needs_a_chain_or_a_learned_variance_is_named_beside_the_table() -> None:
    assert set(LEARN_VARIANCE) <= set(CHAIN_ONLY) <= set(OBJECTIVES.values())


def test_edms_loss_is_the_papers_from_the_network_on() -> None:
    """The whole of eq. 7 and 8, written out: D = c_skip x + c_out F(c_in x, ln(sigma) / 4)."""
    sigma, d = VE()(V).sigma.reshape(-1, 1, 1, 1), 0.5
    x = X0 + sigma * EPS
    both = sigma**2 + d**2
    guess = d**2 / both * x + sigma * d / both.sqrt() * Stub()(x / both.sqrt(), sigma.flatten().log() / 4)
    paper = (both / (sigma * d) ** 2 * (guess - X0) ** 2).flatten(1).mean(1)
    ours = simple(Denoiser(Stub(), meaning("edm")), VE(), X0, EPS, V, weighting=Edm(d))["loss"]
    torch.testing.assert_close(ours, paper.float(), rtol=1e-4, atol=0)


def test_flow_matching_compares_the_output_with_the_velocity_to_the_bit() -> None:
    loss = simple(Denoiser(lambda x, t: GUESS, meaning("flow")), Flow(), X0, EPS, V)["loss"]
    assert torch.equal(loss, ((GUESS - (EPS - X0)) ** 2).flatten(1).mean(1))


def test_a_training_step_computes_in_float32_what_the_float64_tables_say_to_the_bit() -> None:
    """Runs resume to the bit, so how a step is computed does not change: look up, then round, then compute."""
    table = CHAIN.table
    alpha, sigma, time = (c[STEPS].float() for c in (table.alpha, table.sigma, table.time))
    xt = alpha.reshape(-1, 1, 1, 1) * X0 + sigma.reshape(-1, 1, 1, 1) * EPS
    ours = simple(Denoiser(Stub(), meaning("eps")), CHAIN, X0, EPS, U)["loss"]
    assert torch.equal(ours, ((Stub()(xt, time) - EPS) ** 2).flatten(1).mean(1))


@pytest.mark.parametrize("name", [name for name, row in OBJECTIVES.items() if row in CHAIN_ONLY])
def test_what_needs_a_chain_says_so_of_a_continuous_schedule(name: str) -> None:
    denoiser = Denoiser(Stub(6), meaning("flow"), learned_range)
    with pytest.raises(ValueError, match="needs the steps of a chain"):
        made(OBJECTIVES[name])(denoiser, Flow(), X0, EPS, V)
