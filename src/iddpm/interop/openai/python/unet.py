"""The original's networks and layers (and guided-diffusion's): its arguments around `iddpm.nn`, its parameter names."""

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iddpm.interop.openai.python.fp16_util import convert_module_to_f16, convert_module_to_f32
from iddpm.interop.openai.python.nn import avg_pool_nd, checkpoint, conv_nd, linear, normalization, zero_module
from iddpm.nn import Classifier, GivenUNet, UNet, layers

# ---- layers


class TimestepBlock(nn.Module):
    """A module whose forward takes (x, emb)."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        raise NotImplementedError


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """Layers in a row, of which those that want the embedding see it."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, emb) if isinstance(layer, (TimestepBlock, layers.ResBlock, layers.Stage)) else layer(x)
        return x


class Upsample(nn.Module):
    """Twice the size, of the inner two dimensions where there are three, then a convolution where `use_conv`."""

    def __init__(self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None):
        super().__init__()
        self.channels, self.use_conv, self.dims, self.out_channels = channels, use_conv, dims, out_channels or channels
        if use_conv:
            self.conv = conv_nd(dims, channels, self.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self.channels
        x = F.interpolate(x, scale_factor=(1, 2, 2) if self.dims == 3 else 2, mode="nearest")
        return self.conv(x) if self.use_conv else x


class Downsample(nn.Module):
    """Half the size, of the inner two dimensions where there are three, by a strided convolution or by means."""

    def __init__(self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None):
        super().__init__()
        self.channels, self.use_conv, self.dims, self.out_channels = channels, use_conv, dims, out_channels or channels
        stride = (1, 2, 2) if dims == 3 else 2
        if use_conv:
            self.op = conv_nd(dims, channels, self.out_channels, 3, stride=stride, padding=1)
        else:
            assert self.out_channels == channels, "a mean keeps the channels"
            self.op = avg_pool_nd(dims, stride, stride)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self.channels
        return self.op(x)


class ResBlock(layers.ResBlock, TimestepBlock):
    """The residual block, for 1, 2 or 3 dimensions; `up` or `down` change the size of both branches."""

    def __init__(
        self, channels: int, emb_channels: int, dropout: float, out_channels: int | None = None, use_conv: bool = False,
        use_scale_shift_norm: bool = False, dims: int = 2, use_checkpoint: bool = False, up: bool = False, down: bool = False,
    ):  # fmt: skip
        nn.Module.__init__(self)
        out = out_channels or channels
        self.channels, self.emb_channels, self.out_channels, self.use_checkpoint = channels, emb_channels, out, use_checkpoint
        self.scale_shift = use_scale_shift_norm
        self.resize = Upsample(channels, False, dims) if up else Downsample(channels, False, dims) if down else nn.Identity()
        self.in_layers = nn.Sequential(normalization(channels), nn.SiLU(), conv_nd(dims, channels, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), linear(emb_channels, (1 + use_scale_shift_norm) * out))
        last = zero_module(conv_nd(dims, out, out, 3, padding=1))
        self.out_layers = nn.Sequential(normalization(out), nn.SiLU(), nn.Dropout(dropout), last)
        width = dict(kernel_size=3, padding=1) if use_conv else dict(kernel_size=1)
        skip: Any = nn.Identity() if out == channels else conv_nd(dims, channels, out, **width)
        self.skip_connection = skip

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        flat = x.ndim == 4 or self.scale_shift  # ours adds the embedding to images only; scale and shift fit any shape
        return checkpoint(super().forward if flat else self._added, (x, emb), self.parameters(), self.use_checkpoint)

    def _added(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers[2](self.resize(self.in_layers[:2](x)))
        e = self.emb_layers(emb)[(..., *(None,) * (x.ndim - 2))]
        return self.skip_connection(self.resize(x)) + self.out_layers(h + e)


class AttentionBlock(layers.AttentionBlock):
    """Self-attention among the positions of any number of dimensions."""

    def __init__(
        self, channels: int, num_heads: int = 1, use_checkpoint: bool = False, num_head_channels: int = -1,
        use_new_attention_order: bool = False,
    ):  # fmt: skip
        heads = num_heads if num_head_channels == -1 else channels // num_head_channels
        super().__init__(channels, heads, heads_first=not use_new_attention_order)
        self.channels, self.num_heads, self.use_checkpoint = channels, heads, use_checkpoint

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, (x,), self.parameters(), self.use_checkpoint)


def count_flops_attn(model: Any, _x: Any, y: Sequence[Tensor]) -> None:
    """For the package thop: the operations of attention's two products, whose result is y[0] (B, C, T)."""
    model.total_ops += torch.DoubleTensor([2 * y[0].numel() * y[0][0, 0].numel()])


class QKVAttention(nn.Module):
    """Attention of (B, 3C, T) to (B, C, T), the channels q, k, v first and heads within; the original has one head."""

    heads_first = False
    count_flops = staticmethod(count_flops_attn)

    def __init__(self, n_heads: int = 1):
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv: Tensor) -> Tensor:
        return layers.attend(qkv.transpose(1, 2), self.n_heads, heads_first=self.heads_first).transpose(1, 2)


class QKVAttentionLegacy(QKVAttention):
    """The same with the heads first, each with its q, k, v."""

    heads_first = True


class AttentionPool2d(layers.AttentionPool):
    """One vector per image, by attention of its mean."""

    def __init__(self, spacial_dim: int, embed_dim: int, num_heads_channels: int, output_dim: int | None = None):
        super().__init__(spacial_dim, embed_dim, embed_dim // num_heads_channels, output_dim or embed_dim)


# ---- networks


class Exact(nn.Sequential):
    """Layers that are left in the type of their weights where others run in float16."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(next(self.parameters()).dtype))


class _Torso(nn.Module):
    """What every network of the original offers: a torso whose convolutions may be float16."""

    input_blocks: nn.ModuleList
    time_embed: nn.Sequential
    out: nn.Sequential

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self.time_embed, self.out = Exact(*self.time_embed), Exact(*self.out)

    def convert_to_fp16(self) -> None:
        """Make the torso's convolutions float16; what goes in and comes out stays float32."""
        for part in self._torso():
            part.apply(convert_module_to_f16)

    def convert_to_fp32(self) -> None:
        """Undo convert_to_fp16."""
        for part in self._torso():
            part.apply(convert_module_to_f32)

    def _torso(self) -> list[nn.Module]:
        return [part for name, part in self.named_children() if name in ("input_blocks", "middle_block", "output_blocks")]

    @property
    def inner_dtype(self) -> torch.dtype:
        """The type of the torso's convolutions."""
        return next(self.input_blocks.parameters()).dtype

    def _arithmetic(self, x: Tensor) -> AbstractContextManager:
        half = self.inner_dtype == torch.float16
        return torch.autocast(x.device.type, torch.float16) if half else nullcontext()  # the rest of the torso is float32


class UNetModel(_Torso, UNet):
    """The U-Net, with the original's arguments and, after them, guided-diffusion's. ValueError for dims other than 2."""

    def __init__(
        self, in_channels: int, model_channels: int, out_channels: int, num_res_blocks: int,
        attention_resolutions: Collection[int], dropout: float = 0, channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True, dims: int = 2, num_classes: int | None = None, use_checkpoint: bool = False,
        num_heads: int = 1, num_heads_upsample: int = -1, use_scale_shift_norm: bool = False, *,
        image_size: int | None = None, use_fp16: bool = False, num_head_channels: int = -1, resblock_updown: bool = False,
        use_new_attention_order: bool = False,
    ):  # fmt: skip
        _only_images(dims)
        super().__init__(
            in_channels, model_channels, out_channels, num_res_blocks, attention_resolutions, dropout, channel_mult,
            num_classes, use_checkpoint, num_heads, num_heads_upsample, num_head_channels, use_scale_shift_norm,
            resblock_updown, use_new_attention_order, conv_resample,
        )  # fmt: skip
        self.model_channels, self.num_res_blocks, self.dropout = model_channels, num_res_blocks, dropout
        self.attention_resolutions, self.channel_mult, self.conv_resample = attention_resolutions, channel_mult, conv_resample
        self.use_checkpoint, self.num_heads, self.num_head_channels = use_checkpoint, num_heads, num_head_channels
        self.num_heads_upsample = num_heads if num_heads_upsample == -1 else num_heads_upsample
        self.image_size, self.use_fp16 = image_size, use_fp16  # said by guided-diffusion's callers, who convert themselves

    def forward(  # type: ignore[override]
        self, x: Tensor, timesteps: Tensor, y: Tensor | None = None, **cond: Any
    ) -> Tensor:
        """The output for x (B, C, H, W) at timesteps (B,), of classes y (B,) where the network has classes."""
        with self._arithmetic(x):
            return super().forward(x, timesteps, y=y, **cond).to(x.dtype)

    def get_feature_vectors(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> dict[str, Any]:
        """What the stages give: "down" and "up", lists of (B, C, h, w), and "middle"."""
        with self._arithmetic(x):
            emb, (*down, middle) = self.encode(x, timesteps, y)
            up = [middle]
            for stage, skip in zip(self.output_blocks, reversed(down)):
                up.append(stage(up[-1], emb, skip))
        down, (middle, *up) = ([h.to(x.dtype) for h in hs] for hs in (down, up))
        return {"down": down, "middle": middle, "up": up}


class SuperResModel(UNetModel, GivenUNet):
    """The U-Net that also sees a smaller image, `low_res`."""

    def forward(self, x: Tensor, timesteps: Tensor, low_res: Tensor | None = None, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """As UNetModel; low_res (B, C, h, w) is enlarged and stacked under x."""
        assert low_res is not None, "a super-resolution network needs low_res"
        return super().forward(x, timesteps, given=low_res, **kwargs)

    def get_feature_vectors(self, x: Tensor, timesteps: Tensor, low_res: Tensor | None = None, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """As UNetModel's."""
        assert low_res is not None, "a super-resolution network needs low_res"
        return super().get_feature_vectors(layers.stacked(x, low_res), timesteps, **kwargs)


class EncoderUNetModel(_Torso, Classifier):
    """guided-diffusion's classifier of noisy images. ValueError for dims other than 2."""

    def __init__(
        self, image_size: int, in_channels: int, model_channels: int, out_channels: int, num_res_blocks: int,
        attention_resolutions: Collection[int], dropout: float = 0, channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True, dims: int = 2, use_checkpoint: bool = False, use_fp16: bool = False, num_heads: int = 1,
        num_head_channels: int = -1, num_heads_upsample: int = -1, use_scale_shift_norm: bool = False,
        resblock_updown: bool = False, use_new_attention_order: bool = False, pool: str = "adaptive",
    ):  # fmt: skip
        _only_images(dims)
        super().__init__(
            image_size, in_channels, model_channels, out_channels, num_res_blocks, attention_resolutions, dropout,
            channel_mult, use_checkpoint, num_heads, num_head_channels, use_scale_shift_norm, resblock_updown,
            use_new_attention_order, conv_resample, pool,
        )  # fmt: skip
        self.model_channels, self.out_channels, self.pool = model_channels, out_channels, pool

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Logits (B, out_channels)."""
        with self._arithmetic(x):
            return super().forward(x, timesteps).to(x.dtype)


def _only_images(dims: int) -> None:
    if dims != 2:
        raise ValueError(f"dims={dims}: these networks are for images (dims=2); the layers here take 1 and 3 as well")
