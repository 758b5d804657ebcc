"""EDM's and EDM2's pickled networks, in EDM's preconditioning, as weights and config of ours.

Of EDM: SongUNet (DDPM++, NCSN++) and DhariwalUNet in an EDMPrecond. Of EDM2: the UNet in a Precond, of those that draw pixels.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iddpm import build, fit
from iddpm.config import Config, check
from iddpm.config.presets import recipes
from iddpm.errors import UserError
from iddpm.interop.edm.kinds import KINDS, OTHERS, PART, PIXELS, RANGE, Inner, Kind, Outer
from iddpm.interop.edm.pickled import Record, record, unpickle
from iddpm.interop.openai.formats.convert import agreed, named
from iddpm.interop.openai.formats.files import OLD
from iddpm.interop.openai.formats.weights import shapes_of
from iddpm.nn.unet import CHANGES
from iddpm.records import fits
from iddpm.store.checkpoint import Saved
from iddpm.store.weights import require_finite

MOST = 20_000  # modules of a network, more than any has: a record may stand in itself, or many times in another


def is_pickle(path: Path) -> bool:
    """Whether a file begins as a pickle, and not as one of torch.save's."""
    with open(path, "rb") as file:
        start = file.read(len(OLD))
    return start[:1] == OLD[:1] and start != OLD[: len(start)]


def imported(path: Path, given: Mapping[str, Any] = {}, classes: str = "") -> tuple[Saved, Config, list[str]]:
    """The weights of a pickle, their config, and how that came about; `given` and `classes` as in `convert.imported`.

    UserError where it holds something else, is damaged, or its network is none of ours.
    """
    found = unpickle(path)
    net = found.get("ema") if isinstance(found, dict) else found
    if not isinstance(net, Record):
        raise UserError(f"{path} holds no network as 'ema', as EDM's network-snapshot-*.pkl and published files do")
    model, kind = _network(net, found, path)
    config, told = _config(net, model, kind, found, path)
    config = named(agreed(config, given, path), classes)
    weights = require_finite(_weights(model, config, kind, path), path)
    note = f"config: {path} ({net.kind}, {model.kind} as --network {config.model.network})"
    return Saved(0, weights, {}, {}, dict(step=0, images=0, weights_only=True)), config, [note, *told]


def _network(net: Record, found: Any, path: Path) -> tuple[Record, Kind]:
    """The network that a record is around, and its kind; UserError where it is none of ours, or draws no pixels."""
    if net.kind not in PART:
        raise UserError(
            f"{path}: its {net.kind} {OTHERS.get(net.kind, 'is no network of EDM: iddpm reads ' + ' and '.join(PART))}"
        )
    model = record(net, "_modules").get(PART[net.kind])
    known = [name for name, kind in KINDS.items() if kind.outer == net.kind]
    if not isinstance(model, Record) or model.kind not in known:
        what = model.kind if isinstance(model, Record) else "nothing"
        raise UserError(f"{path}: the network of its {net.kind} is {what}: iddpm reads {' and '.join(known)}")
    encoder = found.get("encoder") if isinstance(found, dict) else None
    if encoder is not None and not (isinstance(encoder, Record) and encoder.kind == PIXELS):
        name = encoder.kind if isinstance(encoder, Record) else type(encoder).__name__
        raise UserError(
            f"{path} draws latents, of which its {name} makes images by a network that is not in the file (a VAE), nor in "
            "iddpm: this reads models of pixels, as edm2-img64-*.pkl"
        )
    return model, KINDS[model.kind]


# ---- settings


def _config(net: Record, model: Record, kind: Kind, found: Any, path: Path) -> tuple[Config, list[str]]:
    """The config, and what to tell of it."""
    given = {k: v for k, v in record(model, "_init_kwargs").items() if k in Inner.__annotations__}
    try:
        outer: Any = fits({k: net.held.get(k, RANGE.get(k)) for k in Outer.__annotations__}, Outer)
        inner: Any = {**kind.defaults, **fits(given, Inner)}
    except ValueError as e:
        raise UserError(f"{path}: its settings are not those of a {net.kind} ({e})") from None
    faults = {name: [k for k, v in fixed.items() if inner[k] != v] for name, fixed in kind.ours.items()}
    network, wrong = min(faults.items(), key=lambda item: len(item[1]))
    if wrong:
        raise UserError(
            f"{path}: its {model.kind} has {wrong[0]} {inner[wrong[0]]!r}: iddpm has it as published, {', '.join(kind.ours)}"
        )
    settings = recipes("edm")[0] | kind.settings | dict(
        network=network,
        image_size=str(outer["img_resolution"]),
        image_channels=outer["img_channels"],
        num_channels=inner["model_channels"],
        num_res_blocks=inner["num_blocks"],
        channel_mult=",".join(map(str, inner["channel_mult"])),
        attention_resolutions=",".join(map(str, inner["attn_resolutions"])),
        dropout=float(inner["dropout"]),
        sigma_data=outer["sigma_data"],
        sigma_min=max(0.002, outer["sigma_min"]),  # as EDM's sampler narrows its range
        sigma_max=min(80.0, outer["sigma_max"]),
        clip_denoised=False,  # nor does EDM
        solver="edm",
        S_churn=0.0,  # EDM's own deterministic sampler
        ema_rate="",
    )  # fmt: skip
    if outer["label_dim"]:
        settings |= dict(class_cond=True, num_classes=outer["label_dim"], class_dropout=float(inner["label_dropout"]))
    law = {k: v for k, v in record(found, "loss_fn").items() if k in ("P_mean", "P_std") and isinstance(v, int | float)}
    settings |= {k: float(v) for k, v in law.items()}
    told = list[str]()
    if inner["augment_dim"] == CHANGES and not kind.head:
        share = record(found, "augment_pipe").get("p")
        settings["augment"] = share if isinstance(share, float) and 0 < share <= 1 else 0.12
    elif inner["augment_dim"]:
        told = ["what it knew of changed images is left out: drawing is not touched, training on begins without"]
    try:
        return fit.require_fit(check(Config().updated(settings))), told
    except UserError as e:
        raise UserError(f"{path}: {e}") from None


# ---- weights

PARTS = {
    "norm0": "in_layers.0", "conv0": "in_layers.2", "affine": "emb_layers.1", "norm1": "out_layers.0", "conv1": "out_layers.3",
    "skip": "skip_connection",
}  # fmt: skip
ATTENTION = {"norm2": "norm", "qkv": "qkv", "proj": "proj_out"}
ENDS = {"map_layer0": "time_embed.0", "map_layer1": "time_embed.2", "map_noise.freqs": "freqs", "out_norm": "out.0",
        "out_conv": "out.2", "map_augment": "augment_embed"}  # fmt: skip


def tensors_of(module: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """The modules of a record, as (name, Record), then its tensors, as (name, Tensor)."""
    if depth > 8 or not isinstance(module, Record):
        return
    yield name, module
    for kept in ("_parameters", "_buffers"):
        yield from ((f"{name}{k}", t) for k, t in record(module, kept).items() if isinstance(t, Tensor))
    for k, part in record(module, "_modules").items():
        yield from tensors_of(part, f"{name}{k}.", depth + 1)


def _weights(model: Record, config: Config, kind: Kind, path: Path) -> dict[str, Tensor]:
    """The weights by our names; UserError where they are not those of the settings."""
    tensors = dict[str, Tensor]()
    for count, (name, part) in enumerate(tensors_of(model)):
        if count > MOST:
            raise UserError(f"{path}: its network has more than {MOST} parts")
        if isinstance(part, Tensor):
            tensors[name] = part
        else:
            _require_own_code(name, part, kind, path)
    with torch.device("meta"):
        wanted = shapes_of(build.network(config).state_dict())
    names = _same_names(model, tensors, kind.names) if kind.names else _names(model, tensors)
    labels: dict[str, Tensor] = {name: tensors.pop(name) for name in ("map_label.weight", "map_label.bias") if name in tensors}
    found = {}
    for name, t in tensors.items():
        block, _, last = name.rpartition(".")
        ours = names.get(name) or f"{names.get(block, name)}.{last}"
        if last == "resample_filter" or (ours == "augment_embed.weight" and ours not in wanted):
            continue
        found[ours] = _turned(t.float(), ours, wanted, kind)
    if labels and "label_emb.weight" in wanted:
        found["label_emb.weight"] = _rows(labels, wanted["label_emb.weight"])
    shapes = shapes_of(found)
    if wrong := [name for name in wanted.keys() | shapes.keys() if wanted.get(name) != shapes.get(name)]:
        raise UserError(f"{path}: its weights are not those of its settings, as our {min(wrong)[:80]!r}")
    return {name: found[name].contiguous() for name in wanted}


def _require_own_code(name: str, module: Record, kind: Kind, path: Path) -> None:
    """UserError where a number that EDM's own code fixes is another: then its source, which is not read, is another."""
    held = {k: module.held[k] for k in kind.fixed if k in module.held}
    odd = [k for k, v in held.items() if not isinstance(v, int | float) or not abs(v - kind.fixed[k]) < 1e-7]
    if odd:
        raise UserError(f"{path}: {odd[0]} in {name[:80]!r} is not that of EDM's code: it was made by another version of it")
    weight = record(module, "_parameters").get("weight")
    channels = len(weight) if isinstance(weight, Tensor) and weight.ndim else 0
    if kind.head and module.kind == "GroupNorm" and module.held.get("num_groups") != math.gcd(32, channels):
        raise UserError(f"{path}: {channels} channels are in other groups than in --network unet: the network is too narrow")


def _names(model: Record, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Our names of theirs, up to the last part, as enc.32x32_block0.conv0 -> input_blocks.1.0.in_layers.2.

    Blocks are numbered by their order; ups stand behind the block, and its attention, that comes before.
    """
    found, places, count = dict(ENDS), dict[str, str](), dict(enc=0, image=0, dec=0)
    for name in record(model, "_modules", "enc", "_modules"):
        if "_aux_" in name:
            found[f"enc.{name}"] = f"images.{count['image']}"
            count["image"] += 1
            continue
        places[f"enc.{name}"] = found[f"enc.{name}"] = f"input_blocks.{count['enc']}.0"
        count["enc"] += 1
    before = ""
    for name in record(model, "_modules", "dec", "_modules"):
        last, part = f"{name}.".rpartition("_")[2][:-1], f"dec.{name}"
        if "_aux_" in name:
            found[part] = dict(norm="out.0", conv="out.2").get(last, part)
        elif last in ("in0", "in1"):
            places[part] = f"middle_block.{'0' if last == 'in0' else '2'}"
        elif last == "up":
            behind = 2 if f"{before}.qkv.weight" in tensors else 1
            places[part] = f"output_blocks.{count['dec'] - 1}.{behind}"
        else:
            places[part], before = f"output_blocks.{count['dec']}.0", part
            count["dec"] += 1
    for theirs, ours in places.items():
        stage = ours.rpartition(".")[0]
        found |= {f"{theirs}.{k}": f"{ours}.{v}" for k, v in PARTS.items()}
        found |= {f"{theirs}.{k}": f"{stage}.1.{v}" for k, v in ATTENTION.items()}
    return found


def _same_names(model: Record, tensors: Mapping[str, Tensor], parts: Mapping[str, str]) -> dict[str, str]:
    """Our names of theirs, where blocks are the same, as enc.32x32_block0.attn_qkv.weight -> enc.1.qkv.weight."""
    blocks = {
        f"{way}.{name}": f"{way}.{i}"
        for way in ("enc", "dec")
        for i, name in enumerate(record(model, "_modules", way, "_modules"))
    }
    found = {}
    for name in tensors:
        block = ".".join(name.split(".")[:2])
        ours = blocks.get(block, block) + name[len(block) :]
        found[name] = ".".join(parts.get(part, part) for part in ours.split("."))
    return found


def _turned(t: Tensor, name: str, wanted: Mapping[str, tuple[int, ...]], kind: Kind) -> Tensor:
    """A tensor as ours has it: 1x1 convolutions of attention lose a dimension, and each head's q, k and v come one by one.

    Of EDM2, gains are lists of one, which can be shared among processes, and there is a row for each class.
    """
    if t.ndim == 0:
        return t[None]
    if name == "label_emb.weight" and t.ndim == 2:
        return t.T
    if ".qkv." in name and len(t) % 3 == 0:
        heads = max(1, len(t) // 3 // kind.head) if kind.head else 1
        if len(t) % (3 * heads) == 0:
            t = t.unflatten(0, (heads, -1, 3)).transpose(1, 2).flatten(0, 2)
    return t.squeeze(3) if t.ndim == 4 and len(wanted.get(name, ())) == 3 and t.shape[3] == 1 else t


def _rows(labels: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """A row for each class, of a linear map of one-hot labels: SongUNet's has a bias, and labels as long as there are classes.

    One more, where it was trained without classes, too: of labels of zeros.
    """
    weight, bias = labels["map_label.weight"].float(), labels.get("map_label.bias")
    rows = weight.T if bias is None else weight.T * weight.shape[1] ** 0.5 + bias
    none = torch.zeros_like(rows[:1]) if bias is None else bias[None].float()
    return torch.cat([rows, none]) if len(rows) + 1 == shape[0] else rows
