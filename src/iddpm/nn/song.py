"""The U-Nets of Song et al. 2021, DDPM++ and NCSN++, as Karras et al. 2022 (EDM, table 1 and appendix C) trained theirs.

Parts are named as in unet.py. What differs: every sum is scaled to the variance of its parts, class and augmentation are told
beside the time, sizes change in residual blocks, attention has one head and on the way up stands once a level. NCSN++ also
smooths as it changes sizes, hears the time at random frequencies, and lets the image in at every level.
"""

import math
from collections.abc import Collection, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iddpm.nn.layers import AttentionBlock, GroupNorm, ResBlock, Stage, conv3x3, timestep_embedding, zeroed
from iddpm.nn.unet import CHANGES

ROOT_HALF = 0.5**0.5  # times a sum of two of equal variance: that variance
SCALE = 16.0  # deviation of NCSN++'s frequencies, in turns per unit of time


def norm(channels: int) -> GroupNorm:
    """In groups of at least 4 channels, at most 32 of them; ValueError where the channels do not divide so."""
    made, groups = GroupNorm(channels), min(32, channels // 4)
    if not groups or channels % groups:
        raise ValueError(f"{channels} channels do not divide into {groups} groups of 4 or more: take a multiple of 32")
    made.num_groups, made.eps = groups, 1e-6
    return made


def smoothed(x: Tensor, padding: int) -> Tensor:
    """Two means of 2 x 2 in a row. With a third one, or with repetition of pixels, the filter 1, 3, 3, 1 of NCSN++."""
    return F.avg_pool2d(F.avg_pool2d(x, 2, 1, padding), 2, 1)


class Smooth(nn.Module):
    """Twice the height and width, or half of them, through the filter."""

    def __init__(self, up: bool):
        super().__init__()
        self.up = up

    def forward(self, x: Tensor) -> Tensor:
        return smoothed(F.interpolate(x, scale_factor=2), 1) if self.up else F.avg_pool2d(smoothed(x, 1), 2)


class Block(ResBlock):
    """A residual block; where it changes the size, a convolution stands beside it, too."""

    def __init__(self, channels: int, out_channels: int, emb: int, dropout: float, resize: nn.Module | None = None):
        super().__init__(channels, out_channels, emb, dropout, use_scale_shift_norm=False, resize=resize)
        self.in_layers[0], self.out_layers[0] = norm(channels), norm(out_channels)
        if resize:
            self.skip_connection = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return ROOT_HALF * super().forward(x, emb)


class Attention(AttentionBlock):
    """Self-attention in one head."""

    def __init__(self, channels: int):
        super().__init__(channels, 1)
        self.norm = norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return ROOT_HALF * super().forward(x)


class SongUNet(nn.Module):
    """DDPM++, or with `smooth` NCSN++.

    `attention` holds down-sampling rates, as of `UNet`; the levels are num_channels times `channel_mult` wide. Its time is
    EDM's, log(sigma) / 4. NCSN++'s frequencies, drawn at first, are learned like other weights (EDM leaves them as drawn).
    """

    def __init__(
        self,
        in_channels: int,
        num_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention: Collection[int],
        channel_mult: Sequence[float],
        dropout: float = 0.0,
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        sees_augment: bool = False,
        smooth: bool = False,
    ):
        super().__init__()
        self.in_channels, self.out_channels, self.num_classes = in_channels, out_channels, num_classes
        self.multiple = 2 ** (len(channel_mult) - 1)  # that height and width must be of
        self.num_channels, emb, width = num_channels, 4 * num_channels, num_channels * (1 + smooth)
        self.freqs = nn.Parameter(SCALE * torch.randn(num_channels)) if smooth else None
        self.time_embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, width)
        if sees_augment:
            self.augment_embed = zeroed(nn.Linear(CHANGES, width, bias=False))

        stage, block = partial(Stage, recompute=use_checkpoint), partial(Block, emb=emb, dropout=dropout)
        down, up = (Smooth(False), Smooth(True)) if smooth else (nn.AvgPool2d(2), nn.Upsample(scale_factor=2))  # without weights
        ch, seen = num_channels, in_channels
        stages, widths, images = [stage(conv3x3(in_channels, ch))], [ch], list[nn.Module]()
        for level, mult in enumerate(channel_mult):
            if level:
                stages.append(stage(block(ch, ch, resize=down)))
                widths.append(ch)
                if smooth:
                    images.append(nn.Conv2d(seen, seen := ch, 3, padding=2))
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [block(ch, ch := int(mult * num_channels))]
                if 2**level in attention:
                    layers.append(Attention(ch))
                stages.append(stage(*layers))
                widths.append(ch)
        self.input_blocks, self.images = nn.ModuleList(stages), nn.ModuleList(images)
        self.middle_block = stage(block(ch, ch), Attention(ch), block(ch, ch))
        stages = []
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(num_res_blocks + 1):
                layers = [block(ch + widths.pop(), ch := int(mult * num_channels))]
                if i == num_res_blocks and 2**level in attention:
                    layers.append(Attention(ch))
                if i == num_res_blocks and level:
                    layers.append(block(ch, ch, resize=up))
                stages.append(stage(*layers))
        self.output_blocks = nn.ModuleList(stages)
        self.out = nn.Sequential(norm(ch), nn.SiLU(), zeroed(conv3x3(ch, out_channels)))

    def embed(self, t: Tensor, y: Tensor | None, augment: Tensor | None) -> Tensor:
        """The embedding (B, 4 num_channels) of times t (B,), classes y (B,) and changes (B, 9)."""
        if (y is None) != (self.num_classes is None):
            raise ValueError("this network has classes: give y" if y is None else "this network has no classes: leave out y")
        if self.freqs is None:
            half = self.num_channels // 2
            cosines, sines = timestep_embedding(t, 2 * half, 10_000 ** (half / (half - 1))).chunk(2, dim=1)
        else:
            angles = 2 * math.pi * t.float()[:, None] * self.freqs.float()
            sines, cosines = angles.sin(), angles.cos()
        emb = torch.cat([sines, cosines], dim=1).to(self.dtype)  # b width
        if y is not None:
            emb = emb + self.label_emb(y)
        if augment is not None:
            emb = emb + self.augment_embed(augment.to(self.dtype))
        out: Tensor = self.time_embed(emb)
        return out

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        """The output (B, out_channels, H, W) for x (B, in_channels, H, W) at times t (B,), of classes y (B,).

        `augment` (B, 9) tells how training changed each image, for a network made with sees_augment; without it none was changed.
        ValueError where H or W cannot be halved at every level, or y is missing or out of place.
        """
        if x.ndim != 4 or x.shape[1] != self.in_channels or x.shape[2] % self.multiple or x.shape[3] % self.multiple:
            fits = f"(B, {self.in_channels}, H, W) with H and W multiples of {self.multiple}"
            raise ValueError(f"this network takes images {fits}, not {tuple(x.shape)}")
        emb = self.embed(t, y, augment)  # b 4n
        h = image = x.to(self.dtype)
        images, skips = iter(self.images), list[Tensor]()
        for stage in self.input_blocks:
            finer, h = h.shape[2], stage(h, emb)  # b c h w
            if h.shape[2] < finer and (seen := next(images, None)):
                h = image = ROOT_HALF * (h + F.avg_pool2d(smoothed(seen(image), 0), 2))
            skips.append(h)
        h = self.middle_block(h, emb)
        for stage in self.output_blocks:
            h = stage(h, emb, skips.pop())
        return self.out(h).to(x.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return next(self.time_embed.parameters()).dtype
