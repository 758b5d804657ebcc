"""Checkpoints of k-diffusion (K. Crowson): its U-Net image_v1 in Karras' preconditioning, as weights and config of ours.

Its train.py writes a .pth with the config, the weights and their average; its convert_for_inference.py a .safetensors of the
average, with the config in the metadata.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec
import safetensors
from safetensors import safe_open
from torch import Tensor

from iddpm import fit
from iddpm.config import Config, check
from iddpm.config.presets import recipes
from iddpm.errors import UserError
from iddpm.interop.openai.formats import files
from iddpm.interop.openai.formats.convert import agreed, named
from iddpm.interop.openai.formats.weights import network_shapes, shapes_of
from iddpm.records import fits
from iddpm.store.checkpoint import Saved
from iddpm.store.weights import require_finite

Size = Annotated[int, msgspec.Meta(ge=1, le=65536)]
Sizes = Annotated[list[Size], msgspec.Meta(min_length=1, max_length=16)]
Depth = Annotated[int, msgspec.Meta(ge=1, le=64)]
RATE = 0.9999  # of its average, in the end, by default


class ModelFile(TypedDict, total=False):
    """The settings of an image_v1 that are read, as "model" of its config has them."""

    input_channels: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    input_size: Annotated[list[Size], msgspec.Meta(min_length=2, max_length=2)]
    patch_size: Annotated[int, msgspec.Meta(ge=1, le=64)]
    mapping_out: Size
    mapping_cond_dim: int
    unet_cond_dim: int
    cross_cond_dim: int
    depths: Annotated[list[Depth], msgspec.Meta(min_length=1, max_length=16)]
    channels: Sizes
    self_attn_depths: Annotated[list[bool], msgspec.Meta(min_length=1, max_length=16)]
    skip_stages: Annotated[int, msgspec.Meta(ge=0, le=15)]
    has_variance: bool
    augment_wrapper: bool
    dropout_rate: float
    loss_config: str
    loss_weighting: str
    sigma_data: Annotated[float, msgspec.Meta(gt=0)]
    sigma_min: float
    sigma_max: float


DEFAULTS = ModelFile(
    patch_size=1, mapping_cond_dim=0, unet_cond_dim=0, cross_cond_dim=0, skip_stages=0, has_variance=False, augment_wrapper=True,
    dropout_rate=0.0, loss_config="karras", loss_weighting="karras", sigma_data=1.0,
)  # fmt: skip
OTHERS = ("mapping_cond_dim", "unet_cond_dim", "cross_cond_dim")  # conditions that are given to it, and of which iddpm knows none
WEIGHTINGS = {  # of the error of its output
    "karras": lambda data: dict(weighting="edm"),
    "soft-min-snr": lambda data: dict(weighting="soft_min_snr", snr_gamma=data**-2),
    "snr": lambda data: dict(weighting="p2", p2_gamma=0.0),
}
Tensors = dict[str, Tensor]


def is_one(found: Any) -> bool:
    """Whether what torch.save wrote, or `opened` made of a .safetensors, is such a checkpoint."""
    return isinstance(found, dict) and isinstance(found.get("config"), dict) and isinstance(found.get("model_ema"), dict)


def opened(path: Path) -> dict[str, Any]:
    """A .safetensors as the .pth that it was made of; UserError where it is damaged or holds no config of k-diffusion."""
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            config = json.loads(about.get("config", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path} is damaged or no .safetensors file ({str(e)[:200]!a})") from None
    if "iddpm" in about:
        raise UserError(f"{path} is iddpm's own: give it to iddpm sample, or to iddpm train --init_from")
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise UserError(f"{path} holds no config of k-diffusion, as its convert_for_inference.py writes it")
    return dict(config=config, model_ema=tensors)


def imported(path: Path, found: Any, given: Mapping[str, Any] = {}, classes: str = "") -> tuple[Saved, Config, list[str]]:
    """Weights and average of a checkpoint, their config, and how that came about; `given`, `classes` as in `convert.imported`.

    UserError where it is damaged, or its network is none of ours.
    """
    model = _model(found["config"], path)
    rate = str(given.get("ema_rate", RATE)) if isinstance(found.get("model"), dict) else ""
    try:
        config = fit.require_fit(check(Config().updated(_settings(model) | dict(ema_rate=rate))))
    except UserError as e:
        raise UserError(f"{path}: {e}") from None
    config, notes = agreed(config, given, path), [f"config: that in {path} (image_v1 as --network unet_mapped)"]
    average = _weights(found["model_ema"], model, config, path)
    step, rates = found.get("step", 0), [float(part) for part in rate.split(",") if part]
    if rate and len(rates) != 1:
        raise UserError(f"--ema_rate {rate}: {path} holds one average, at most of the rate {RATE} by default")
    left = {"changed images (augment_wrapper)": model["augment_wrapper"], "its own error (has_variance)": model["has_variance"]}
    notes += [f"what it knew of {what} is left out: drawing is not touched" for what, there in left.items() if there]
    step = step if isinstance(step, int) and 0 <= step < 2**53 else 0
    weights = _weights(found["model"], model, config, path) if rate else average
    state = dict(step=step, images=0, weights_only=True)
    return Saved(step, weights, {rates[0]: average} if rate else {}, {}, state), named(config, classes), notes


# ---- settings


def _model(config: Mapping[str, Any], path: Path) -> Any:
    """Its settings with its defaults; UserError where they are of another network, or no settings."""
    given = config.get("model")
    held = given if isinstance(given, dict) else {}
    kind = held.get("type")
    if kind != "image_v1":
        raise UserError(f"{path}: its network is {str(kind)[:40]!a}: of k-diffusion's, iddpm has the U-Net image_v1")
    try:
        model: Any = {**DEFAULTS, **fits({k: v for k, v in held.items() if k in ModelFile.__annotations__}, ModelFile)}
    except ValueError as e:
        raise UserError(f"{path}: its config is not one of k-diffusion's image_v1 ({e})") from None
    if missing := [name for name in ModelFile.__annotations__ if name not in model]:
        raise UserError(f"{path}: its config has no {missing[0]}")
    faults = [f"{name} {model[name]}" for name in OTHERS if model[name]]
    faults += ["loss_weighting " + ascii(model["loss_weighting"][:40])] * (model["loss_weighting"] not in WEIGHTINGS)
    if faults:
        raise UserError(f"{path}: its network has {faults[0]}, and iddpm's --network unet_mapped has not")
    skip, lists = model["skip_stages"], [model[name] for name in ("depths", "channels", "self_attn_depths")]
    if len({len(part) for part in lists}) > 1 or skip >= len(lists[0]):
        raise UserError(
            f"{path}: depths, channels and self_attn_depths of its config are not as long, or not as skip_stages has it"
        )
    return model


def _settings(model: Any) -> dict[str, Any]:
    """The fields of the run: levels that skip_stages leaves out have no part in it, but for the width of the ends."""
    (height, width), patch, skip = model["input_size"], model["patch_size"], model["skip_stages"]
    ends = model["channels"][max(0, skip - 1)]
    side = min(height, width) // patch
    attends = [level for level, there in enumerate(model["self_attn_depths"][skip:]) if there]
    simple = model["loss_config"] == "simple"  # the error of eps
    return recipes("edm")[0] | WEIGHTINGS["snr" if simple else model["loss_weighting"]](model["sigma_data"]) | dict(
        network="unet_mapped",
        image_size=str(height) if height == width else f"{height}x{width}",
        image_channels=model["input_channels"],
        num_channels=ends,
        channel_mult=",".join(f"{ch / ends:.17g}" for ch in model["channels"][skip:]),
        level_depths=",".join(map(str, model["depths"][skip:])),
        attention_resolutions=",".join(str(side // 2**level) for level in attends),
        mapping_width=model["mapping_out"],
        unet_patch=patch,
        dropout=float(model["dropout_rate"]),
        sigma_data=model["sigma_data"],
        sigma_min=model["sigma_min"],
        sigma_max=model["sigma_max"],
        clip_denoised=False,  # nor does k-diffusion
        solver="dpmpp_2m",
        sampling_steps="50",  # as its sample.py, by another method of one call a step
    )  # fmt: skip


# ---- weights

LEFT_OUT = re.compile(r"mapping_cond\.weight$|(.*\.)?kernel$")  # told zeros where no image was changed; the filter
BLOCK = re.compile(r"u_net\.(d|u)_blocks\.(\d{1,3})\.(.*)")


def _weights(kept: Mapping[str, Any], model: Any, config: Config, path: Path) -> Tensors:
    """The weights of the levels that are used, by our names; UserError where they are not those of the config."""
    if odd := next((name for name, t in kept.items() if not isinstance(t, Tensor)), None):
        raise UserError(f"{path} is damaged, or no checkpoint of k-diffusion: {str(odd)[:80]!a} is no tensor")
    bare = {name.removeprefix("inner_model."): t for name, t in zip(files.bare(kept).values(), kept.values(), strict=False)}
    levels, skip, found = len(model["depths"]), model["skip_stages"], Tensors()
    for name, t in files.floats({name: t for name, t in bare.items() if not LEFT_OUT.match(name)}, path).items():
        if block := BLOCK.match(name):
            way, number, rest = block[1], int(block[2]), block[3]
            if not skip <= (number if way == "d" else levels - 1 - number) < levels:
                continue
            name = f"{way}_blocks.{number - skip * (way == 'd')}.{rest}"
        found[name] = t[:-1] if model["has_variance"] and name.startswith("proj_out.") else t
    wanted, has = network_shapes(config), shapes_of(found)
    if wrong := [name for name in wanted.keys() | has.keys() if wanted.get(name) != has.get(name)]:
        raise UserError(f"{path}: its weights are not those of its config, as our {min(wrong)[:80]!r}")
    return require_finite({name: found[name].contiguous() for name in wanted}, path)
