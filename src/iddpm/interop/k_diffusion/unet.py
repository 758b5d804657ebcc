"""k-diffusion's U-Net, image_v1, as `--network unet_mapped`."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec

from iddpm.interop.k_diffusion.kinds import DEFAULTS, Depths, File, Kind, Size, Sizes, Tensors, common

OTHERS = ("mapping_cond_dim", "unet_cond_dim", "cross_cond_dim")  # conditions that are given to it, and of which iddpm knows none


class UNetFile(File, total=False):
    """The settings of an image_v1 that are read."""

    patch_size: Annotated[int, msgspec.Meta(ge=1, le=64)]
    mapping_out: Size
    unet_cond_dim: int
    cross_cond_dim: int
    depths: Depths
    channels: Sizes
    self_attn_depths: Annotated[list[bool], msgspec.Meta(min_length=1, max_length=16)]
    skip_stages: Annotated[int, msgspec.Meta(ge=0, le=15)]
    augment_wrapper: bool
    dropout_rate: float


def faults(model: Any) -> Iterator[str]:
    """What ours has not; lists that do not go together."""
    yield from (f"{name} {model[name]}" for name in OTHERS if model[name])
    lists = [model[name] for name in ("depths", "channels", "self_attn_depths")]
    if len({len(part) for part in lists}) > 1 or model["skip_stages"] >= len(lists[0]):
        yield "depths, channels and self_attn_depths that are not as long, or not as skip_stages has it"


def settings(model: Any) -> dict[str, Any]:
    """The fields of the run: levels that skip_stages leaves out have no part in it, but for the width of the ends."""
    patch, skip = model["patch_size"], model["skip_stages"]
    ends = model["channels"][max(0, skip - 1)]
    side = min(model["input_size"]) // patch
    attends = [level for level, there in enumerate(model["self_attn_depths"][skip:]) if there]
    return common(model) | dict(
        network="unet_mapped",
        num_channels=ends,
        channel_mult=",".join(f"{ch / ends:.17g}" for ch in model["channels"][skip:]),
        level_depths=",".join(map(str, model["depths"][skip:])),
        attention_resolutions=",".join(str(side // 2**level) for level in attends),
        mapping_width=model["mapping_out"],
        unet_patch=patch,
        dropout=float(model["dropout_rate"]),
    )  # fmt: skip


LEFT_OUT = re.compile(r"mapping_cond\.weight$|(.*\.)?kernel$")  # told zeros where no image was changed; the filter
BLOCK = re.compile(r"u_net\.(d|u)_blocks\.(\d{1,3})\.(.*)")


def weights(kept: Tensors, model: Any, path: Path) -> Tensors:
    """The weights of the levels that are used, by our names."""
    levels, skip, found = len(model["depths"]), model["skip_stages"], Tensors()
    for name, t in kept.items():
        if LEFT_OUT.match(name):
            continue
        if block := BLOCK.match(name):
            way, number, rest = block[1], int(block[2]), block[3]
            if not skip <= (number if way == "d" else levels - 1 - number) < levels:
                continue
            name = f"{way}_blocks.{number - skip * (way == 'd')}.{rest}"
        found[name] = t[:-1] if model["has_variance"] and name.startswith("proj_out.") else t
    return found


def left(model: Any) -> dict[str, bool]:
    return {
        "changed images (augment_wrapper)": model["augment_wrapper"],
        "its own error (has_variance)": model["has_variance"],
    }


UNET = Kind(
    "unet_mapped", UNetFile,
    {**DEFAULTS, **UNetFile(patch_size=1, unet_cond_dim=0, cross_cond_dim=0, skip_stages=0, augment_wrapper=True,
                            dropout_rate=0.0)},
    faults, settings, weights, left,
)  # fmt: skip
