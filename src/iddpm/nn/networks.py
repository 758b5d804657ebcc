"""Networks from the settings of a run: what a task asks of one, and a row for each architecture."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from iddpm.nn.classifier import Classifier
from iddpm.nn.unet import SuperResUNet, UNet, attention_rates, channel_mult_for


class Asked(NamedTuple):
    """What a task asks of a network."""

    image_size: tuple[int, int]  # (height, width)
    in_channels: int
    out_channels: int  # or, of logits, the classes
    classes: int | None  # that it is told of each image; None: none
    logits: bool = False  # it tells the class instead of making an image
    small: bool = False  # it is shown a small image
    small_level: bool = False  # and how much noise is on that


SAME = (  # settings that are arguments of the networks, too
    "num_channels", "num_res_blocks", "dropout", "use_checkpoint", "num_heads", "num_head_channels", "use_scale_shift_norm",
    "resblock_updown", "new_attention_order",
)  # fmt: skip


def unet(asked: Asked, settings: Any) -> UNet | Classifier:
    """The U-Net of Nichol & Dhariwal 2021

    `settings` has the fields of `config.Model`. ValueError where sizes and channels do not fit together.
    """
    side = min(asked.image_size)
    mult = _numbers(settings.channel_mult) or channel_mult_for(side)
    if bad := [s for s in asked.image_size if s % 2 ** (len(mult) - 1)]:
        raise ValueError(f"{len(mult)} levels need an image size of multiples of {2 ** (len(mult) - 1)}, not {bad[0]}")
    common: dict[str, Any] = dict(
        in_channels=asked.in_channels,
        out_channels=asked.out_channels,
        attention=attention_rates([int(r) for r in _numbers(settings.attention_resolutions)], side, len(mult)),
        channel_mult=mult,
    )
    common |= {name: getattr(settings, name) for name in SAME}
    if asked.logits:
        if len(set(asked.image_size)) > 1 and settings.classifier_pool == "attention":
            raise ValueError(f"a classifier of images {asked.image_size} needs --classifier_pool adaptive")
        return Classifier(**common, image_size=side, pool=settings.classifier_pool)
    common |= dict(num_classes=asked.classes, num_heads_upsample=settings.num_heads_upsample)
    return SuperResUNet(**common, sees_noise_level=asked.small_level) if asked.small else UNet(**common)


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(",") if part.strip())


NETWORKS: dict[str, Callable[..., nn.Module]] = {"unet": unet}
