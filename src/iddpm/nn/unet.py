"""The U-Net of Nichol & Dhariwal 2021, with the later options of Dhariwal & Nichol 2021.

Parameter names, shapes and their order are the published ones; tests/nn holds every published checkpoint against them.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iddpm.nn.layers import (
    AttentionBlock,
    Downsample,
    GroupNorm,
    ResBlock,
    Stage,
    Upsample,
    conv3x3,
    scale_embedding,
    stacked,
    timestep_embedding,
    zeroed,
)

# ---- sizes


CHANNEL_MULT: dict[int, tuple[float, ...]] = {  # 32, 64, 256: Nichol & Dhariwal 2021; 128, 512: Dhariwal & Nichol 2021
    8: (1, 2),
    16: (1, 2, 2),
    32: (1, 2, 2, 2),
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (0.5, 1, 1, 2, 2, 4, 4),
}


def power_of_two_below(side: int) -> int:
    return 1 << (side.bit_length() - 1)


def channel_mult_for(side: int) -> tuple[float, ...]:
    """The usual width of each level, in units of num_channels, for images whose shorter side is `side` pixels.

    Tabulated for powers of two. Another side takes the entry of the power of two below it, cut where halving it leaves
    a fraction. Past 512, each doubling puts a further level, as wide as the first, in front.
    """
    size = power_of_two_below(side)
    mult = CHANNEL_MULT[min(max(size, min(CHANNEL_MULT)), max(CHANNEL_MULT))]
    mult = mult[:1] * (size.bit_length() - max(CHANNEL_MULT).bit_length()) + mult  # a negative count adds nothing
    return mult[: (side & -side).bit_length()]  # 2 divides side one time fewer than that


def attention_rates(resolutions: Sequence[int], side: int, levels: int) -> tuple[int, ...]:
    """The down-sampling rates of the levels whose shorter side has one of `resolutions` pixels; `side` is the image's.

    For a side that is no power of two, 16 also means the level that has 16 at the power of two below (24 of 48). What is
    larger than the image or smaller than the deepest level is left out, so 16,8 suits any size; ValueError for the rest.
    """
    rates = [2**level for level in range(levels)]
    names = {s // rate: rate for s in (power_of_two_below(side), side) for rate in rates if s % rate == 0}
    for r in resolutions:
        if r not in names and side / rates[-1] <= r <= side:
            occurring = ", ".join(f"{side / rate:g}" for rate in rates)
            raise ValueError(f"attention at {r} pixels: no level has that size; with side {side} there are {occurring}")
    return tuple(sorted({names[r] for r in resolutions if r in names}))


# ---- networks

CHANGES = 9  # numbers that tell how an image was changed, as data/augment.py makes them


@dataclass(frozen=True)
class Parts:
    """Makes the layers of a network, which differ only in their channels."""

    emb_channels: int
    dropout: float
    use_scale_shift_norm: bool
    num_head_channels: int  # -1: a number of heads is given instead
    new_attention_order: bool
    resblock_updown: bool
    conv_resample: bool

    def block(self, ch: int, out: int, resize: nn.Module | None = None) -> ResBlock:
        return ResBlock(ch, out, self.emb_channels, self.dropout, self.use_scale_shift_norm, resize)

    def heads(self, ch: int, num_heads: int) -> int:
        if self.num_head_channels == -1:
            return num_heads
        if ch % self.num_head_channels:
            raise ValueError(f"{ch} channels do not divide into heads of {self.num_head_channels} channels")
        return ch // self.num_head_channels

    def attend(self, ch: int, num_heads: int) -> AttentionBlock:
        return AttentionBlock(ch, self.heads(ch, num_heads), heads_first=not self.new_attention_order)

    def down(self, ch: int) -> nn.Module:
        return self.block(ch, ch, Downsample(ch, False)) if self.resblock_updown else Downsample(ch, self.conv_resample)

    def up(self, ch: int) -> nn.Module:
        return self.block(ch, ch, Upsample(ch, False)) if self.resblock_updown else Upsample(ch, self.conv_resample)


class Encoder(nn.Module):
    """What the U-Net and the classifier share: the embedding of time and class, and the way down to the middle."""

    def __init__(
        self,
        in_channels: int,
        num_channels: int,
        num_res_blocks: int,
        attention: Collection[int],
        channel_mult: Sequence[float],
        num_classes: int | None,
        num_heads: int,
        use_checkpoint: bool,
        parts: Parts,
        given_channels: int = 0,
    ):
        super().__init__()
        self.in_channels, self.num_channels, self.num_classes = in_channels, num_channels, num_classes
        self.given_channels = given_channels  # of an image that is stacked under x
        self.multiple = 2 ** (len(channel_mult) - 1)  # that height and width must be of
        self.max_period = 10_000.0  # of the embedding of time
        emb = parts.emb_channels
        self.time_embed = nn.Sequential(nn.Linear(num_channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, emb)

        stage = partial(Stage, recompute=use_checkpoint)
        ch = int(channel_mult[0] * num_channels)
        stages, self.widths = [stage(conv3x3(in_channels + given_channels, ch))], [ch]  # widths: each stage's output channels
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [parts.block(ch, ch := int(mult * num_channels))]
                if 2**level in attention:
                    layers.append(parts.attend(ch, num_heads))
                stages.append(stage(*layers))
                self.widths.append(ch)
            if 2**level < self.multiple:
                stages.append(stage(parts.down(ch)))
                self.widths.append(ch)
        self.input_blocks = nn.ModuleList(stages)
        self.middle_block = stage(parts.block(ch, ch), parts.attend(ch, num_heads), parts.block(ch, ch))

    def embed(self, t: Tensor, y: Tensor | None, batch: int) -> Tensor:
        """The embedding (B, 4 num_channels) of times t (B,) and classes y (B,)."""
        if (y is None) != (self.num_classes is None):
            raise ValueError("this network has classes: give y" if y is None else "this network has no classes: leave out y")
        for name, numbers in (("t", t), ("y", y)):
            if numbers is not None and numbers.shape != (batch,):
                raise ValueError(f"{name} must hold one number per image, ({batch},), not {tuple(numbers.shape)}")
        emb: Tensor = self.time_embed(timestep_embedding(t, self.num_channels, self.max_period).to(self.dtype))  # b 4n
        return emb if y is None else emb + self.label_emb(y)

    def encode(self, x: Tensor, t: Tensor, y: Tensor | None = None, extra: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """The embedding, and what each input stage makes of x (B, C, H, W), with, last, what the middle makes of that.

        `extra` (B, 4 num_channels) is added to the embedding.
        """
        channels = self.in_channels + self.given_channels
        if x.ndim != 4 or x.shape[1] != channels or x.shape[2] % self.multiple or x.shape[3] % self.multiple:
            fits = f"(B, {channels}, H, W) with H and W multiples of {self.multiple}"
            raise ValueError(f"this network takes images {fits}, not {tuple(x.shape)}")
        emb = self.embed(t, y, x.shape[0])  # b 4n; len(x) would tie an exported graph to this batch
        emb = emb if extra is None else emb + extra
        outputs = [x.to(self.dtype)]
        for stage in (*self.input_blocks, self.middle_block):
            outputs.append(stage(outputs[-1], emb))  # b c h w
        return emb, outputs[1:]

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return next(self.time_embed.parameters()).dtype


class UNet(Encoder):
    """The U-Net (Nichol & Dhariwal 2021, section 3 and appendix A; Ho et al. 2020, appendix B).

    `attention` holds down-sampling rates: with 4 in it, the level of a quarter of the image's size has attention. The levels
    are num_channels times `channel_mult` wide. `num_head_channels` other than -1 replaces `num_heads`. With `patch`, each square
    of so many pixels a side comes in, and goes out, as one of more channels (Luhman & Luhman 2022): 2 is four times as fast.
    ValueError where the channels do not divide among the heads.
    """

    def __init__(
        self,
        in_channels: int,
        num_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention: Collection[int],
        dropout: float = 0.0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        num_heads: int = 1,
        num_heads_upsample: int = -1,
        num_head_channels: int = -1,
        use_scale_shift_norm: bool = True,
        resblock_updown: bool = False,
        new_attention_order: bool = False,
        conv_resample: bool = True,
        given_channels: int = 0,
        sees_scale: bool = False,
        patch: int = 1,
        sees_augment: bool = False,
    ):
        norm, order = use_scale_shift_norm, new_attention_order
        parts = Parts(4 * num_channels, dropout, norm, num_head_channels, order, resblock_updown, conv_resample)
        super().__init__(
            in_channels * patch**2, num_channels, num_res_blocks, attention, channel_mult, num_classes, num_heads, use_checkpoint,
            parts, given_channels * patch**2,
        )  # fmt: skip
        self.out_channels, self.patch = out_channels, patch

        stages, skips, ch = [], self.widths.copy(), self.widths[-1]
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(num_res_blocks + 1):
                layers: list[nn.Module] = [parts.block(ch + skips.pop(), ch := int(mult * num_channels))]
                if 2**level in attention:
                    layers.append(parts.attend(ch, num_heads if num_heads_upsample == -1 else num_heads_upsample))
                if level and i == num_res_blocks:
                    layers.append(parts.up(ch))
                stages.append(Stage(*layers, recompute=use_checkpoint))
        self.output_blocks = nn.ModuleList(stages)
        self.out = nn.Sequential(GroupNorm(ch), nn.SiLU(), zeroed(conv3x3(ch, out_channels * patch**2)))
        self.sees_scale = sees_scale
        if sees_scale:
            emb = 4 * num_channels
            self.scale_embed = nn.Sequential(nn.Linear(num_channels, emb), nn.SiLU(), zeroed(nn.Linear(emb, emb)))
        if sees_augment:
            self.augment_embed = zeroed(nn.Linear(CHANGES, 4 * num_channels, bias=False))

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, extra: Tensor | None = None, scale: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The output (B, out_channels, H, W) for x (B, in_channels, H, W) at times t (B,), as trained on, of classes y (B,).

        `scale` (B,) is that of guidance, for a network that sees it; without one it is 1. `augment` (B, 9) tells how training
        changed each image, for a network made with sees_augment; without it none was changed.
        ValueError where H or W cannot be halved at every level, or y or scale is missing or out of place.
        """
        if self.sees_scale:
            seen = self.scale_embed(scale_embedding(scale, t, self.num_channels).to(self.dtype))  # b 4n
            extra = seen if extra is None else extra + seen
        elif scale is not None:
            raise ValueError("scale is for networks made with sees_scale")
        if augment is not None:
            changed = self.augment_embed(augment.to(self.dtype))  # b 4n
            extra = changed if extra is None else extra + changed
        emb, (*skips, h) = self.encode(self._patches(x), t, y, extra)
        for stage in self.output_blocks:
            h = stage(h, emb, skips.pop())  # b c h w
        out = self.out(h)
        return (out if self.patch == 1 else F.pixel_shuffle(out, self.patch)).to(x.dtype)

    def _patches(self, x: Tensor) -> Tensor:
        """Each patch of x (B, C, H, W) as one pixel, of C patch^2 channels."""
        if self.patch == 1:
            return x
        if x.ndim != 4 or x.shape[2] % self.patch or x.shape[3] % self.patch:
            raise ValueError(f"this network takes images of patches of {self.patch} pixels, not {tuple(x.shape)}")
        return F.pixel_unshuffle(x, self.patch)


class GivenUNet(UNet):
    """The U-Net that is also given an image: the small one to enlarge, or another one of any number of channels.

    Stacked under x (Nichol & Dhariwal 2021; Saharia et al. 2021, SR3; Saharia et al. 2022, Palette). `given_channels` -1: as many
    as x has. The published upsampler to 512 pixels is as wide as that to 256: channel_mult_for(256).
    """

    def __init__(self, in_channels: int, *args: Any, given_channels: int = -1, sees_noise_level: bool = False, **settings: Any):
        settings["given_channels"] = in_channels if given_channels == -1 else given_channels
        super().__init__(in_channels, *args, **settings)
        if sees_noise_level:  # the published ones do not
            emb = 4 * self.num_channels
            self.level_embed = nn.Sequential(nn.Linear(self.num_channels, emb), nn.SiLU(), zeroed(nn.Linear(emb, emb)))
        self.sees_noise_level = sees_noise_level

    def forward(  # type: ignore[override]
        self, x: Tensor, t: Tensor, given: Tensor, y: Tensor | None = None, low_res_level: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As UNet; `given` (B, given_channels, h, w) of any size is scaled bilinearly to x's and stacked under it.

        `low_res_level` (B,) in [0, 1] is the deviation of the noise that was put on it, for a network that sees it.
        """
        if (low_res_level is None) == self.sees_noise_level:
            raise ValueError("low_res_level is for networks made with sees_noise_level, and these need it")
        extra = None
        if low_res_level is not None:
            extra = self.level_embed(timestep_embedding(1000 * low_res_level, self.num_channels).to(self.dtype))  # b 4n
        return super().forward(stacked(x, given), t, y, extra, scale)
