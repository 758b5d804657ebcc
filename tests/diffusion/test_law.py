"""Laws of t: the published loss-aware weights, draws that follow them, and an unbiased estimate."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion.rows import CONTINUOUS, middle
from golden_rules import load
from iddpm.diffusion.grid import Chain
from iddpm.diffusion.law import LAWS, LogitNormal, Lognormal, LossSecondMoment, Stratified, Uniform
from iddpm.diffusion.schedule import SCHEDULES, VE, Cosine, Linear

GOLDEN = load("second_moment.json")
T = 12
CHAIN = Chain(Linear(T))
EVERY = middle(torch.arange(T), T)


def step_of(draw: Any, steps: int = T) -> Tensor:
    """The chain's steps that a draw stands for."""
    return (draw.u * steps).long()


def uniforms(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def fed(updates: int = len(GOLDEN["updates"])) -> LossSecondMoment:
    """The loss-aware law after so many golden updates."""
    law = LossSecondMoment(Chain(Linear(GOLDEN["num_timesteps"])), GOLDEN["history_per_term"], GOLDEN["uniform_prob"])
    for update in GOLDEN["updates"][:updates]:
        law.update(middle(torch.tensor(update["ts"]), T), torch.tensor(update["losses"], dtype=torch.float64))
    return law


def test_the_loss_aware_law_follows_the_published_one_update_by_update() -> None:
    law = fed(0)
    for update in GOLDEN["updates"]:
        law.update(middle(torch.tensor(update["ts"]), T), torch.tensor(update["losses"], dtype=torch.float64))
        published = torch.tensor(update["weights"], dtype=torch.float64)
        assert law.warm() == update["warm"]
        if not law.warm():  # the published weights are ones until then
            assert (published == 1).all()
            published = published / len(published)
        torch.testing.assert_close(law.probabilities(), published, rtol=0, atol=1e-9)
    assert law.warm()


def test_the_law_is_the_root_mean_square_of_the_last_losses() -> None:
    law, losses = LossSecondMoment(Chain(Linear(2)), history=3, uniform=0.1), ([9.0, 1.0, 2.0, 2.0], [4.0, 4.0, 4.0])
    for step, values in enumerate(losses):
        law.update(middle(torch.full((len(values),), step), 2), torch.tensor(values))
    moments = torch.tensor([math.sqrt((1 + 4 + 4) / 3), 4.0], dtype=torch.float64)  # the 9 is forgotten
    torch.testing.assert_close(law.probabilities(), 0.9 * moments / moments.sum() + 0.05)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("updates", [5, 60])
def test_a_loss_that_is_not_finite_leaves_the_law_as_it_was(bad: float, updates: int) -> None:
    law = fed(updates)
    before, state = law.probabilities(), copy.deepcopy(law.state_dict())
    law.update(EVERY, torch.full((T,), bad))
    assert torch.equal(law.probabilities(), before)
    assert all(torch.equal(law.state_dict()[name], value) for name, value in state.items())
    law.update(middle(torch.tensor([3, 3]), T), torch.tensor([bad, 7.0]))  # the finite one beside it counts
    assert (law.state_dict()["losses"][3] == 7.0).sum() == 1


@pytest.mark.parametrize("updates", [0, 5, 60])
def test_a_law_restored_from_its_state_goes_on_as_if_never_stopped(updates: int) -> None:
    law, restored = fed(updates), LossSecondMoment(CHAIN)
    restored.load_state_dict(copy.deepcopy(law.state_dict()))
    for each in (law, restored):
        each.update(EVERY, torch.linspace(1, 5, T))
    assert torch.equal(law.probabilities(), restored.probabilities())
    assert all(torch.equal(*pair) for pair in zip(law(uniforms(50)), restored(uniforms(50))))


def test_loading_a_state_does_not_tie_two_laws_together() -> None:
    law, restored = fed(60), LossSecondMoment(CHAIN)
    restored.load_state_dict(law.state_dict())
    before = restored.probabilities()
    law.update(EVERY, torch.full((T,), 100.0))
    assert torch.equal(restored.probabilities(), before)


@pytest.mark.parametrize("name", LAWS)
def test_every_laws_state_survives_a_round_trip(name: str) -> None:
    law = LAWS[name](CHAIN)
    law.update(EVERY, torch.ones(T))
    other = LAWS[name](CHAIN)
    other.load_state_dict(law.state_dict())
    assert all(torch.equal(*pair) for pair in zip(law(uniforms(50)), other(uniforms(50))))


EACH = {"uniform": Uniform(CHAIN), "stratified": Stratified(CHAIN), "cold": fed(5), "warm": fed()}


def probabilities(law: Uniform) -> Tensor:
    uniform = torch.full((T,), 1 / T, dtype=torch.float64)
    return law.probabilities() if isinstance(law, LossSecondMoment) else uniform


@pytest.mark.parametrize("law", EACH.values(), ids=EACH)
def test_draws_follow_the_probabilities_and_weights_are_their_inverse(law: Uniform) -> None:
    count, p = 100_000, probabilities(law)
    draw = law(uniforms(count))
    assert draw.u.dtype == torch.float64 and draw.weight.dtype == torch.float32
    frequency = torch.bincount(step_of(draw), minlength=T) / count
    assert ((frequency - p).abs() < 5 * (p * (1 - p) / count).sqrt()).all()
    torch.testing.assert_close(draw.weight, (1 / (T * p[step_of(draw)])).float())


@pytest.mark.parametrize("law", EACH.values(), ids=EACH)
def test_the_weighted_loss_is_unbiased(law: Uniform) -> None:
    """The mean over the law of weight x loss is the plain mean over the steps, whatever the losses are."""
    losses = torch.linspace(1, 3, T, dtype=torch.float64) ** 2
    even = (torch.arange(120_000, dtype=torch.float64) + 0.5) / 120_000  # the integral over u
    draw = law(even)
    assert (losses[step_of(draw)] * draw.weight).mean().item() == pytest.approx(losses.mean().item(), rel=1e-3)
    assert draw.weight.double().mean().item() == pytest.approx(1, rel=1e-3)


def test_weighting_by_the_loss_makes_the_estimate_less_noisy() -> None:
    losses = torch.logspace(-2, 2, T, dtype=torch.float64)
    law = LossSecondMoment(CHAIN)
    for _ in range(10):
        law.update(EVERY, losses)
    noisy = [(losses[step_of(d)] * d.weight).std().item() for d in (f(uniforms(10_000)) for f in (Uniform(CHAIN), law))]
    assert noisy[1] < 0.2 * noisy[0]


@pytest.mark.parametrize("batch", [1, 5, 12, 64])
@pytest.mark.parametrize("seed", range(5))
def test_stratified_takes_one_step_from_each_of_b_strata(batch: int, seed: int) -> None:
    u = uniforms(batch, seed)
    position = (torch.arange(batch) + u) * 1000 / batch
    i = step_of(Stratified(Chain(Linear(1000)))(u), 1000)
    assert torch.equal(i, position.long())
    assert (i.double() * batch / 1000 + batch / 1000 > torch.arange(batch)).all()
    assert (i.double() * batch / 1000 < torch.arange(1, batch + 1)).all()


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("steps", [1, 3, 1000])
def test_steps_stay_on_the_chain_at_the_ends_of_the_unit_interval(name: str, steps: int) -> None:
    for u in (0.0, math.nextafter(1.0, 0.0)):
        i = step_of(LAWS[name](Chain(Linear(steps)))(torch.full((4,), u, dtype=torch.float64)), steps)
        assert (i >= 0).all() and (i < steps).all()


@pytest.mark.parametrize("name", [name for name in LAWS if name != "stratified"])
def test_the_steps_of_a_batch_do_not_depend_on_how_it_is_split(name: str) -> None:
    law = LAWS[name](CHAIN)
    law.update(EVERY.repeat(10), torch.linspace(1, 9, 10 * T))
    u = uniforms(16)
    whole, parts = law(u), [law(part) for part in u.split([3, 6, 7])]
    assert torch.equal(whole.u, torch.cat([part.u for part in parts]))
    assert torch.equal(whole.weight, torch.cat([part.weight for part in parts]))


def test_until_it_is_warm_the_loss_aware_law_is_uniform_to_the_bit() -> None:
    u = torch.cat([torch.arange(8, dtype=torch.float64) / 8, uniforms(100)])  # with the edges
    chain = Chain(Linear(8))
    cold, uniform = LossSecondMoment(chain)(u), Uniform(chain)(u)
    assert torch.equal(step_of(cold, 8), step_of(uniform, 8)) and torch.equal(cold.weight, uniform.weight)


def test_only_a_law_that_learns_from_losses_looks_at_them() -> None:
    looking = {name for name, law in LAWS.items() if law.looks}
    assert looking == {name for name, law in LAWS.items() if law.update is not Uniform.update}


@pytest.mark.parametrize("schedule", [*CONTINUOUS, "cosine"])
def test_lognormal_makes_the_logarithm_of_the_ratio_normal(schedule: str) -> None:
    made = Chain(Cosine(1000)) if schedule == "cosine" else SCHEDULES[schedule]()
    level = made(Lognormal(made, P_mean=-0.8, P_std=0.7)(uniforms(20_000)).u)
    ratio = (level.sigma / level.alpha).log()
    assert ratio.mean().item() == pytest.approx(-0.8, abs=0.02) and ratio.std().item() == pytest.approx(0.7, rel=0.02)


def test_lognormal_is_held_within_the_schedule() -> None:
    """EDM draws sigma beyond its sampling range; here the law ends where the schedule does."""
    made = VE(0.1, 2.0)
    sigma = made(Lognormal(made, 0.0, 5.0)(uniforms(1000)).u).sigma
    assert sigma.min() >= 0.1 - 1e-12 and sigma.max() <= 2.0


def test_logit_normal_makes_the_logit_of_u_normal() -> None:
    u = LogitNormal(CHAIN, 0.5, 2.0)(uniforms(20_000)).u
    assert u.logit().mean().item() == pytest.approx(0.5, abs=0.05) and u.logit().std().item() == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", LAWS)
def test_every_law_stays_within_every_schedule(name: str, schedule: str) -> None:
    made = SCHEDULES[schedule]() if schedule in CONTINUOUS else Chain(SCHEDULES[schedule](1000))
    draw = LAWS[name](made)(torch.tensor([0.0, 1e-9, 0.5, 1 - 1e-9, math.nextafter(1.0, 0.0)], dtype=torch.float64))
    assert draw.u.dtype == torch.float64 and (draw.u >= 0).all() and (draw.u < 1).all()
    assert all(column.isfinite().all() for column in made(draw.u))


@pytest.mark.parametrize("schedule", CONTINUOUS)
def test_the_loss_aware_law_reaches_all_of_a_continuous_schedule_and_stays_unbiased(schedule: str) -> None:
    law = LossSecondMoment(SCHEDULES[schedule](), history=1)
    law.update(middle(torch.arange(1000), 1000), torch.linspace(0.1, 3, 1000))
    assert law.warm()
    draw = law(uniforms(200_000))
    within = (draw.u * 1000) % 1
    assert within.mean().item() == pytest.approx(0.5, abs=0.01) and within.std().item() == pytest.approx(12**-0.5, abs=0.01)
    assert (draw.u**2 * draw.weight).mean().item() == pytest.approx(1 / 3, abs=0.01)  # the integral of u^2


@pytest.mark.parametrize("steps", [3, 49, 1000, 4000])
def test_the_loss_aware_law_takes_note_of_a_loss_at_the_step_it_drew(steps: int) -> None:
    """Also where v lies on the edge between two steps, and rounding could lead over it."""
    law = LossSecondMoment(Chain(Linear(steps)), history=1)
    edges = torch.arange(steps, dtype=torch.float64) / steps
    v = torch.cat([edges, edges + 1e-16, (edges - 1e-16).clamp(min=0)])
    i = torch.searchsorted(law.probabilities().cumsum(0), v, right=True).clamp(max=steps - 1)
    assert torch.equal(step_of(law(v), steps), i)
