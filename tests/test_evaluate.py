"""Bits per dimension of a data set: each image once, whatever the batches, and equal to the chain's own sum."""

import json

import pytest
import torch

from iddpm import build, checkpoint, rng, sample
from iddpm.cli import main
from iddpm.data import Order
from iddpm.diffusion.likelihood import bound_terms, prior_term
from iddpm.evaluate import bits_per_dim

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def net(run):
    return sample.restore(checkpoint.read_weights(run), CPU)


def test_the_mean_over_images_is_their_own_bounds_one_by_one(config, data, net):
    config = config.updated(dict(sampling_steps="6"))
    result = bits_per_dim(config, net, data, CPU, num_samples=5, batch_size=2, seed=3, say=lambda line: None)
    denoiser, totals = build.denoiser(config.diffusion, net, "6", clip=True), []
    with torch.inference_mode():
        for place, index in enumerate(Order(len(data), 3).indices(0, 5)):
            x0 = torch.from_numpy(data.batch([index])).float() / 127.5 - 1
            y = torch.from_numpy(data.labels[[index]])

            def noise(k, place=place):
                return rng.normal(3, rng.LIKELIHOOD, k, [place], (1, 8, 8))

            total = prior_term(denoiser.chain, x0) + sum(t.vb for t in bound_terms(denoiser, x0, noise, {"y": y}))
            totals.append(total.item())
    assert result["bits_per_dim"] == pytest.approx(sum(totals) / 5, rel=1e-5)
    assert result["standard_error"] == pytest.approx(torch.tensor(totals).std().item() / 5**0.5, rel=1e-3)


def test_all_images_are_measured_by_default_and_the_last_batch_too(config, data, net):
    config = config.updated(dict(sampling_steps="3"))
    results = [bits_per_dim(config, net, data, CPU, batch_size=n, say=lambda line: None) for n in (22, 5)]
    assert [r["images"] for r in results] == [22, 22]
    assert results[0]["bits_per_dim"] == pytest.approx(results[1]["bits_per_dim"], rel=1e-5)
    assert results[0]["vb"] == pytest.approx(results[1]["vb"], rel=1e-4, abs=1e-6)


def test_training_lowers_the_bound(config, data, tmp_path):
    from iddpm.train import TrainState, train

    config = config.updated(dict(steps=150, save_interval=1000, log_interval=50, sampling_steps="all", ema_rate="0.9"))
    folder = train(config, data, tmp_path)
    untrained = build.in_precision(TrainState(config, CPU).net.eval(), CPU, "fp32")
    trained = sample.restore(checkpoint.read_weights(folder), CPU)
    before, after = (bits_per_dim(config, n, data, CPU, say=lambda line: None)["bits_per_dim"] for n in (untrained, trained))
    assert after < 0.9 * before


def test_nll_names_the_chain_and_classes_are_those_of_the_run(run, pictures, tmp_path, capsys):
    one = tmp_path / "subset"
    (one / "down").mkdir(parents=True)
    for file in sorted((pictures / "down").iterdir())[:2]:
        (one / "down" / file.name).write_bytes(file.read_bytes())
    assert main(["nll", str(run), str(one), "--out", str(tmp_path / "n.json"), "--device", "cpu", "--sampling_steps", "all"]) == 0
    assert " bits/dim (2 images" in capsys.readouterr().out
    assert json.loads((tmp_path / "n.json").read_text())["kept_steps"] == list(range(20))
    (one / "up").mkdir()
    next((one / "down").iterdir()).rename(one / "up" / "x.png")
    assert main(["nll", str(run), str(one), "--device", "cpu"]) == 2
    assert "up" in capsys.readouterr().err
