"""EDM2's pickles: networks compared with outputs of EDM2's own code, and what is refused of them.

tests/goldens/edm2.json holds what its classes keep in small networks, as edm.json those of EDM's, and edm2.npz what they give and
what its sampler draws in eight steps, with weights by the same rule; both made by EDM2's code, none of which is here.
"""

import pickle
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
from iddpm.diffusion.schedule import Level
from iddpm.diffusion.solvers import run as walk
from iddpm.errors import UserError
from iddpm.interop.edm.read import imported
from interop import test_edm
from interop.test_edm import Called, Persistent, module, opened, refusal, theirs, written  # noqa: F401  # theirs: autouse

NETWORKS = {"plain": 3, "of classes": 1}  # and the channels of their images
SIGMA = torch.tensor([0.05, 1.0, 20.0])


def golden(name: str, what: str) -> Tensor:
    return torch.from_numpy(load("edm2.npz")[f"{name.replace(' ', '_')}.{what}"])


def edm2(name: str = "of classes", **changes: Any) -> dict[str, Any]:
    """As EDM2's training and its reconstruction of averages write it."""
    row = load("edm2.json")[name]
    return dict(
        ema=module(row["tree"], settings=Persistent.settings(row["settings"] | changes)),
        encoder=Persistent("StandardRGBEncoder", {"_init_args": (), "_init_kwargs": {}}),
        loss_fn=Persistent("EDM2Loss", dict(P_mean=-0.4, P_std=1.0, sigma_data=0.5)),
        dataset_kwargs=Persistent.settings(class_name="training.dataset.ImageFolderDataset", path="x.zip", use_labels=True),
    )


# ---- what is read


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_computes_what_it_does_in_edm2s_code(tmp_path, name):
    config, net = opened(written(tmp_path / "edm2.pkl", edm2(name)))
    y = {"y": torch.tensor([0, 2, 1])} if config.model.class_cond else {}
    sigma, denoise = SIGMA.double(), build.denoiser(config, net)
    for what, width in (("x0", 8), ("wide", 12)):  # as an image that is not square, too
        x = noise(0, (3, NETWORKS[name], 8, width)) * SIGMA[:, None, None, None]
        found = denoise(x, Level(sigma.log(), torch.ones(3), sigma), cond=y).x0
        torch.testing.assert_close(found, golden(name, what), rtol=1e-5, atol=1e-5)
    grid = build.grid(config, "8")
    start = grid.start * noise(2, (3, NETWORKS[name], 8, 8))
    drawn = walk(build.solver(config)(build.drawing(config, net, y), start, grid, lambda k: None))
    torch.testing.assert_close(drawn, golden(name, "drawn"), rtol=1e-5, atol=1e-4)


def test_weights_are_kept_in_fp16_there_and_in_fp32_here(tmp_path, monkeypatch):
    whole = imported(written(tmp_path / "fp32.pkl", edm2()))[0].weights
    monkeypatch.setattr(test_edm, "weights", lambda name, shape, rule=test_edm.weights: rule(name, shape).half())
    halves = imported(written(tmp_path / "fp16.pkl", edm2()))[0].weights
    assert all(t.dtype == torch.float32 and torch.equal(t, whole[name].half().float()) for name, t in halves.items())


def test_the_import_draws_and_trains_as_edm2_does(tmp_path):
    config = imported(written(tmp_path / "edm2.pkl", edm2()))[1]
    m, d, s = config.model, config.diffusion, config.sample
    assert (m.network, m.num_classes, m.class_dropout, m.dropout) == ("unet_mp", 3, 0.0, 0.1)
    assert (d.noise_schedule, d.parametrization, d.weighting, d.schedule_sampler) == ("ve", "edm", "uncertainty", "lognormal")
    assert (s.solver, s.sampling_steps, s.clip_denoised) == ("edm", "32", False)
    numbers = config.numbers()
    assert [numbers[k] for k in ("P_mean", "P_std", "sigma_data", "sigma_min", "sigma_max", "S_churn")] == [
        -0.4, 1.0, 0.5, 0.002, 80.0, 0.0,
    ]  # fmt: skip


def test_a_run_of_it_draws_is_guided_measured_and_trained_on(tmp_path, capsys):
    path, run = written(tmp_path / "edm2.pkl", edm2()), str(tmp_path / "run")
    assert main(["import", str(path), "--run", run, "--classes", "0,1,2"]) == 0
    assert "UNet as --network unet_mp" in capsys.readouterr().out
    assert main(["import", str(path), "--run", str(tmp_path / "weak"), "--classes", "0,1,2"]) == 0
    few = ["--num_samples", "2", "--sampling_steps", "4"]
    for how in (["--solver", "heun"], ["--solver", "dpmpp_3m", "--labels", "1"], ["--autoguide", str(tmp_path / "weak")]):
        assert main(["sample", run, *few, *how]) == 0
    images = str(tmp_path / "images.npz")
    np.savez(images, np.zeros((2, 8, 8, 1), np.uint8), np.array([0, 2]))
    for how in ([], ["--ode", "--trace", "hutchinson"]):
        assert main(["nll", run, images, "--sampling_steps", "4", *how]) == 0
    on = [
        "--init_from",
        run,
        "--steps",
        "2",
        "--batch_size",
        "2",
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--sampling_steps",
        "2",
    ]
    assert main(["train", images, "--run", str(tmp_path / "on"), *on]) == 0


# ---- what is refused


def changed(change: Callable[[dict[str, Any]], Any], **settings: Any) -> dict[str, Any]:
    content = edm2(**settings)
    change(content)
    return content


def unet(content: dict[str, Any]) -> dict[str, Any]:
    return content["ema"].state["_modules"]["unet"].state


def block(content: dict[str, Any]) -> dict[str, Any]:
    return unet(content)["_modules"]["enc"]._modules["8x8_block0"].state


def first(content: dict[str, Any]) -> dict[str, Any]:
    return unet(content)["_modules"]["enc"]._modules["8x8_conv"].state["_parameters"]


def vae(content: dict[str, Any]) -> None:
    """As in edm2-img512-*.pkl."""
    scale = np.float32([0.5, 0.4, 0.3, 0.2])
    content["encoder"] = Persistent("StabilityVAEEncoder", dict(vae_name="x", scale=scale, bias=-scale, batch_size=8, _vae=None))


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "latents": (lambda: changed(vae), "its StabilityVAEEncoder makes images by a network"),
    "an encoder of text": (lambda: changed(lambda c: c.update(encoder="x" * 10**5)), "its str makes images"),
    "nothing inside": (lambda: dict(ema=Persistent("Precond", {})), "the network of its Precond is nothing"),
    "EDM's network": (lambda: changed(lambda c: setattr(c["ema"].state["_modules"]["unet"], "kind", "SongUNet")), "is SongUNet"),
    "EDM2's in EDM's": (lambda: changed(lambda c: setattr(c["ema"], "kind", "EDMPrecond")), "its EDMPrecond is nothing"),
    "other heads": (lambda: edm2(channels_per_head=32), "channels_per_head 32"),
    "another embedding": (lambda: edm2(channel_mult_noise=2), "channel_mult_noise 2"),
    "another filter": (lambda: edm2(resample_filter=[1, 3, 3, 1]), "resample_filter [1, 3, 3, 1]"),
    "another balance": (lambda: changed(lambda c: block(c).update(res_balance=0.5)), "res_balance"),
    "no clipping": (lambda: changed(lambda c: block(c).update(clip_act=None)), "clip_act"),
    "another join": (lambda: changed(lambda c: unet(c).update(concat_balance=0.4)), "concat_balance"),
    "settings of other weights": (lambda: edm2(num_blocks=1), "not those of its settings"),
    "attention where it has none": (lambda: edm2(attn_resolutions=[8, 4, 2]), "not those of its settings"),
    "widths by the million": (lambda: edm2(channel_mult=[1] * 10**6), "channel_mult"),
    "a size of text": (lambda: changed(lambda c: c["ema"].state.update(img_resolution="8")), "img_resolution"),
    "a sigma_data that is not finite": (lambda: changed(lambda c: c["ema"].state.update(sigma_data=float("nan"))), "sigma_data"),
    "a law that is not finite": (lambda: changed(lambda c: c["loss_fn"].state.update(P_std=float("inf"))), "P_std"),
    "weights not finite": (lambda: changed(lambda c: first(c)["weight"].fill_(float("nan"))), "not finite"),
    "a number for a weight": (lambda: changed(lambda c: first(c).update(weight=torch.tensor(1.0))), "not those of its settings"),
    "a number for attention": (
        lambda: changed(lambda c: block(c)["_modules"]["attn_qkv"].state["_parameters"].update(weight=torch.tensor(1.0))),
        "not those of its settings",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_here_is_refused_by_its_name(tmp_path, name):
    make, said = WRONG[name]
    assert said in refusal(written(tmp_path / "x.pkl", make()))


def test_a_hostile_file_or_one_cut_short_ends_in_one_line_with_code_2(tmp_path, capsys):
    content = pickle.dumps(edm2(), 4)
    hostile = changed(lambda c: block(c).update(dropout=Called(__import__("os").system, "exit 1")))
    for what, said in (
        (hostile, "asks for posix.system"),
        (content[: len(content) // 2], "cut short"),
        (content[:-1], "cut short"),
    ):
        assert main(["import", str(written(tmp_path / "x.pkl", what)), "--run", str(tmp_path / "run")]) == 2
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1
        assert not (tmp_path / "run").exists()


def test_a_damaged_byte_gives_one_line_or_nothing(tmp_path):
    content, numbers = pickle.dumps(edm2(), 4), np.random.default_rng(0)
    for at in numbers.integers(len(content), size=10):
        damaged = bytearray(content)
        damaged[at] ^= int(numbers.integers(1, 256))
        path = written(Path(tmp_path) / "x.pkl", bytes(damaged))
        try:
            imported(path)
        except UserError:
            refusal(path)
