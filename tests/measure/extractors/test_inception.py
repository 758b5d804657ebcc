"""Inception of FID equals torch-fidelity's and pytorch-fid's networks, for weights by rule under the published names."""

import sys
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from iddpm.errors import UserError
from iddpm.measure import extractors
from iddpm.measure.extractors import inception, weights
from iddpm.measure.extractors.interface import Extractor
from iddpm.measure.extractors.resize import tensorflow_bilinear
from inception_oracles import fidelity, pytorch_fid, torch_fidelity, weights_by_rule

SIZES = [(32, 32), (64, 48), (299, 299), (340, 410)]


class Networks(NamedTuple):
    path: object
    state: dict[str, Tensor]
    ours: Extractor
    theirs: nn.Module  # torch-fidelity's


def published() -> dict[str, tuple[int, ...]]:
    """The names and shapes that we ask for; torch-fidelity loads strictly, so that these are all of its own."""
    shapes = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    with torch.device("meta"):
        net = inception.Inception()
    for name, conv in net.named_modules():
        if isinstance(conv, nn.Conv2d):
            shapes[f"{name}.conv.weight"] = tuple(conv.weight.shape)
            shapes |= {f"{name}.bn.{n}": (conv.out_channels,) for n in ("weight", "bias", "running_mean", "running_var")}
    return shapes


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> Networks:
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    state = weights_by_rule(published())
    torch.save(state, path)
    theirs = fidelity(path, "64", "192", "768", "2048", "logits_unbiased")
    return Networks(path, state, extractors.open("inception", {"inception_weights": str(path)}), theirs)


def pictures(n: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Images uint8 of large shapes and of noise, each of its own colours: features of noise alone are nearly equal."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 5, 5, generator=generator)
    smooth = nn.functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)
    return (255 * (0.7 * smooth + 0.3 * torch.rand(n, 3, height, width, generator=generator))).round().to(torch.uint8)


def require_equal(ours: Tensor, theirs: Tensor) -> None:
    """To 1e-5 of the spread between the two images, which is what distances see of features."""
    spread = (theirs[0] - theirs[1]).abs().mean()
    assert theirs.std() > 1e-3 and spread > 1e-3 * theirs.abs().mean()
    assert ours.shape == theirs.shape and (ours - theirs).abs().mean() < 1e-4 * spread
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().mean().item())


@pytest.mark.parametrize("size", SIZES)
def test_pool_features_and_probabilities_equal_torch_fidelitys(networks, size):
    images = pictures(2, *size)
    with torch.no_grad():
        *_, pool, logits = networks.theirs(images)
    features = networks.ours.network(images)
    require_equal(features["pool"], pool)
    found = networks.ours.probabilities(features["pool"])
    torch.testing.assert_close(found, logits.double().softmax(1), rtol=1e-4, atol=1e-9)
    assert found.shape == (2, 1008) and (found.sum(1) - 1).abs().max() < 1e-12


def test_every_depth_equals_torch_fidelitys(networks):
    net, _ = inception.load(networks.state, "the rule")
    images, found = pictures(2, 40, 56), {}

    def keep(name, pool):
        return lambda module, x, y: found.update({name: (nn.functional.max_pool2d(y, 3, 2) if pool else y).mean((2, 3))})

    net.Conv2d_2b_3x3.register_forward_hook(keep("64", pool=True))
    net.Conv2d_4a_3x3.register_forward_hook(keep("192", pool=True))
    net.Mixed_6e.register_forward_hook(keep("768", pool=False))
    with torch.no_grad():
        net(inception._tensorflow(images))
        for name, theirs in zip(("64", "192", "768"), networks.theirs(images)):
            require_equal(found[name], theirs)


def test_spatial_features_are_the_first_seven_channels_behind_mixed_6ds_first_convolution(networks):
    kept = []
    handle = networks.theirs.Mixed_6d.branch1x1.register_forward_hook(lambda module, x, y: kept.append(y.clone()))
    images = pictures(2, 64, 64)
    with torch.no_grad():
        networks.theirs(images)
    handle.remove()
    found = networks.ours.network(images)["spatial"]
    assert found.shape == (2, 2023) == (2, networks.ours.widths["spatial"])
    maps = found.view(2, 17, 17, 7)  # TensorFlow's order, in which OpenAI's files have their statistics
    require_equal(maps.permute(0, 3, 1, 2), kept[0][:, :7])


@pytest.mark.parametrize("size", [(32, 32), (340, 410)])
def test_the_other_pipeline_equals_pytorch_fids(networks, size):
    images = pictures(2, *size)
    with torch.no_grad():
        theirs = pytorch_fid(networks.path)(images / 255)[0].flatten(1)
    other = extractors.open("inception-pytorch-fid", {"inception_weights": str(networks.path)})
    found = other.network(images)["pool"]
    require_equal(found, theirs)
    ours = networks.ours
    assert (found - ours.network(images)["pool"]).abs().mean() > 1e-3  # so that the two must not be mixed
    assert other.name == "inception-pytorch-fid" and ours.name == "inception" and other.identity != ours.identity


@pytest.mark.parametrize("size", [(1, 1), (2, 3), *SIZES, (299, 600)])
def test_resizing_equals_tensorflows_to_the_last_bit(size):
    images = pictures(1, *size).float()
    theirs = torch_fidelity("interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x
    expected = theirs(images, size=(299, 299), align_corners=False)
    assert torch.equal(tensorflow_bilinear(images, 299), expected)


def test_features_do_not_depend_on_the_batch_an_image_is_in(networks):
    images = pictures(5, 32, 32)
    together = networks.ours.network(images)
    alone = networks.ours.network(images[3:4])
    for name, width in networks.ours.widths.items():
        assert together[name].shape == (5, width) and together[name].dtype == torch.float32
        torch.testing.assert_close(together[name][3:4], alone[name], rtol=1e-5, atol=1e-5)


def test_a_large_batch_is_taken_in_parts_and_comes_back_in_order(networks, monkeypatch):
    sizes = []

    def forward(net, x):
        sizes.append(len(x))
        return {name: x[:, :1, 0, 0].expand(-1, width) for name, width in inception.WIDTHS.items()}

    monkeypatch.setattr(inception.Inception, "forward", forward)
    images = torch.arange(37, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    found = networks.ours.network(images)
    assert sum(sizes) == 37 and max(sizes) == 8  # of about 15 MB each
    for name in inception.WIDTHS:
        torch.testing.assert_close(found[name][:, 0] * 128 + 128, torch.arange(37.0))


def test_the_identity_tells_other_weights(networks, tmp_path):
    path = tmp_path / "other.pth"
    torch.save(networks.state | {"fc.bias": torch.zeros(1008)}, path)
    ours, other = networks.ours, extractors.open("inception", {"inception_weights": str(path)})
    assert weights.digest(networks.path) in ours.identity and ours.identity != other.identity and ours.name == other.name


def test_missing_weights_print_the_address_and_the_flag(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("IDDPM_INCEPTION_WEIGHTS", raising=False)
    with pytest.raises(UserError) as missing:
        extractors.open("inception")
    assert inception.ADDRESS in str(missing.value) and "--inception-weights" in str(missing.value)


@pytest.mark.parametrize("variable", ["environment", "cache of torch-fidelity"])
def test_weights_are_found_in_the_environment_and_where_other_tools_keep_them(networks, monkeypatch, tmp_path, variable):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("IDDPM_INCEPTION_WEIGHTS", raising=False)
    if variable == "environment":
        monkeypatch.setenv("IDDPM_INCEPTION_WEIGHTS", str(networks.path))
        assert extractors.open("inception").identity == networks.ours.identity
    else:  # these are not the published weights, whose digest the name holds
        (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
        (tmp_path / "hub" / "checkpoints" / inception.ALIAS).symlink_to(networks.path)
        with pytest.raises(UserError, match="its sha256 does not begin with 6726825d"):
            extractors.open("inception")


def of_torchvision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    more = {"AuxLogits.conv0.conv.weight": torch.zeros(128, 768, 1, 1)}
    return state | more | {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}


REFUSED = {
    r"is torchvision's Inception-v3 \(it has AuxLogits\)": of_torchvision,
    r"lacks .*\(Mixed_7c\.branch1x1\.conv\.weight and 44 more\)": lambda s: {k: v for k, v in s.items() if "Mixed_7c." not in k},
    r"has more than .*\(module\.fc and 1 more\)": lambda s: s | {"module.fc": torch.zeros(1), "x": torch.zeros(1)},
    r"of another Inception: fc\.weight is \(1000, 2048\), not \(1008, 2048\)": lambda s: (
        s | {"fc.weight": torch.zeros(1000, 2048)}
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_weights_of_another_network_are_one_line_that_says_what_is_wrong(networks, message):
    with pytest.raises(UserError, match=message) as refused:
        inception.load(REFUSED[message](networks.state), "other.pth")
    assert "\n" not in str(refused.value) and inception.ADDRESS in str(refused.value)


def test_counters_and_half_precision_are_taken(networks):
    counters = {"Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(7)}
    net, _ = inception.load({k: v.half() for k, v in networks.state.items()} | counters, "half.pth")
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def test_the_stand_ins_for_torchvision_are_gone_after_an_import(networks):
    assert not [name for name in sys.modules if name.partition(".")[0] in ("torch_fidelity", "pytorch_fid")]
    assert "torchvision" not in sys.modules
