"""k-diffusion's transformer, image_transformer_v2 (Crowson et al. 2024, HDiT), as `--network hdit`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import msgspec
import torch

from iddpm.errors import UserError
from iddpm.interop.k_diffusion.kinds import DEFAULTS, Depths, File, Kind, Pair, Size, Sizes, Tensors, common
from iddpm.nn.hdit import frequencies

Share = Annotated[float, msgspec.Meta(ge=0, lt=1)]
Shares = Annotated[list[Share], msgspec.Meta(min_length=1, max_length=16)]


class AttentionFile(TypedDict, total=False):
    """The attention of a level."""

    type: Literal["global", "neighborhood", "shifted-window", "none"]
    d_head: Size
    kernel_size: Size
    window_size: Size


class TransformerFile(File, total=False):
    """The settings of an image_transformer_v2 that are read, and of its data the classes."""

    patch_size: Pair
    depths: Depths
    widths: Sizes
    d_ffs: Sizes | None
    self_attns: Annotated[list[AttentionFile], msgspec.Meta(min_length=1, max_length=16)] | None
    dropout_rate: Share | Shares | None
    mapping_width: Size
    mapping_depth: Annotated[int, msgspec.Meta(ge=0, le=64)]
    mapping_d_ff: Annotated[int, msgspec.Meta(ge=0, le=65536)] | None
    mapping_dropout_rate: Share
    augment_prob: float
    num_classes: Annotated[int, msgspec.Meta(ge=0, le=10**6)]
    cond_dropout_rate: Share


def faults(model: Any) -> Iterator[str]:
    """What ours has not; lists that do not go together."""
    if model["mapping_cond_dim"]:
        yield f"mapping_cond_dim {model['mapping_cond_dim']}"
    if model["has_variance"]:
        yield "has_variance, for which it has no part"
    if len(set(model["patch_size"])) > 1:
        yield "patches that are not square: patch_size {}, {}".format(*model["patch_size"])
    lists = {name: model[name] for name in ("depths", "widths", "d_ffs", "self_attns", "dropout_rate")}
    if odd := [name for name, part in lists.items() if isinstance(part, list) and len(part) != len(model["depths"])]:
        yield f"{odd[0]} that are not as many as its depths"
    attends = model["self_attns"] or []
    if unsized := [a for a in attends if "type" not in a or (a["type"] == "shifted-window" and "window_size" not in a)]:
        yield "self_attns without " + ("window_size" if "type" in unsized[0] else "type")
    elif len(_heads(model)) > 1:
        yield f"heads of different widths: self_attns of d_head {', '.join(map(str, _heads(model)))}"


def _heads(model: Any) -> list[int]:
    """The widths of its heads, by default of 64 channels."""
    asked = model["self_attns"] or [AttentionFile(type="global")]
    return sorted({a.get("d_head", 64) for a in asked if a["type"] != "none"})


def settings(model: Any) -> dict[str, Any]:
    """The fields of the run, with the defaults of its config.py where something is not said."""
    widths, rate = model["widths"], model["dropout_rate"] or 0.0
    usual = [AttentionFile(type="neighborhood")] * (len(widths) - 1) + [AttentionFile(type="global")]
    rates = [float(part) for part in rate] if isinstance(rate, list) else [float(rate)]
    classes = model["num_classes"]
    return common(model) | dict(
        network="hdit",
        patch_size=model["patch_size"][0],
        num_channels=widths[0],
        channel_mult=",".join(f"{width / widths[0]:.17g}" for width in widths),
        level_depths=",".join(map(str, model["depths"])),
        level_attention=",".join(map(_attention, model["self_attns"] or usual)),
        level_hidden=",".join(map(str, model["d_ffs"] or [3 * width for width in widths])),
        level_dropout=",".join(map(str, rates)) if len(set(rates)) > 1 else "",
        dropout=rates[0] if len(set(rates)) == 1 else 0.0,
        head_width=next(iter(_heads(model)), 64),
        mapping_width=model["mapping_width"],
        mapping_depth=model["mapping_depth"],
        mapping_hidden=model["mapping_d_ff"] or 3 * model["mapping_width"],
        mapping_dropout=model["mapping_dropout_rate"],
        class_cond=classes > 0,
        class_dropout=model["cond_dropout_rate"] if classes else 0.0,
        num_classes=classes,
    )  # fmt: skip


def _attention(asked: Any) -> str:
    kind = asked["type"]
    if kind == "shifted-window":
        return f"window:{asked['window_size']}"
    return f"{kind}:{asked.get('kernel_size', 7)}" if kind == "neighborhood" else kind


def weights(kept: Tensors, model: Any, path: Path) -> Tensors:
    """Weights by our names: what it tells of an image that was not changed is a bias; frequencies of places are no weights.

    The row of no class is left out where it was never trained. UserError where the frequencies are others.
    """
    found, width = Tensors(), model["mapping_width"]
    for name, t in kept.items():
        if name.endswith(".pos_emb.freqs"):
            if t.ndim != 2 or not torch.allclose(t, frequencies(len(t), 8 * t.shape[1]), rtol=1e-2):
                raise UserError(f"{path}: {name[:80]!a} are not the frequencies that k-diffusion has")
        elif name == "class_emb.weight" and not model["cond_dropout_rate"]:
            found[name] = t[:-1]
        elif name == "aug_in_proj.weight" and t.ndim == 2:
            found["time_in_proj.bias"] = t[:, : width // 2].sum(1)  # of nine zeros the cosines are 1, the sines 0
        elif name != "aug_emb.weight":
            found[name] = t
    return found


def left(model: Any) -> dict[str, bool]:
    return {"changed images (augment_prob)": model["augment_prob"] > 0}


TRANSFORMER = Kind(
    "hdit", TransformerFile,
    {**DEFAULTS, **TransformerFile(d_ffs=None, self_attns=None, dropout_rate=None, mapping_width=256, mapping_depth=2,
                                   mapping_d_ff=None, mapping_dropout_rate=0.0, augment_prob=0.0, num_classes=0,
                                   cond_dropout_rate=0.1)},
    faults, settings, weights, left,
)  # fmt: skip
