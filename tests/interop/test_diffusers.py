"""`iddpm export --to diffusers`: what diffusers itself computes and draws with the folder, beside what we do."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from iddpm import build
from iddpm.cli.main import main
from iddpm.config import Config
from iddpm.diffusion.solvers import run as walk
from iddpm.errors import UserError
from iddpm.interop.diffusers.write import exported
from iddpm.store.weights import Weights
from inception_oracles import ORACLES

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers, at numpy

SMALL = dict(
    image_size="8", num_channels=32, num_res_blocks=1, channel_mult="1,2", attention_resolutions="4", num_heads=2,
    noise_schedule="cosine", sampling_steps="20", clip_denoised=True,
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


@pytest.mark.parametrize("row", ["learned variance", "classes", "classes, drawn by ddim", "flow"])
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
