"""The hourglass diffusion transformer (Crowson et al. 2024, HDiT, arXiv 2401.11605; k-diffusion's image_transformer_v2).

Parts are named as there, so that its weights load as they are. Tokens are patches of pixels; four neighbours become one at the
next level, and are parted again on the way back, where they are blended with what they were (section 4.2). Of the outer levels,
which have many tokens, each attends to those around it alone (4.1); queries and keys are of unit length, up to a learned scale,
and turn with their place; feed-forward layers are gated; the time, and the class, scale every norm (4.3).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iddpm.nn.layers import recomputing, zeroed
from iddpm.nn.reach import REACHES

EPS = 1e-6  # added to mean squares


class Level(NamedTuple):
    """What the layers of a level are."""

    width: int
    depth: int
    hidden: int  # channels inside the feed-forward layers
    attention: str  # one of REACHES, or "none"
    reach: int  # tokens a side of a neighbourhood (odd), or of a window
    dropout: float


def frequencies(heads: int, head_width: int) -> Tensor:
    """From pi to 10 pi, in even ratios, shared out among the heads: (heads, head_width / 8)."""
    count = head_width // 8
    return torch.linspace(math.log(math.pi), math.log(10 * math.pi), heads * count + 1)[:-1].exp().view(count, heads).T


def rotary(height: int, width: int, heads: int, head_width: int, device: torch.device) -> Tensor:
    """Angles (heads, h, w, head_width / 4) of places from -1 to 1 along the longer side: of the row, then of the column."""
    freqs = frequencies(heads, head_width).to(device)[:, None, None]  # n 1 1 f
    y, x = ((2 * torch.arange(n, device=device) + 1 - n) / max(height, width) for n in (height, width))
    rows, columns = y[None, :, None, None] * freqs, x[None, None, :, None] * freqs
    return torch.cat([rows.expand(-1, -1, width, -1), columns.expand(-1, height, -1, -1)], dim=3)


def directed(x: Tensor, scale: Tensor, angles: Tensor) -> Tensor:
    """x (B, heads, h, w, c) at length scale^(1/2) of each head (heads,), and half of its channels turned by angles."""
    wide = x.float()
    wide = wide * (scale.float().sqrt()[:, None, None, None] / (wide.square().sum(4, keepdim=True) + EPS).sqrt())
    a, b, rest = wide.split([angles.shape[3], angles.shape[3], x.shape[4] - 2 * angles.shape[3]], dim=4)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=4).to(x.dtype)


def normed(x: Tensor, scale: Tensor) -> Tensor:
    """x over the root of its mean square, times `scale`; computed in float32."""
    root = (x.float().square().mean(-1, keepdim=True) + EPS).sqrt()  # not times 1/root, which onnxruntime 1.32 cannot load
    return x * (scale.float() / root).to(x.dtype)


class Norm(nn.Module):
    """RMS norm with a learned scale."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return normed(x, self.scale)


class AdaptiveNorm(nn.Module):
    """RMS norm of tokens, scaled by the embedding."""

    def __init__(self, width: int, emb: int):
        super().__init__()
        self.linear = zeroed(nn.Linear(emb, width, bias=False))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return normed(x, 1 + self.linear(emb).float()[:, None, None])


class FeedForward(nn.Module):
    """A gated layer (GEGLU, Shazeer 2020) beside its input, which the norm scales by the embedding where there is one."""

    def __init__(self, width: int, hidden: int, dropout: float, emb: int = 0):
        super().__init__()
        self.norm = AdaptiveNorm(width, emb) if emb else Norm(width)
        self.up_proj, self.drop = nn.Linear(width, 2 * hidden, bias=False), nn.Dropout(dropout)
        self.down_proj = zeroed(nn.Linear(hidden, width, bias=False))

    def forward(self, x: Tensor, *emb: Tensor) -> Tensor:
        value, gate = self.up_proj(self.norm(x, *emb)).chunk(2, dim=-1)
        return x + self.down_proj(self.drop(value * F.gelu(gate)))


class Attention(nn.Module):
    """Attention of a level's kind beside its input."""

    def __init__(self, level: Level, head_width: int, emb: int, shifted: bool):
        super().__init__()
        self.level, self.heads, self.shifted = level, level.width // head_width, shifted
        self.norm, self.qkv_proj = AdaptiveNorm(level.width, emb), nn.Linear(level.width, 3 * level.width, bias=False)
        self.scale = nn.Parameter(torch.full([self.heads], 10.0))
        self.drop, self.out_proj = nn.Dropout(level.dropout), zeroed(nn.Linear(level.width, level.width, bias=False))

    def forward(self, x: Tensor, emb: Tensor, angles: Tensor) -> Tensor:
        q, k, v = self.qkv_proj(self.norm(x, emb)).unflatten(3, (3, self.heads, -1)).permute(3, 0, 4, 1, 2, 5)  # b n h w c/n
        q, k = directed(q, self.scale, angles), directed(k, self.scale, angles)
        h = REACHES[self.level.attention](q, k, v, self.level.reach, self.shifted)
        return x + self.out_proj(self.drop(h.permute(0, 2, 3, 1, 4).flatten(3)))


class Layer(nn.Module):
    """Attention, where the level has any, and a feed-forward layer."""

    def __init__(self, level: Level, head_width: int, emb: int, shifted: bool):
        super().__init__()
        self.self_attn = Attention(level, head_width, emb, shifted) if level.attention != "none" else None
        self.ff = FeedForward(level.width, level.hidden, level.dropout, emb)

    def forward(self, x: Tensor, emb: Tensor, angles: Tensor) -> Tensor:
        if self.self_attn is not None:
            x = self.self_attn(x, emb, angles)
        out: Tensor = self.ff(x, emb)
        return out


class Layers(nn.ModuleList):
    """The layers of a level, the `first` of which on; every second one has its windows shifted."""

    def __init__(self, level: Level, head_width: int, emb: int, recompute: bool, first: int = 0):
        shifts = ((first + i) % 2 == 1 for i in range(level.depth))
        super().__init__(Layer(level, head_width, emb, shifted) for shifted in shifts)
        self.heads, self.head_width, self.recompute = max(1, level.width // head_width), head_width, recompute

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (B, h, w, width) for emb (B, mapping width)."""
        angles, run = rotary(x.shape[1], x.shape[2], self.heads, self.head_width, x.device), recomputing(self.recompute)
        for layer in self:
            x = run(layer, x, emb, angles)
        return x


class Merge(nn.Module):
    """patch x patch tokens as one."""

    def __init__(self, width: int, out_width: int, patch: int = 2):
        super().__init__()
        self.patch, self.proj = patch, nn.Linear(patch**2 * width, out_width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = x.unflatten(2, (-1, self.patch)).unflatten(1, (-1, self.patch))  # b h p w p c
        out: Tensor = self.proj(parts.transpose(2, 3).flatten(3))
        return out


class Split(nn.Module):
    """One token as patch x patch; with `blends`, these and those that were there, by a learned share."""

    def __init__(self, width: int, out_width: int, patch: int = 2, blends: bool = True):
        super().__init__()
        self.patch, self.proj = patch, nn.Linear(width, patch**2 * out_width, bias=False)
        self.fac = nn.Parameter(torch.full([1], 0.5)) if blends else None

    def forward(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        parts = self.proj(x).unflatten(3, (self.patch, self.patch, -1))  # b h w p p c
        h = parts.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # b hp wp c
        return h if self.fac is None or before is None else torch.lerp(before.to(h.dtype), h, self.fac.to(h.dtype))


class Mapping(nn.Module):
    """Gated layers between norms, which make the embedding of what is told (as StyleGAN's, Karras et al. 2019)."""

    def __init__(self, depth: int, width: int, hidden: int, dropout: float):
        super().__init__()
        self.in_norm, self.out_norm = Norm(width), Norm(width)
        self.blocks = nn.ModuleList(FeedForward(width, hidden, dropout) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_norm(x)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.out_norm(x)
        return out


class HDiT(nn.Module):
    """The transformer of `levels`, from the outer to the inner one, on patches of `patch` x `patch` pixels.

    Its time is EDM's, log(sigma) / 4. The frequencies at which it hears that, drawn at first, are learned like other weights
    (k-diffusion leaves them as drawn). ValueError where heads are not of a multiple of 8 channels, or no share of a level's.
    """

    def __init__(
        self, in_channels: int, out_channels: int, levels: Sequence[Level], mapping: Mapping, *, patch: int, head_width: int,
        num_classes: int | None = None, use_checkpoint: bool = False,
    ):  # fmt: skip
        super().__init__()
        attending = [level.width for level in levels if level.attention != "none"]
        if odd := [width for width in attending if head_width % 8 or width % head_width]:
            raise ValueError(f"{odd[0]} channels do not divide into heads of {head_width}: choose a divisor that 8 divides")
        emb = len(mapping.in_norm.scale)
        self.in_channels, self.num_classes, self.mapping = in_channels, num_classes, mapping
        outer, ends = levels[:-1], list(zip(levels[:-1], levels[1:]))
        self.patch_in = Merge(in_channels, levels[0].width, patch)
        self.time_emb, self.time_in_proj = nn.Linear(1, emb // 2, bias=False), nn.Linear(emb, emb)
        nn.init.normal_(self.time_emb.weight)
        self.class_emb = nn.Embedding(num_classes, emb) if num_classes is not None else None
        self.down_levels = nn.ModuleList(Layers(level, head_width, emb, use_checkpoint) for level in outer)
        self.up_levels = nn.ModuleList(Layers(level, head_width, emb, use_checkpoint, level.depth) for level in outer)
        self.mid_level = Layers(levels[-1], head_width, emb, use_checkpoint)
        self.merges = nn.ModuleList(Merge(wide.width, deep.width) for wide, deep in ends)
        self.splits = nn.ModuleList(Split(deep.width, wide.width) for wide, deep in ends)
        self.out_norm = Norm(levels[0].width)
        self.patch_out = Split(levels[0].width, out_channels, patch, blends=False)
        zeroed(self.patch_out.proj)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """The output (B, out_channels, H, W) for x (B, in_channels, H, W) at times t (B,), of classes y (B,)."""
        if (y is None) != (self.class_emb is None):
            raise ValueError("this network has classes: give y" if y is None else "this network has no classes: leave out y")
        angles = 2 * math.pi * t.float()[:, None] * self.time_emb.weight[:, 0]  # not by a product, which may be of bf16
        told = self.time_in_proj(torch.cat([angles.cos(), angles.sin()], dim=1).to(self.time_emb.weight.dtype))
        if self.class_emb is not None:
            told = told + self.class_emb(y)
        emb = self.mapping(told)  # b mapping width
        h = self.patch_in(x.permute(0, 2, 3, 1))  # b h/p w/p width
        before = list[Tensor]()
        for level, merge in zip(self.down_levels, self.merges):
            before.append(level(h, emb))
            h = merge(before[-1])
        h = self.mid_level(h, emb)
        for level, split, kept in zip(reversed(self.up_levels), reversed(self.splits), reversed(before)):
            h = level(split(h, kept), emb)
        out: Tensor = self.patch_out(self.out_norm(h)).permute(0, 3, 1, 2).to(x.dtype)
        return out
