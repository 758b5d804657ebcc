"""GaussianDiffusion and SpacedDiffusion, by the original's names, against what the original computes on the same numbers."""

import math
from functools import cache
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from golden_rules import Stub, load, noise
from iddpm.interop.openai.python import gaussian_diffusion as gd
from iddpm.interop.openai.python.respace import SpacedDiffusion, space_timesteps

ENTRIES = load("process.json")
LOSSES = {e["key"]: e for e in ENTRIES if e["kind"] == "training_losses"}
STEPS = {e["key"]: e for e in ENTRIES if e["kind"] == "process"}
LOOPS = [key for key in STEPS if f"{key}_p_loop" in load("process.npz")]
SHAPE = (4, 3, 8, 8)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's global generator gives the golden draws, in order."""
    numbers = count()
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: noise(next(numbers), shape))
    monkeypatch.setattr(torch, "randn_like", lambda x: noise(next(numbers), tuple(x.shape)))


def golden(name: str) -> Tensor:
    return torch.from_numpy(load("process.npz")[name])


def close(ours: Tensor, name: str) -> None:
    torch.testing.assert_close(ours, golden(name), rtol=1e-5, atol=1e-5, msg=lambda m: f"{name}: {m}")


def close_bits(ours: Tensor, name: str) -> None:
    torch.testing.assert_close(ours, golden(name), rtol=1e-4, atol=0, msg=lambda m: f"{name}: {m}")


class Seeing(Stub):
    """The stub network, with the parameters that a sampling loop asks for, and the times that it was given."""

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        self.t = t
        return super().__call__(x, t, **cond)

    def parameters(self) -> Any:
        return iter([torch.zeros(1)])


@cache
def process(key: str) -> gd.GaussianDiffusion:
    e = {**LOSSES, **STEPS}[key]
    spec = space_timesteps(e["T"], e.get("respacing") or [e["T"]])
    return SpacedDiffusion(
        spec,
        betas=gd.get_named_beta_schedule(e["schedule"], e["T"]),
        model_mean_type=gd.ModelMeanType[e["mean"]],
        model_var_type=gd.ModelVarType[e["var"]],
        loss_type=gd.LossType[e.get("loss", "MSE")],
        rescale_timesteps=e["rescale_timesteps"],
    )


def model(key: str) -> Seeing:
    return Seeing(6 if "LEARNED" in {**LOSSES, **STEPS}[key]["var"] else 3)


def plain(key: str) -> gd.GaussianDiffusion:
    """The same process as the base class, which scales the time itself."""
    d = process(key)
    names = ("betas", "model_mean_type", "model_var_type", "loss_type", "rescale_timesteps")
    return gd.GaussianDiffusion(**{name: getattr(d, name) for name in names})


@pytest.mark.parametrize("make", [process, plain])
@pytest.mark.parametrize("key", LOSSES)
def test_training_losses_are_the_published_ones(key: str, make: Any) -> None:
    net, t = model(key), torch.tensor([0, 1, 17, 39])
    terms = make(key).training_losses(net, golden("x0"), t, noise=golden("eps"))
    assert sorted(terms) == sorted(LOSSES[key]["terms"])
    assert torch.equal(net.t.double(), golden(f"{key}_t_seen"))
    for name, ours in terms.items():
        (close if name == "mse" else close_bits)(ours, f"{key}_{name}")


def at(key: str) -> tuple[gd.GaussianDiffusion, Seeing, Tensor, Tensor, dict[str, Any]]:
    d, t = process(key), torch.tensor(STEPS[key]["t"])
    xt = d.q_sample(golden("x0"), t, noise=golden("eps"))
    return d, model(key), xt, t, dict(clip_denoised=STEPS[key]["clip_denoised"])


@pytest.mark.parametrize("key", STEPS)
def test_predictions_are_the_published_ones(key: str) -> None:
    d, net, xt, t, clip = at(key)
    out = d.p_mean_variance(net, xt, t, **clip)
    assert set(out) == {"mean", "variance", "log_variance", "pred_xstart"}
    for name, ours in out.items():
        close(ours, f"{key}_{name}")
    close_bits(d._vb_terms_bpd(net, golden("x0"), xt, t, **clip)["output"], f"{key}_vb")


@pytest.mark.parametrize("key", STEPS)
def test_single_steps_are_the_published_ones(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    d, net, xt, t, clip = at(key)
    monkeypatch.setattr(torch, "randn_like", lambda x: noise(0, tuple(x.shape)))
    close(d.p_sample(net, xt, t, **clip)["sample"], f"{key}_p_sample")
    for eta in (0.0, 0.5, 1.0):
        close(d.ddim_sample(net, xt, t, eta=eta, **clip)["sample"], f"{key}_ddim_{eta}")
    close(d.ddim_reverse_sample(net, xt, t, **clip)["sample"], f"{key}_ddim_reverse")


@pytest.mark.parametrize("key", LOOPS)
@pytest.mark.usefixtures("drawn")
def test_whole_ancestral_loops_are_the_published_ones(key: str) -> None:
    close(process(key).p_sample_loop(model(key), SHAPE, clip_denoised=STEPS[key]["clip_denoised"]), f"{key}_p_loop")


@pytest.mark.parametrize("key", LOOPS)
@pytest.mark.usefixtures("drawn")
def test_whole_ddim_loops_are_the_published_ones(key: str) -> None:
    close(process(key).ddim_sample_loop(model(key), SHAPE, clip_denoised=STEPS[key]["clip_denoised"]), f"{key}_ddim_loop")


@pytest.mark.parametrize("key", LOOPS)
@pytest.mark.usefixtures("drawn")
def test_the_whole_bound_is_the_published_one(key: str) -> None:
    out = process(key).calc_bpd_loop(model(key), golden("x0"), clip_denoised=STEPS[key]["clip_denoised"])
    for name, ours in out.items():
        (close if "mse" in name else close_bits)(ours, f"{key}_bpd_{name}")


@pytest.mark.parametrize("entry", load("guided_sampling.json"), ids=lambda e: e["key"])
@pytest.mark.usefixtures("drawn")
def test_guided_loops_are_the_published_ones(entry: dict[str, Any]) -> None:
    d = SpacedDiffusion(
        space_timesteps(entry["T"], entry["respacing"]),
        betas=gd.get_named_beta_schedule("cosine", entry["T"]),
        model_mean_type=gd.ModelMeanType.EPSILON,
        model_var_type=gd.ModelVarType.LEARNED_RANGE,
        loss_type=gd.LossType.MSE,
    )
    loop = d.ddim_sample_loop if entry["respacing"].startswith("ddim") else d.p_sample_loop
    seen = []

    def cond_fn(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append((t[0].item(), y))
        return entry["guide"] * torch.cos(x) * (1 + t.view(-1, 1, 1, 1) / entry["T"])

    ours = loop(Seeing(6), SHAPE, cond_fn=cond_fn, model_kwargs={"y": torch.tensor([1, 2, 3, 4])})
    torch.testing.assert_close(ours, torch.from_numpy(load("guided_sampling.npz")[entry["key"]]), rtol=1e-5, atol=1e-5)
    assert [t for t, _ in seen] == sorted(d.use_timesteps, reverse=True), "cond_fn sees the steps of the whole process"


@pytest.mark.parametrize("name", sorted(load("schedules.npz")))
def test_tables_are_the_published_ones(name: str) -> None:
    schedule, steps, quantity = name.split("_", 2)
    d = gd.GaussianDiffusion(
        betas=gd.get_named_beta_schedule(schedule, int(steps)),
        model_mean_type=gd.ModelMeanType.EPSILON,
        model_var_type=gd.ModelVarType.FIXED_SMALL,
        loss_type=gd.LossType.MSE,
    )
    ours = getattr(d, quantity)
    assert isinstance(ours, np.ndarray) and ours.dtype == np.float64
    np.testing.assert_allclose(ours, load("schedules.npz")[name], rtol=1e-12)


def test_other_tables_follow_from_alpha_bar() -> None:
    d = process("proc_96")
    bar, one = d.alphas_cumprod, np.ones(1)
    expected = {
        "alphas_cumprod_prev": np.concatenate([one, bar[:-1]]),
        "alphas_cumprod_next": np.concatenate([bar[1:], 0 * one]),
        "sqrt_alphas_cumprod": bar**0.5,
        "sqrt_one_minus_alphas_cumprod": (1 - bar) ** 0.5,
        "log_one_minus_alphas_cumprod": np.log1p(-bar),
        "sqrt_recip_alphas_cumprod": bar**-0.5,
        "sqrt_recipm1_alphas_cumprod": (1 / bar - 1) ** 0.5,
    }
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(d, name), values, rtol=1e-9, err_msg=name)
        like = torch.zeros(2, 3, 5)
        table = gd._extract_into_tensor(getattr(d, name), torch.tensor([0, 7]), like.shape)
        torch.testing.assert_close(table, torch.tensor(values[[0, 7]]).float()[:, None, None].expand_as(like))


def test_q_mean_variance_is_the_law_of_q_sample() -> None:
    d, t = process("proc_96"), torch.tensor([0, 20, 39, 1])
    mean, variance, log_variance = d.q_mean_variance(golden("x0"), t)
    torch.testing.assert_close(mean + variance.sqrt() * golden("eps"), d.q_sample(golden("x0"), t, golden("eps")))
    torch.testing.assert_close(variance, log_variance.exp())
    assert mean.shape == variance.shape == SHAPE


@pytest.mark.parametrize("entry", load("respacing.json"), ids=lambda e: f"{e['num_timesteps']}-{e['spec']}")
def test_respacing_is_the_published_one(entry: dict[str, Any]) -> None:
    if "error" in entry:
        with pytest.raises(ValueError, match=r"cannot|possible|give"):
            space_timesteps(entry["num_timesteps"], entry["spec"])
    else:
        assert space_timesteps(entry["num_timesteps"], entry["spec"]) == set(entry["steps"])


def test_betas_of_any_alpha_bar() -> None:
    ours = gd.betas_for_alpha_bar(50, lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2)
    np.testing.assert_allclose(ours, load("schedules.npz")["cosine_50_betas"], rtol=1e-12)
    assert gd.betas_for_alpha_bar(4, lambda u: 1 - u, max_beta=0.7).tolist() == pytest.approx([1 / 4, 1 / 3, 1 / 2, 0.7])


def test_an_unknown_schedule_is_refused_with_those_there_are() -> None:
    with pytest.raises(NotImplementedError, match="linear, cosine"):
        gd.get_named_beta_schedule("square", 10)


# ---- what forks do


def test_a_progressive_loop_goes_on_from_what_its_reader_puts_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    d, starts = process("proc_96"), []

    class Watched(gd.GaussianDiffusion):
        pass

    watched = plain("proc_96")
    watched.__class__ = Watched
    Watched.p_sample = lambda self, net, x, t, **k: (starts.append(x), gd.GaussianDiffusion.p_sample(self, net, x, t, **k))[1]
    for k, out in enumerate(watched.p_sample_loop_progressive(model("proc_96"), SHAPE, noise=golden("eps"))):
        assert torch.is_grad_enabled(), "the reader's own work is not without gradients"
        out["sample"] = torch.full(SHAPE, k / 100)
    assert torch.equal(starts[0], golden("eps")) and [x.unique().item() for x in starts[1:3]] == pytest.approx([0.0, 0.01])
    assert len(starts) == d.num_timesteps


@pytest.mark.parametrize(
    ("method", "change", "moves"),
    [
        ("p_mean_variance", lambda out: {**out, "mean": out["mean"] + 1}, ("p_sample", "vb")),
        ("p_mean_variance", lambda out: {**out, "pred_xstart": out["pred_xstart"] * 0.5}, ("ddim_sample", "ddim_reverse_sample")),
        ("_predict_xstart_from_eps", lambda out: out * 0.5, ("p_sample", "ddim_sample", "vb", "loss")),
        ("q_posterior_mean_variance", lambda out: (out[0] + 1, *out[1:]), ("p_sample",)),
        ("_vb_terms_bpd", lambda out: {**out, "output": out["output"] + 1}, ("vb", "loss", "bpd")),
        ("_scale_timesteps", lambda t: t + 100, ("p_sample", "loss")),
        ("q_sample", lambda x: x * 0.5, ("loss", "bpd")),
        ("_prior_bpd", lambda x: x + 1, ("bpd",)),
    ],
)
def test_an_overridden_method_is_the_one_that_the_others_call(method: str, change: Any, moves: tuple[str, ...]) -> None:
    def results(kind: type[gd.GaussianDiffusion]) -> dict[str, Tensor]:
        names = ("betas", "model_mean_type", "model_var_type", "rescale_timesteps")
        base = process("loss_94")  # EPSILON, LEARNED_RANGE
        d = kind(loss_type=gd.LossType.RESCALED_MSE, **{name: getattr(base, name) for name in names})
        net, x0, t = model("loss_94"), golden("x0"), torch.tensor([1, 5, 20, 30])
        xt = gd.GaussianDiffusion.q_sample(d, x0, t, golden("eps"))
        torch.manual_seed(0)
        return {
            "p_sample": d.p_sample(net, xt, t)["sample"],
            "ddim_sample": d.ddim_sample(net, xt, t)["sample"],
            "ddim_reverse_sample": d.ddim_reverse_sample(net, xt, t)["sample"],
            "vb": d._vb_terms_bpd(net, x0, xt, t)["output"],
            "loss": d.training_losses(net, x0, t)["loss"],
            "bpd": d.calc_bpd_loop(net, x0)["total_bpd"],
        }

    original = getattr(gd.GaussianDiffusion, method)
    fork = type("Fork", (gd.GaussianDiffusion,), {method: lambda *a, **k: change(original(*a, **k))})
    before, after = results(gd.GaussianDiffusion), results(fork)
    assert [name for name in moves if torch.equal(before[name], after[name])] == []


def test_denoised_fn_is_applied_before_clipping() -> None:
    d, net, xt, t, _ = at("proc_96")
    out = d.p_mean_variance(net, xt, t, denoised_fn=lambda x0: 0 * x0 + 3)
    assert torch.equal(out["pred_xstart"], torch.ones(SHAPE))
