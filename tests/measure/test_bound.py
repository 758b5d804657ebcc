"""The bound of a data set: the published numbers, a second computation's, and the same whatever the batches and breaks."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.special import ndtr
from torch.distributions import Normal, kl_divergence

from golden_rules import Stub, load, noise
from iddpm import build, rng
from iddpm.config import Config
from iddpm.data import Order
from iddpm.errors import UserError
from iddpm.measure import bound as nll
from iddpm.measure.bound import Progress, bits_per_dim, summary, write_original_tables, write_tables
from iddpm.sampling.open import restore
from iddpm.store.weights import read_weights

CPU = torch.device("cpu")
LOOPS = {
    e["key"]: e
    for e in load("process.json")
    if e["kind"] == "process" and f"{e['key']}_bpd_vb" in load("process.npz") and e["var"] != "LEARNED"
}


def quiet(line):
    pass


@pytest.fixture(scope="module")
def trained(config, data, tmp_path_factory):
    """A run of 60 steps."""
    from iddpm.training.loop import train

    config = config.updated(dict(steps=60, save_interval=1000, log_interval=50, sampling_steps="all", ema_rate="0.9"))
    return train(config, data, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def net(run):
    return restore(read_weights(run), CPU)


class Golden:
    """The golden images as a data set."""

    labels = None
    files = ("a", "b", "c", "d")

    def __len__(self):
        return 4

    def batch(self, indices):
        return ((load("process.npz")["x0"].astype(np.float64) + 1) * 127.5)[indices]


def test_there_are_golden_loops_with_each_variance_a_config_can_name():
    assert len(LOOPS) == 12 and {e["var"] for e in LOOPS.values()} == {"FIXED_SMALL", "FIXED_LARGE", "LEARNED_RANGE"}


@pytest.mark.parametrize("key", LOOPS)
def test_the_bound_is_the_published_one_in_uneven_batches(monkeypatch, key):
    e, golden = (
        LOOPS[key],
        {n: load("process.npz")[f"{key}_bpd_{n}"] for n in ("total_bpd", "prior_bpd", "vb", "mse", "xstart_mse")},
    )
    monkeypatch.setattr(rng, "normal", lambda seed, purpose, k, indices, shape: noise(k, (4, *shape))[list(indices)])
    learned = e["var"] == "LEARNED_RANGE"
    config = Config().updated(
        dict(
            diffusion_steps=e["T"], noise_schedule=e["schedule"], parametrization=dict(START_X="x0", EPSILON="eps")[e["mean"]],
            learn_sigma=learned, sigma_small=e["var"] == "FIXED_SMALL", rescale_timesteps=e["rescale_timesteps"],
            sampling_steps=e["respacing"] or "all", clip_denoised=e["clip_denoised"],
        )
    )  # fmt: skip
    bound = bits_per_dim(config, Stub(6 if learned else 3), Golden(), CPU, chosen=np.arange(4), batch_size=3, say=quiet)
    np.testing.assert_allclose(bound.total, golden["total_bpd"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(bound.prior, golden["prior_bpd"], rtol=1e-4)
    np.testing.assert_allclose(bound.decoder, golden["vb"][:, -1], rtol=1e-4)
    for name, theirs in (("vb", "vb"), ("eps_mse", "mse"), ("x0_mse", "xstart_mse")):
        np.testing.assert_allclose(bound.mean[name], golden[theirs].mean(0)[::-1], rtol=1e-4)
        np.testing.assert_allclose(bound.error[name], golden[theirs].std(0, ddof=1)[::-1] / 2, rtol=1e-3, atol=1e-7)


def second_computation(config, net, x0, y, place, seed, kept):
    """The bound of one image in float64, from the papers' formulas and torch.distributions; the terms from step 0 upwards."""
    steps = config.diffusion.diffusion_steps
    bar = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
    whole = np.cumprod(1 - np.minimum(1 - np.array(bar[1:]) / np.array(bar[:-1]), 0.999))
    bar = whole[kept]
    before = np.concatenate([[1.0], bar[:-1]])
    betas = 1 - bar / before
    posterior = betas * (1 - before) / (1 - bar)
    posterior[0] = posterior[1]
    terms = []
    for i in reversed(range(len(kept))):
        draw = np.random.Generator(np.random.Philox(key=[seed, 5], counter=[0, 0, place, len(kept) - 1 - i]))
        eps = torch.from_numpy(draw.standard_normal(x0.shape[1:], dtype=np.float32)).double()[None]
        xt = math.sqrt(bar[i]) * x0 + math.sqrt(1 - bar[i]) * eps
        out = net(xt.float(), torch.tensor([kept[i] * 1000 / steps]).float(), y=y).double()
        guess, share = out.chunk(2, dim=1)
        x0_hat = ((xt - math.sqrt(1 - bar[i]) * guess) / math.sqrt(bar[i])).clamp(-1, 1)

        def mean(clean, i=i, xt=xt):
            by_x0, by_xt = math.sqrt(before[i]) * betas[i], math.sqrt(1 - betas[i]) * (1 - before[i])
            return (by_x0 * clean + by_xt * xt) / (1 - bar[i])

        log_var = (share + 1) / 2 * math.log(betas[i]) + (1 - share) / 2 * math.log(posterior[i])
        model = Normal(mean(x0_hat), (log_var / 2).exp())
        if i:
            terms.append(kl_divergence(Normal(mean(x0), math.sqrt(posterior[i])), model).mean().item() / math.log(2))
        else:  # the published code's approximation of the normal distribution's function, within 4e-4 of the exact one's bins
            edges = [(x0 + d / 255 - model.loc) / model.scale for d in (1, -1)]
            upper, lower = (0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) for z in edges)
            assert all((torch.from_numpy(ndtr(z.numpy())) - a).abs().max() < 4e-4 for z, a in zip(edges, (upper, lower)))
            upper, lower = torch.where(x0 > 0.999, 1.0, upper), torch.where(x0 < -0.999, 0.0, lower)
            terms.append(-(upper - lower).clamp(min=1e-12).log2().mean().item())
    end = Normal(math.sqrt(bar[-1]) * x0, math.sqrt(1 - bar[-1]))
    return kl_divergence(end, Normal(0 * x0, 1.0)).mean().item() / math.log(2), terms[::-1]


@pytest.mark.parametrize(("spec", "kept"), [("all", list(range(20))), ("6", [0, 4, 8, 11, 15, 19])])
def test_the_bound_of_a_trained_model_is_a_second_computations(trained, config, data, spec, kept):
    weights = read_weights(trained)
    config = weights.config.updated(dict(sampling_steps=spec))
    bound = bits_per_dim(config, restore(weights, CPU), data, CPU, num_samples=5, batch_size=2, seed=3, say=quiet)
    net = build.network(config).eval()
    net.load_state_dict(weights.tensors)
    rows = []
    with torch.inference_mode():
        for place, index in enumerate(Order(len(data), 3).indices(0, 5)):
            x0 = torch.from_numpy(data.batch([index])).double() / 127.5 - 1
            rows.append(second_computation(config, net, x0, torch.from_numpy(data.labels[[index]]), place, 3, kept))
    priors, terms = (np.array(column) for column in zip(*rows))
    np.testing.assert_allclose(bound.total, priors + terms.sum(1), rtol=0, atol=1e-4)
    np.testing.assert_allclose(bound.prior, priors, rtol=0, atol=1e-6)
    np.testing.assert_allclose(bound.decoder, terms[:, 0], rtol=0, atol=1e-4)
    np.testing.assert_allclose(bound.mean["vb"], terms.mean(0), rtol=0, atol=1e-4)
    np.testing.assert_allclose(bound.error["vb"], terms.std(0, ddof=1) / 5**0.5, rtol=1e-3, atol=1e-5)
    assert bound.kept.tolist() == kept
    np.testing.assert_allclose(bound.rest, terms[:, 1:].sum(1), rtol=0, atol=1e-4)
    total = summary(bound)
    assert total["bits_per_dim"] == pytest.approx((priors + terms.sum(1)).mean(), abs=1e-4)
    assert total["standard_error"] == pytest.approx((priors + terms.sum(1)).std(ddof=1) / 5**0.5, rel=1e-3)
    assert total["rest"] == pytest.approx(terms[:, 1:].sum(1).mean(), abs=1e-4)


def test_every_image_counts_once_and_equally_and_the_last_partial_batch_too(config, data, net):
    """The original wrapped round, left out the tail, and averaged the means of batches (FIELD B17)."""
    config = config.updated(dict(sampling_steps="3"))
    bounds = [bits_per_dim(config, net, data, CPU, batch_size=n, say=quiet) for n in (22, 5)]
    assert all(sorted(bound.indices) == list(range(22)) for bound in bounds)
    whole, parts = (bound.total for bound in bounds)
    np.testing.assert_allclose(whole, parts, rtol=1e-5)
    np.testing.assert_allclose(bounds[0].mean["vb"], bounds[1].mean["vb"], rtol=1e-4, atol=1e-6)
    batches = [parts[k : k + 5].mean() for k in range(0, 22, 5)]
    assert summary(bounds[1])["bits_per_dim"] == pytest.approx(whole.mean(), rel=1e-6)
    assert abs(np.mean(batches) - whole.mean()) > 1e-4 * whole.mean()  # here the original's rule would show


def test_training_lowers_the_bound(trained, config, data):
    from iddpm.training.loop import TrainState

    config = config.updated(dict(sampling_steps="all"))
    untrained = build.in_precision(TrainState(config, CPU).net.eval(), CPU, "fp32")
    better = restore(read_weights(trained), CPU)
    before, after = (bits_per_dim(config, n, data, CPU, say=quiet).total.mean() for n in (untrained, better))
    assert after < 0.9 * before


@pytest.fixture
def eager(monkeypatch):
    """Look at all processes and save after every term."""
    monkeypatch.setattr(nll, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(nll, "SAVE_COST", 0)


class Cut(Exception):
    pass


def cut_after(terms):
    """A tick that breaks off once so many terms are in."""
    seen = []

    def tick(count):
        seen.append(count)
        if sum(seen) > terms:
            raise Cut

    return tick


@pytest.mark.parametrize("terms", [0, 13, 60, 100])
def test_a_measurement_broken_off_anywhere_goes_on_to_the_very_same_numbers(eager, config, data, net, tmp_path, terms):
    config = config.updated(dict(sampling_steps="5"))
    job = dict(batch_size=4, identity=dict(a=1), say=quiet)
    whole = bits_per_dim(config, net, data, CPU, **job)
    with pytest.raises(Cut):
        bits_per_dim(config, net, data, CPU, **job, state=tmp_path / "s", tick=cut_after(terms))
    said, ticks, spent = [], [], 0.0
    if terms:
        with np.load(tmp_path / "s") as file:
            spent = float(file["seconds"][0])
    rest = bits_per_dim(config, net, data, CPU, **(job | dict(say=said.append)), state=tmp_path / "s", tick=ticks.append)
    assert sum(ticks) == 5 * 22
    assert (terms > 0) == (spent > 0) and rest.seconds > spent
    assert any("going on" in line for line in said) == (terms > 0)
    for name in ("total", "prior", "decoder"):
        assert np.array_equal(getattr(rest, name), getattr(whole, name))
    assert summary(rest) == summary(whole)


def test_a_broken_off_measurement_may_go_on_in_smaller_batches_but_not_as_another(eager, config, data, net, tmp_path):
    config, said = config.updated(dict(sampling_steps="5")), []
    whole = bits_per_dim(config, net, data, CPU, batch_size=8, say=quiet)
    with pytest.raises(Cut):
        bits_per_dim(config, net, data, CPU, batch_size=8, say=quiet, state=tmp_path / "s", tick=cut_after(70))
    kept = (tmp_path / "s").read_bytes()
    rest = bits_per_dim(config, net, data, CPU, batch_size=3, say=said.append, state=tmp_path / "s")
    assert "going on" in said[0]
    np.testing.assert_allclose(rest.total, whole.total, rtol=1e-5)
    (tmp_path / "s").write_bytes(kept)
    said.clear()
    bits_per_dim(config, net, data, CPU, seed=1, say=said.append, state=tmp_path / "s")
    assert "other images, seed" in said[0] and "anew" in said[0]
    (tmp_path / "s").write_bytes(kept[: len(kept) // 2])
    said.clear()
    again = bits_per_dim(config, net, data, CPU, batch_size=8, say=said.append, state=tmp_path / "s")
    assert "damaged" in said[0]
    assert np.array_equal(again.total, whole.total)


def test_what_is_kept_on_the_way_grows_with_images_plus_steps_and_not_their_product(tmp_path):
    sizes = []
    for n, steps in ((1000, 10), (1000, 1010), (2000, 10), (2000, 1010)):
        Progress(n, steps).save(tmp_path / "s")
        sizes.append((tmp_path / "s").stat().st_size)
    assert sizes[3] - sizes[2] == sizes[1] - sizes[0] == 1000 * 2 * 3 * 8


def test_a_bound_that_is_not_finite_names_the_image(config, data, net):
    def broken(x, t, **cond):
        return net(x, t, **cond) * torch.tensor(float("nan"))

    with pytest.raises(UserError, match=r"\.png is not finite"):
        bits_per_dim(config.updated(dict(sampling_steps="3")), broken, data, CPU, say=quiet)


@pytest.mark.parametrize("augmented", [False, True])
def test_an_upsampler_sees_the_small_image_of_each_and_no_noise_on_it(config, data, augmented):
    flat = dict(task="enlarge", small_size="4", low_res_noise=0.3 * augmented, sampling_steps="2", learn_sigma=False)
    seen = []

    def spy(x, t, **cond):
        seen.append(cond)
        return Stub(1)(x.expand(-1, 3, -1, -1), t)

    bits_per_dim(config.updated(flat), spy, data, CPU, chosen=np.array([7, 3]), say=quiet)
    blocks = data.batch([7, 3]).reshape(2, 1, 4, 2, 4, 2).mean((3, 5))  # b c h 2 w 2
    small = (seen[-1]["given"].numpy() + 1) * 127.5
    assert np.abs(small - np.round(small)).max() < 1e-4
    assert np.abs(small - blocks).max() <= 0.5 + 1e-4
    assert seen[-1]["y"].tolist() == data.labels[[7, 3]].tolist()
    assert set(seen[-1]) == {"y", "given"} | ({"low_res_level"} if augmented else set())
    assert not augmented or seen[-1]["low_res_level"].tolist() == [0, 0]


def test_tables_name_their_order_and_the_originals_run_from_the_noise_down(config, data, net, tmp_path):
    bound = bits_per_dim(config.updated(dict(sampling_steps="4")), net, data, CPU, num_samples=6, say=quiet)
    names = dict(vb_terms="vb", mse_terms="eps_mse", xstart_mse_terms="x0_mse")
    assert [p.name for p in write_tables(bound, tmp_path, "x_")] == [
        f"x_{n}.npz" for n in ("vb_terms", "mse_terms", "xstart_mse_terms")
    ]
    (tmp_path / "o").mkdir()
    write_original_tables(bound, tmp_path / "o")
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == sorted(f"{n}.npz" for n in names)
    for file_name, name in names.items():
        with np.load(tmp_path / f"x_{file_name}.npz") as ours, np.load(tmp_path / "o" / f"{file_name}.npz") as theirs:
            assert ours.files == ["t", "mean", "standard_error"] and ours["t"].tolist() == [0, 6, 13, 19]
            assert np.array_equal(ours["mean"], bound.mean[name]) and np.array_equal(ours["standard_error"], bound.error[name])
            assert theirs.files == ["arr_0"] and theirs["arr_0"].dtype == np.float32
            np.testing.assert_allclose(theirs["arr_0"], ours["mean"][::-1], rtol=1e-6)


def test_a_single_image_has_no_standard_error(config, data, net):
    result = summary(bits_per_dim(config.updated(dict(sampling_steps="2")), net, data, CPU, num_samples=1, say=quiet))
    assert result["standard_error"] is result["prior_error"] is result["vb_error"] is None
    assert "NaN" not in json.dumps(result)
