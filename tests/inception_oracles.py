"""The Inception networks of torch-fidelity and pytorch-fid, and weights by rule to put into them and ours.

Both packages import torchvision, which is not installed (it would break torchmetrics): modules that stand in for it are in
sys.modules while they are imported, and only then.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

ORACLES = Path(__file__).parents[1] / ".venv" / "oracles"  # `make .venv/oracles/ready`


@contextmanager
def _standing_in(**names: ModuleType) -> Iterator[None]:
    """Modules for a moment: what is imported meanwhile from these packages is forgotten too."""
    ours = ("torchvision", "torch_fidelity", "pytorch_fid")
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in ours}
    sys.modules |= {name.replace("__", "."): module for name, module in names.items()}
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] in ours]:
            del sys.modules[name]
        sys.modules |= before


def _package(name: str) -> ModuleType:
    """A package whose own __init__, which imports all of it, does not run."""
    package = ModuleType(name)
    package.__path__ = [str(ORACLES / name)]
    return package


def torch_fidelity(module: str) -> ModuleType:
    """A module of torch-fidelity; its utils, which want torchvision and which arithmetic does not call, stay out."""
    utils = ModuleType("torch_fidelity.utils")
    utils.__getattr__ = lambda name: None
    with _standing_in(torch_fidelity=_package("torch_fidelity"), torch_fidelity__utils=utils):
        return importlib.import_module(f"torch_fidelity.{module}")


def fidelity(weights: Path, *features: str) -> nn.Module:
    """torch-fidelity's network: uint8 images to the features of these names, as a tuple."""
    network = torch_fidelity("feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    return network("inception", list(features), feature_extractor_weights_path=str(weights))


def pytorch_fid(weights: Path) -> nn.Module:
    """pytorch-fid's network: images in [0, 1] to a list of one, (n, 2048, 1, 1).

    Its resizing, its A, C and E blocks and its order of blocks are its own; torchvision's blocks, which it takes the rest
    from and builds the layers by, are torch-fidelity's, which bear torchvision's names.
    """
    blocks = torch_fidelity("feature_extractor_inceptionv3")
    vision, models, inception = (ModuleType(n) for n in ("torchvision", "torchvision.models", "torchvision.models.inception"))
    vision.__version__, vision.models, models.inception = "0.28.0", models, inception
    models.inception_v3 = lambda **ignored: fidelity(weights, "2048")
    inception.InceptionA, inception.InceptionC, inception.InceptionE = blocks.InceptionA, blocks.InceptionC, blocks.InceptionE_1
    models_names = dict(torchvision=vision, torchvision__models=models, torchvision__models__inception=inception)
    with _standing_in(pytorch_fid=_package("pytorch_fid"), **models_names):
        module = importlib.import_module("pytorch_fid.inception")
    module.load_state_dict_from_url = lambda *_, **__: torch.load(weights, weights_only=True)
    return module.InceptionV3().eval()


def weights_by_rule(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Tensors for which activations stay of order one: He's for convolutions, statistics near (0, 1) for BatchNorm."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        z = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            state[name] = z * (2 / z[0].numel()) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            state[name] = 0.7 + 0.6 * torch.rand(shape, generator=generator)
        else:
            state[name] = 0.2 * z
    return state
