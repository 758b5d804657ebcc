"""The U-Net of denoising-diffusion-pytorch (P. Wang, github.com/lucidrains/denoising-diffusion-pytorch, version 2).

Parts are named as there, so that its weights load as they are. Every level attends: linearly (Shen et al. 2021, Efficient
Attention), or by softmax where `attention` says so, to its pixels and to a few learned tokens. Each pixel's channels are
normalised by themselves, and what the first convolution gives comes back before the last block.
"""

from collections.abc import Collection, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iddpm.nn.layers import conv3x3, recomputing, timestep_embedding


class RMSNorm(nn.Module):
    """The channels of each pixel at a mean square of 1, times a learned gain."""

    def __init__(self, channels: int):
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * (x.shape[1] ** 0.5 * self.g)


class Block(nn.Module):
    """A convolution, the norm, scaled and shifted where that is given, and SiLU."""

    def __init__(self, channels: int, out_channels: int, dropout: float = 0.0):
        super().__init__()
        self.proj, self.norm, self.dropout = conv3x3(channels, out_channels), RMSNorm(out_channels), nn.Dropout(dropout)

    def forward(self, x: Tensor, scale: Tensor | float = 0.0, shift: Tensor | float = 0.0) -> Tensor:
        h: Tensor = self.dropout(F.silu(self.norm(self.proj(x)) * (1 + scale) + shift))
        return h


class ResidualBlock(nn.Module):
    """Two blocks, of which the time modulates the first, beside the input."""

    def __init__(self, channels: int, out_channels: int, emb: int, dropout: float):
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * out_channels))
        self.block1, self.block2 = Block(channels, out_channels, dropout), Block(out_channels, out_channels)
        self.res_conv = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.mlp(emb)[..., None, None].chunk(2, dim=1)  # b c 1 1
        h: Tensor = self.block2(self.block1(x, scale, shift)) + self.res_conv(x)
        return h


class Attention(nn.Module):
    """Softmax attention of the pixels to each other and to learned tokens, added to them."""

    def __init__(self, channels: int, heads: int, head_width: int, tokens: int):
        super().__init__()
        self.heads, inner = heads, heads * head_width
        self.norm = RMSNorm(channels)
        self.mem_kv = nn.Parameter(torch.randn(2, heads, tokens, head_width))
        self.to_qkv = nn.Conv2d(channels, 3 * inner, 1, bias=False)
        self.to_out: nn.Module = nn.Conv2d(inner, channels, 1)

    def learned(self) -> Tensor:
        """Keys and values of the learned tokens (2, heads, c, tokens)."""
        return self.mem_kv.transpose(2, 3)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, heads, c, N) for q of N pixels, and k and v of these and the tokens, the positions last."""
        q, k, v = (z.transpose(2, 3) for z in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(self.norm(x)).flatten(2).unflatten(1, (3, self.heads, -1)).unbind(1)  # b heads c hw
        k, v = (torch.cat([kept.to(z.dtype).expand(x.shape[0], -1, -1, -1), z], dim=3) for kept, z in zip(self.learned(), (k, v)))
        h = self.attend(q, k, v).flatten(1, 2).unflatten(2, x.shape[2:])  # b inner h w
        return x + self.to_out(h)


class LinearAttention(Attention):
    """The same at a cost that grows with the pixels, not with their square: (softmax(k) v) first, then softmax(q) times that."""

    def __init__(self, channels: int, heads: int, head_width: int, tokens: int):
        super().__init__(channels, heads, head_width, tokens)
        self.mem_kv = nn.Parameter(self.mem_kv.data.transpose(2, 3).contiguous())  # kept the other way around
        self.to_out = nn.Sequential(self.to_out, RMSNorm(channels))

    def learned(self) -> Tensor:
        return self.mem_kv

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        context = k.softmax(3) @ v.transpose(2, 3)  # b heads c c'
        return context.transpose(2, 3) @ q.softmax(2) * q.shape[2] ** -0.5


class Level(nn.ModuleList):
    """Two residual blocks, attention, and a change of size."""

    def __init__(self, *layers: nn.Module, recompute: bool):
        super().__init__(layers)
        self.recompute = recompute

    def forward(self, x: Tensor, emb: Tensor, *under: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the first block, attention and the change of size give; `under` is stacked, one by one, under what blocks get."""
        (one, two, attend, resize), run = self, recomputing(self.recompute)
        first = run(one, torch.cat([x, under[0]], dim=1) if under else x, emb)
        attended = attend(run(two, torch.cat([first, under[1]], dim=1) if under else first, emb))
        return first, attended, resize(attended)


class LinearUNet(nn.Module):
    """Levels of two residual blocks and attention; `attention` holds the down-sampling rates of those with softmax."""

    def __init__(
        self,
        in_channels: int,
        num_channels: int,
        out_channels: int,
        attention: Collection[int],
        channel_mult: Sequence[float],
        heads: int = 4,
        head_width: int = 32,
        tokens: int = 4,
        dropout: float = 0.0,
        use_checkpoint: bool = False,
    ):
        super().__init__()
        if num_channels < 4 or num_channels % 2:  # half of them hear sines of the time, half cosines
            raise ValueError(f"num_channels {num_channels} is not an even number from 4 on")
        self.in_channels, self.num_channels, self.use_checkpoint = in_channels, num_channels, use_checkpoint
        emb, widths = 4 * num_channels, [num_channels, *(int(mult * num_channels) for mult in channel_mult)]
        block = partial(ResidualBlock, emb=emb, dropout=dropout)
        how = dict(heads=heads, head_width=head_width, tokens=tokens)
        self.init_conv = nn.Conv2d(in_channels, num_channels, 7, padding=3)
        self.time_mlp = nn.Sequential(nn.Identity(), nn.Linear(num_channels, emb), nn.GELU(), nn.Linear(emb, emb))
        stage, downs, ups = partial(Level, recompute=use_checkpoint), list[nn.Module](), list[nn.Module]()
        for level, (ch, wide) in enumerate(zip(widths, widths[1:])):
            attend = Attention if 2**level in attention else LinearAttention
            halve = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * ch, wide, 1))
            double = nn.Sequential(nn.Upsample(scale_factor=2), conv3x3(wide, ch))
            down = halve if level < len(channel_mult) - 1 else conv3x3(ch, wide)
            downs.append(stage(block(ch, ch), block(ch, ch), attend(ch, **how), down))
            up = double if level else conv3x3(wide, ch)
            ups.append(stage(block(wide + ch, wide), block(wide + ch, wide), attend(wide, **how), up))
        self.downs, self.ups = nn.ModuleList(downs), nn.ModuleList(reversed(ups))
        self.mid_block1, self.mid_block2 = block(widths[-1], widths[-1]), block(widths[-1], widths[-1])
        self.mid_attn = Attention(widths[-1], **how)
        self.final_res_block = block(2 * num_channels, num_channels)
        self.final_conv = nn.Conv2d(num_channels, out_channels, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The output (B, out_channels, H, W) for x (B, in_channels, H, W) at times t (B,)."""
        run, half = recomputing(self.use_checkpoint), self.num_channels // 2
        cosines, sines = timestep_embedding(t, 2 * half, 10_000 ** (half / (half - 1))).chunk(2, dim=1)
        emb = self.time_mlp(torch.cat([sines, cosines], dim=1))  # b 4n
        h = first = self.init_conv(x)  # b n h w
        skips = list[Tensor]()
        for level in self.downs:
            *skipped, h = level(h, emb)
            skips += skipped
        h = run(self.mid_block2, self.mid_attn(run(self.mid_block1, h, emb)), emb)
        for level in self.ups:
            h = level(h, emb, skips.pop(), skips.pop())[2]
        h = run(self.final_res_block, torch.cat([h, first], dim=1), emb)
        out: Tensor = self.final_conv(h).to(x.dtype)
        return out
