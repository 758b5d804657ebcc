"""The layers of the U-Net: a residual block that time and class modulate, self-attention, and changes of size.

Names, shapes and the order of the random draws are those of the published networks, so their weights load as they are.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

M = TypeVar("M", bound=nn.Module)


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000) -> Tensor:
    """Cosines, then sines, of t (B,) at dim/2 frequencies from 1 down to 1/max_period: (B, dim) float32 (Ho et al. 2020)."""
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * freqs  # b half
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))  # b dim


SCALES = 100.0  # how finely a network tells scales of guidance apart, beside times of 1000


def scale_embedding(scale: Tensor | None, like: Tensor, dim: int) -> Tensor:
    """(B, dim) of scales of guidance (B,), 1 where none is given; `like` (B,) is on the device of the network."""
    return timestep_embedding(SCALES * (torch.zeros_like(like) if scale is None else scale - 1), dim)


def zeroed(module: M) -> M:
    """The module with its weights set to 0, so that a new block starts as the identity."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def recomputing(wanted: bool) -> Callable[..., Any]:
    """How to call a layer: `wanted`, and where gradients are asked for, so that the backward pass computes it again."""
    if wanted and torch.is_grad_enabled():
        return partial(checkpoint, use_reentrant=False, preserve_rng_state=True)
    return lambda layer, *args: layer(*args)


def stacked(x: Tensor, given: Tensor) -> Tensor:
    """x (B, C, H, W) and, under it, an image (B, G, h, w) of any size, scaled bilinearly: (B, C + G, H, W)."""
    return torch.cat([x, F.interpolate(given, x.shape[2:], mode="bilinear", align_corners=False)], dim=1)


def conv3x3(channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, 3, stride=stride, padding=1)


class GroupNorm(nn.GroupNorm):
    """Group normalisation in at most 32 groups, optionally with a scale and a shift for each image and channel."""

    def __init__(self, channels: int):
        super().__init__(math.gcd(32, channels), channels)

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """norm(x) (1 + scale) + shift; x (B, C, ...), scale and shift (B, C)."""
        if scale is None or shift is None:
            return super().forward(x).to(x.dtype)
        # as one image of B C channels, the modulation is the norm's own affine map and costs no pass over x
        gain = 1 + scale.to(self.weight.dtype)  # in bfloat16 the sum would lose a small scale
        weight, bias = self.weight * gain, self.bias * gain + shift  # b c
        rows = x.reshape(1, -1, *x.shape[2:])  # 1 bc h w
        h = F.group_norm(rows, len(x) * self.num_groups, weight.flatten(), bias.flatten(), self.eps)
        return h.reshape(x.shape).to(x.dtype)  # autocast on a GPU normalises in float32


class Upsample(nn.Module):
    """Twice the height and width by repetition, then a convolution where `use_conv`."""

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.conv = conv3x3(channels, channels) if use_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))  # b c 2h 2w


class Downsample(nn.Module):
    """Half the height and width, by a strided convolution where `use_conv`, else by the mean of each 2 x 2."""

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.op = conv3x3(channels, channels, stride=2) if use_conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)  # b c h/2 w/2


class ResBlock(nn.Module):
    """Two convolutions around which the input is added; the embedding modulates the second norm (Nichol & Dhariwal 2021, 3).

    `resize`, a layer without weights, changes the size of both branches (Dhariwal & Nichol 2021, 3).
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        emb_channels: int,
        dropout: float = 0.0,
        use_scale_shift_norm: bool = True,
        resize: nn.Module | None = None,
    ):
        super().__init__()
        self.scale_shift = use_scale_shift_norm
        self.in_layers = nn.Sequential(GroupNorm(channels), nn.SiLU(), conv3x3(channels, out_channels))
        self.resize = resize or nn.Identity()
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, (1 + use_scale_shift_norm) * out_channels))
        self.out_layers = nn.Sequential(
            GroupNorm(out_channels), nn.SiLU(), nn.Dropout(dropout), zeroed(conv3x3(out_channels, out_channels))
        )
        self.skip_connection = nn.Identity() if out_channels == channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        in_norm, in_act, in_conv = self.in_layers
        out_norm, *out_rest = self.out_layers
        h = in_conv(self.resize(in_act(in_norm(x))))  # b o h w
        e = self.emb_layers(emb)  # b o, or b 2o
        h = out_norm(h, *e.chunk(2, dim=1)) if self.scale_shift else out_norm(h + e[..., None, None])
        for layer in out_rest:
            h = layer(h)
        return self.skip_connection(self.resize(x)) + h  # b o h w


class Pointwise(nn.Conv1d):
    """A linear map of tokens (B, T, C) whose weight is kept as a 1x1 convolution's, (C', C, 1), as published."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.squeeze(2), self.bias)  # b t c'


FEW_TOKENS = 256  # up to which a CPU's flash attention goes back through bfloat16 in twice the time of plain products


def attend(qkv: Tensor, heads: int, *, heads_first: bool, queries: int | None = None) -> Tensor:
    """Softmax attention of tokens (B, T, 3C) in `heads` heads; the first `queries` outputs (all by default), (B, T', C).

    The 3C channels are heads x (q, k, v) x C/heads where `heads_first`, else (q, k, v) x heads x C/heads.
    """
    split, which = ((heads, 3, -1), 3) if heads_first else ((3, heads, -1), 2)
    # views with the channels of a head innermost: the layout that the fast kernels take without a copy
    q, k, v = (z.transpose(1, 2) for z in qkv.unflatten(2, split).unbind(which))  # b heads t c/heads
    q = q[:, :, :queries]
    if qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16 and qkv.requires_grad and k.shape[2] <= FEW_TOKENS:
        weights = (q @ k.transpose(2, 3)).float().mul(q.shape[3] ** -0.5).softmax(3)  # b heads t' t
        return (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)  # b t' c
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # b t' c


class AttentionBlock(nn.Module):
    """Self-attention among the pixels, added to the input.

    The published networks order the channels of qkv in two ways: `heads_first` (Nichol & Dhariwal 2021), or q, k, v first
    (Dhariwal & Nichol 2021's "new attention order").
    """

    def __init__(self, channels: int, heads: int, heads_first: bool = True):
        super().__init__()
        if channels % heads:
            raise ValueError(f"{channels} channels cannot be shared among {heads} attention heads: choose a divisor")
        self.heads, self.heads_first = heads, heads_first
        self.norm = GroupNorm(channels)
        self.qkv = Pointwise(channels, 3 * channels)
        self.proj_out = zeroed(Pointwise(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x).flatten(2).transpose(1, 2))  # b hw 3c
        h = self.proj_out(attend(qkv, self.heads, heads_first=self.heads_first))  # b hw c
        return x + h.transpose(1, 2).reshape(x.shape)  # b c h w


class AttentionPool(nn.Module):
    """One vector per image: its mean attends to its side x side pixels (Radford et al. 2021); (B, C, H, W) -> (B, out)."""

    def __init__(self, side: int, channels: int, heads: int, out_channels: int):
        super().__init__()
        self.side, self.heads = side, heads
        self.positional_embedding = nn.Parameter(torch.randn(channels, side**2 + 1) / channels**0.5)
        self.qkv_proj = Pointwise(channels, 3 * channels)
        self.c_proj = Pointwise(channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] != (self.side, self.side):
            got, made = "x".join(map(str, x.shape[2:])), f"{self.side}x{self.side}"
            raise ValueError(f"attention pooling of {got} features was made for {made}: give images of the classifier's size")
        x = x.flatten(2)  # b c hw
        x = torch.cat([x.mean(2, keepdim=True), x], dim=2) + self.positional_embedding  # b c 1+hw
        h = attend(self.qkv_proj(x.transpose(1, 2)), self.heads, heads_first=False, queries=1)  # b 1 c
        return self.c_proj(h).squeeze(1)  # b out


class Stage(nn.ModuleList):
    """Layers in a row, of which the residual blocks see the embedding.

    With `recompute`, activations inside are dropped and computed again, dropout included, in the backward pass.
    """

    def __init__(self, *layers: nn.Module, recompute: bool = False):
        super().__init__(layers)
        self.recompute = recompute and isinstance(layers[0], ResBlock)  # a lone convolution would only be run twice

    def forward(self, x: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), with the channels of `skip` stacked under it where given, through the layers."""
        h: Tensor = recomputing(self.recompute)(self.run, x, emb, skip)
        return h

    def run(self, x: Tensor, emb: Tensor, skip: Tensor | None) -> Tensor:
        h = x if skip is None else torch.cat([x, skip], dim=1)  # b c h w
        for layer in self:
            h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
        return h
