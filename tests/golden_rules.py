"""The rules by which the golden inputs and weights are made (tests/goldens/rules.json), so that only outputs need files."""

import json
import zlib
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from iddpm.nn import Classifier, GivenUNet, UNet, attention_rates, channel_mult_for

M = TypeVar("M", bound=nn.Module)
FOLDER = Path(__file__).parent / "goldens"
SEED: int = json.loads((FOLDER / "rules.json").read_text())["seed"]


@cache
def load(name: str) -> Any:
    """tests/goldens/`name`: the JSON of a .json, a dict of arrays of an .npz. Shared between tests: do not write to it."""
    path = FOLDER / name
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return dict(arrays)
    return json.loads(path.read_text())


def noise(k: int, shape: tuple[int, ...]) -> Tensor:
    """The k-th Gaussian draw, float32; in a loop k counts the draws in call order."""
    return torch.from_numpy(np.random.RandomState(SEED + k).standard_normal(tuple(shape)).astype(np.float32))


def image_tensor(k: int, shape: tuple[int, ...]) -> Tensor:
    """The k-th stand-in for a batch of images, uniform in [-1, 1], float32."""
    return torch.from_numpy(np.random.RandomState(SEED + 500_000 + k).uniform(-1, 1, tuple(shape)).astype(np.float32))


@torch.no_grad()
def fill(module: M) -> M:
    """Give every parameter the weights that follow from its name, and return the module."""
    for name, p in module.named_parameters():
        w = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).standard_normal(tuple(p.shape)).astype(np.float32)
        if w.ndim > 1:
            w /= np.sqrt(np.prod(w.shape[1:]))
        else:
            w = 0.1 * w + float(name.endswith("weight"))
        p.copy_(torch.from_numpy(w))
    return module


class Stub:
    """A network without weights: out[:, c] = 0.7 sin(1.7 x[:, c mod 3] + 0.1 c + t / 250), t as the network receives it."""

    def __init__(self, out_channels: int = 3) -> None:
        self.out_channels = out_channels

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        c = torch.arange(self.out_channels, device=x.device)
        # summed left to right, as when the golden numbers were made: at the noisy end x0 is eps times 700, and so is the rounding
        return 0.7 * torch.sin(1.7 * x[:, c % 3] + 0.1 * c.view(1, -1, 1, 1) + t.view(-1, 1, 1, 1) / 250)


IMAGE_FLAGS = dict(
    image_size=64,
    num_channels=128,
    num_res_blocks=2,
    attention_resolutions="16,8",
    dropout=0.0,
    num_heads=4,
    num_heads_upsample=-1,
    num_head_channels=-1,
    use_scale_shift_norm=True,
    resblock_updown=False,
    use_new_attention_order=False,
    use_checkpoint=False,
    class_cond=False,
    learn_sigma=False,
)
CLASSIFIER_FLAGS = dict(
    image_size=64,
    classifier_width=128,
    classifier_depth=2,
    classifier_attention_resolutions="32,16,8",
    classifier_use_scale_shift_norm=True,
    classifier_resblock_updown=True,
    classifier_pool="attention",
)


def published_network(kind: str, flags: dict[str, Any]) -> UNet | Classifier:
    """The network that the published commands build for `flags`: kind "...unet", "image", "...super_res" or "...classifier"."""
    if kind.endswith("classifier"):
        f = CLASSIFIER_FLAGS | flags
        side, mult = f["image_size"], channel_mult_for(f["image_size"])
        return Classifier(
            side,
            3,
            f["classifier_width"],
            1000,
            f["classifier_depth"],
            _rates(f["classifier_attention_resolutions"], side, len(mult)),
            channel_mult=mult,
            use_scale_shift_norm=f["classifier_use_scale_shift_norm"],
            resblock_updown=f["classifier_resblock_updown"],
            pool=f["classifier_pool"],
        )
    super_res = kind.endswith("super_res")
    f = IMAGE_FLAGS | ({"large_size": 256} if super_res else {}) | flags
    side = f["large_size"] if super_res else f["image_size"]
    mult = channel_mult_for(min(side, 256) if super_res else side)  # the published upsampler to 512 pixels is built as for 256
    return (GivenUNet if super_res else UNet)(
        3,
        f["num_channels"],
        6 if f["learn_sigma"] else 3,
        f["num_res_blocks"],
        _rates(f["attention_resolutions"], side, len(mult)),
        f["dropout"],
        mult,
        1000 if f["class_cond"] else None,
        f["use_checkpoint"],
        f["num_heads"],
        f["num_heads_upsample"],
        f["num_head_channels"],
        f["use_scale_shift_norm"],
        f["resblock_updown"],
        f["use_new_attention_order"],
    )


def _rates(resolutions: str, side: int, levels: int) -> tuple[int, ...]:
    return attention_rates([int(r) for r in str(resolutions).split(",")], side, levels)
