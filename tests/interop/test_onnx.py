"""`iddpm export --to onnx`: what onnxruntime computes with the graph, and draws without torch, beside what we do."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from iddpm import build
from iddpm.cli.main import main
from iddpm.config import Config
from iddpm.diffusion.solvers import Ddim
from iddpm.diffusion.solvers import run as walk
from iddpm.errors import UserError
from iddpm.interop import onnx
from iddpm.store.weights import Weights, read_weights

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "formats.md"
SMALL = dict(
    image_size="8", image_channels=1, num_channels=16, num_res_blocks=1, channel_mult="1,2", attention_resolutions="4",
    num_heads=2, noise_schedule="cosine", sampling_steps="10",
)  # fmt: skip
CLASSES = dict(class_cond=True, num_classes=3)
ROWS: dict[str, dict[str, Any]] = {
    "scale and shift, classes, learned variance": dict(CLASSES, learn_sigma=True, image_size="8x16"),
    "enlarges, plain norm": dict(task="enlarge", small_size="4", low_res_noise=0.2, use_scale_shift_norm=False),
    "tokens beside those of the image": dict(network="unet_linear"),
    "magnitudes kept": dict(network="unet_mp"),
    "a mapping network": dict(network="unet_mapped"),
    "translates": dict(task="translate", given_channels=3),
    "a transformer that guides itself": dict(
        CLASSES, network="dit", patch_size=2, width=32, depth=1, heads=2, class_dropout=0.1, trained_guidance=3.0
    ),
    "an hourglass of neighbours and windows": dict(
        CLASSES,
        network="hdit",
        image_size="8x16",
        patch_size=1,
        level_attention="neighborhood:3,window:2",
        level_depths="2,2",
        head_width=8,
        mapping_width=32,
    ),
}


def made(**settings: Any) -> tuple[Any, Weights]:
    """A network of random weights, none of which is 0."""
    torch.manual_seed(0)
    config = Config().updated(SMALL | settings)
    net = build.network(config).eval().requires_grad_(False)
    for name, p in net.named_parameters():
        p.normal_(0, 0.5 / max(1, p[0].numel()) ** 0.5)
        if name.endswith("attn.scale"):  # of which the root is taken
            p.abs_()
    return net, Weights(Path("runs/some/weights.safetensors"), dict(net.state_dict()), config, dict(step=7, images=70))


@pytest.mark.parametrize("row", ROWS)
def test_the_graph_computes_what_the_network_does_at_any_batch(tmp_path, row):
    net, weights = made(**ROWS[row])
    onnx.exported(weights, tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for count in (1, 5):
        given = onnx.inputs(weights.config, count)
        assert {i.name for i in session.get_inputs()} == set(given)
        ours, (theirs,) = net(**given), session.run(None, {name: t.numpy() for name, t in given.items()})
        assert ours.abs().max() > 0.1
        torch.testing.assert_close(torch.from_numpy(theirs), ours, rtol=0, atol=1e-4)


def test_a_graph_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    _, weights = made()
    right = onnx.PlainNorm.forward
    monkeypatch.setattr(onnx.PlainNorm, "forward", lambda self, *given: 1.01 * right(self, *given))
    with pytest.raises(UserError, match="differs from the network"):
        onnx.exported(weights, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_network_that_the_exporter_cannot_write_is_one_line(tmp_path, monkeypatch):
    _, weights = made()
    monkeypatch.setattr(
        onnx.PlainNorm, "forward", lambda self, x, *rest: torch.linalg.lu_factor(x.flatten(2))[0].reshape(x.shape)
    )
    with pytest.raises(UserError, match="cannot write this network as ONNX"):
        onnx.exported(weights, tmp_path)


def test_a_network_of_consistency_is_refused(tmp_path):
    _, weights = made(objective="consistency", **EDM)
    with pytest.raises(UserError, match="--to onnx"):
        onnx.exported(weights, tmp_path)


EDM = dict(noise_schedule="ve", parametrization="edm", image_channels=3)


@pytest.mark.parametrize("settings", [dict(CLASSES, learn_sigma=True), EDM])
def test_the_script_of_the_guide_draws_our_images_without_torch(tmp_path, settings):
    net, weights = made(**settings)
    onnx.exported(weights, tmp_path)
    code = re.search(r"```python\n(import numpy.*?)```", GUIDE.read_text(), re.DOTALL)[1]
    assert code.count("\n") <= 40
    path = os.pathsep.join(sys.path)
    code += "\nimport sys\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, check=True)
    config, shape = weights.config, (4, weights.config.model.image_channels, 8, 8)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal(shape)).float()
    grid, cond = build.grid(config), {"y": torch.arange(4) % 3} if config.model.class_cond else {}
    images = walk(Ddim()(build.drawing(config, net, cond), x * grid.start, grid, lambda k: x))
    ours = torch.cat(list((images + 1) * 127.5), dim=2).permute(1, 2, 0).squeeze().clamp(0, 255).numpy()
    theirs = np.asarray(Image.open(tmp_path / "picture.png")).astype(float)
    assert np.abs(ours - theirs).max() <= 1 and theirs.std() > 20


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"iddpm\[export\]"):
        onnx.exported(made()[1], tmp_path)


def test_one_file_of_weights_is_read_as_the_run_it_came_from(run, tmp_path):
    assert main(["export", str(run), "--to", "safetensors", "--out", str(tmp_path)]) == 0
    before, after = read_weights(run), read_weights(tmp_path / "model.safetensors")
    assert (after.config, after.about) == (before.config, before.about)
    assert all(torch.equal(after.tensors[name], t) for name, t in before.tensors.items())
    assert "0.9" in (tmp_path / "README.md").read_text()
