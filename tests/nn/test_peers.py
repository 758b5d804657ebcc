"""The networks of denoising-diffusion-pytorch, k-diffusion and EDM2, to train; what they compute is in tests/interop."""

import pytest
import torch
import torch.nn.functional as F

from iddpm import build
from iddpm.config import Config
from iddpm.errors import UserError
from iddpm.nn.hdit import directed, rotary
from iddpm.nn.mapped_unet import Resize
from iddpm.nn.mp_unet import hold

SMALL = dict(image_size="8", num_channels=32, num_res_blocks=1, channel_mult="1,2", attention_resolutions="4")
NETWORKS = ("unet_linear", "unet_mapped", "unet_mp", "hdit")
UNETS = NETWORKS[:3]
LEVELS = dict(patch_size=2, level_attention="neighborhood:3,window:2", level_depths="1,2", head_width=16)


def made(network: str, **settings: object) -> torch.nn.Module:
    torch.manual_seed(0)
    small = dict(SMALL) if network in UNETS else {k: SMALL[k] for k in ("image_size", "num_channels", "channel_mult")} | LEVELS
    net = build.network(Config().updated(small | dict(network=network) | settings))
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
        *((network, dict(image_size="9"), "multiples of 2") for network in UNETS),
        *((network, dict(class_cond=True, num_classes=3), "knows no classes") for network in NETWORKS[:2]),
        *((network, dict(task="enlarge", small_size="4"), "is given no image") for network in NETWORKS),
        *((network, dict(task="classify"), "is no classifier") for network in NETWORKS),
        ("hdit", dict(image_size="10"), "2 levels of patches of 2 pixels need an image size of multiples of 4, not 10"),
        ("hdit", dict(image_size="8x10"), "multiples of 4, not 10"),
        ("hdit", dict(patch_size=3), "multiples of 6"),
        ("hdit", dict(head_width=24), "32 channels do not divide into heads of 24"),
        ("hdit", dict(head_width=4), "choose a divisor that 8 divides"),
        ("hdit", dict(level_depths="1,2,3"), "'1,2,3' has 3 values for 2 levels"),
        ("hdit", dict(level_depths="1,0"), "--level_depths 0 is out of range"),
        ("hdit", dict(level_depths="1,x"), "give a number for each level, as 2,4"),
        ("hdit", dict(level_depths=","), "give a number"),
        ("hdit", dict(level_hidden="64,6.5"), "give a number for each level, as 96,192"),
        ("hdit", dict(level_dropout="0.1,nan"), "--level_dropout nan is out of range"),
        ("hdit", dict(level_dropout="0.1,0.2", dropout=0.1), "give one"),
        ("hdit", dict(level_attention="global,near"), "'near' is none of: global, neighborhood:7"),
        ("hdit", dict(level_attention="neighborhood:5,global"), "at most the side of the level's 4x4 tokens"),
        ("hdit", dict(level_attention="window:3,global"), "windows do not fill the level's 4x4 tokens"),
        ("hdit", dict(mapping_width=33), "--mapping_width 33 is odd"),
    ],
)
def test_what_it_cannot_be_is_refused(network, settings, said):
    with pytest.raises(UserError, match=said):
        made(network, **settings)


ODD: dict[str, dict[str, object]] = {
    "oblong, of two channels, with a learned variance": dict(
        image_size="8x16", image_channels=2, noise_schedule="linear", learn_sigma=True
    ),
    "of classes": dict(class_cond=True, num_classes=3, class_dropout=0.1),
    "without attention": dict(level_attention="none,none"),
    "of one level": dict(channel_mult="1", level_attention="global", level_depths="1", image_size="10"),
    "of three": dict(channel_mult="1,2,1.5", level_attention="", level_depths="", image_size="72", patch_size=1),
    "without layers of the mapping": dict(mapping_depth=0),
}


@pytest.mark.parametrize("name", ODD)
def test_the_hourglass_takes_other_forms(name):
    net, settings = made("hdit", **ODD[name]), dict(image_size="8", image_channels=3) | ODD[name]
    height, width = (int(side) for side in (f"{settings['image_size']}x" * 2).split("x")[:2])
    x = torch.randn(2, settings["image_channels"], height, width)
    told = (torch.tensor([0, 3]),) if "class_cond" in settings else ()
    out = net(x, torch.tensor([-1.0, 0.5]), *told)
    assert out.shape == (2, settings["image_channels"] * (2 if "learn_sigma" in settings else 1), height, width)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())
    if told:
        with pytest.raises(ValueError, match="give y"):
            net(x, torch.zeros(2))


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        (dict(image_size="256"), ["neighborhood:7", "neighborhood:7", "global"]),  # as k-diffusion's config of flowers
        (dict(image_size="32", patch_size=2), ["global", "global"]),  # of CIFAR-10
        (dict(image_size="28"), ["global"]),  # of MNIST
        (dict(image_size="32"), ["global", "global"]),
        (dict(image_size="200"), ["neighborhood:7", "neighborhood:7"]),  # 50 tokens a side, then 25, which are odd
    ],
)
def test_levels_are_as_usual_for_the_number_of_tokens(settings, kinds):
    with torch.device("meta"):
        net = build.network(Config().updated(dict(network="hdit") | settings))
    layers = [level[0].self_attn.level for level in (*net.down_levels, net.mid_level)]
    assert [layer.attention + f":{layer.reach}" * (layer.reach > 0) for layer in layers] == kinds
    assert [layer.width for layer in layers] == [128 * 2**i for i in range(len(kinds))]
    assert [layer.depth for layer in layers] == [2] * (len(kinds) - 1) + [4]


def test_turning_by_places_leaves_what_places_have_in_common():
    """Products of queries and keys depend on how far they lie apart, not on where (Su et al. 2021)."""
    angles, scale = rotary(4, 6, 2, 16, torch.device("cpu")), torch.tensor([10.0, 3.0])
    q, k = (torch.randn(2, 1, 1, 16).expand(1, 2, 4, 6, 16) for _ in range(2))
    q, k = (directed(z, scale, angles).flatten(2, 3) for z in (q, k))
    products = (q @ k.transpose(2, 3)).view(1, 2, 4, 6, 4, 6)
    torch.testing.assert_close(products[:, :, 0, 0, 1, 2], products[:, :, 2, 3, 3, 5], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(q.norm(dim=3), scale.sqrt()[:, None].expand(1, 2, 24), rtol=1e-4, atol=1e-5)


def test_training_keeps_weights_of_edm2_at_unit_size_and_what_they_compute():
    net, x, t = made("unet_mp").eval().requires_grad_(False), torch.randn(2, 3, 8, 8), torch.tensor([-1.0, 0.5])
    before = net(x, t)
    for p in net.parameters():
        p.mul_(1 + 9 * (p.ndim > 1))
    hold(net)
    sizes = [p.flatten(1).square().mean(1).sqrt() for name, p in net.named_parameters() if name.endswith("weight")]
    torch.testing.assert_close(torch.cat(sizes), torch.ones(sum(map(len, sizes))), rtol=1e-3, atol=0)
    torch.testing.assert_close(net(x, t), before, rtol=1e-2, atol=1e-2)  # up to what keeps divisors from 0
