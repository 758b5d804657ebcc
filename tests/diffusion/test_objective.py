"""Training losses: what the published code computes on the same numbers, and where their gradients go."""

from typing import Any

import pytest
import torch
from torch import Tensor

from golden_rules import Stub, image_tensor, load, noise
from iddpm.diffusion.denoiser import LEARNED, VARIANCES, Denoiser, fixed_large, learned, learned_range
from iddpm.diffusion.objective import OBJECTIVES, hybrid, hybrid_unscaled, simple, vlb, vlb_unscaled
from iddpm.diffusion.parametrization import PARAMETRIZATIONS
from iddpm.diffusion.schedule import SCHEDULES, Chain, Cosine

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
    denoiser = Denoiser(net, chain, PARAMETRIZATIONS[MEANS[e["mean"]]], variance)
    terms = objective(denoiser, golden["x0"], golden["eps"], golden["t"])
    for name in e["terms"]:
        holds_bound = name != "mse" and e["terms"] != ["loss", "mse"]
        rtol, atol = (1e-4, 0.0) if holds_bound else (1e-5, 1e-5)
        torch.testing.assert_close(terms[name], golden[f"{e['key']}_{name}"], rtol=rtol, atol=atol)
    assert torch.equal(net.seen.double(), golden[f"{e['key']}_t_seen"])


def test_the_golden_entries_are_all_here() -> None:
    assert len(ENTRIES) == 96 and {e["loss"] for e in ENTRIES} == set(LOSSES)
    assert {f for pair in LOSSES.values() for f in pair} == set(OBJECTIVES.values())


def gradients(objective: Any, parametrization: str, variance: Any = learned_range) -> tuple[Tensor, Tensor]:
    """d loss / d output, for the mean channels and the variance channels."""
    output = image_tensor(1, (5, 6, 8, 8)).requires_grad_()
    denoiser = Denoiser(lambda x, t: output, Chain(Cosine(40)), PARAMETRIZATIONS[parametrization], variance)
    objective(denoiser, image_tensor(0, SHAPE), noise(0, SHAPE), STEPS)["loss"].sum().backward()
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
    output, meaning = image_tensor(1, SHAPE).requires_grad_(), PARAMETRIZATIONS[parametrization]
    denoiser = Denoiser(lambda x, t: output, Chain(Cosine(40)), meaning, fixed_large)
    x0, eps = image_tensor(0, SHAPE), noise(0, SHAPE)
    simple(denoiser, x0, eps, STEPS)["loss"].sum().backward()
    scale = denoiser.scalings(STEPS, x0)
    target = scale.of_x0 * x0 + scale.of_eps * eps
    torch.testing.assert_close(output.grad, 2 * (output.detach() - target) / x0[0].numel())


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_a_network_that_gives_the_target_has_no_squared_error(parametrization: str) -> None:
    x0, eps = image_tensor(0, SHAPE), noise(0, SHAPE)
    chain, meaning = Chain(Cosine(40)), PARAMETRIZATIONS[parametrization]
    scale = Denoiser(Stub(), chain, meaning, fixed_large).scalings(STEPS, x0)
    perfect = Denoiser(lambda x, t: scale.of_x0 * x0 + scale.of_eps * eps, chain, meaning, fixed_large)
    assert torch.equal(simple(perfect, x0, eps, STEPS)["loss"], torch.zeros(5))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_image_has_its_own_loss(name: str) -> None:
    denoiser = Denoiser(Stub(6), Chain(Cosine(40)), PARAMETRIZATIONS["eps"], learned_range)
    x0, eps = image_tensor(0, SHAPE), noise(0, SHAPE)
    together = OBJECTIVES[name](denoiser, x0, eps, STEPS)
    assert all(term.shape == (5,) for term in together.values())
    alone = OBJECTIVES[name](denoiser, x0[2:3], eps[2:3], STEPS[2:3])
    torch.testing.assert_close(together["loss"][2:3], alone["loss"])


def test_the_scales_of_the_bound_are_t_and_a_thousandth_of_t() -> None:
    denoiser = Denoiser(Stub(6), Chain(Cosine(40)), PARAMETRIZATIONS["eps"], learned_range)
    of = {name: f(denoiser, image_tensor(0, SHAPE), noise(0, SHAPE), STEPS) for name, f in OBJECTIVES.items()}
    torch.testing.assert_close(of["vlb"]["loss"], 40 * of["vlb_unscaled"]["loss"])
    torch.testing.assert_close(of["hybrid_unscaled"]["vb"], of["vlb_unscaled"]["loss"])
    torch.testing.assert_close(of["hybrid"]["vb"], 0.04 * of["vlb_unscaled"]["loss"])
    assert all(torch.equal(of[name]["mse"], of["simple"]["loss"]) for name in ("hybrid", "hybrid_unscaled"))


def test_without_a_learned_variance_hybrid_is_simple() -> None:
    denoiser = Denoiser(Stub(), Chain(Cosine(40)), PARAMETRIZATIONS["eps"], fixed_large)
    arguments = denoiser, image_tensor(0, SHAPE), noise(0, SHAPE), STEPS
    assert torch.equal(hybrid(*arguments)["loss"], simple(*arguments)["loss"])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_condition_reaches_the_network(name: str) -> None:
    class Conditional(Stub):
        def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
            return super().__call__(x, t) + cond["y"].view(-1, 1, 1, 1)

    x0, eps = image_tensor(0, SHAPE), noise(0, SHAPE)
    denoiser = Denoiser(Conditional(6), Chain(Cosine(40)), PARAMETRIZATIONS["eps"], learned_range)
    conds = [{"y": torch.arange(5) * scale} for scale in (0.0, 0.1)]
    a, b = (OBJECTIVES[name](denoiser, x0, eps, STEPS, cond)["loss"] for cond in conds)
    assert ((a != b) == (torch.arange(5) > 0)).all()
