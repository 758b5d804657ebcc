"""The U-Net of k-diffusion (K. Crowson, github.com/crowsonkb/k-diffusion: image_v1), for EDM's preconditioning.

Parts are named as there, so that its weights load as they are. A mapping network (as StyleGAN's, Karras et al. 2019) makes of
the time what scales and shifts every norm; sizes change by a smooth filter, before a level and behind it; levels may be of
different depths.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iddpm.nn.layers import attend, conv3x3, recomputing, zeroed
from iddpm.nn.song import smoothed

GROUP, HEAD = 32, 64  # channels of a norm's group, and of a head of attention


def shared(channels: int, size: int) -> int:
    """How many groups of `size` channels, or one; ValueError where these are not alike."""
    if channels % (count := max(1, channels // size)):
        raise ValueError(f"{channels} channels do not divide into {count} groups: take a multiple of {size}")
    return count


class Norm(nn.Module):
    """Group normalisation that the embedding scales and shifts (AdaGN, Dhariwal & Nichol 2021)."""

    def __init__(self, channels: int, emb: int):
        super().__init__()
        self.groups, self.mapper = shared(channels, GROUP), zeroed(nn.Linear(emb, 2 * channels))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.mapper(emb)[..., None, None].chunk(2, dim=1)  # b c 1 1
        return F.group_norm(x, self.groups) * (1 + scale) + shift


class Residual(nn.Module):
    """Two convolutions beside the input."""

    def __init__(self, channels: int, width: int, out_channels: int, emb: int, dropout: float):
        super().__init__()
        first = [Norm(channels, emb), nn.GELU(), conv3x3(channels, width), nn.Dropout2d(dropout)]
        second = [Norm(width, emb), nn.GELU(), zeroed(conv3x3(width, out_channels)), nn.Dropout2d(dropout)]
        self.main = nn.ModuleList([*first, *second])
        self.skip = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = x
        for layer in self.main:
            h = layer(h, emb) if isinstance(layer, Norm) else layer(h)
        out: Tensor = self.skip(x) + h
        return out


class Attention(nn.Module):
    """Self-attention among the pixels, beside the input."""

    def __init__(self, channels: int, emb: int):
        super().__init__()
        self.heads, self.norm_in = shared(channels, HEAD), Norm(channels, emb)
        self.qkv_proj, self.out_proj = nn.Conv2d(channels, 3 * channels, 1), zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        qkv = self.qkv_proj(self.norm_in(x, emb)).flatten(2).transpose(1, 2)  # b hw 3c
        h = attend(qkv, self.heads, heads_first=False).transpose(1, 2)  # b c hw
        return x + self.out_proj(h.unflatten(2, x.shape[2:]))


class Resize(nn.Module):
    """Twice the height and width (1), half of them (-1) or the same (0), by the filter 1, 3, 3, 1 on a mirrored edge."""

    def __init__(self, way: int):
        super().__init__()
        self.way = way

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if not self.way:
            return x
        x = F.pad(x, (1, 1, 1, 1), "reflect")
        if self.way < 0:
            return F.avg_pool2d(smoothed(x, 0), 2)
        return smoothed(F.interpolate(x, scale_factor=2), 0)[..., 1:-1, 1:-1]


class Level(nn.ModuleList):
    """Layers in a row, each of which sees the embedding."""

    def __init__(self, layers: Iterable[nn.Module], recompute: bool):
        super().__init__(layers)
        self.recompute = recompute

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        run = recomputing(self.recompute)
        for layer in self:
            x = run(layer, x, emb)
        return x


class MappedUNet(nn.Module):
    """As many levels as `depths`, the counts of their residual blocks; `attention` holds down-sampling rates, as of `UNet`.

    It works on patches of `patch` x `patch` pixels, `num_channels` wide at both ends. Its time is EDM's, log(sigma) / 4. The
    frequencies at which it hears that, drawn at first, are learned like other weights (k-diffusion leaves them as drawn).
    """

    def __init__(
        self,
        in_channels: int,
        num_channels: int,
        out_channels: int,
        depths: Sequence[int],
        attention: Collection[int],
        channel_mult: Sequence[float],
        mapping_width: int = 256,
        patch: int = 1,
        dropout: float = 0.0,
        use_checkpoint: bool = False,
    ):
        super().__init__()
        if len(depths) != len(channel_mult) or mapping_width % 2:
            raise ValueError(f"{len(depths)} depths for {len(channel_mult)} levels, or an odd --mapping_width")
        self.in_channels, self.patch = in_channels, patch
        self.timestep_embed = nn.Linear(1, mapping_width // 2, bias=False)
        nn.init.normal_(self.timestep_embed.weight)
        layers = [nn.Linear(mapping_width, mapping_width), nn.GELU()]
        self.mapping = nn.Sequential(*layers, nn.Linear(mapping_width, mapping_width), nn.GELU())
        self.proj_in = nn.Conv2d(patch**2 * in_channels, num_channels, 1)
        self.proj_out = zeroed(nn.Conv2d(num_channels, patch**2 * out_channels, 1))

        block, attend = partial(Residual, emb=mapping_width, dropout=dropout), partial(Attention, emb=mapping_width)
        widths = [int(mult * num_channels) for mult in channel_mult]
        downs, ups = list[nn.Module](), list[nn.Module]()
        for level, (before, ch, depth) in enumerate(zip([num_channels, *widths], widths, depths)):
            joined = ch if level == len(widths) - 1 else 2 * ch  # with what came down
            for begins, ends, stages in ((before, ch, downs), (joined, before, ups)):
                inner = list[nn.Module]()
                for i in range(depth):
                    out = ends if i == depth - 1 else ch
                    inner.append(block(ch if i else begins, ch, out))
                    if 2**level in attention:
                        inner.append(attend(out))
                resize = Resize((-1 if stages is downs else 1) * (level > 0))
                stages.append(Level([resize, *inner] if stages is downs else [*inner, resize], use_checkpoint))
        self.d_blocks, self.u_blocks = nn.ModuleList(downs), nn.ModuleList(reversed(ups))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The output (B, out_channels, H, W) for x (B, in_channels, H, W) at times t (B,)."""
        angles = 2 * math.pi * t.float()[:, None] * self.timestep_embed.weight[:, 0]  # not by a product, which may be of bf16
        emb = self.mapping(torch.cat([angles.cos(), angles.sin()], dim=1))  # b mapping_width
        h = self.proj_in(F.pixel_unshuffle(x, self.patch))  # b n h/p w/p
        skips = list[Tensor]()
        for level in self.d_blocks:
            h = level(h, emb)
            skips.append(h)
        skips.pop()
        for k, level in enumerate(self.u_blocks):
            h = level(torch.cat([h, skips.pop()], dim=1) if k else h, emb)
        out: Tensor = F.pixel_shuffle(self.proj_out(h), self.patch).to(x.dtype)
        return out
