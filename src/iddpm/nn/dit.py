"""A diffusion transformer: patches as tokens, each block modulated by time and class (Peebles & Xie 2023, DiT).

With what has since proved itself: RMS norms, also of queries and keys (Esser et al. 2024), rotary positions in two dimensions
(Su et al. 2021), gated feed-forward layers (Shazeer 2020), as in Li & He 2025 (JiT).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iddpm.nn.layers import recomputing, scale_embedding, stacked, timestep_embedding, zeroed

FREQUENCIES = 256  # of the time's embedding


def rotary(rows: int, columns: int, width: int) -> Tensor:
    """Angles (rows x columns, width / 2): half of a head's pairs of channels turn with the row, half with the column."""
    freqs = 100.0 ** (-torch.arange(width // 4, dtype=torch.float32) / (width // 4))  # images have few tokens a side
    y, x = (torch.arange(n, dtype=torch.float32)[:, None] * freqs for n in (rows, columns))
    return torch.cat([y[:, None].expand(-1, columns, -1), x[None].expand(rows, -1, -1)], dim=2).flatten(0, 1)


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """x (B, heads, T, width) with each pair of channels k, k + width/2 turned by its angle (T, width / 2)."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=3)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=3)


class Block(nn.Module):
    """Attention and a gated feed-forward layer, each scaled, shifted and gated by the embedding; the identity at first."""

    def __init__(self, width: int, heads: int, dropout: float, recompute: bool):
        super().__init__()
        self.heads, self.recompute = heads, recompute
        hidden = -(-width * 8 // 3 // 32) * 32  # as many weights as a plain layer of 4 widths has
        self.modulation = nn.Sequential(nn.SiLU(), zeroed(nn.Linear(width, 6 * width)))
        self.norm1, self.norm2 = (nn.RMSNorm(width, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.q_norm, self.k_norm = (nn.RMSNorm(width // heads, eps=1e-6) for _ in range(2))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down, self.drop = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width), nn.Dropout(dropout)

    def forward(self, x: Tensor, emb: Tensor, angles: Tensor) -> Tensor:
        """x (B, T, width) for emb (B, width)."""
        out: Tensor = recomputing(self.recompute)(self.run, x, emb, angles)
        return out

    def run(self, x: Tensor, emb: Tensor, angles: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(emb)[:, None].chunk(6, dim=2)  # b 1 width
        q, k, v = self.qkv(self.norm1(x) * (1 + scale1) + shift1).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = turned(self.q_norm(q), angles), turned(self.k_norm(k), angles)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate1 * self.proj(h)
        gate, value = self.up(self.norm2(x) * (1 + scale2) + shift2).chunk(2, dim=2)
        return x + gate2 * self.down(self.drop(F.silu(gate) * value))


class DiT(nn.Module):
    """The transformer on patches of `patch` x `patch` pixels.

    ValueError where the image does not divide into patches, or the width into heads of a multiple of 4 channels.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        in_channels: int,
        out_channels: int,
        *,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        num_classes: int | None = None,
        given_channels: int = 0,  # of an image that is given beside x
        dropout: float = 0.0,
        use_checkpoint: bool = False,
        sees_scale: bool = False,
    ):
        super().__init__()
        if bad := [side for side in image_size if side % patch]:
            raise ValueError(f"patches of {patch} pixels do not fill {bad[0]}: choose a divisor for --patch_size")
        if width % (4 * heads):
            raise ValueError(f"a width of {width} does not divide into {heads} heads of a multiple of 4 channels")
        self.in_channels, self.out_channels, self.num_classes, self.patch = in_channels, out_channels, num_classes, patch
        self.heads, self.width = heads, width
        self.embed_patches = nn.Conv2d(in_channels + given_channels, width, patch, stride=patch)
        self.time_embed = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, width)
        self.sees_scale = sees_scale
        if sees_scale:
            self.scale_embed = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), zeroed(nn.Linear(width, width)))
        self.blocks = nn.ModuleList(Block(width, heads, dropout, use_checkpoint) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), zeroed(nn.Linear(width, 2 * width)))
        self.out = zeroed(nn.Linear(width, patch**2 * out_channels))

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, given: Tensor | None = None, scale: Tensor | None = None
    ) -> Tensor:
        """The output (B, out_channels, H, W) for x (B, in_channels, H, W) at times t (B,), of classes y (B,).

        `given` (B, given_channels, h, w) of any size is scaled bilinearly to x's and stacked under it; `scale` (B,) is that of
        guidance, for a network that sees it, without one 1.
        """
        if (y is None) != (self.num_classes is None):
            raise ValueError("this network has classes: give y" if y is None else "this network has no classes: leave out y")
        h = x if given is None else stacked(x, given)
        emb = self.time_embed(timestep_embedding(t, FREQUENCIES).to(self.out.weight.dtype))  # b width
        if y is not None:
            emb = emb + self.label_emb(y)
        if self.sees_scale:
            emb = emb + self.scale_embed(scale_embedding(scale, t, FREQUENCIES).to(emb.dtype))
        elif scale is not None:
            raise ValueError("scale is for networks made with sees_scale")
        tokens = self.embed_patches(h)  # b width rows columns
        rows, columns = tokens.shape[2:]
        angles = rotary(rows, columns, self.width // self.heads).to(x.device)
        h = tokens.flatten(2).transpose(1, 2)  # b t width
        for block in self.blocks:
            h = block(h, emb, angles)
        shift, scale = self.modulation(emb)[:, None].chunk(2, dim=2)
        patches = self.out(self.norm(h) * (1 + scale) + shift)  # b t p p c
        patches = patches.reshape(x.shape[0], rows, columns, self.patch, self.patch, self.out_channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], self.out_channels, *x.shape[2:]).to(x.dtype)
