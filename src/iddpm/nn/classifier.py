"""The classifier of noisy images (Dhariwal & Nichol 2021): the U-Net's way down, and how it sums an image up."""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from iddpm.nn.layers import AttentionPool, GroupNorm, zeroed
from iddpm.nn.unet import Encoder, Parts


class Sizes(NamedTuple):
    """What a head is made for."""

    channels: int  # of the middle
    all_channels: int  # of the middle and every stage before it
    side: int  # of the middle, in pixels
    heads: int
    out_channels: int


def adaptive(s: Sizes) -> nn.Sequential:
    """The mean of the middle's pixels."""
    conv = zeroed(nn.Conv2d(s.channels, s.out_channels, 1))
    return nn.Sequential(GroupNorm(s.channels), nn.SiLU(), nn.AdaptiveAvgPool2d(1), conv, nn.Flatten())


def attention(s: Sizes) -> nn.Sequential:
    """Attention to the middle's pixels, whose positions are learned: for one image size."""
    pool = AttentionPool(s.side, s.channels, s.heads, s.out_channels)
    return nn.Sequential(GroupNorm(s.channels), nn.SiLU(), pool)


def spatial(s: Sizes) -> nn.Sequential:
    """A small network on the means of every stage."""
    return nn.Sequential(nn.Linear(s.all_channels, 2048), nn.ReLU(), nn.Linear(2048, s.out_channels))


def spatial_v2(s: Sizes) -> nn.Sequential:
    """As spatial, normalised."""
    last = nn.Linear(2048, s.out_channels)
    return nn.Sequential(nn.Linear(s.all_channels, 2048), GroupNorm(2048), nn.SiLU(), last)


POOLS: dict[str, Callable[[Sizes], nn.Sequential]] = {f.__name__: f for f in (adaptive, attention, spatial, spatial_v2)}


class Classifier(Encoder):
    """The classifier of noisy images that guides sampling (Dhariwal & Nichol 2021, section 4 and appendix H).

    Half a U-Net, summed up by one of POOLS. Its defaults, and channel_mult_for, are those of the published ones.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        num_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention: Collection[int],
        dropout: float = 0.0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        use_checkpoint: bool = False,
        num_heads: int = 1,
        num_head_channels: int = 64,
        use_scale_shift_norm: bool = True,
        resblock_updown: bool = True,
        new_attention_order: bool = False,
        conv_resample: bool = True,
        pool: str = "attention",
    ):
        if pool not in POOLS:
            raise ValueError(f"pool {pool!r}: choose from {', '.join(POOLS)}")
        norm, order = use_scale_shift_norm, new_attention_order
        parts = Parts(4 * num_channels, dropout, norm, num_head_channels, order, resblock_updown, conv_resample)
        super().__init__(
            in_channels, num_channels, num_res_blocks, attention, channel_mult, None, num_heads, use_checkpoint, parts
        )
        ch = self.widths[-1]
        sizes = Sizes(ch, sum(self.widths) + ch, image_size // self.multiple, parts.heads(ch, num_heads), out_channels)
        self.out = POOLS[pool](sizes)
        self.sees_all = pool.startswith("spatial")

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Logits (B, out_channels) for x (B, in_channels, H, W) at times t (B,); ValueError where the size does not fit."""
        _, outputs = self.encode(x, t)
        h = torch.cat([h.mean((2, 3)) for h in outputs], dim=1) if self.sees_all else outputs[-1]
        return self.out(h).to(x.dtype)
