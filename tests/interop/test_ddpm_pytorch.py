"""Checkpoints of denoising-diffusion-pytorch, compared with what version 2.3.4 itself computes.

tests/goldens/ddpm_pytorch.json holds the shapes of small networks of its, and ddpm_pytorch.npz what they give with weights by a
rule, what it draws with one, and the buffers of its processes; all made by the library, of which nothing is here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from golden_rules import load, noise
from iddpm import build
from iddpm.cli.main import main
from iddpm.config import Config
from iddpm.diffusion.solvers import run as walk
from iddpm.store.weights import read_weights
from interop.ruled import ruled

V8 = "pred_v, of 8"
SIDE = ["--image_size", "8"]


def golden(name: str) -> Tensor:
    return torch.from_numpy(load("ddpm_pytorch.npz")[name].copy())


def state(net: str = "linear", process: str = V8, sign: float = 1.0) -> dict[str, Tensor]:
    """As a GaussianDiffusion keeps it."""
    weights = {f"model.{name}": sign * ruled(name, shape) for name, shape in load("ddpm_pytorch.json")[net]["shapes"].items()}
    buffers = {name: golden(f"{process}.{name}") for name in ("betas", "loss_weight")}
    return buffers | {"posterior_variance": buffers["betas"]} | weights


def checkpoint(net: str = "linear", process: str = V8) -> dict[str, Any]:
    """As its Trainer saves it: the average is the weights of the goldens, the others are not."""
    raw, kept = state(net, process, -1.0), state(net, process)
    ema = {"initted": torch.tensor(True), "step": torch.tensor(70)}
    ema |= {f"online_model.{name}": t for name, t in raw.items()} | {f"ema_model.{name}": t for name, t in kept.items()}
    opt = {"state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    return dict(step=70, model=raw, opt=opt, ema=ema, scaler=None, version="2.3.4")


def imported(tmp_path: Path, content: Any, *flags: str) -> tuple[Config, torch.nn.Module]:
    """What `iddpm import` makes of a file: the config, and the network with the weights that are sampled from."""
    torch.save(content, tmp_path / "model-7.pt")
    assert main(["import", str(tmp_path / "model-7.pt"), "--run", str(tmp_path / "run"), *flags]) == 0
    weights = read_weights(tmp_path / "run")
    net = build.network(weights.config).eval().requires_grad_(False)
    net.load_state_dict(weights.tensors)
    return weights.config, net


def refusal(tmp_path: Path, capsys: Any, content: Any, *flags: str) -> str:
    torch.save(content, tmp_path / "model-7.pt")
    assert main(["import", str(tmp_path / "model-7.pt"), "--run", str(tmp_path / "run"), *flags]) == 2
    said = str(capsys.readouterr().err)
    assert said.count("\n") == 1
    assert said.isascii()
    return said


# ---- what is read


@pytest.mark.parametrize("net", ["linear", "softmax"])
def test_a_network_computes_what_it_does_in_the_library(tmp_path, net):
    config, ours = imported(tmp_path, checkpoint(net), *SIDE)
    assert config.model.network == "unet_linear"
    out = ours(noise(0, (2, 3, 8, 8)), torch.tensor([1, 6]))
    torch.testing.assert_close(out, golden(f"{net}.out"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", ["ddim", "ancestral"])
def test_it_draws_what_the_library_does_from_the_same_noise(tmp_path, solver):
    config, net = imported(tmp_path, checkpoint(), *SIDE, "--solver", solver, "--sampling_steps", "all")
    shape, grid = (2, 3, 8, 8), build.grid(config)
    path = build.solver(config)(build.drawing(config, net, {}), noise(0, shape), grid, lambda k: noise(k, shape))
    torch.testing.assert_close(walk(path), golden(solver), rtol=1e-5, atol=1e-5)


PROCESSES = {
    "pred_v, sigmoid": ("sigmoid_chain", "v", "p2", 0.0),
    "pred_noise, linear, min_snr": ("linear", "eps", "min_snr", 5.0),
    "pred_x0, cosine, min_snr": ("cosine", "x0", "min_snr", 3.0),
    "pred_v, linear, min_snr": ("linear", "v", "min_snr", 5.0),
    "pred_noise, sigmoid": ("sigmoid_chain", "eps", "p2", 0.0),
    "pred_x0, linear": ("linear", "x0", "p2", 0.0),
    "pred_v, of 1000": ("cosine", "v", "p2", 0.0),
    V8: ("sigmoid_chain", "v", "p2", 0.0),
}


@pytest.mark.parametrize("process", PROCESSES)
def test_the_process_is_told_by_its_buffers(tmp_path, process):
    config, _ = imported(tmp_path, checkpoint(process=process), *SIDE)
    schedule, parametrization, weighting, number = PROCESSES[process]
    d, numbers, betas = config.diffusion, config.numbers(), golden(f"{process}.betas").double()
    assert (d.noise_schedule, d.parametrization, d.weighting) == (schedule, parametrization, weighting)
    assert numbers["p2_gamma" if weighting == "p2" else "snr_gamma"] == number
    steps = build.schedule(config)(torch.arange(len(betas)).double() / len(betas) + 0.5 / len(betas))
    torch.testing.assert_close(steps.alpha**2, (1 - betas).cumprod(0), rtol=3e-4, atol=1e-7)
    assert steps.time.tolist() == list(range(len(betas)))  # the library tells the number of the step
    # ours weighs the error of the output as the library does
    scalings = build.parametrization(config)(steps)
    weight = build.weighting(config)(steps, scalings, lambda: steps.alpha)
    torch.testing.assert_close(weight, golden(f"{process}.loss_weight").double(), rtol=2e-3, atol=1e-7)


def test_the_average_is_drawn_from_and_the_weights_are_kept(tmp_path, capsys):
    imported(tmp_path, checkpoint(), *SIDE)
    assert "average 0.995" in capsys.readouterr().out
    raw, average = (read_weights(tmp_path / "run", ema_rate=rate).tensors for rate in (0.0, None))
    assert all(torch.equal(raw[name], -average[name]) for name in raw)
    assert read_weights(tmp_path / "run").about["step"] == 70


def test_the_state_of_a_process_alone_is_read(tmp_path):
    _, net = imported(tmp_path, state(), *SIDE)
    torch.testing.assert_close(net(noise(0, (2, 3, 8, 8)), torch.tensor([1, 6])), golden("linear.out"), rtol=1e-5, atol=1e-5)


def test_a_run_of_it_draws_is_measured_and_trained_on(tmp_path):
    imported(tmp_path, checkpoint(), *SIDE)
    run, images = str(tmp_path / "run"), str(tmp_path / "images.npz")
    np.savez(images, np.zeros((4, 8, 8, 3), np.uint8))
    for solver in ("ddim", "ancestral", "dpmpp_2m", "heun"):
        assert main(["sample", run, "--num_samples", "2", "--solver", solver, "--sampling_steps", "4"]) == 0
    for how in ([], ["--ode"]):
        assert main(["nll", run, images, *how]) == 0
    on = ["--init_from", run, "--steps", "1", "--batch_size", "2", "--device", "cpu", "--sample_interval", "1"]
    assert main(["train", images, "--run", str(tmp_path / "on"), *on, "--num_samples", "2"][:-2]) == 0


# ---- what is refused


def changed(change: Callable[[dict[str, Tensor]], Any], net: str = "linear") -> dict[str, Tensor]:
    content = state(net)
    change(content)
    return content


def wider(name: str, times: int, dim: int) -> Callable[[dict[str, Tensor]], Any]:
    return lambda s: s.update({f"model.{name}": torch.cat([s[f"model.{name}"]] * times, dim)})


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "another tau": (lambda: state(process="pred_noise, tau"), "of no noise schedule of iddpm"),
    "self_condition": (lambda: changed(wider("init_conv.weight", 2, 1)), "self_condition"),
    "a learned variance": (lambda: changed(wider("final_conv.weight", 2, 0)), "LearnedGaussianDiffusion"),
    "learned frequencies": (lambda: state() | {"model.time_mlp.0.weights": torch.ones(8)}, "random or learned frequencies"),
    "classes": (lambda: state() | {"model.classes_emb.weight": torch.ones(8, 8)}, "is told classes"),
    "version 1": (lambda: state() | {"model.downs.0.0.block1.norm.weight": torch.ones(16)}, "first version"),
    "another init_dim": (lambda: changed(wider("init_conv.weight", 2, 0)), "init_dim, 32, other than its dim, 16"),
    "no attention in the middle": (lambda: changed(lambda s: s.pop("model.mid_attn.mem_kv")), "no mid_attn.mem_kv"),
    "heads that differ": (lambda: changed(wider("downs.0.2.mem_kv", 2, 1)), "same heads and tokens at every level"),
    "weights too many": (lambda: state() | {"model.more": torch.ones(3)}, "'more' of its weights"),
    "no objective": (lambda: changed(lambda s: s.pop("loss_weight")), "give --parametrization"),
    "an objective of none": (lambda: changed(lambda s: s["loss_weight"].copy_(torch.ones(8).cumsum(0))), "none of pred_noise"),
    "betas below 0": (lambda: changed(lambda s: s["betas"].neg_()), "betas are no list"),
    "betas of nothing": (lambda: state() | {"betas": torch.ones(2, 2)}, "betas are no list"),
    "no number": (lambda: changed(lambda s: s["model.final_conv.bias"].fill_(float("nan"))), "is not finite"),
    "a text for a weight": (lambda: {"model": {**state(), "model.final_conv.bias": "x"}}, "is no tensor"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_here_is_refused_in_one_line(tmp_path, capsys, name):
    made, said = WRONG[name]
    assert said in refusal(tmp_path, capsys, made(), *SIDE)


def test_what_the_file_does_not_tell_is_asked_for(tmp_path, capsys):
    assert "give --image_size" in refusal(tmp_path, capsys, checkpoint())
    assert "image size of multiples of 2" in refusal(tmp_path, capsys, checkpoint(), "--image_size", "9")
    assert "contradicts" in refusal(tmp_path, capsys, checkpoint(), *SIDE, "--num_channels", "32")
    assert "is of denoising-diffusion-pytorch" in refusal(tmp_path, capsys, checkpoint(), *SIDE, "--alone")
    older = changed(lambda s: s.pop("loss_weight"))
    config, _ = imported(tmp_path, older, *SIDE, "--parametrization", "eps")
    assert config.diffusion.parametrization == "eps"


def test_its_network_alone_is_named_with_the_file_to_give(tmp_path, capsys):
    net = {name.removeprefix("model."): t for name, t in state().items() if name.startswith("model.")}
    assert "give the whole file of its Trainer" in refusal(tmp_path, capsys, net)
