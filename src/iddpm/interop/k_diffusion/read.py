"""Checkpoints of k-diffusion (K. Crowson): its networks in Karras' preconditioning, as weights and config of ours.

Its train.py writes a .pth with the config, the weights and their average; its convert_for_inference.py a .safetensors of the
average, with the config in the metadata.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
from safetensors import safe_open
from torch import Tensor

from iddpm import fit
from iddpm.config import Config, check
from iddpm.errors import UserError
from iddpm.interop.k_diffusion.kinds import WEIGHTINGS, Kind, Tensors
from iddpm.interop.k_diffusion.transformer import TRANSFORMER
from iddpm.interop.k_diffusion.unet import UNET
from iddpm.interop.openai.formats import files
from iddpm.interop.openai.formats.convert import agreed, named
from iddpm.interop.openai.formats.weights import Shapes, network_shapes, shapes_of
from iddpm.records import fits
from iddpm.store.checkpoint import Saved
from iddpm.store.weights import require_finite

RATE = 0.9999  # of its average, in the end, by default
KINDS = {"image_v1": UNET, "image_transformer_v2": TRANSFORMER}
DATA = ("num_classes", "cond_dropout_rate")  # settings that a config has under "dataset"


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
    kind, model = _kind(found["config"], path)
    rate = str(given.get("ema_rate", RATE)) if isinstance(found.get("model"), dict) else ""
    try:
        config = fit.require_fit(check(Config().updated(kind.settings(model) | dict(ema_rate=rate))))
        shapes = network_shapes(config)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None
    network = f"{found['config']['model']['type']} as --network {kind.network}"
    config, notes = agreed(config, given, path), [f"config: that in {path} ({network})"]
    average = _weights(found["model_ema"], kind, model, shapes, path)
    step, rates = found.get("step", 0), [float(part) for part in rate.split(",") if part]
    if rate and len(rates) != 1:
        raise UserError(f"--ema_rate {rate}: {path} holds one average, at most of the rate {RATE} by default")
    notes += [f"what it knew of {what} is left out: drawing is not touched" for what, there in kind.left(model).items() if there]
    if model["loss_scales"] != 1:
        notes.append(f"loss_scales {model['loss_scales']} is left out: training on weighs all frequencies alike")
    step = step if isinstance(step, int) and 0 <= step < 2**53 else 0
    weights = _weights(found["model"], kind, model, shapes, path) if rate else average
    state = dict(step=step, images=0, weights_only=True)
    return Saved(step, weights, {rates[0]: average} if rate else {}, {}, state), named(config, classes), notes


# ---- settings


def _kind(config: Mapping[str, Any], path: Path) -> tuple[Kind, Any]:
    """Its kind of network, and its settings with the defaults; UserError where they are of another network, or no settings."""
    held, data = (given if isinstance(given, dict) else {} for given in (config.get("model"), config.get("dataset")))
    name = held.get("type")
    if not isinstance(name, str) or name not in KINDS:
        raise UserError(f"{path}: its network is {str(name)[:40]!a}: of k-diffusion's, iddpm has {' and '.join(KINDS)}")
    kind = KINDS[name]
    held = {k: v for k, v in held.items() if k not in DATA} | {k: data[k] for k in DATA if k in data}
    try:
        model = {**kind.defaults, **fits({k: v for k, v in held.items() if k in kind.file.__annotations__}, kind.file)}
    except ValueError as e:
        raise UserError(f"{path}: its config is not one of k-diffusion's {name} ({e})") from None
    if missing := [field for field in kind.file.__annotations__ if field not in model]:
        raise UserError(f"{path}: its config has no {missing[0]}")
    losses = {"loss_config": ("karras", "simple"), "loss_weighting": tuple(WEIGHTINGS)}
    faults = [f"{field} {model[field][:40]!a}" for field, known in losses.items() if model[field] not in known]
    if faults := faults + list(kind.faults(model)):
        raise UserError(f"{path}: its network has {faults[0]}, and iddpm's --network {kind.network} has not")
    return kind, model


def _weights(kept: Mapping[str, Any], kind: Kind, model: Any, wanted: Shapes, path: Path) -> Tensors:
    """Weights by our names; UserError where they are not those of the config."""
    if odd := next((name for name, t in kept.items() if not isinstance(t, Tensor)), None):
        raise UserError(f"{path} is damaged, or no checkpoint of k-diffusion: {str(odd)[:80]!a} is no tensor")
    bare = {name.removeprefix("inner_model."): t for name, t in zip(files.bare(kept).values(), kept.values(), strict=False)}
    found = kind.weights(files.floats(bare, path), model, path)
    has = shapes_of(found)
    if wrong := [name for name in wanted.keys() | has.keys() if wanted.get(name) != has.get(name)]:
        raise UserError(f"{path}: its weights are not those of its config, as our {min(wrong)[:80]!r}")
    return require_finite({name: found[name].contiguous() for name in wanted}, path)
