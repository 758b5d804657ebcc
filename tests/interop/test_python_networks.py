"""The original's networks and layers by its names and arguments: the published numbers, float16, and what forks build."""

import argparse
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from golden_rules import fill, image_tensor, load
from iddpm.interop.openai.python import fp16_util, guided, losses, script_util, unet
from iddpm.interop.openai.python import nn as pieces

ENTRIES = load("networks.json")
T = torch.tensor([3.5, 871.0])


def made(kind: str, config: dict[str, Any]) -> nn.Module:
    """The network of a golden entry, through the function that the original's scripts call."""
    if kind == "improved_unet":
        return script_util.create_model_and_diffusion(**script_util.model_and_diffusion_defaults() | config)[0]
    if kind == "improved_super_res":
        return script_util.sr_create_model_and_diffusion(**script_util.sr_model_and_diffusion_defaults() | config)[0]
    if kind == "guided_unet":
        return guided.create_model(**config)
    return guided.create_classifier(**config)


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e["key"] in ("net_1", "net_2", "net_5", "net_6", "net_9")], ids=str)
def test_outputs_are_those_of_the_published_network(entry: dict[str, Any]) -> None:
    kind, config, shape = entry["kind"], entry["config"], entry["input_shape"]
    net = fill(made(kind, config))
    assert [name for name, _ in net.named_parameters()] == entry["param_names"]
    cond = {"y": torch.tensor([1, 998])} if config.get("class_cond") else {}
    if kind == "improved_super_res":
        cond["low_res"] = image_tensor(21, (*shape[:2], config["small_size"], config["small_size"]))
    first = {"improved_unet": 10, "improved_super_res": 20, "guided_unet": 30, "guided_classifier": 40}[kind]
    out = net(image_tensor(first, shape), timesteps=T, **cond).detach()
    golden, stride = torch.from_numpy(load("networks.npz")[entry["key"] + "_out"]), entry["out_stride"]
    torch.testing.assert_close(out[(..., *(slice(None, None, stride),) * (out.ndim - 2))], golden, atol=2e-4, rtol=0)


def test_improved_flags_take_guided_diffusions_further_ones() -> None:
    (entry,) = (e for e in ENTRIES if e["key"] == "net_6")
    flags = script_util.model_and_diffusion_defaults() | entry["config"]
    ours, theirs = script_util.create_model_and_diffusion(**flags)[0], guided.create_model(**entry["config"])
    x, y = image_tensor(0, (1, 3, 64, 64)), torch.tensor([3])
    assert torch.equal(fill(ours)(x, T[:1], y), fill(theirs)(x, T[:1], y))


def test_channel_mult_may_be_given_for_any_size() -> None:
    net = guided.create_model(24, 32, 1, channel_mult="0.5,1", attention_resolutions="12")
    assert net.input_blocks[0][0].out_channels == 16 and net(torch.zeros(1, 3, 24, 24), T[:1]).shape == (1, 3, 24, 24)


# ---- attributes and methods


def small(kind: type[nn.Module] = unet.UNetModel, **changes: Any) -> Any:
    args: dict[str, Any] = dict(
        in_channels=3, model_channels=32, out_channels=3, num_res_blocks=1, attention_resolutions=(2,), channel_mult=(1, 2),
        num_heads=2,
    )  # fmt: skip
    return fill(kind(**args | changes))


def test_the_constructors_arguments_are_attributes() -> None:
    net = small(num_classes=5, dropout=0.25)
    told = (net.in_channels, net.model_channels, net.out_channels, net.num_res_blocks, net.attention_resolutions, net.dropout)
    assert told == (3, 32, 3, 1, (2,), 0.25)
    more = (net.channel_mult, net.conv_resample, net.num_classes, net.use_checkpoint, net.num_heads, net.num_heads_upsample)
    assert more == ((1, 2), True, 5, False, 2, 2)


def test_guided_networks_take_the_image_size_first() -> None:
    net = guided.UNetModel(16, 3, 32, 3, 1, (2,), channel_mult=(1, 2), num_heads=2, use_scale_shift_norm=False)
    x = image_tensor(0, (2, 3, 16, 16))
    assert net.image_size == 16 and torch.equal(fill(net)(x, T), small()(x, T))
    up = guided.SuperResModel(16, 3, 32, 3, 1, (2,), channel_mult=(1, 2))
    assert isinstance(up, unet.UNetModel) and up(x, T, low_res=x[..., :8, :8]).shape == x.shape


def test_networks_of_other_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match="dims=3"):
        small(dims=3)


@pytest.mark.parametrize("kind", [unet.UNetModel, unet.SuperResModel])
def test_feature_vectors_are_what_the_stages_give(kind: Any) -> None:
    net, x = small(kind), image_tensor(0, (2, 3, 16, 16))
    cond = {"low_res": image_tensor(1, (2, 3, 4, 4))} if kind is unet.SuperResModel else {}
    got = net.get_feature_vectors(x, T, **cond)
    assert [h.shape[1:] for h in got["down"]] == [(32, 16, 16), (32, 16, 16), (32, 8, 8), (64, 8, 8)]
    assert got["middle"].shape == (2, 64, 8, 8)
    assert [h.shape[1:] for h in got["up"]] == [(64, 8, 8), (64, 16, 16), (32, 16, 16), (32, 16, 16)]
    torch.testing.assert_close(net.out(got["up"][-1]), net(x, T, **cond))


def test_a_fork_may_walk_the_stages_itself() -> None:
    class Fork(unet.UNetModel):
        def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:  # type: ignore[override]
            emb = self.time_embed(pieces.timestep_embedding(timesteps, self.model_channels))
            hs, h = [], x.type(self.inner_dtype)
            for module in self.input_blocks:
                h = module(h, emb)
                hs.append(h)
            h = self.middle_block(h, emb)
            for module in self.output_blocks:
                h = module(torch.cat([h, hs.pop()], dim=1), emb)
            return self.out(h.type(x.dtype))

    x = image_tensor(0, (2, 3, 16, 16))
    torch.testing.assert_close(small(Fork)(x, T), small()(x, T))


def test_a_fork_may_put_its_own_stage_in_front() -> None:
    net = small()
    first = pieces.conv_nd(2, 5, 32, 3, padding=1)
    net.input_blocks[0], net.in_channels = unet.TimestepEmbedSequential(first), 5
    assert net(torch.zeros(2, 5, 16, 16), T).shape == (2, 3, 16, 16)


# ---- float16


@pytest.mark.parametrize("shape", ["improved", "updown", "classifier"])
@pytest.mark.parametrize("norm", [False, True])
def test_a_float16_torso_gives_nearly_the_same(shape: str, norm: bool) -> None:
    updown = dict(resblock_updown=True, use_new_attention_order=True, num_head_channels=32)
    if shape == "classifier":
        net = small(unet.EncoderUNetModel, image_size=16, out_channels=7, pool="attention", use_scale_shift_norm=norm, **updown)
    else:
        net = small(use_scale_shift_norm=norm, **(updown if shape == "updown" else {}))
    x = image_tensor(0, (2, 3, 16, 16))
    exact = net(x, T)
    net.convert_to_fp16()
    assert net.inner_dtype == torch.float16
    assert {p.dtype for p in (*net.time_embed.parameters(), *net.out.parameters())} == {torch.float32}
    half = net(x, T)
    assert half.dtype == torch.float32
    assert 0 < (half - exact).norm() < 0.01 * exact.norm()
    (half**2).mean().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in net.parameters())
    net.convert_to_fp32()
    assert net.inner_dtype == torch.float32
    assert (net(x, T) - exact).norm() < 0.01 * exact.norm()


def test_masters_are_flat_copies() -> None:
    params = [nn.Parameter(torch.randn(2, 3).half()), nn.Parameter(torch.randn(4))]
    (master,) = fp16_util.make_master_params(params)
    assert master.shape == (10,) and master.dtype == torch.float32 and master.requires_grad
    params[0].grad = torch.ones(2, 3).half()
    fp16_util.model_grads_to_master_grads(params, [master])
    assert master.grad is not None and master.grad.tolist() == [1.0] * 6 + [0.0] * 4
    with torch.no_grad():
        master.copy_(torch.arange(10.0))
    assert [p.tolist() for p in fp16_util.unflatten_master_params(iter(params), [master])] == [
        [[0, 1, 2], [3, 4, 5]],
        [6, 7, 8, 9],
    ]
    fp16_util.master_params_to_model_params(iter(params), [master])
    assert params[1].tolist() == [6, 7, 8, 9] and params[0].dtype == torch.float16
    fp16_util.zero_grad(params)
    assert params[0].grad is None


# ---- layers, in as many dimensions as the original's


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("change", [None, "up", "down"])
def test_a_residual_block_is_its_formula(dims: int, norm: bool, change: str | None) -> None:
    block = unet.ResBlock(
        32, 8, 0.0, out_channels=64, use_scale_shift_norm=norm, dims=dims, up=change == "up", down=change == "down"
    )
    assert not any(p.abs().sum() for p in block.out_layers[-1].parameters()), "it starts as the identity"
    fill(block)
    x, emb = image_tensor(0, (2, 32, *(4,) * dims)), image_tensor(1, (2, 8))
    resize: Any = {None: nn.Identity(), "up": unet.Upsample(32, False, dims), "down": unet.Downsample(32, False, dims)}[change]
    h = block.in_layers[2](resize(block.in_layers[1](block.in_layers[0](x))))
    e = block.emb_layers(emb).view(2, -1, *(1,) * dims)
    h = block.out_layers[0](h) * (1 + e[:, :64]) + e[:, 64:] if norm else block.out_layers[0](h + e)
    torch.testing.assert_close(block(x, emb), block.skip_connection(resize(x)) + block.out_layers[1:](h))


def test_a_recomputing_block_has_the_gradient_of_the_same_dropout() -> None:
    """B19: the original draws another mask for the gradient than for the output."""
    gradients = []
    for flag in (False, True):
        block = fill(unet.ResBlock(32, 8, 0.5, use_checkpoint=flag))
        torch.manual_seed(0)
        block(image_tensor(0, (2, 32, 4, 4)), image_tensor(1, (2, 8))).square().sum().backward()
        gradients.append([p.grad for p in block.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_changes_of_size(dims: int) -> None:
    """B20: without a convolution the original's Downsample raises TypeError."""
    x = image_tensor(0, (2, 32, 4, 4, 4)[: 2 + dims])
    inner = (4, 8, 8) if dims == 3 else (8,) * dims
    for conv in (False, True):
        assert unet.Upsample(32, conv, dims)(x).shape == (2, 32, *inner)
        assert unet.Downsample(32, conv, dims)(unet.Upsample(32, conv, dims)(x)).shape == x.shape
    torch.testing.assert_close(unet.Downsample(32, False, dims)(unet.Upsample(32, False, dims)(x)), x)


@pytest.mark.parametrize("order", [False, True])
def test_attention_blocks_use_the_attention_beside_them(order: bool) -> None:
    block = fill(unet.AttentionBlock(64, num_head_channels=16, use_new_attention_order=order, use_checkpoint=True))
    x = image_tensor(0, (2, 64, 3, 5))
    attention = (unet.QKVAttention if order else unet.QKVAttentionLegacy)(4)
    h = attention(nn.functional.conv1d(block.norm(x).flatten(2), block.qkv.weight, block.qkv.bias))
    h = nn.functional.conv1d(h, block.proj_out.weight, block.proj_out.bias)
    torch.testing.assert_close(block(x), x + h.view_as(x))


def test_attention_of_one_head_is_a_softmax() -> None:
    qkv = image_tensor(0, (2, 12, 5))
    q, k, v = qkv.chunk(3, dim=1)
    expected = torch.einsum("bts,bcs->bct", (q.mT @ k / 2).softmax(-1), v)
    torch.testing.assert_close(unet.QKVAttention()(qkv), expected)
    counter = argparse.Namespace(total_ops=torch.zeros(1, dtype=torch.float64))
    unet.QKVAttention.count_flops(counter, None, [expected])
    assert counter.total_ops.item() == 2 * 2 * 5**2 * 4


def test_a_sequence_gives_the_embedding_to_those_that_want_it() -> None:
    class Adds(unet.TimestepBlock):
        def forward(self, x: Tensor, emb: Tensor) -> Tensor:
            return x + emb

    row = unet.TimestepEmbedSequential(nn.Identity(), Adds(), nn.Tanh())
    torch.testing.assert_close(row(torch.zeros(2), torch.ones(2)), torch.ones(2).tanh())
    with pytest.raises(NotImplementedError):
        unet.TimestepBlock()(torch.zeros(1), torch.zeros(1))


def test_attention_pooling_gives_a_vector() -> None:
    assert unet.AttentionPool2d(4, 32, 16, 7)(torch.zeros(2, 32, 4, 4)).shape == (2, 7)


# ---- pieces


def test_pieces_are_what_they_say() -> None:
    x = image_tensor(0, (2, 48, 4, 4))
    torch.testing.assert_close(pieces.SiLU()(x), x * x.sigmoid())
    torch.testing.assert_close(pieces.normalization(48)(x.half()).float(), pieces.normalization(48)(x), atol=2e-3, rtol=0)
    assert pieces.normalization(48).num_groups == 16 and pieces.GroupNorm32(4, 48).num_groups == 4
    torch.testing.assert_close(pieces.mean_flat(x), x.mean(dim=(1, 2, 3)))
    assert pieces.avg_pool_nd(3, 2)(torch.ones(1, 1, 4, 4, 4)).shape == (1, 1, 2, 2, 2)
    assert pieces.scale_module(fill(nn.Linear(2, 2, bias=False)), 0.0).weight.abs().sum() == 0
    assert not pieces.zero_module(nn.Linear(2, 2)).bias.any()
    assert isinstance(pieces.linear(2, 3), nn.Linear)
    with pytest.raises(ValueError, match="unsupported dimensions: 4"):
        pieces.conv_nd(4, 1, 1, 1)


def test_an_average_moves_by_its_rate() -> None:
    target, source = [torch.zeros(2), nn.Parameter(torch.ones(1))], [torch.ones(2), torch.tensor([3.0])]
    pieces.update_ema(target, source, rate=0.75)
    assert [t.tolist() for t in target] == [[0.25, 0.25], [1.5]]


def test_recomputing_by_both_names_gives_the_gradient() -> None:
    w, x = torch.tensor(3.0, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    for run in (lambda f: pieces.checkpoint(f, (x,), (w,), True), lambda f: pieces.CheckpointFunction.apply(f, 1, x, w)):
        (grad,) = torch.autograd.grad(run(lambda x: w * x**2), w)
        assert grad == 4


def test_terms_of_the_bound_are_their_formulas() -> None:
    p, q = torch.distributions.Normal(0.5, 2.0), torch.distributions.Normal(torch.tensor([0.0, 1.0]), 1.0)
    ours = losses.normal_kl(0.5, 2 * torch.tensor(2.0).log(), torch.tensor([0.0, 1.0]), 0.0)
    torch.testing.assert_close(ours, torch.distributions.kl_divergence(p, q))
    z = torch.linspace(-4, 4, 9)
    torch.testing.assert_close(losses.approx_standard_normal_cdf(z), torch.special.ndtr(z), atol=5e-4, rtol=0)
    pixel = (torch.arange(256) / 127.5 - 1)[:, None]
    mass = losses.discretized_gaussian_log_likelihood(pixel, means=0 * pixel + 0.2, log_scales=0 * pixel - 1).exp().sum()
    assert mass.item() == pytest.approx(1, abs=1e-4)
