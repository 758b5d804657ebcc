"""Folders of diffusers, there and back: what diffusers itself computes and draws with them, beside what we do."""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from iddpm import build
from iddpm.cli.main import main
from iddpm.config import Config, Which
from iddpm.diffusion.solvers import run as walk
from iddpm.errors import UserError
from iddpm.interop.diffusers.read import read
from iddpm.interop.diffusers.write import exported
from iddpm.sampling.open import open_weights
from iddpm.store.weights import Weights
from inception_oracles import ORACLES

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers, at numpy

SMALL = dict(
    image_size="8", num_channels=32, num_res_blocks=1, channel_mult="1,2", attention_resolutions="4", num_heads=2,
    noise_schedule="cosine", sampling_steps="10", clip_denoised=True,
)  # fmt: skip
ROWS: dict[str, dict[str, Any]] = {
    "learned variance": dict(learn_sigma=True),
    "learned variance, drawn by ddim": dict(learn_sigma=True, solver="ddim"),
    "beta, plain norm, grey": dict(use_scale_shift_norm=False, image_channels=1, noise_schedule="linear"),
    "posterior variance, one head": dict(sigma_small=True, num_heads=1, attention_resolutions="8,4"),
    "v, sizes changed in blocks": dict(
        parametrization="v", resblock_updown=True, new_attention_order=True, num_head_channels=16, attention_resolutions="8",
        channel_mult="1,2,2", solver="ddim",
    ),
    "x0, pure noise at the end": dict(parametrization="x0", zero_terminal_snr=True, solver="ddim", snr_shift=2.0),
    "a chain of 4000, not square": dict(diffusion_steps=4000, image_size="8x16", num_res_blocks=2, solver="ddim"),
    "as Ho et al.": dict(network="unet_ddpm", num_heads=1, channel_mult="1,2,2", attention_resolutions="4"),
    "times as they are": dict(diffusion_steps=50, rescale_timesteps=False, clip_denoised=False, parametrization="v"),
    "classes": dict(class_cond=True, num_classes=5, class_dropout=0.1, learn_sigma=True),
    "classes, drawn by ddim": dict(class_cond=True, num_classes=5, solver="ddim", num_heads=1),
    "flow": dict(noise_schedule="flow", parametrization="flow", clip_denoised=False, solver="ddim"),
}  # fmt: skip


@pytest.fixture(scope="module")
def diffusers() -> Iterator[Any]:
    """The library, which lies where only tests look."""
    sys.path.append(str(ORACLES))
    import diffusers

    diffusers.utils.logging.disable_progress_bar()
    yield diffusers
    sys.path.remove(str(ORACLES))


def made(**settings: Any) -> tuple[Config, torch.nn.Module, Weights]:
    """A network of random weights, none of which is 0."""
    torch.manual_seed(0)
    config = Config().updated(SMALL | settings)
    net = build.network(config).eval().requires_grad_(False)
    for p in net.parameters():
        p.normal_(0, 0.5 / max(1, p[0].numel()) ** 0.5)
    return config, net, Weights(Path("runs/some/weights.safetensors"), dict(net.state_dict()), config, dict(step=7, images=70))


def classes(config: Config, count: int) -> dict[str, Tensor]:
    return {"y": torch.arange(count) % config.model.num_classes} if config.model.class_cond else {}


def drawn(config: Config, net: torch.nn.Module, noise: Any, count: int) -> Tensor:
    """Our images in [0, 1] from draws of `noise` (shape), by the command that the card names."""
    grid, cond = build.grid(config), classes(config, count)
    x = noise()
    path = build.solver(config)(build.drawing(config, net, cond), x * grid.start, grid, lambda k: noise())
    return (walk(path) / 2 + 0.5).clamp(0, 1)


def as_the_card_says(config: Config, folder: Path) -> Config:
    """The config with the flags of `iddpm sample` that the card names."""
    flags = re.search(r"`iddpm sample RUN (.*?)`", (folder / "README.md").read_text())[1].split()
    given = {flag.removeprefix("--"): value for flag, value in zip(flags[::2], flags[1::2])}
    given |= {"eta": float(given["eta"])} if "eta" in given else {}
    return config.updated(given | {"clip_denoised": given["clip_denoised"] == "True"})


def shape(config: Config, count: int) -> tuple[int, ...]:
    height, _, width = config.model.image_size.partition("x")
    return count, config.model.image_channels, int(height), int(width or height)


@pytest.mark.parametrize("row", ROWS)
def test_the_network_computes_the_same(diffusers, tmp_path, row):
    config, net, weights = made(**ROWS[row])
    exported(weights, tmp_path)
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "unet").eval()
    x, t = torch.randn(shape(config, 3)), torch.tensor([0, 7, 19])
    told = build.schedule(config).table.time[t].float() if config.diffusion.noise_schedule != "flow" else t.float()
    y = torch.tensor([0, 5 if config.model.class_dropout else 4, 2]) if config.model.class_cond else None
    with torch.no_grad():
        ours, others = net(x, told, **({} if y is None else {"y": y})), theirs(x, t, class_labels=y).sample
    assert ours.abs().max() > 0.1
    torch.testing.assert_close(others, ours[:, : others.shape[1]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("row", [row for row in ROWS if "classes" not in row])
def test_the_pipeline_draws_the_same_images_from_the_same_noise(diffusers, tmp_path, row):
    config, net, weights = made(**ROWS[row])
    exported(weights, tmp_path)
    config = as_the_card_says(config, tmp_path)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    more = {"use_clipped_model_output": True} if config.sample.solver == "ddim" and "flow" not in row else {}
    theirs = pipeline(
        batch_size=2, generator=torch.manual_seed(3), num_inference_steps=build.grid(config).steps, output_type="pt", **more
    ).images
    generator = torch.manual_seed(3)
    ours = drawn(config, net, lambda: torch.randn(shape(config, 2), generator=generator), 2)
    assert ((ours > 0) & (ours < 1)).float().mean() > 0.05  # not all at the ends of the range
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)


@pytest.mark.parametrize("row", ["learned variance", "classes, drawn by ddim"])
def test_the_code_of_the_card_draws_these_images(diffusers, tmp_path, monkeypatch, row):
    config, net, weights = made(**ROWS[row])
    exported(weights, tmp_path)
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL)[1]
    torch.manual_seed(5)
    exec(code, found := {})
    torch.manual_seed(5)
    config = as_the_card_says(config, tmp_path)
    ours = drawn(config, net, lambda: torch.randn(shape(config, 8)), 8).permute(0, 2, 3, 1).mul(255).numpy()
    theirs = np.stack([np.asarray(image) for image in found["images"]])
    assert len(theirs) == 8 and np.abs(theirs - ours).max() <= 1


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (dict(task="enlarge", small_size="4"), "--task enlarge"),
        (dict(network="dit"), "--network dit"),
        (dict(parametrization="previous"), "--parametrization previous"),
        (dict(noise_schedule="ve", parametrization="edm"), "--noise_schedule ve"),
        (dict(noise_schedule="flow", parametrization="x0"), "--parametrization x0"),
        (dict(class_cond=True, num_classes=3, class_dropout=0.1, trained_guidance=3.0), "--trained_guidance"),
        (dict(objective="consistency", steps=9, solver="consistency"), "--objective consistency"),
        (dict(num_channels=16), "--num_channels 16"),
        (dict(channel_mult="0.5,1", num_channels=64), "--channel_mult 0.5,1"),
        (dict(attention_resolutions="8,4"), "--num_heads 2"),
    ],
)
def test_what_diffusers_cannot_express_is_refused_by_its_name(tmp_path, settings, named):
    _, _, weights = made(**settings)
    with pytest.raises(UserError, match=named):
        exported(weights, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_refuses_flags_of_another_program(run, tmp_path, capsys):
    assert main(["export", str(run), "--to", "openai", "--solver", "ddim", "--out", str(tmp_path / "a")]) == 2
    assert main(["export", str(run), "--to", "diffusers", "--label_rows", "0", "--out", str(tmp_path / "a")]) == 2
    assert main(["export", str(run), "--to", "diffusers", "--out", str(tmp_path / "a")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    assert all(flag in error for flag, error in zip(("--solver", "--label_rows", "--num_channels 16"), errors))


# ---- read


HO = dict(  # google/ddpm-cifar10-32, at a quarter of its width
    sample_size=32, in_channels=3, out_channels=3, block_out_channels=(32, 64, 64, 64), layers_per_block=2, norm_eps=1e-6,
    attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip
TWO = dict(
    sample_size=(16, 8), in_channels=1, block_out_channels=(32, 64), layers_per_block=1, attn_norm_num_groups=32,
    down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"), downsample_type="resnet", upsample_type="resnet",
    up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"), resnet_time_scale_shift="scale_shift",
)  # fmt: skip
FOLDERS = {
    "google/ddpm-cifar10-32": (HO, "DDPM", dict(beta_schedule="linear", variance_type="fixed_large", clip_sample=True)),
    "scale and shift, classes, learned variance": (
        TWO | dict(out_channels=2, num_class_embeds=4),
        "DDPM",
        dict(beta_schedule="squaredcos_cap_v2", variance_type="learned_range", num_train_timesteps=4000),
    ),
    "v, pure noise at the end": (
        TWO | dict(out_channels=1),
        "DDIM",
        dict(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    ),
    "flow": (TWO | dict(out_channels=1), "FlowMatchEulerDiscrete", dict(shift=3.0)),
}


def folder_of(diffusers: Any, path: Path, network: dict[str, Any], scheduler: str, how: dict[str, Any]) -> Any:
    """A folder that diffusers writes, of a network of random weights; the network."""
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(**network).eval().requires_grad_(False)
    for p in net.parameters():
        p.normal_(0, 0.5 / max(1, p[0].numel()) ** 0.5)
    net.save_pretrained(path / "unet")
    getattr(diffusers, f"{scheduler}Scheduler")(**how).save_pretrained(path / "scheduler")
    return net


PREDICTED = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


def same_levels(scheduler: Any, config: Config, variance: str) -> None:
    """The scheduler's levels and outputs are those of the config."""
    if "Flow" in type(scheduler).__name__:
        u = torch.arange(1, 1001, dtype=torch.float64) / 1000
        torch.testing.assert_close(build.schedule(config)(u).sigma.flip(0).float(), scheduler.sigmas, rtol=0, atol=1e-6)
    else:
        ours, d = build.schedule(config).table, config.diffusion
        torch.testing.assert_close(ours.alpha.float(), scheduler.alphas_cumprod.sqrt(), rtol=1e-4, atol=1e-5)
        assert d.parametrization == PREDICTED[scheduler.config.prediction_type]
        assert (d.learn_sigma, d.sigma_small) == (variance == "learned_range", variance == "fixed_small")


@pytest.mark.parametrize("row", FOLDERS)
def test_a_folder_of_diffusers_computes_the_same_as_a_run(diffusers, tmp_path, row):
    network, scheduler, how = FOLDERS[row]
    theirs = folder_of(diffusers, tmp_path / "folder", network, scheduler, how)
    assert main(["import", str(tmp_path / "folder"), "--run", str(tmp_path / "run")]) == 0
    opened = open_weights(tmp_path / "run", Which(device="cpu"))
    size, y = network["sample_size"], torch.tensor([0, 3, 1]) if "num_class_embeds" in network else None
    x = torch.randn(3, network["in_channels"], *(size if isinstance(size, tuple) else (size, size)))
    times = torch.tensor([0, 7, 600])
    levels = times.float() if scheduler.startswith("Flow") else build.schedule(opened.config).table.time[times].float()
    ours = opened.net(x, levels, **({} if y is None else {"y": y}))
    others = theirs(x, times, class_labels=y).sample
    same_levels(getattr(diffusers, f"{scheduler}Scheduler")(**how), opened.config, how.get("variance_type", ""))
    assert others.abs().max() > 0.1
    torch.testing.assert_close(ours, others, rtol=0, atol=1e-5)


def test_a_run_of_a_folder_draws_what_diffusers_draws_and_is_sampled_and_measured(diffusers, tmp_path, capsys):
    network, scheduler, how = FOLDERS["v, pure noise at the end"]
    theirs = folder_of(diffusers, tmp_path / "folder", network, scheduler, how)
    run = tmp_path / "run"
    assert main(["import", str(tmp_path / "folder"), "--run", str(run), "--sampling_steps", "ddim5"]) == 0
    opened = open_weights(run, Which(device="cpu"))
    pipeline = diffusers.DDIMPipeline(theirs, diffusers.DDIMScheduler(**how))
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.manual_seed(3)
    images = pipeline(2, generator, num_inference_steps=5, use_clipped_model_output=True, output_type="pt").images
    generator = torch.manual_seed(3)
    ours = drawn(opened.config, opened.net, lambda: torch.randn(2, 1, 16, 8, generator=generator), 2)
    torch.testing.assert_close(images, ours, rtol=0, atol=1e-4)

    few = ["--num_samples", "2", "--sampling_steps", "3", "--device", "cpu"]
    assert main(["sample", str(run), "--solver", "unipc", "--out", str(tmp_path / "drawn"), *few]) == 0
    assert [np.asarray(Image.open(file)).shape for file in (tmp_path / "drawn").rglob("*.png")] == [(16, 8)] * 2
    assert main(["nll", str(run), str(tmp_path / "drawn"), "--out", str(tmp_path / "nll.json"), *few]) == 0
    assert json.loads((tmp_path / "nll.json").read_text())["bits_per_dim"] > 0


@pytest.mark.parametrize("row", ROWS)
def test_what_was_exported_comes_back_the_same(tmp_path, row):
    config, _, weights = made(**ROWS[row])
    exported(weights, tmp_path, solver="ddim" if "flow" in row else "ancestral")
    _, back, read_config = read(tmp_path)
    assert back.keys() == weights.tensors.keys()
    order = config.model.new_attention_order  # which is not kept: of theirs, q, k and v are apart
    assert all(torch.equal(back[name], t) for name, t in weights.tensors.items() if not (order and "qkv" in name))
    for name in ("noise_schedule", "parametrization", "learn_sigma", "zero_terminal_snr", "snr_shift", "diffusion_steps"):
        assert getattr(read_config.diffusion, name) == getattr(config.diffusion, name), name
    assert read_config.model.network == config.model.network


def test_old_folders_with_everything_side_by_side_are_read(diffusers, tmp_path):
    """As google/ddpm-cifar10-32: no subfolders, a pickle of tensors, attention's old names, a config without what came later."""
    theirs = folder_of(diffusers, tmp_path, *FOLDERS["google/ddpm-cifar10-32"])
    new, old = (".to_q.", ".to_k.", ".to_v.", ".to_out.0."), (".query.", ".key.", ".value.", ".proj_attn.")
    state = theirs.state_dict()
    for a, b in zip(new, old):
        state = {name.replace(a, b): t for name, t in state.items()}
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    kept = {k: v for k, v in json.loads((tmp_path / "unet" / "config.json").read_text()).items() if k in HO}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    (tmp_path / "scheduler" / "scheduler_config.json").rename(tmp_path / "scheduler_config.json")
    before = read(tmp_path)[1]
    shutil.rmtree(tmp_path / "unet")
    after = read(tmp_path)[1]
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("network", "scheduler", "named"),
    [
        (dict(act_fn="gelu"), {}, "act_fn 'gelu'"),
        (dict(norm_num_groups=16), {}, "16 groups"),
        (dict(time_embedding_type="fourier"), {}, "time_embedding_type"),
        (dict(sample_size=None), {}, "no sample_size"),
        (dict(add_attention=False), {}, "add_attention False"),
        ({}, dict(beta_schedule="scaled_linear"), "'scaled_linear'"),
        ({}, dict(beta_end=0.03), "no noise schedule"),
        ({}, dict(trained_betas=[0.1, 0.2]), "2 betas for 1000 steps"),
        ({}, dict(trained_betas=[2.0] * 1000), "not above 0 and at most 1"),
    ],
)
def test_what_iddpm_cannot_compute_is_refused_by_its_name(diffusers, tmp_path, capsys, network, scheduler, named):
    folder_of(diffusers, tmp_path / "f", TWO | dict(out_channels=1) | network, "DDPM", scheduler)
    assert main(["import", str(tmp_path / "f"), "--run", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.splitlines()
    assert (len(error), named in error[0], (tmp_path / "run").exists()) == (1, True, False)


@pytest.mark.parametrize(
    "damage", [dict(block_out_channels="x"), dict(block_out_channels=[]), dict(layers_per_block=-1), dict(norm_num_groups=None)]
)
def test_a_config_of_other_types_is_refused_in_one_line(diffusers, tmp_path, capsys, damage):
    folder_of(diffusers, tmp_path / "f", *FOLDERS["flow"])
    config = tmp_path / "f" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | damage))
    assert main(["import", str(tmp_path / "f"), "--run", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("setting", ["use_dynamic_shifting", "invert_sigmas", "use_karras_sigmas", "stochastic_sampling"])
def test_flows_that_are_walked_in_another_way_are_refused(diffusers, tmp_path, capsys, setting):
    folder_of(diffusers, tmp_path / "f", *FOLDERS["flow"])
    record = tmp_path / "f" / "scheduler" / "scheduler_config.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {setting: True}))
    assert main(["import", str(tmp_path / "f"), "--run", str(tmp_path / "run")]) == 2
    assert f"{setting} True: iddpm draws by flow matching with a fixed shift alone" in capsys.readouterr().err


def test_weights_of_another_shape_or_number_are_named(diffusers, tmp_path, capsys):
    folder_of(diffusers, tmp_path / "f", *FOLDERS["flow"])
    path = tmp_path / "f" / "unet" / "diffusion_pytorch_model.safetensors"
    good, line = load_file(path), ["import", str(tmp_path / "f"), "--run", str(tmp_path / "run")]
    scalar = good | {"time_embedding.linear_1.weight": torch.tensor(1.0)}
    for tensors in (
        scalar,
        {n: t for n, t in good.items() if "time_embedding" not in n},
        good | {"time_embedding.x": torch.ones(1)},
    ):
        save_file(tensors, path)
        assert main(line) == 2
        assert "not those of its config.json, as time_embedding." in capsys.readouterr().err


def test_a_folder_with_a_pickle_of_objects_or_without_weights_is_refused(diffusers, tmp_path, capsys):
    folder_of(diffusers, tmp_path / "f", *FOLDERS["flow"])
    (tmp_path / "f" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    line = ["import", str(tmp_path / "f"), "--run", str(tmp_path / "run")]
    assert main(line) == 2
    torch.save({"conv_in.weight": Path("x")}, tmp_path / "f" / "unet" / "diffusion_pytorch_model.bin")
    assert main(line) == 2
    errors = capsys.readouterr().err.splitlines()
    assert ["holds neither" in errors[0], "could execute anything" in errors[1]] == [True, True]
