"""EDM's pickled networks, SongUNet (DDPM++, NCSN++) and DhariwalUNet in EDM's preconditioning, as weights and config of ours."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict

import msgspec
import torch
from torch import Tensor

from iddpm import build, fit
from iddpm.config import Config, check
from iddpm.config.presets import recipes
from iddpm.errors import UserError
from iddpm.interop.edm.pickled import Record, record, unpickle
from iddpm.interop.openai.formats.convert import agreed, named
from iddpm.interop.openai.formats.files import OLD
from iddpm.interop.openai.formats.weights import shapes_of
from iddpm.nn.unet import CHANGES
from iddpm.records import fits
from iddpm.store.checkpoint import Saved
from iddpm.store.weights import require_finite

Size = Annotated[int, msgspec.Meta(ge=1, le=65536)]
Sizes = Annotated[list[Size], msgspec.Meta(max_length=16)]
MOST = 20_000  # modules of a network, more than any has: a record may stand in itself, or many times in another


class Outer(TypedDict):
    """The settings of an EDMPrecond that are read, as its state has them."""

    img_resolution: Size
    img_channels: Annotated[int, msgspec.Meta(ge=1, le=4)]
    label_dim: Annotated[int, msgspec.Meta(ge=0, le=10**6)]
    sigma_min: float
    sigma_max: float
    sigma_data: float


class Inner(TypedDict, total=False):
    """Those of its network, as they were given to it; what was not given is as in DEFAULTS."""

    augment_dim: Annotated[int, msgspec.Meta(ge=0, le=1024)]
    model_channels: Size
    channel_mult: Annotated[Sizes, msgspec.Meta(min_length=1)]
    channel_mult_emb: int
    num_blocks: Annotated[int, msgspec.Meta(ge=1, le=64)]
    attn_resolutions: Sizes
    dropout: float
    label_dropout: float
    embedding_type: str
    channel_mult_noise: int
    encoder_type: str
    decoder_type: str
    resample_filter: Sizes


class Kind(NamedTuple):
    """A network of EDM's: its defaults, and of each of our networks that can be it, what must be set."""

    defaults: dict[str, Any]
    ours: dict[str, dict[str, Any]]
    fixed: dict[str, float]  # in its blocks and norms; another number is of another version of its code
    head: int  # channels of a head of attention; 0: there is one head


COMMON = dict(augment_dim=0, channel_mult_emb=4, dropout=0.1, label_dropout=0.0)
PLAIN = dict(embedding_type="positional", channel_mult_noise=1, encoder_type="standard", decoder_type="standard",
             resample_filter=[1, 1])  # fmt: skip
SMOOTH = dict(PLAIN, embedding_type="fourier", channel_mult_noise=2, encoder_type="residual", resample_filter=[1, 3, 3, 1])
KINDS = {
    "SongUNet": Kind(
        dict(COMMON, **PLAIN, model_channels=128, channel_mult=[1, 2, 2, 2], num_blocks=4, attn_resolutions=[16]),
        {"ddpmpp": PLAIN, "ncsnpp": SMOOTH},
        dict(adaptive_scale=False, skip_scale=0.5**0.5, eps=1e-6),
        0,
    ),
    "DhariwalUNet": Kind(
        dict(COMMON, model_channels=192, channel_mult=[1, 2, 3, 4], num_blocks=3, attn_resolutions=[32, 16, 8]),
        {"unet": {}},
        dict(adaptive_scale=True, skip_scale=1.0, eps=1e-5),
        64,
    ),
}
OTHERS = {  # what is like an EDMPrecond, and is not
    "Precond": "is of EDM2, whose network iddpm does not have",
    "VPPrecond": "is told its noise and scaled as by Song et al.'s VP: iddpm reads EDM's own preconditioning, EDMPrecond",
    "VEPrecond": "is told its noise and scaled as by Song et al.'s VE: iddpm reads EDM's own preconditioning, EDMPrecond",
    "iDDPMPrecond": "is scaled as a chain: give the file of OpenAI's that it was made of; iddpm reads EDMPrecond",
}


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
    if net.kind != "EDMPrecond":
        raise UserError(f"{path}: its {net.kind} {OTHERS.get(net.kind, 'is no network of EDM: iddpm reads EDMPrecond')}")
    config, kind, told = _config(net, found, path)
    config = named(agreed(config, given, path), classes)
    weights = require_finite(_weights(net, config, kind, path), path)
    note = f"config: {path} ({net.kind}, {record(net, '_modules')['model'].kind} as --network {config.model.network})"
    return Saved(0, weights, {}, {}, dict(step=0, images=0, weights_only=True)), config, [note, *told]


# ---- settings


def _config(net: Record, found: Any, path: Path) -> tuple[Config, Kind, list[str]]:
    """The config, the kind of network, and what to tell of it."""
    model = record(net, "_modules").get("model")
    if not isinstance(model, Record) or model.kind not in KINDS:
        what = model.kind if isinstance(model, Record) else "nothing"
        raise UserError(f"{path}: the network of its EDMPrecond is {what}: iddpm reads {' and '.join(KINDS)}")
    kind = KINDS[model.kind]
    given = {k: v for k, v in record(model, "_init_kwargs").items() if k in Inner.__annotations__}
    try:
        outer: Any = fits({k: net.held.get(k) for k in Outer.__annotations__}, Outer)
        inner: Any = {**kind.defaults, **fits(given, Inner)}
    except ValueError as e:
        raise UserError(f"{path}: its settings are not those of an EDMPrecond ({e})") from None
    faults = {name: [k for k, v in fixed.items() if inner[k] != v] for name, fixed in kind.ours.items()}
    network, wrong = min(faults.items(), key=lambda item: len(item[1]))
    wrong += ["channel_mult_emb"] * (inner["channel_mult_emb"] != 4)
    if wrong:
        raise UserError(
            f"{path}: its {model.kind} has {wrong[0]} {inner[wrong[0]]!r}: iddpm has EDM's own, {', '.join(kind.ours)}"
        )
    settings = recipes("edm")[0] | dict(
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
    )
    if kind.head:
        settings |= dict(num_head_channels=kind.head, resblock_updown=True, use_scale_shift_norm=True)
    if outer["label_dim"]:
        settings |= dict(class_cond=True, num_classes=outer["label_dim"], class_dropout=float(inner["label_dropout"]))
    told = []
    if inner["augment_dim"] == CHANGES and not kind.head:
        share = record(found, "augment_pipe").get("p")
        settings["augment"] = share if isinstance(share, float) and 0 < share <= 1 else 0.12
    elif inner["augment_dim"]:
        told = ["what it knew of changed images is left out: drawing is not touched, training on begins without"]
    try:
        return fit.require_fit(check(Config().updated(settings))), kind, told
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


def _weights(net: Record, config: Config, kind: Kind, path: Path) -> dict[str, Tensor]:
    """The weights by our names; UserError where they are not those of the settings."""
    model = record(net, "_modules")["model"]
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
    names = _names(model, tensors)
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


def _turned(t: Tensor, name: str, wanted: Mapping[str, tuple[int, ...]], kind: Kind) -> Tensor:
    """A tensor as ours has it: 1x1 convolutions of attention lose a dimension, and each head's q, k and v come one by one."""
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
