"""The U-Net of EDM2 (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", figure 21).

Every layer keeps the root mean square of what it is given: weights count by their direction alone, sums and stacks are scaled, no
norm nor bias is learned. `hold` keeps the weights at that size in training, so that a rate means the same in every layer and at
every step. Equations are of the paper's appendix B. u(sigma), a network of its loss alone, is left out.
"""

import math
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iddpm.nn.layers import attend, recomputing
from iddpm.nn.mapped_unet import shared

EPS = 1e-4  # added to a root mean square
HEAD = 64  # channels of a head of attention
BALANCE = 0.3  # share of what a block adds to its input, by convolution or by attention; class, skip: 0.5
MOST = 256.0  # largest output of a block, far from fp16's largest number


def unit(x: Tensor, *dims: int) -> Tensor:
    """x with a root mean square of 1 along `dims`."""
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.float32)
    return x / (norm / math.prod(x.shape[d] for d in dims) ** 0.5 + EPS).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU over the root mean square that it has of normal numbers (eq. 81)."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, share: float = 0.5) -> Tensor:
    """a and a `share` of b (eq. 88)."""
    return ((1 - share) * a + share * b) / math.hypot(1 - share, share)


def mp_cat(a: Tensor, b: Tensor) -> Tensor:
    """b's channels under a's, each as loud as the other however many they are (eq. 103)."""
    both = ((a.shape[1] + b.shape[1]) / 2) ** 0.5
    return torch.cat([a * (both / a.shape[1] ** 0.5), b * (both / b.shape[1] ** 0.5)], dim=1)


class MPConv(nn.Conv2d):
    """A convolution by kernels of unit norm, times `gain` (eq. 47)."""

    over = (1, 2, 3)  # dimensions along which the weight is of unit size

    def __init__(self, channels: int, out_channels: int, side: int):
        super().__init__(channels, out_channels, side, padding=side // 2, bias=False)
        nn.init.normal_(self.weight)

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        w = unit(self.weight.float(), *self.over) * (gain / self.weight[0].numel() ** 0.5)
        return F.conv2d(x, w.to(x.dtype), padding=self.padding)


class MPLinear(nn.Linear):
    """A linear map likewise."""

    over = (1,)

    def __init__(self, width: int, out_width: int):
        super().__init__(width, out_width, bias=False)
        nn.init.normal_(self.weight)

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        w = unit(self.weight.float(), *self.over) * (gain / self.in_features**0.5)
        return F.linear(x, w.to(x.dtype))


class MPEmbedding(nn.Embedding):
    """A row for each class, of which every channel has unit size over the classes: EDM2's linear map of one-hot labels."""

    over = (0,)

    def forward(self, y: Tensor) -> Tensor:
        return F.embedding(y, unit(self.weight.float(), *self.over))


@torch.no_grad()
def hold(net: nn.Module) -> None:
    """Bring weights of these layers back to unit size, which changes nothing but what the next step does to them (eq. 66)."""
    for layer in net.modules():
        if isinstance(layer, MPConv | MPLinear | MPEmbedding):
            layer.weight.copy_(unit(layer.weight, *layer.over))


class MPFourier(nn.Module):
    """Cosines of numbers (B,) at `width` random frequencies and phases, which stay as they were drawn (eq. 75)."""

    def __init__(self, width: int):
        super().__init__()
        self.freqs = nn.Parameter(2 * math.pi * torch.randn(width), requires_grad=False)  # kept, as parameters are, with a run
        self.phases = nn.Parameter(2 * math.pi * torch.rand(width), requires_grad=False)

    def forward(self, t: Tensor) -> Tensor:
        return 2**0.5 * (t.float()[:, None] * self.freqs.float() + self.phases.float()).cos()  # b width


class Block(nn.Module):
    """A residual block, then attention in heads of 64 channels, if any; on the way down the input is normalised at each pixel."""

    def __init__(
        self, channels: int, out_channels: int, emb: int, dropout: float, down: bool, resize: nn.Module | None = None,
        attends: bool = False, joined: int = 0,
    ):  # fmt: skip
        super().__init__()
        self.out_channels, self.joined = out_channels, joined
        self.down, self.resize = down, resize or nn.Identity()
        self.conv_skip = nn.Identity() if channels + joined == out_channels else MPConv(channels + joined, out_channels, 1)
        self.conv_res0 = MPConv(out_channels if down else channels + joined, out_channels, 3)
        self.emb_linear, self.emb_gain = MPLinear(emb, out_channels), nn.Parameter(torch.zeros(1))
        self.dropout, self.conv_res1 = nn.Dropout(dropout), MPConv(out_channels, out_channels, 3)
        self.heads = shared(out_channels, HEAD) if attends else 0
        if attends:
            self.qkv, self.proj = MPConv(out_channels, 3 * out_channels, 1), MPConv(out_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), with the `joined` channels of `skip` under it where it has any; emb (B, E)."""
        x = self.resize(x if skip is None else mp_cat(x, skip))
        if self.down:
            x = unit(self.conv_skip(x), 1)
        scale = self.emb_linear(emb, self.emb_gain) + 1  # b c
        y = mp_silu(self.conv_res0(mp_silu(x)) * scale[..., None, None].to(x.dtype))
        y = self.conv_res1(self.dropout(y))
        x = mp_sum(x if self.down else self.conv_skip(x), y, BALANCE)
        if self.heads:
            x = mp_sum(x, self.proj(self.attended(x)), BALANCE)
        return x.clamp(-MOST, MOST)

    def attended(self, x: Tensor) -> Tensor:
        """Attention among the pixels, whose queries, keys and values are of unit size: of which only directions count."""
        qkv = unit(self.qkv(x).unflatten(1, (3 * self.heads, -1)), 2)  # b 3heads c h w
        h = attend(qkv.flatten(1, 2).flatten(2).transpose(1, 2), self.heads, heads_first=True)  # b hw c
        return h.transpose(1, 2).reshape(x.shape)


class MPUNet(nn.Module):
    """`attention` holds down-sampling rates, as of `UNet`; the levels are num_channels times `channel_mult` wide.

    The blocks in the middle are the first two on the way up. Its time is EDM's, log(sigma) / 4. A channel of ones beside the
    image stands for biases.
    """

    def __init__(
        self, in_channels: int, num_channels: int, out_channels: int, num_res_blocks: int, attention: Collection[int],
        channel_mult: Sequence[float], dropout: float = 0.0, num_classes: int | None = None, use_checkpoint: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.num_classes, self.recompute = num_classes, use_checkpoint
        widths = [int(mult * num_channels) for mult in channel_mult]
        emb = max(widths)
        self.emb_fourier, self.emb_noise = MPFourier(widths[0]), MPLinear(widths[0], emb)
        if num_classes is not None:
            self.label_emb = MPEmbedding(num_classes, emb)

        block, ch = partial(Block, emb=emb, dropout=dropout), widths[0]
        downs: list[Any] = [MPConv(in_channels + 1, ch, 3)]
        for level, wide in enumerate(widths):
            if level:
                downs.append(block(ch, ch, down=True, resize=nn.AvgPool2d(2)))
            for _ in range(num_res_blocks):
                downs.append(block(ch, ch := wide, down=True, attends=2**level in attention))
        skips = [layer.out_channels for layer in downs]
        ups = [block(ch, ch, down=False, attends=True), block(ch, ch, down=False)]
        for level, wide in reversed(list(enumerate(widths))):
            if level < len(widths) - 1:
                ups.append(block(ch, ch, down=False, resize=nn.Upsample(scale_factor=2)))
            for _ in range(num_res_blocks + 1):
                ups.append(block(ch, ch := wide, down=False, attends=2**level in attention, joined=skips.pop()))
        self.enc, self.dec = nn.ModuleList(downs), nn.ModuleList(ups)
        self.out, self.out_gain = MPConv(ch, out_channels, 3), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """The output (B, out_channels, H, W) for x (B, in_channels, H, W) at times t (B,), of classes y (B,).

        ValueError where y is missing or out of place.
        """
        if (y is None) != (self.num_classes is None):
            raise ValueError("this network has classes: give y" if y is None else "this network has no classes: leave out y")
        emb = self.emb_noise(self.emb_fourier(t))  # b e
        emb = mp_silu(emb if y is None else mp_sum(emb, self.label_emb(y)))
        (first, *downs), run = self.enc, recomputing(self.recompute)
        skips = [first(torch.cat([x, torch.ones_like(x[:, :1])], dim=1))]  # b c h w
        for block in downs:
            skips.append(run(block, skips[-1], emb))
        h = skips[-1]
        for block in self.dec:
            h = run(block, h, emb, *([skips.pop()] if block.joined else []))
        out: Tensor = self.out(h, self.out_gain)
        return out.to(x.dtype)
