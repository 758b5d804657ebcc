"""Every named method from end to end: trained, stopped and gone on with, sampled, measured; two of them on two processes."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import TINY, flags
from iddpm import build
from iddpm.cli.main import main
from iddpm.config import Config
from iddpm.config.choices import choices
from iddpm.store.log import read_rows
from launcher import Launcher

BASE = dict(TINY, batch_size=4, ema_rate="0.9") | dict(learn_sigma=False)
CHAIN = dict(diffusion_steps=20, noise_schedule="cosine")
METHODS: dict[str, dict] = {
    "ddpm": dict(CHAIN, noise_schedule="linear"),
    "iddpm hybrid": dict(CHAIN, learn_sigma=True),
    "iddpm vlb": dict(CHAIN, learn_sigma=True, objective="vlb", schedule_sampler="loss-second-moment"),
    "v": dict(CHAIN, parametrization="v", schedule_sampler="stratified", solver="ddim", eta=0.3),
    "x0": dict(CHAIN, parametrization="x0", weighting="flow", solver="dpmpp_2m"),
    "edm": dict(
        noise_schedule="ve", parametrization="edm", schedule_sampler="lognormal", weighting="edm", sigma_data=0.6, sigma_max=40.0,
        solver="dpmpp_2m",
    ),
    "flow": dict(noise_schedule="flow", parametrization="flow", schedule_sampler="logit-normal", weighting="flow", solver="ddim"),
    "flow, looking": dict(noise_schedule="flow", parametrization="x0", weighting="flow", schedule_sampler="loss-second-moment"),
}  # fmt: skip


def settings(name: str) -> dict:
    return {k: v for k, v in BASE.items() if k not in CHAIN} | METHODS[name]


def tensors(run, step: int) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"step_{step:08d}"
    return {f"{file.name}:{k}": v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    """A run of each method of four steps; and another that was stopped after two."""
    root = tmp_path_factory.mktemp("methods")
    for name in METHODS:
        for run, ends in (("whole", [4]), ("parted", [2, 4])):
            for steps in ends:
                line = flags(**settings(name) | dict(steps=steps))
                assert main(["train", str(pictures), "--run", str(root / name / run), *line]) == 0
    return root


@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_was_stopped_ends_with_the_same_bits(trained, name):
    whole, parted = (tensors(trained / name / run, 4) for run in ("whole", "parted"))
    assert whole.keys() == parted.keys() and len(whole) > 50
    assert all(torch.equal(whole[k], parted[k]) for k in whole)
    losses = [[row["loss"] for row in read_rows(trained / name / run) if "loss" in row] for run in ("whole", "parted")]
    assert losses[0] == losses[1] and np.isfinite(losses[0]).all()


@pytest.mark.parametrize("solver", ["", *choices("solver")])
@pytest.mark.parametrize("name", METHODS)
def test_it_draws_with_every_solver(trained, name, solver, tmp_path):
    chosen = ["--solver", solver] if solver else []
    command = ["sample", str(trained / name / "whole"), "--num_samples", "2", "--sampling_steps", "4", "--device", "cpu", *chosen]
    assert main([*command, "--out", str(tmp_path / "x.npz")]) == 0
    with np.load(tmp_path / "x.npz") as file:
        images = file["arr_0"]
    assert images.shape == (2, 8, 8, 1) and images.std() > 0


@pytest.mark.parametrize("name", METHODS)
def test_its_bits_per_dimension_are_finite_and_no_wonder(trained, name, pictures, tmp_path):
    """Of a network that has hardly learned: not below what 8-bit images can be, nor beyond a uniform guess by far."""
    run, out = trained / name / "whole", tmp_path / "nll.json"
    command = [
        "nll",
        str(run),
        str(pictures),
        "--num_samples",
        "4",
        "--sampling_steps",
        "8",
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    assert main(command) == 0
    assert 0.5 < json.loads(out.read_text())["bits_per_dim"] < 60


@pytest.mark.parametrize("name", ["flow", "edm"])
def test_two_processes_train_what_one_does(trained, name, pictures, tmp_path):
    with Launcher() as launcher:
        line = flags(**settings(name))
        launcher.start("train", pictures, "--run", tmp_path / "two", *line, said=tmp_path / "said", processes=2).succeed()
    one, two = tensors(trained / name / "whole", 4), tensors(tmp_path / "two", 4)
    assert one.keys() == two.keys()
    for a, b in zip(read_rows(trained / name / "whole"), read_rows(tmp_path / "two")):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
    close = [torch.allclose(one[k].double(), two[k].double(), rtol=0, atol=2e-3) for k in one]  # Adam's steps are 1e-3 each
    assert all(close)


@pytest.mark.parametrize(("name", "drawn"), [("flow", "fixed_small"), ("edm", "fixed_small"), ("ddpm", "fixed_large")])
def test_few_large_steps_are_drawn_with_the_posteriors_variance_and_bounded_with_betas(name, drawn):
    config = Config().updated(METHODS[name])
    assert build.sampling_denoiser(config, None).variance.__name__ == drawn
    assert build.bound_denoiser(config, None).variance.__name__ == "fixed_large"
