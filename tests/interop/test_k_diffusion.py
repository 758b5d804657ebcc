"""Checkpoints of k-diffusion, of image_v1 and image_transformer_v2, compared with what version 0.1.1 itself computes.

tests/goldens/k_diffusion.json holds the configs and shapes of small networks of its, and k_diffusion.npz what they give in its
Denoiser with weights by a rule, and what its Euler draws; made by the library, of which nothing is here. Where it calls natten,
that was a loop over single tokens in float64.
"""

import json
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from golden_rules import load, noise
from iddpm import build
from iddpm.cli.main import main
from iddpm.config import Config
from iddpm.diffusion.schedule import Level
from iddpm.diffusion.solvers import run as walk
from iddpm.nn.hdit import frequencies
from iddpm.store.weights import read_weights
from interop.ruled import ruled

NETWORKS = ("plain", "of patches", "skipping")
TRANSFORMERS = ("one level", "of windows", "of neighbours")


def golden(name: str, what: str) -> Tensor:
    return torch.from_numpy(load("k_diffusion.npz")[f"{name.replace(' ', '_')}.{what}"].copy())


def weights(name: str) -> dict[str, Tensor]:
    return {name: weight(name, shape) for name, shape in load("k_diffusion.json")[name]["shapes"].items()}


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """By the rule; a filter is zeros here, scales are about 1 or 5, and frequencies of places are as they are."""
    if name.endswith("freqs"):
        return frequencies(shape[0], 8 * shape[1]).contiguous()
    if name.endswith("kernel"):
        return torch.zeros(shape)
    drawn = ruled(name, shape)
    return 5 + 10 * drawn if name.endswith("self_attn.scale") else 1 + drawn if name.endswith("scale") else drawn


def checkpoint(name: str = "plain", **model: Any) -> dict[str, Any]:
    """As its train.py saves it: the average is the weights of the goldens, the others are not."""
    config = deepcopy(load("k_diffusion.json")[name]["config"])
    config["model"] |= model
    raw = {name: t if name.endswith("freqs") else -t for name, t in weights(name).items()}
    return dict(
        config=config, model=raw, model_ema=weights(name), opt={"state": {}, "param_groups": []}, sched={"last_epoch": 3},
        ema_sched={}, epoch=1, step=55, gns_stats=None, ema_stats={}, demo_gen=torch.Generator().get_state(), elapsed=1.5,
    )  # fmt: skip


def save(path: Path, content: Any) -> str:
    if path.suffix == ".safetensors":
        save_file(content["model_ema"], path, {"config": json.dumps(content["config"], indent=4)})
    else:
        torch.save(content, path)
    return str(path)


def imported(path: Path, content: Any) -> tuple[Config, torch.nn.Module]:
    """What `iddpm import` makes of a file: the config, and the network with the weights that are sampled from."""
    assert main(["import", save(path, content), "--run", str(path.parent / "run")]) == 0
    found = read_weights(path.parent / "run")
    net = build.network(found.config).eval().requires_grad_(False)
    net.load_state_dict(found.tensors)
    return found.config, net


# ---- what is read


@pytest.mark.parametrize("ends", ["pth", "safetensors"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_computes_what_it_does_in_the_library(tmp_path, name, ends):
    config, net = imported(tmp_path / f"k.{ends}", checkpoint(name))
    assert config.model.network == "unet_mapped"
    x0, sigma = golden(name, "x0"), torch.tensor([0.05, 1.0, 20.0]).double()
    x = noise(0, tuple(x0.shape))
    found = build.denoiser(config, net)(x * sigma[:, None, None, None].float(), Level(sigma.log(), torch.ones(3), sigma)).x0
    torch.testing.assert_close(found, x0, rtol=1e-5, atol=1e-5)
    config = config.updated(dict(solver="ddim", sampling_steps="5"))  # which is Euler's on these levels
    grid = build.grid(config)
    path = build.solver(config)(build.drawing(config, net, {}), grid.start * x, grid, lambda k: None)
    torch.testing.assert_close(walk(path), golden(name, "euler"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ends", ["pth", "safetensors"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformer_computes_what_it_does_in_the_library(tmp_path, name, ends):
    config, net = imported(tmp_path / f"k.{ends}", checkpoint(name))
    assert config.model.network == "hdit"
    x0, sigma = golden(name, "x0"), torch.tensor([0.05, 1.0, 20.0]).double()
    x, level = noise(0, tuple(x0.shape)), Level(sigma.log(), torch.ones(3), sigma)
    cond = {"y": torch.tensor([0, 1, 2 if config.model.class_dropout else 0])} if config.model.class_cond else {}
    found = build.denoiser(config, net)(x * sigma[:, None, None, None].float(), level, cond).x0
    torch.testing.assert_close(found, x0, rtol=1e-5, atol=1e-5)


def test_the_config_of_a_transformer_is_read_with_the_defaults_of_its_program(tmp_path):
    config, _ = imported(tmp_path / "a.pth", checkpoint("one level"))  # which says little
    assert not config.model.class_cond and config.model.dropout == 0.05 and config.diffusion.weighting == "soft_min_snr"
    found, wanted = config.numbers(), dict(
        patch_size=2, level_depths="2", level_attention="global", level_hidden="192", level_dropout="", head_width=64,
        mapping_width=32, mapping_depth=2, mapping_hidden=96, mapping_dropout=0.0,
    )  # fmt: skip
    assert found.items() >= wanted.items()


def test_the_config_of_a_transformer_is_read_in_full(tmp_path):
    config, _ = imported(tmp_path / "a.pth", checkpoint("of windows"))
    m = config.model
    assert (m.num_classes, m.class_cond, m.class_dropout, m.dropout, m.channel_mult) == (2, True, 0.1, 0.0, "1,1.5")
    found, wanted = config.numbers(), dict(
        level_depths="3,2", level_attention="window:4,global", level_hidden="64,100", level_dropout="0.0,0.1", head_width=16,
        mapping_depth=1, mapping_hidden=40,
    )  # fmt: skip
    assert found.items() >= wanted.items()


def test_a_transformer_whose_classes_were_never_dropped_knows_these_alone(tmp_path, capsys):
    config, net = imported(tmp_path / "a.pth", checkpoint("of neighbours"))
    assert (config.model.num_classes, config.model.class_dropout, net.num_classes) == (2, 0.0, 2)
    assert config.numbers()["level_attention"] == "neighborhood:5,neighborhood:7,none"
    assert "changed images" not in capsys.readouterr().out


def test_what_a_transformer_knew_besides_is_told(tmp_path, capsys):
    imported(tmp_path / "a.pth", checkpoint("one level", loss_scales=2))
    said = capsys.readouterr().out
    assert "changed images (augment_prob) is left out" in said and "loss_scales 2 is left out" in said


def test_a_run_of_a_transformer_draws_with_guidance_and_is_trained_on(tmp_path):
    imported(tmp_path / "k.pth", checkpoint("of windows"))
    run, images = str(tmp_path / "run"), tmp_path / "images.npz"
    np.savez(images, np.zeros((4, 16, 16, 3), np.uint8), np.array([0, 1, 0, 1]))
    assert main(["sample", run, "--num_samples", "2", "--sampling_steps", "3", "--guidance", "2"]) == 0
    on = ["--init_from", run, "--steps", "1", "--batch_size", "2", "--device", "cpu"]
    assert main(["train", str(images), "--run", str(tmp_path / "on"), *on]) == 0


@pytest.mark.parametrize(
    ("model", "weighting", "said"),
    [
        (dict(loss_weighting="karras"), "edm", lambda sigma, d: torch.ones_like(sigma)),
        (dict(loss_weighting="snr"), "p2", lambda sigma, d: d**2 / (sigma**2 + d**2)),
        (dict(), "soft_min_snr", lambda sigma, d: (sigma * d) ** 2 / (sigma**2 + d**2) ** 2),
        (dict(loss_config="simple"), "p2", lambda sigma, d: d**2 / (sigma**2 + d**2)),
    ],
)
def test_levels_weigh_as_there(tmp_path, model, weighting, said):
    """Of the error of the network's output, by the formulas of its Denoiser."""
    config, _ = imported(tmp_path / "k.pth", checkpoint(**model))
    sigma = torch.tensor([0.05, 0.5, 7.0]).double()
    level = Level(sigma.log(), torch.ones(3).double(), sigma)
    assert config.diffusion.weighting == weighting
    found = build.weighting(config)(level, build.parametrization(config)(level), lambda: sigma)
    torch.testing.assert_close(found, said(sigma, 0.5))


def test_the_average_is_drawn_from_and_the_weights_are_kept(tmp_path, capsys):
    imported(tmp_path / "k.pth", checkpoint())
    said = capsys.readouterr().out
    assert "average 0.9999" in said
    assert "what it knew of changed images (augment_wrapper) is left out" in said
    raw, average = (read_weights(tmp_path / "run", ema_rate=rate).tensors for rate in (0.0, None))
    assert all(torch.equal(raw[name], -average[name]) for name in raw)
    assert read_weights(tmp_path / "run").about["step"] == 55


def test_a_run_of_it_draws_is_measured_and_trained_on(tmp_path):
    imported(tmp_path / "k.safetensors", checkpoint())
    run, images = str(tmp_path / "run"), str(tmp_path / "images.npz")
    np.savez(images, np.zeros((4, 8, 8, 3), np.uint8))
    for solver in ("dpmpp_2m", "heun", "edm", "ancestral"):
        assert main(["sample", run, "--num_samples", "2", "--solver", solver, "--sampling_steps", "4"]) == 0
    for how in ([], ["--ode"]):
        assert main(["nll", run, images, *how]) == 0
    on = ["--init_from", run, "--steps", "1", "--batch_size", "2", "--device", "cpu"]
    assert main(["train", images, "--run", str(tmp_path / "on"), *on]) == 0


# ---- what is refused


def changed(change: Callable[[dict[str, Any]], Any], name: str = "plain") -> dict[str, Any]:
    content = checkpoint(name)
    change(content)
    return content


windowed = partial(changed, name="of windows")


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "a transformer of before": (lambda: checkpoint(type="image_transformer_v1"), "its network is 'image_transformer_v1'"),
    "a type of no text": (lambda: checkpoint(type=["x"] * 10**5), "has image_v1 and image_transformer_v2"),
    "another loss": (lambda: checkpoint(loss_config="x" * 1000), "loss_config 'xxx"),
    "another network": (lambda: checkpoint(type="image_transformer_v2"), "not one of k-diffusion's image_transformer_v2"),
    **{
        f"transformer: {name}": (partial(checkpoint, "of windows", **changes), said)
        for name, changes, said in (
            ("a condition", dict(mapping_cond_dim=8), "mapping_cond_dim 8"),
            ("a variance", dict(has_variance=True), "has_variance, for which it has no part"),
            ("oblong patches", dict(patch_size=[2, 4]), "patch_size 2, 4"),
            ("patches of nothing", dict(patch_size=[0, 0]), "not one of k-diffusion's image_transformer_v2"),
            ("depths of other levels", dict(depths=[1]), "widths that are not as many as its depths"),
            ("d_ffs of other levels", dict(d_ffs=[8]), "d_ffs that are not as many"),
            ("dropout of other levels", dict(dropout_rate=[0.1]), "dropout_rate that are not as many"),
            ("dropout of all", dict(dropout_rate=1.0), "dropout_rate"),
            ("dropout of no number", dict(dropout_rate=float("nan")), "dropout_rate"),
            ("no kind", dict(self_attns=[{}, {}]), "self_attns without type"),
            ("no window", dict(self_attns=[{"type": "shifted-window"}, {"type": "none"}]), "self_attns without window_size"),
            ("another kind", dict(self_attns=[{"type": "cross"}] * 2), "not one of k-diffusion's image_transformer_v2"),
            (
                "other windows",
                dict(self_attns=[{"type": "shifted-window", "window_size": 3, "d_head": 16}, {"type": "none"}]),
                "windows do not fill the level's 8x8 tokens",
            ),
            (
                "neighbours of all",
                dict(self_attns=[{"type": "neighborhood", "kernel_size": 9, "d_head": 16}, {"type": "none"}]),
                "at most the side of the level's 8x8 tokens",
            ),
            (
                "heads of 16 and 8",
                dict(self_attns=[{"type": "global", "d_head": 16}, {"type": "global", "d_head": 8}]),
                "self_attns of d_head 8, 16",
            ),
            ("heads of 12", dict(self_attns=[{"type": "global", "d_head": 12}] * 2), "do not divide into heads of 12"),
            ("another size", dict(input_size=[10, 10]), "2 levels of patches of 2 pixels need an image size of multiples of 4"),
            ("another mapping", dict(mapping_depth=2), "not those of its config, as our 'mapping.blocks.1.down_proj.weight'"),
            ("an odd mapping", dict(mapping_width=33), "--mapping_width 33 is odd"),
            ("depths by the million", dict(depths=[10**6, 1]), "not one of k-diffusion's image_transformer_v2"),
        )
    },
    "transformer: more classes": (lambda: windowed(lambda c: c["config"]["dataset"].update(num_classes=3)), "'class_emb.weight'"),
    "transformer: classes of no number": (
        lambda: windowed(lambda c: c["config"]["dataset"].update(num_classes="x")),
        "`$.num_classes`",
    ),
    "transformer: classes dropped always": (
        lambda: windowed(lambda c: c["config"]["dataset"].update(cond_dropout_rate=0.95)),
        "--class_dropout 0.95",
    ),
    "transformer: no data": (lambda: windowed(lambda c: c["config"].update(dataset=[1])), "'class_emb.weight'"),
    "transformer: other frequencies": (
        lambda: windowed(lambda c: c["model_ema"]["mid_level.0.self_attn.pos_emb.freqs"].mul_(2)),
        "not the frequencies",
    ),
    "transformer: a weight less": (lambda: windowed(lambda c: c["model"].pop("aug_in_proj.weight")), "'time_in_proj.bias'"),
    "transformer: flat": (lambda: windowed(lambda c: c["model"].update({"aug_in_proj.weight": torch.ones(3)})), "as our"),
    "cross attention": (lambda: checkpoint(cross_cond_dim=8), "cross_cond_dim 8"),
    "another condition": (lambda: checkpoint(mapping_cond_dim=8), "mapping_cond_dim 8"),
    "another weighting": (lambda: checkpoint(loss_weighting="x"), "loss_weighting 'x'"),
    "depths by the million": (lambda: checkpoint(depths=[1] * 10**6), "not one of k-diffusion's image_v1"),
    "depths of other levels": (lambda: checkpoint(depths=[1, 2, 3]), "not as long"),
    "no level": (lambda: checkpoint(skip_stages=2), "not as long, or not as skip_stages has it"),
    "another depth": (lambda: checkpoint(depths=[2, 2]), "not those of its config"),
    "a sigma_data of nothing": (lambda: checkpoint(sigma_data=0.0), "sigma_data"),
    "a sigma_data that is not finite": (lambda: checkpoint(sigma_data=float("nan")), "sigma_data"),
    "no sizes": (lambda: changed(lambda c: c["config"]["model"].pop("input_size")), "its config has no input_size"),
    "no network": (lambda: changed(lambda c: c.update(config={})), "its network is 'None'"),
    "no number": (lambda: changed(lambda c: c["model_ema"]["inner_model.proj_out.bias"].fill_(float("nan"))), "is not finite"),
    "a weight less": (lambda: changed(lambda c: c["model"].pop("inner_model.proj_in.bias")), "as our 'proj_in.bias'"),
    "a text for a weight": (lambda: changed(lambda c: c["model_ema"].update(x="y")), "'x' is no tensor"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_here_is_refused_in_one_line(tmp_path, capsys, name):
    made, said = WRONG[name]
    assert main(["import", save(tmp_path / "k.pth", made()), "--run", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert len(err) < len(str(tmp_path)) + 400


def test_a_safetensors_of_another_kind_or_cut_short_is_refused(tmp_path, capsys):
    run, path = ["--run", str(tmp_path / "run")], tmp_path / "k.safetensors"
    save_file({"a": torch.ones(2)}, path, {"config": "[1"})
    assert main(["import", str(path), *run]) == 2
    assert "damaged" in capsys.readouterr().err
    save_file({"a": torch.ones(2)}, path)
    assert main(["import", str(path), *run]) == 2
    assert "no config of k-diffusion" in capsys.readouterr().err
    path.write_bytes(Path(save(path, checkpoint())).read_bytes()[:-100])
    assert main(["import", str(path), *run]) == 2
    assert "damaged" in capsys.readouterr().err
