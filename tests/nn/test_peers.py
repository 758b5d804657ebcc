"""The networks of denoising-diffusion-pytorch, k-diffusion and EDM2, to train; what they compute is in tests/interop."""

import pytest
import torch
import torch.nn.functional as F

from iddpm import build
from iddpm.config import Config
from iddpm.errors import UserError
from iddpm.nn.mapped_unet import Resize
from iddpm.nn.mp_unet import hold

SMALL = dict(image_size="8", num_channels=32, num_res_blocks=1, channel_mult="1,2", attention_resolutions="4")
NETWORKS = ("unet_linear", "unet_mapped", "unet_mp")


def made(network: str, **settings: object) -> torch.nn.Module:
    torch.manual_seed(0)
    net = build.network(Config().updated(SMALL | dict(network=network) | settings))
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)  # past the zeros that a new network begins with
    return net


def gradients(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([-1.0, 0.5])
    net(x, t).square().mean().backward()
    return {name: p.grad for name, p in net.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("network", NETWORKS)
def test_every_weight_gets_a_gradient_and_recomputing_gives_the_same(network):
    found, again = gradients(made(network)), gradients(made(network, use_checkpoint=True))
    assert all(g is not None and g.abs().max() > 0 for g in found.values())
    assert all(torch.allclose(g, again[name], rtol=1e-4, atol=1e-6) for name, g in found.items())


@pytest.mark.parametrize("network", NETWORKS)
def test_under_autocast_the_output_is_of_the_type_of_the_input(network):
    net, x = made(network), torch.randn(2, 3, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = net(x, torch.tensor([1.0, 2.0]))
    assert out.dtype == x.dtype
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("way", [1, -1])
def test_sizes_change_by_the_filter_1_3_3_1_on_a_mirrored_edge(way):
    x, taps = torch.randn(2, 3, 6, 10), torch.tensor([1.0, 3.0, 3.0, 1.0])
    kernel = (taps[:, None] * taps / 64)[None, None].expand(3, 1, 4, 4)
    padded = F.pad(x, (1, 1, 1, 1), "reflect")
    down, up = F.conv2d(padded, kernel, stride=2, groups=3), F.conv_transpose2d(padded, 4 * kernel, stride=2, padding=3, groups=3)
    torch.testing.assert_close(Resize(way)(x, x), up if way > 0 else down)


@pytest.mark.parametrize(
    ("network", "settings", "said"),
    [
        *(("unet_linear", dict(num_channels=n), "not an even number from 4 on") for n in (2, 5)),
        ("unet_mapped", dict(num_channels=65), "multiple of 32"),
        ("unet_mp", dict(num_channels=43, channel_mult="1,3"), "multiple of 64"),
        ("unet_mapped", dict(level_depths="1,2,3"), "3 depths for 2 levels"),
        ("unet_mapped", dict(mapping_width=33), "odd --mapping_width"),
        ("unet_mapped", dict(image_size="10", attention_resolutions="", unet_patch=2), "multiples of 4"),
        *((network, dict(image_size="9"), "multiples of 2") for network in NETWORKS),
        *((network, dict(class_cond=True, num_classes=3), "knows no classes") for network in NETWORKS[:2]),
        *((network, dict(task="enlarge", small_size="4"), "is given no image") for network in NETWORKS),
        *((network, dict(task="classify"), "is no classifier") for network in NETWORKS),
    ],
)
def test_what_it_cannot_be_is_refused(network, settings, said):
    with pytest.raises(UserError, match=said):
        made(network, **settings)


def test_training_keeps_weights_of_edm2_at_unit_size_and_what_they_compute():
    net, x, t = made("unet_mp").eval().requires_grad_(False), torch.randn(2, 3, 8, 8), torch.tensor([-1.0, 0.5])
    before = net(x, t)
    for p in net.parameters():
        p.mul_(1 + 9 * (p.ndim > 1))
    hold(net)
    sizes = [p.flatten(1).square().mean(1).sqrt() for name, p in net.named_parameters() if name.endswith("weight")]
    torch.testing.assert_close(torch.cat(sizes), torch.ones(sum(map(len, sizes))), rtol=1e-3, atol=0)
    torch.testing.assert_close(net(x, t), before, rtol=1e-2, atol=1e-2)  # up to what keeps divisors from 0
