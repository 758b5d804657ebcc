"""The networks against the published implementation's numbers, and what they add to it."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golden_rules import fill, image_tensor, load, published_network
from iddpm.nn import Classifier, GivenUNet, UNet, attention_rates, channel_mult_for, timestep_embedding
from iddpm.nn.classifier import POOLS
from iddpm.nn.layers import Downsample, GroupNorm, attend

ENTRIES = load("networks.json")
T = torch.tensor([3.5, 871.0])


def small(**changes: Any) -> UNet:
    """A network of two levels and few channels, with weights that leave no output at 0."""
    args: dict[str, Any] = dict(
        in_channels=3, num_channels=32, out_channels=3, num_res_blocks=1, attention=(2,), channel_mult=(1, 2)
    )
    return fill(UNet(**args | changes))


def gradients(net: nn.Module, *inputs: Tensor, seed: int = 0) -> dict[str, Tensor]:
    net.zero_grad()
    torch.manual_seed(seed)
    (net(*inputs) ** 2).mean().backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


# ---- the published numbers


@pytest.mark.parametrize("entry", ENTRIES, ids=[f"{e['key']}-{e['kind']}" for e in ENTRIES])
def test_outputs_and_gradients_are_those_of_the_published_network(entry: dict[str, Any]) -> None:
    kind, config, shape = entry["kind"], entry["config"], entry["input_shape"]
    net = fill(published_network(kind, config))
    assert [name for name, _ in net.named_parameters()] == entry["param_names"]
    assert [list(p.shape) for p in net.parameters()] == entry["param_shapes"]

    cond = {"y": torch.tensor([1, 998])} if config.get("class_cond") else {}
    first_input = {"improved_unet": 10, "improved_super_res": 20, "guided_unet": 30, "guided_classifier": 40}[kind]
    if kind == "improved_super_res":
        cond["given"] = image_tensor(21, (*shape[:2], config["small_size"], config["small_size"]))
    out = net(image_tensor(first_input, shape), T, **cond)
    (out**2).mean().backward()

    golden = torch.from_numpy(load("networks.npz")[entry["key"] + "_out"])
    stride = entry["out_stride"]
    torch.testing.assert_close(out.detach()[(..., *(slice(None, None, stride),) * (out.ndim - 2))], golden, atol=2e-4, rtol=0)
    norms = torch.stack([p.grad.norm() for p in net.parameters()])
    golden_norms = torch.from_numpy(load("networks.npz")[entry["key"] + "_gradnorm"]).float()
    heard = golden_norms > 1e-6
    torch.testing.assert_close(norms[heard], golden_norms[heard], atol=0, rtol=1e-3)


def test_a_seed_gives_the_initial_weights_of_the_published_network() -> None:
    torch.manual_seed(0)
    net = UNet(3, 64, 6, 2, (2, 4), channel_mult=(1, 2, 2, 2), num_heads=4)
    assert sum(p.double().abs().sum().item() for p in net.parameters()) == pytest.approx(146707.6588292747, rel=1e-9)
    assert torch.rand(1).item() == pytest.approx(0.31045693159103394, abs=1e-6), "as many draws"


# ---- other sizes


@pytest.mark.parametrize("side", [1, 2, 8, 16, 28, 33, 36, 48, 64, 100, 128, 256, 500, 512, 1024])
def test_the_usual_levels_fit_every_size_and_take_the_usual_attention(side: int) -> None:
    mult = channel_mult_for(side)
    rates = attention_rates((16, 8), side, len(mult))
    assert side % 2 ** (len(mult) - 1) == 0
    assert all(rate in [2**level for level in range(len(mult))] for rate in rates)


@pytest.mark.parametrize(
    ("side", "mult"),
    [
        (8, (1, 2)),
        (32, (1, 2, 2, 2)),
        (64, (1, 2, 3, 4)),
        (256, (1, 1, 2, 2, 4, 4)),
        (48, (1, 2, 2, 2)),
        (36, (1, 2, 2)),
        (33, (1,)),
        (4, (1, 2)),
        (1024, (0.5, 0.5, 1, 1, 2, 2, 4, 4)),
    ],
)
def test_the_width_of_the_levels_follows_from_the_size(side: int, mult: tuple[float, ...]) -> None:
    assert channel_mult_for(side) == mult


@pytest.mark.parametrize(
    ("resolutions", "side", "levels", "rates"),
    [
        ((16, 8), 64, 4, (4, 8)),
        ((16, 8), 32, 4, (2, 4)),
        ((32, 16, 8), 512, 7, (16, 32, 64)),
        ((16, 8), 8, 2, (1,)),  # 16 is larger than the image
        ((16, 8), 128, 3, ()),  # the deepest level has 32
        ((16, 8), 48, 4, (2, 4)),  # as at 32: the levels of 24 and 12
        ((24, 12), 48, 4, (2, 4)),
        ((), 64, 4, ()),
    ],
)
def test_attention_resolutions_become_rates(resolutions: tuple[int, ...], side: int, levels: int, rates: tuple[int, ...]) -> None:
    assert attention_rates(resolutions, side, levels) == rates


@pytest.mark.parametrize("size", [(8, 8), (48, 48), (64, 96), (2, 6)])
@pytest.mark.parametrize("updown", [False, True])
def test_an_output_has_the_size_of_its_input(size: tuple[int, int], updown: bool) -> None:
    net = small(resblock_updown=updown)
    assert net(image_tensor(0, (2, 3, *size)), T).shape == (2, 3, *size)


def test_grey_images_of_five_classes_depend_on_their_class() -> None:
    net = small(in_channels=1, out_channels=2, num_classes=5)
    x, y = image_tensor(0, (2, 1, 8, 8)), torch.tensor([0, 4])
    assert net(x, T, y).shape == (2, 2, 8, 8)
    assert not torch.equal(net(x, T, y)[1], net(x, T, 0 * y)[1])


@pytest.mark.parametrize("num_channels", [20, 33])
def test_channels_that_32_groups_do_not_divide(num_channels: int) -> None:
    net = small(num_channels=num_channels, channel_mult=(0.5, 1), conv_resample=False)
    assert net(image_tensor(0, (2, 3, 8, 8)), T).isfinite().all()
    assert net.out[0].num_groups == math.gcd(32, num_channels // 2)


@pytest.mark.parametrize("pool", POOLS)
def test_a_classifier_gives_logits_with_every_pool(pool: str) -> None:
    net = fill(Classifier(16, 3, 32, 7, 1, (2,), channel_mult=(1, 2), num_head_channels=32, pool=pool))
    x = image_tensor(0, (2, 3, 16, 16))
    assert net(x, T).shape == (2, 7)
    assert gradients(net, x, T)["time_embed.0.weight"].norm() > 0


def test_super_resolution_takes_any_smaller_size() -> None:
    net = fill(GivenUNet(1, 32, 1, 1, (), channel_mult=(1, 2)))
    x = image_tensor(0, (2, 1, 16, 24))
    assert net(x, T, image_tensor(1, (2, 1, 5, 7))).shape == x.shape


# ---- layers, each against its definition


def test_half_the_size_without_a_convolution_is_the_mean_of_each_four_pixels() -> None:
    x = image_tensor(0, (2, 3, 4, 6))
    torch.testing.assert_close(Downsample(3, use_conv=False)(x), x.unflatten(2, (2, 2)).unflatten(4, (3, 2)).mean((3, 5)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_modulated_norm_is_the_norm_scaled_and_shifted(layout: torch.memory_format) -> None:
    norm = fill(GroupNorm(64))
    x, scale, shift = image_tensor(0, (2, 64, 4, 6)).to(memory_format=layout), *image_tensor(1, (2, 2, 64))
    expected = norm(x) * (1 + scale[..., None, None]) + shift[..., None, None]
    torch.testing.assert_close(norm(x, scale, shift), expected)


@pytest.mark.parametrize("heads_first", [False, True])
def test_attention_is_the_softmax_of_scaled_products(heads_first: bool) -> None:
    qkv = image_tensor(0, (2, 5, 3 * 8))
    split = qkv.view(2, 5, 2, 3, 4).transpose(2, 3) if heads_first else qkv.view(2, 5, 3, 2, 4)
    q, k, v = split.permute(2, 0, 3, 1, 4)
    expected = ((q @ k.mT / 2).softmax(-1) @ v).permute(0, 2, 1, 3).reshape(2, 5, 8)
    torch.testing.assert_close(attend(qkv, 2, heads_first=heads_first), expected)


@pytest.mark.parametrize("heads_first", [True, False])
def test_attention_of_few_tokens_in_bfloat16_has_the_gradient_of_float32(heads_first: bool) -> None:
    qkv = torch.randn(2, 16, 3 * 24, generator=torch.Generator().manual_seed(0), requires_grad=True)
    low = qkv.detach().bfloat16().requires_grad_()
    for tokens in (qkv, low):
        (attend(tokens, 3, heads_first=heads_first) ** 2).sum().backward()
    assert qkv.grad is not None and low.grad is not None
    assert (low.grad.float() - qkv.grad).norm() < 0.01 * qkv.grad.norm()


def test_patches_come_in_and_go_out_as_channels() -> None:
    net = small(patch=2)
    inner = small(in_channels=12, out_channels=12)
    inner.load_state_dict(net.state_dict())
    x = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(F.pixel_unshuffle(net(x, T), 2), inner(F.pixel_unshuffle(x, 2), T))
    with pytest.raises(ValueError, match="patches of 2 pixels"):
        net(torch.zeros(2, 3, 16, 15), T)


def test_the_time_embedding_is_cosines_then_sines_and_a_zero_where_odd() -> None:
    out = timestep_embedding(torch.tensor([0, 5]), 5, max_period=100)
    angles = [5.0, 5.0 / 10]
    expected = [[1, 1, 0, 0, 0], [*map(math.cos, angles), *map(math.sin, angles), 0]]
    torch.testing.assert_close(out, torch.tensor(expected))


# ---- memory and precision


def test_recomputed_activations_give_the_same_gradients_with_dropout() -> None:
    plain, saving = small(dropout=0.5), small(dropout=0.5, use_checkpoint=True)
    x = image_tensor(0, (2, 3, 16, 16))
    expected = gradients(plain, x, T)
    torch.testing.assert_close(gradients(saving, x, T), expected, atol=0, rtol=0)
    assert not torch.equal(gradients(saving, x, T, seed=1)["out.2.weight"], expected["out.2.weight"]), "dropout is on"


def test_recomputing_keeps_less_for_the_backward_pass() -> None:
    def kept(net: UNet) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            net(image_tensor(0, (2, 3, 16, 16)), T)
        return sum(sizes)

    assert kept(small(use_checkpoint=True)) < kept(small()) / 3


def test_recomputing_changes_no_name() -> None:
    assert list(small(use_checkpoint=True).state_dict()) == list(small().state_dict())


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_bfloat16_arithmetic_is_close_to_float32(use_checkpoint: bool) -> None:
    net, x = small(use_checkpoint=use_checkpoint), image_tensor(0, (2, 3, 16, 16))
    exact = net(x, T)
    with torch.autocast("cpu", torch.bfloat16):
        close = net(x, T)
    assert close.dtype == torch.float32
    assert (close - exact).norm() < 0.03 * exact.norm()
    (close**2).mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in net.parameters())


def test_bfloat16_weights_are_close_to_float32() -> None:
    net, x = small(), image_tensor(0, (2, 3, 16, 16))
    exact = net(x, T)
    assert (net.bfloat16()(x, T) - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("t", [torch.tensor([3, 871]), torch.tensor([3.0, 871.0], dtype=torch.float64)])
def test_times_may_be_of_any_type(t: Tensor) -> None:
    x = image_tensor(0, (2, 3, 8, 8))
    torch.testing.assert_close(small()(x, t), small()(x, t.float()))


# ---- what is refused


X = torch.zeros(2, 3, 16, 16)
Y = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("net", "inputs", "message"),
    [
        (dict(num_classes=5), (X, T), "give y"),
        (dict(), (X, T, Y), "leave out y"),
        (dict(num_classes=5), (X, T, Y[:1]), "one number per image"),
        (dict(), (X, T[:1]), "one number per image"),
        (dict(), (X[..., :15], T), "multiples of 2"),
        (dict(), (X[:, :1], T), r"\(B, 3, H, W\)"),
        (dict(), (X[0], T), r"\(B, 3, H, W\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(net: dict[str, Any], inputs: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**net)(*inputs)


@pytest.mark.parametrize("heads", [dict(num_heads=5), dict(num_head_channels=48)])
def test_heads_that_do_not_divide_the_channels_are_refused(heads: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="64 channels"):
        small(**heads)


def test_a_classifier_refuses_images_its_positions_were_not_learned_for() -> None:
    net = Classifier(16, 3, 32, 7, 1, (), channel_mult=(1, 2), num_head_channels=32)
    with pytest.raises(ValueError, match="4x16 features was made for 8x8"):
        net(torch.zeros(2, 3, 8, 32), T)


def test_an_unknown_pool_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="adaptive, attention, spatial, spatial_v2"):
        Classifier(16, 3, 32, 7, 1, (), pool="mean")


@pytest.mark.parametrize("resolutions", [(12,), (16, 24)])
def test_attention_at_a_size_that_no_level_has_is_refused_with_those_there_are(resolutions: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="64, 32, 16, 8"):
        attention_rates(resolutions, 64, 4)
