"""DDPM++ and NCSN++ as networks to train; what they compute is compared with EDM's own code in tests/interop/test_edm.py."""

import pytest
import torch
import torch.nn.functional as F

from iddpm import build
from iddpm.config import Config
from iddpm.errors import UserError
from iddpm.nn.song import Smooth

SMALL = dict(
    image_size="8", num_channels=32, num_res_blocks=1, channel_mult="1,2", attention_resolutions="4", class_cond=True,
    num_classes=3, augment=0.1,
)  # fmt: skip


def made(network: str, **settings: object) -> torch.nn.Module:
    torch.manual_seed(0)
    net = build.network(Config().updated(SMALL | dict(network=network) | settings))
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)  # past the zeros that a new network begins with
    return net


def gradients(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([-1.0, 0.5])
    net(x, t, y=torch.tensor([0, 2]), augment=torch.ones(2, 9)).square().mean().backward()
    return {name: p.grad for name, p in net.named_parameters()}


@pytest.mark.parametrize("network", ["ddpmpp", "ncsnpp"])
def test_every_weight_gets_a_gradient_and_recomputing_gives_the_same(network):
    found, again = gradients(made(network)), gradients(made(network, use_checkpoint=True))
    assert all(g is not None and g.abs().max() > 0 for g in found.values())
    assert all(torch.allclose(g, again[name], rtol=1e-4, atol=1e-7) for name, g in found.items())


@pytest.mark.parametrize("up", [False, True])
def test_three_means_are_the_filter_1_3_3_1(up):
    """Also at the edges, against one convolution with its sixteen numbers."""
    x, taps = torch.randn(2, 3, 6, 10), torch.tensor([1.0, 3.0, 3.0, 1.0])
    kernel = (taps[:, None] * taps / 64)[None, None].expand(3, 1, 4, 4)
    settings = dict(stride=2, padding=1, groups=3)
    wanted = F.conv_transpose2d(x, 4 * kernel, **settings) if up else F.conv2d(x, kernel, **settings)
    torch.testing.assert_close(Smooth(up)(x), wanted)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(num_channels=130), "multiple of 32"),
        (dict(image_size="9"), "multiples of 2"),
        (dict(task="enlarge", small_size="4", augment=0.0), "is given no image"),
        (dict(task="classify", augment=0.0), "is no classifier"),
        (dict(trained_guidance=3.0, class_dropout=0.1), "no --trained_guidance"),
    ],
)
def test_what_it_cannot_be_is_refused(settings, said):
    with pytest.raises(UserError, match=said):
        made("ddpmpp", **settings)
