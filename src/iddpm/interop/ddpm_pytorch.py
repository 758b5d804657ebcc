"""Checkpoints of denoising-diffusion-pytorch's Trainer (P. Wang, version 2), as weights, average and config of ours.

Such a file holds no settings. The network follows from its shapes, the noise from its `betas`, what the network predicts and how
levels are weighed from its `loss_weight`; the size of the images is in no part of it, and has to be given.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iddpm import fit
from iddpm.config import Config, Model, check, image_size
from iddpm.errors import UserError
from iddpm.interop.diffusers.read import schedule_of
from iddpm.interop.openai.formats import files
from iddpm.interop.openai.formats.convert import agreed, named
from iddpm.interop.openai.formats.weights import network_shapes, shapes_of
from iddpm.store.checkpoint import Saved
from iddpm.store.weights import require_finite

NET = "model."  # what GaussianDiffusion puts before its network's names
RATE = 0.995  # of the Trainer's average, by default; the file does not tell it
OTHERS = {  # parts of names of what it has besides, and iddpm has not
    "time_mlp.0.weights": "hears the time at random or learned frequencies",
    "classes_emb.": "is told classes",
    ".block1.norm.weight": "has the group norm of the library's first version",
    ".fn.": "is put together as in the library's first version",
}
Tensors = dict[str, Tensor]


def is_one(found: Any) -> bool:
    """Whether what torch.save wrote is such a checkpoint, or the state of a GaussianDiffusion by itself."""
    return isinstance(found, dict) and {"betas", f"{NET}init_conv.weight"} <= set(files.bare(_raw(found)).values())


def _raw(found: Mapping[str, Any]) -> Mapping[str, Any]:
    kept = found.get("model")
    return kept if isinstance(kept, dict) else found


def imported(path: Path, found: Any, given: Mapping[str, Any] = {}, classes: str = "") -> tuple[Saved, Config, list[str]]:
    """Weights and average of a file, their config, and how that came about; `given` and `classes` as in `convert.imported`.

    UserError where it is damaged, its network is none of ours, or its images' size is not given.
    """
    raw, step = _tensors(_raw(found), path), found.get("step", 0)
    average = _tensors(kept, path) if isinstance(kept := found.get("ema"), dict) else {}
    process, weights = _process(raw, given, path), _net(raw)
    if "image_size" not in given:
        raise UserError(f"{path} does not tell the size of its images: give --image_size, as 128, or 96x128 (height first)")
    settings = _network(weights, str(given["image_size"]), path) | process
    rate = given.get("ema_rate", str(RATE)) if average else ""
    config = agreed(_checked(settings | dict(ema_rate=rate), path), given, path)
    for tensors in (weights, *([_net(average)] if average else [])):
        _require_shapes(tensors, config, path)
    notes = [f"config: from the shapes, betas and loss weights of {path}", "taken, for it does not tell: images span -1 to 1"]
    step = step if isinstance(step, int) and 0 <= step < 2**53 else 0
    rates = [float(part) for part in str(rate).split(",") if part]
    if average and len(rates) != 1:
        raise UserError(f"--ema_rate {rate}: {path} holds one average; its Trainer's ema_decay, {RATE} by default, is its rate")
    averages = {rates[0]: _net(average)} if average else {}
    state = dict(step=step, images=0, weights_only=True)
    return Saved(step, weights, averages, {}, state), named(config, classes), notes


def _tensors(kept: Mapping[str, Any], path: Path) -> Tensors:
    """Weights and buffers by GaussianDiffusion's names, of an average's file the average's; UserError where it has others."""
    if odd := next((name for name, t in kept.items() if not isinstance(t, Tensor)), None):
        raise UserError(f"{path} is damaged, or no checkpoint of denoising-diffusion-pytorch: {str(odd)[:80]!a} is no tensor")
    return require_finite(files.floats({short: kept[name] for name, short in files.bare(kept).items()}, path), path)


def _net(tensors: Mapping[str, Tensor]) -> Tensors:
    return {name.removeprefix(NET): t for name, t in tensors.items() if name.startswith(NET)}


def _checked(settings: Mapping[str, Any], path: Path) -> Config:
    try:
        return fit.require_fit(check(Config().updated(settings)))
    except UserError as e:
        raise UserError(f"{path}: {e}") from None


def _require_shapes(tensors: Tensors, config: Config, path: Path) -> None:
    wanted, has = network_shapes(config), shapes_of(tensors)
    if wrong := [name for name in wanted.keys() | has.keys() if wanted.get(name) != has.get(name)]:
        raise UserError(
            f"{path}: {min(wrong)[:80]!r} of its weights is not that of --network unet_linear, whose attention has the same "
            f"heads and tokens at every level"
        )


# ---- settings


def _network(net: Tensors, side: str, path: Path) -> dict[str, Any]:
    """The fields of the network that has these weights."""
    for sign, what in OTHERS.items():
        if any(sign in name for name in net):
            raise UserError(f"{path}: its network {what}, which iddpm's --network unet_linear does not")
    levels = len({name.split(".")[1] for name in net if name.startswith("downs.")})
    ends = [f"downs.{k}.3.{'1.' * (k < levels - 1)}weight" for k in range(levels)]
    needs = {
        "time_mlp.1.weight": 2,
        "mid_attn.mem_kv": 4,
        "init_conv.weight": 4,
        "final_conv.weight": 4,
        **dict.fromkeys(ends, 4),
    }
    if missing := [name for name, rank in needs.items() if name not in net or net[name].ndim != rank]:
        raise UserError(f"{path}: its network has no {missing[0]} as denoising-diffusion-pytorch's Unet of version 2 has it")
    emb, width = net["time_mlp.1.weight"].shape
    (first, seen), out = net["init_conv.weight"].shape[:2], len(net["final_conv.weight"])
    _, heads, tokens, head_width = net["mid_attn.mem_kv"].shape
    faults = {
        "was trained with self_condition, and is given its own last image": seen == 2 * out,
        "learned the variance too (LearnedGaussianDiffusion)": out == 2 * seen,
        f"makes {out} channels of {seen}": out not in (seen, 2 * seen) and seen != 2 * out,
        f"has an init_dim, {first}, other than its dim, {width}": first != width or emb != 4 * width or width < 4,
    }
    if found := next((fault for fault, there in faults.items() if there), ""):
        raise UserError(f"{path}: its network {found}, which iddpm's --network unet_linear does not")
    pixels = min(image_size(Model(image_size=side)))
    softmax = [k for k in range(levels) if f"downs.{k}.2.to_out.weight" in net]
    return dict(
        network="unet_linear",
        image_size=side,
        image_channels=seen,
        num_channels=width,
        channel_mult=",".join(f"{len(net[name]) / width:.10g}" for name in ends),
        attention_resolutions=",".join(str(pixels // 2**k) for k in softmax),
        num_heads=heads,
        head_width=head_width,
        tokens=tokens,
    )


# ---- noise, and what is learned of it

PREDICTS = {"eps": lambda snr: snr, "x0": torch.ones_like, "v": lambda snr: snr + 1}  # errors of x0 for one of the output's


def _process(tensors: Tensors, given: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The fields of the process, and how it is sampled from: as the library does with few sampling_timesteps."""
    betas = tensors["betas"]
    if betas.ndim != 1 or not len(betas) or not bool(((betas > 0) & (betas <= 1)).all()):
        raise UserError(f"{path} is damaged: its betas are no list of numbers above 0 and at most 1")
    schedule = schedule_of(betas)
    if not schedule:
        first, last = betas[0].item(), betas[-1].item()
        raise UserError(
            f"{path}: its {len(betas)} betas, {first:.3g} to {last:.3g}, are of no noise schedule of iddpm (linear, cosine, "
            "sigmoid, each with its usual numbers)"
        )
    steps = len(betas)
    return schedule | _objective(betas.double(), tensors.get("loss_weight"), given, path) | dict(
        rescale_timesteps=steps == 1000,  # then both ways are the same; else the network is told the steps as they are
        sigma_small=True,
        solver="ddim",
        sampling_steps=str(min(steps, 250)),
    )  # fmt: skip


def _objective(betas: Tensor, weight: Tensor | None, given: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What the network predicts, and the weighting: of the error of x0 by the signal-to-noise ratio, or at most some gamma."""
    if weight is None and "parametrization" in given:  # files of the library's earlier years
        return dict(parametrization=given["parametrization"])
    if weight is None:
        raise UserError(f"{path} holds no loss_weight, which would tell what its network predicts: give --parametrization")
    bar = (1 - betas).cumprod(0)
    snr = bar / (1 - bar)
    for name, errors in PREDICTS.items():
        kept = weight.double() * errors(snr) if weight.shape == snr.shape else torch.zeros_like(snr)
        gamma = round(kept.max().item(), 4)
        if torch.allclose(kept, snr, rtol=1e-2):
            return dict(parametrization=name, weighting="p2", p2_gamma=0.0)  # the error of eps, whatever is predicted
        if gamma > 0 and torch.allclose(kept, snr.clamp(max=gamma), rtol=1e-2):
            return dict(parametrization=name, weighting="min_snr", snr_gamma=gamma)
    raise UserError(f"{path}: its loss_weight is that of none of pred_noise, pred_x0 and pred_v")
