"""Networks from the settings of a run: what a task asks of one, and a row for each architecture."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from iddpm.nn.classifier import Classifier
from iddpm.nn.dit import DiT
from iddpm.nn.hdit import HDiT, Level, Mapping
from iddpm.nn.layers import Downsample, GroupNorm
from iddpm.nn.linear_unet import LinearUNet
from iddpm.nn.mapped_unet import MappedUNet
from iddpm.nn.mp_unet import MPUNet
from iddpm.nn.reach import reach
from iddpm.nn.song import SongUNet
from iddpm.nn.unet import GivenUNet, UNet, attention_rates, channel_mult_for


class Asked(NamedTuple):
    """What a task asks of a network."""

    image_size: tuple[int, int]  # (height, width)
    in_channels: int
    out_channels: int  # or, of logits, the classes
    classes: int | None  # that it is told of each image; None: none
    logits: bool = False  # it tells the class instead of making an image
    given: int = 0  # channels of an image that it is given beside x; 0: it is given none
    small_level: bool = False  # and how much noise is on that
    scale: bool = False  # it is told a scale of guidance
    augment: bool = False  # it is told how training changed an image


SAME = (  # settings that are arguments of the networks, too
    "num_channels", "num_res_blocks", "dropout", "use_checkpoint", "num_heads", "num_head_channels", "use_scale_shift_norm",
    "resblock_updown", "new_attention_order",
)  # fmt: skip


def unet(asked: Asked, settings: Any) -> UNet | Classifier:
    """The U-Net of Nichol & Dhariwal 2021

    `settings` has the fields of `config.Model`. ValueError where sizes and channels do not fit together.
    """
    patch = settings.unet_patch
    common = _levels(asked, settings, patch) | {name: getattr(settings, name) for name in SAME}
    if asked.logits:
        if patch > 1:
            raise ValueError("--unet_patch is for networks that make images, not for classifiers")
        side = min(asked.image_size)
        if len(set(asked.image_size)) > 1 and settings.classifier_pool == "attention":
            raise ValueError(f"a classifier of images {asked.image_size} needs --classifier_pool adaptive")
        return Classifier(**common, image_size=side, pool=settings.classifier_pool)
    common |= dict(num_classes=asked.classes, num_heads_upsample=settings.num_heads_upsample, sees_scale=asked.scale, patch=patch)
    if not asked.given:
        return UNet(**common, sees_augment=asked.augment)
    return GivenUNet(**common, given_channels=asked.given, sees_noise_level=asked.small_level)


def _levels(asked: Asked, settings: Any, patch: int = 1) -> dict[str, Any]:
    """The channels at both ends, the levels' widths, the rates of those with attention; ValueError where the sizes do not fit."""
    side = min(asked.image_size) // patch
    mult = _numbers(settings.channel_mult) or channel_mult_for(side)
    _require_fit(asked.image_size, len(mult), patch)
    rates = attention_rates([int(r) for r in _numbers(settings.attention_resolutions)], side, len(mult))
    return dict(in_channels=asked.in_channels, out_channels=asked.out_channels, channel_mult=mult, attention=rates)


def _require_fit(image_size: tuple[int, int], levels: int, patch: int) -> None:
    """ValueError where patches, halved at each level but one, do not fill an image."""
    least = patch * 2 ** (levels - 1)
    if bad := [size for size in image_size if size % least]:
        of = f" of patches of {patch} pixels" if patch > 1 else ""
        raise ValueError(f"{levels} levels{of} need an image size of multiples of {least}, not {bad[0]}")


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(",") if part.strip())


def _require_images(asked: Asked, classes: bool = True) -> None:
    """ValueError where more is asked than images, of a class where the network knows `classes`."""
    faults = {
        "is no classifier": asked.logits,
        "is given no image": asked.given,
        "is told no --trained_guidance": asked.scale,
        "knows no classes": asked.classes is not None and not classes,
    }
    if found := next((fault for fault, there in faults.items() if there), ""):
        raise ValueError(f"this network {found}: take --network unet")


class AfterConv(nn.Conv2d):
    """The strided convolution that halves height and width, with zeros to the right of x and below it alone."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


@dataclass(frozen=True)
class DdpmUnet:
    """The same with the details of Ho et al. 2020's own code, which differ: for weights of diffusers' UNet2DModel"""

    norm_eps: Annotated[float, "added to the variance in group norm", 0.0, 0.1] = 1e-6
    freq_shift: Annotated[int, "the slowest of n frequencies of time is 10000^-1 (1) or 10000^(1/n - 1) (0)", 0, 1] = 1
    pad_after: Annotated[bool, "convolutions that halve the size see zeros to the right and below alone"] = True

    def __call__(self, asked: Asked, settings: Any) -> UNet:
        """`settings` has the fields of `config.Model`. ValueError where sizes do not fit, or for a classifier."""
        if asked.logits:
            raise ValueError("--network unet_ddpm is no classifier: take unet")
        net = unet(asked, settings)
        assert isinstance(net, UNet)
        half = net.num_channels // 2
        net.max_period **= half / (half - self.freq_shift)
        for layer in list(net.modules()):
            if isinstance(layer, GroupNorm):
                layer.eps = self.norm_eps
            elif isinstance(layer, Downsample) and self.pad_after and isinstance(layer.op, nn.Conv2d):
                layer.op = AfterConv(layer.op.in_channels)
        return net


def ddpmpp(asked: Asked, settings: Any, smooth: bool = False) -> SongUNet:
    """DDPM++ of Song et al. 2021, as EDM trained it (Karras et al. 2022): its published weights "vp"

    `settings` has the fields of `config.Model`. ValueError where sizes do not fit, or for a task it has no part for.
    """
    _require_images(asked)
    same = {name: getattr(settings, name) for name in ("num_channels", "num_res_blocks", "dropout", "use_checkpoint")}
    return SongUNet(
        **_levels(asked, settings), **same, num_classes=asked.classes, sees_augment=asked.augment, smooth=smooth
    )  # fmt: skip


def ncsnpp(asked: Asked, settings: Any) -> SongUNet:
    """NCSN++ of Song et al. 2021, as EDM trained it: its published weights "ve"

    As `ddpmpp`.
    """
    return ddpmpp(asked, settings, smooth=True)


@dataclass(frozen=True)
class LinearUnet:
    """The U-Net of denoising-diffusion-pytorch: linear attention at every level, and learned tokens"""

    head_width: Annotated[int, "channels of an attention head, whatever the level's", 1, 65536] = 32
    tokens: Annotated[int, "learned tokens that pixels attend to as to each other", 1, 65536] = 4

    def __call__(self, asked: Asked, settings: Any) -> LinearUNet:
        """`settings` has the fields of `config.Model`. ValueError where sizes do not fit, or for a task it has no part for."""
        _require_images(asked, classes=False)
        same = {name: getattr(settings, name) for name in ("num_channels", "dropout", "use_checkpoint")}
        return LinearUNet(
            **_levels(asked, settings), **same, heads=settings.num_heads, head_width=self.head_width, tokens=self.tokens
        )  # fmt: skip


@dataclass(frozen=True)
class MappedUnet:
    """The U-Net of k-diffusion (image_v1): a mapping network of the time modulates every norm"""

    level_depths: Annotated[str, "blocks of each level, as 2,4,4; empty: --num_res_blocks in each, of hdit 2 and at last 4"] = ""
    mapping_width: Annotated[int, "width of the mapping network", 2, 65536] = 256

    def __call__(self, asked: Asked, settings: Any) -> MappedUNet:
        """`settings` has the fields of `config.Model`. ValueError where sizes do not fit, or for a task it has no part for."""
        _require_images(asked, classes=False)
        common = _levels(asked, settings, settings.unet_patch)
        depths = [int(depth) for depth in _numbers(self.level_depths)] or [settings.num_res_blocks] * len(common["channel_mult"])
        return MappedUNet(
            **common, depths=depths, mapping_width=self.mapping_width, patch=settings.unet_patch,
            num_channels=settings.num_channels, dropout=settings.dropout, use_checkpoint=settings.use_checkpoint,
        )  # fmt: skip


def unet_mp(asked: Asked, settings: Any) -> MPUNet:
    """The U-Net of EDM2 (Karras et al. 2024): every layer, sum and stack keeps the size of what it is given

    `settings` has the fields of `config.Model`. ValueError where sizes do not fit, or for a task it has no part for.
    """
    _require_images(asked)
    same = {name: getattr(settings, name) for name in ("num_channels", "num_res_blocks", "dropout", "use_checkpoint")}
    return MPUNet(**_levels(asked, settings), **same, num_classes=asked.classes)


@dataclass(frozen=True)
class Dit:
    """A transformer on patches: adaLN-Zero, rotary positions, gated layers (Peebles & Xie 2023; Li & He 2025)"""

    patch_size: Annotated[int, "side of a patch in pixels", 1, 256] = 4
    width: Annotated[int, "channels of a token", 8, 65536] = 384
    depth: Annotated[int, "blocks", 1, 1000] = 12
    heads: Annotated[int, "attention heads", 1, 1024] = 6

    def __call__(self, asked: Asked, settings: Any) -> DiT:
        """`settings` has the fields of `config.Model`. ValueError where sizes do not fit, or for a task it has no part for."""
        if asked.logits or asked.small_level:
            raise ValueError(f"--network dit {'is no classifier' if asked.logits else 'has no --low_res_noise'}: take unet")
        return DiT(
            asked.image_size, asked.in_channels, asked.out_channels, patch=self.patch_size, width=self.width, depth=self.depth,
            heads=self.heads, num_classes=asked.classes, given_channels=asked.given, dropout=settings.dropout,
            use_checkpoint=settings.use_checkpoint, sees_scale=asked.scale,
        )  # fmt: skip


@dataclass(frozen=True)
class Hdit:
    """The hourglass transformer of k-diffusion (image_transformer_v2): outer levels attend to neighbours (Crowson et al. 2024)"""

    patch_size: Annotated[int, "side of a patch in pixels", 1, 256] = 4
    level_depths: Annotated[str, "blocks of each level, as 2,4,4; empty: --num_res_blocks in each, of hdit 2 and at last 4"] = ""
    level_attention: Annotated[
        str,
        "what tokens attend to at each level: global, neighborhood:7, window:8 or none; empty: neighborhood:7 where a side has "
        "more than 16 tokens, else global",
    ] = ""
    level_hidden: Annotated[str, "channels inside the feed-forward layers of each level; empty: 3 times its width"] = ""
    level_dropout: Annotated[str, "dropout of each level, as 0,0,0.1; empty: --dropout in each"] = ""
    head_width: Annotated[int, "channels of an attention head, whatever the level's", 1, 65536] = 32
    mapping_width: Annotated[int, "width of the mapping network", 2, 65536] = 256
    mapping_depth: Annotated[int, "its layers", 0, 1000] = 2
    mapping_hidden: Annotated[int, "channels inside them; 0: 3 times its width", 0, 1_000_000] = 0
    mapping_dropout: Annotated[float, "share of features dropped in them in training", 0, 0.999] = 0.0

    def __call__(self, asked: Asked, settings: Any) -> HDiT:
        """`settings` has the fields of `config.Model`. ValueError where sizes do not fit, or for a task it has no part for."""
        _require_images(asked)
        if self.mapping_width % 2:
            raise ValueError(f"--mapping_width {self.mapping_width} is odd: half of it are cosines, half sines")
        hidden = self.mapping_hidden or 3 * self.mapping_width
        return HDiT(
            asked.in_channels, asked.out_channels, self._levels(asked.image_size, settings),
            Mapping(self.mapping_depth, self.mapping_width, hidden, self.mapping_dropout), patch=self.patch_size,
            head_width=self.head_width, num_classes=asked.classes, use_checkpoint=settings.use_checkpoint,
        )  # fmt: skip

    def _levels(self, image_size: tuple[int, int], settings: Any) -> list[Level]:
        """The levels; ValueError where settings of them are not as many, or tokens do not fit."""
        outer, count = [size // self.patch_size for size in image_size], 1
        while (count == 1 or min(outer) >> (count - 1) > 16) and not any(side % 2**count for side in outer):
            count += 1  # usually the innermost has 16 tokens a side or less, and there are two
        mult = _numbers(settings.channel_mult) or [2.0**i for i in range(count)]
        _require_fit(image_size, len(mult), self.patch_size)
        tokens = [[side >> i for side in outer] for i in range(len(mult))]
        widths = [round(ratio * settings.num_channels) for ratio in mult]
        usual = ["neighborhood:7" if min(sides) > 16 else "global" for sides in tokens]
        if self.level_dropout and settings.dropout:
            raise ValueError("--dropout is that of all levels, --level_dropout of each: give one")
        parts = zip(
            widths,
            _each("level_depths", self.level_depths, [2] * (len(mult) - 1) + [4], int, 1, 1000),
            _each("level_hidden", self.level_hidden, [3 * width for width in widths], int, 1, 10**6),
            [reach(text, sides) for text, sides in zip(_each("level_attention", self.level_attention, usual, str), tokens)],
            _each("level_dropout", self.level_dropout, [settings.dropout] * len(mult), float, 0, 0.999),
        )
        return [Level(width, depth, inner, *reaches, dropout) for width, depth, inner, reaches, dropout in parts]


T = TypeVar("T", int, float, str)


def _each(name: str, text: str, usual: list[T], kind: type[T], low: float = 0, high: float = 0) -> list[T]:
    """The values of each level, by default the usual ones; ValueError where they are not as many, or out of range."""
    parts = [part.strip() for part in text.split(",")] if text else []
    try:
        found = [kind(part) for part in parts] or usual
    except ValueError:
        raise ValueError(f"--{name} {text!r}: give a number for each level, as {','.join(map(str, usual))}") from None
    if len(found) != len(usual):
        raise ValueError(f"--{name} {text!r} has {len(found)} values for {len(usual)} levels")
    if bad := [value for value in found if not isinstance(value, str) and not low <= value <= high]:
        raise ValueError(f"--{name} {bad[0]} is out of range: from {low:g} to {high:g}")
    return found


NETWORKS: dict[str, Callable[..., Any]] = {
    "unet": unet,
    "unet_ddpm": DdpmUnet,
    "ddpmpp": ddpmpp,
    "ncsnpp": ncsnpp,
    "unet_linear": LinearUnet,
    "unet_mapped": MappedUnet,
    "unet_mp": unet_mp,
    "dit": Dit,
    "hdit": Hdit,
}
