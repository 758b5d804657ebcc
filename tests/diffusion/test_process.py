"""Predictions, steps, loops and the whole bound: what the published code computes on the same numbers."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion.rows import columns
from golden_rules import Stub, load, noise
from iddpm.diffusion.bound import bound_terms, prior_term, vlb_term
from iddpm.diffusion.denoiser import LEARNED, VARIANCES, Denoiser, clip
from iddpm.diffusion.grid import Chain, Step, respace
from iddpm.diffusion.parametrization import PARAMETRIZATIONS
from iddpm.diffusion.schedule import SCHEDULES
from iddpm.diffusion.solvers import Ddim, ancestral, ddim_inversion, run

SHAPE = (4, 3, 8, 8)
MEANS = {"EPSILON": "eps", "START_X": "x0", "PREVIOUS_X": "previous"}
STEPS = {e["key"]: e for e in load("process.json") if e["kind"] == "process"}
LOOPS = [key for key in STEPS if f"{key}_p_loop" in load("process.npz")]


def draw(k: int) -> Tensor:
    return noise(k, SHAPE)


def golden(name: str) -> Tensor:
    return torch.from_numpy(load("process.npz")[name])


def close(ours: Tensor, name: str) -> None:
    torch.testing.assert_close(ours, golden(name), rtol=1e-5, atol=1e-5, msg=lambda m: f"{name}: {m}")


def close_bits(ours: Tensor, name: str) -> None:
    torch.testing.assert_close(ours, golden(name), rtol=1e-4, atol=0, msg=lambda m: f"{name}: {m}")


@cache
def setting(key: str) -> tuple[Denoiser, Chain, Any, Tensor, Tensor, Step]:
    """The entry's denoiser, chain and prediction, and the x0, x_t and steps it was made of."""
    e = STEPS[key]
    schedule, kept = SCHEDULES[e["schedule"]](e["T"]), respace(e["T"], e["respacing"])
    chain = Chain(schedule, kept, rescale_time=e["rescale_timesteps"])
    variance = VARIANCES[e["var"].lower()]
    net = Stub(6 if variance in LEARNED else 3)
    denoiser = Denoiser(net, PARAMETRIZATIONS[MEANS[e["mean"]]], variance, (clip,) if e["clip_denoised"] else ())
    x0, step = golden("x0"), chain.at(torch.tensor(e["t"]))
    s = columns(step, x0)
    xt = s.alpha * x0 + s.sigma * golden("eps")
    return denoiser, chain, denoiser(xt, step), x0, xt, step


def each(key: str, solver: Any) -> Tensor:
    """A step of each image, whose levels differ: a solver walks one step of one image at a time."""
    denoiser, _, _, _, xt, step = setting(key)
    ends = []
    for b in range(len(xt)):
        one = Step(*(column[b] for column in step))
        ends.append(run(solver(denoiser, xt[b : b + 1], [one], lambda k, b=b: draw(0)[b : b + 1])))
    return torch.cat(ends)


def test_the_golden_entries_are_all_here() -> None:
    assert len(STEPS) == 72 and len(LOOPS) == 16
    assert all(setting(key)[1].steps == e["num_timesteps"] for key, e in STEPS.items())


@pytest.mark.parametrize("key", STEPS)
def test_prediction_is_the_published_one(key: str) -> None:
    _, _, p, x0, xt, step = setting(key)
    close(p.mean, f"{key}_mean")
    close(p.x0, f"{key}_pred_xstart")
    close(p.log_var.expand(SHAPE), f"{key}_log_variance")
    close_bits(vlb_term(p, x0, xt, step), f"{key}_vb")


@pytest.mark.parametrize("key", STEPS)
def test_variance_is_the_exponential_of_its_logarithm(key: str) -> None:
    _, _, p, _, _, step = setting(key)
    ours = p.log_var.exp().expand(SHAPE)
    if STEPS[key]["var"] == "FIXED_SMALL":  # it reports 0 at step 0, and uses what is used here
        ours = ours * (1 - columns(step, ours).last)
    close(ours, f"{key}_variance")


@pytest.mark.parametrize("key", STEPS)
def test_one_ancestral_step_is_the_published_one(key: str) -> None:
    close(each(key, ancestral), f"{key}_p_sample")


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("key", STEPS)
def test_one_ddim_step_is_the_published_one(key: str, eta: float) -> None:
    close(each(key, Ddim(eta)), f"{key}_ddim_{eta}")


@pytest.mark.parametrize("key", STEPS)
def test_one_step_of_ddim_inversion_is_the_published_one(key: str) -> None:
    denoiser, chain, _, _, xt, _ = setting(key)
    ends, walked = [], list(chain)[::-1]
    noise_itself = walked[-1]._replace(alpha=torch.tensor(0.0), sigma=torch.tensor(1.0))  # what follows the last step there
    for b, i in enumerate(STEPS[key]["t"]):
        pair = [([*walked, noise_itself])[i + 1], walked[i]]
        ends.append(run(ddim_inversion(denoiser, xt[b : b + 1], pair)))
    close(torch.cat(ends), f"{key}_ddim_reverse")


@pytest.mark.parametrize("key", LOOPS)
def test_whole_sampling_loops_are_the_published_ones(key: str) -> None:
    denoiser, chain = setting(key)[:2]
    close(run(ancestral(denoiser, draw(0), chain, draw)), f"{key}_p_loop")
    close(run(Ddim()(denoiser, draw(0), chain, draw)), f"{key}_ddim_loop")


@pytest.mark.parametrize("key", LOOPS)
def test_the_whole_bound_is_the_published_one(key: str) -> None:
    denoiser, chain, _, x0, _, _ = setting(key)
    terms = list(bound_terms(denoiser, x0, chain, draw))
    i, *columns = zip(*terms)
    vb, x0_mse, eps_mse = (torch.stack(column, dim=1) for column in columns)
    prior = prior_term(chain, x0)
    assert list(i) == list(reversed(range(chain.steps)))
    close_bits(vb, f"{key}_bpd_vb")
    close_bits(prior, f"{key}_bpd_prior_bpd")
    close_bits(vb.sum(1) + prior, f"{key}_bpd_total_bpd")
    close(x0_mse, f"{key}_bpd_xstart_mse")
    close(eps_mse, f"{key}_bpd_mse")
