"""A run's U-Net as a folder that diffusers' pipelines load: UNet2DModel, a scheduler with the run's betas, and a model card."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save
from torch import nn

from iddpm import build, fit
from iddpm.config import Config, image_size, is_chain
from iddpm.diffusion.grid import Chain
from iddpm.errors import UserError
from iddpm.interop.card import card
from iddpm.interop.diffusers.names import names, to_theirs
from iddpm.nn import timestep_embedding
from iddpm.nn.layers import AttentionBlock, GroupNorm
from iddpm.nn.unet import UNet
from iddpm.store.remote import write_file
from iddpm.store.weights import Weights

LEVELS = 16  # at most, of a U-Net
VERSION = "0.42.1"  # of diffusers, whose layout this is
PREDICTION = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


# ---- what cannot be said in diffusers' settings


def require_expressible(config: Config, net: nn.Module) -> None:
    """UserError for the first choice for which diffusers has no network or no scheduler."""
    m, d = config.model, config.diffusion
    flow = d.noise_schedule == d.parametrization == "flow"
    faults = {
        f"--task {m.task}: it has no pipeline of such a U-Net": not config.task.draws,
        f"--network {m.network}: of networks of pixels it has the U-Net alone": not isinstance(net, UNet),
        f"--objective {d.objective_name}: its pipelines walk from level to level, this model leaps": fit.leaps(config),
        "--unet_patch: UNet2DModel works on pixels": m.unet_patch > 1,
        "--trained_guidance: UNet2DModel is told no scale of guidance": m.trained_guidance > 0,
        f"--noise_schedule {d.noise_schedule} with --parametrization {d.parametrization}: of continuous ones its pipelines draw "
        "flow with flow alone": not (flow or is_chain(d)),
        f"--parametrization {d.parametrization}: it reads eps, x0 and v": is_chain(d) and d.parametrization not in PREDICTION,
    }
    _refuse(faults)


def _refuse(faults: Mapping[str, bool]) -> None:
    for fault, found in faults.items():
        if found:
            raise UserError(f"diffusers cannot express {fault}")


def unet_config(config: Config, net: UNet) -> dict[str, Any]:
    """The settings of a UNet2DModel that computes what our network does; UserError for the first that it does not have."""
    m, own, height_width = config.model, config.numbers(), image_size(config.model)
    layers: dict[str, Any] = {theirs: net.get_submodule(ours) for ours, theirs in names(net).items()}
    levels = [k for k in range(LEVELS) if f"down_blocks.{k}.resnets.0" in layers]
    widths = [layers[f"down_blocks.{k}.resnets.0"].out_layers[0].num_channels for k in levels]
    attends = [f"down_blocks.{k}.attentions.0" in layers for k in levels]
    middle = layers["mid_block.attentions.0.group_norm"]
    groups = sorted({norm.num_groups for norm in net.modules() if isinstance(norm, GroupNorm)})
    attention = [layer for layer in net.modules() if isinstance(layer, AttentionBlock)]
    one_head = all(layer.heads == 1 for layer in attention)
    of_head = sorted({layer.norm.num_channels // layer.heads for layer in attention})
    faults = {
        f"--channel_mult {m.channel_mult}: UNet2DModel's first level is num_channels wide": widths[0] != m.num_channels,
        f"--num_channels {m.num_channels}: group norm has {_or(groups)} groups by turns, UNet2DModel's one number (32 where all "
        "widths are multiples of 32)": len(groups) > 1,
        f"--num_heads {m.num_heads} here: heads of {_or(of_head)} channels, UNet2DModel's are alike (as with --num_head_channels "
        "64)": not one_head and len(of_head) > 1,
    }
    _refuse(faults)
    learned = is_chain(config.diffusion) and _scaled(config)
    plain = "Resnet{}sampleBlock2D" if m.resblock_updown else "{}Block2D"
    kinds = ["Attn{}Block2D" if attend else plain for attend in attends]
    return dict(
        sample_size=height_width[0] if len(set(height_width)) == 1 else list(height_width),
        in_channels=m.image_channels,
        out_channels=net.out_channels,
        center_input_sample=False,
        time_embedding_type="learned" if learned else "positional",
        num_train_timesteps=config.diffusion.diffusion_steps if learned else None,
        freq_shift=own.get("freq_shift", 0),
        flip_sin_to_cos=True,
        down_block_types=[kind.format("Down") for kind in kinds],
        mid_block_type="UNetMidBlock2D",
        up_block_types=[kind.format("Up") for kind in kinds[::-1]],
        block_out_channels=widths,
        layers_per_block=m.num_res_blocks,
        downsample_padding=0 if own.get("pad_after") else 1,
        downsample_type="resnet" if m.resblock_updown else "conv",
        upsample_type="resnet" if m.resblock_updown else "conv",
        dropout=m.dropout,
        act_fn="silu",
        attention_head_dim=None if one_head else of_head[0],  # None: one head
        norm_num_groups=groups[0],
        attn_norm_num_groups=groups[0],
        norm_eps=middle.eps,
        resnet_time_scale_shift="scale_shift" if m.use_scale_shift_norm else "default",
        num_class_embeds=net.num_classes,
    )


def _or(numbers: Sequence[int]) -> str:
    return " or ".join(map(str, numbers))


def _scaled(config: Config) -> bool:
    """Whether the network is told other times than the numbers of steps, which diffusers tells: then a table holds them."""
    return config.diffusion.rescale_timesteps and config.diffusion.diffusion_steps != 1000


# ---- the scheduler


class Scheduler(NamedTuple):
    """A scheduler of diffusers, its settings, and how to draw with it as we do."""

    name: str
    settings: dict[str, Any]
    steps: int  # num_inference_steps
    call: str  # what else the pipeline, or the scheduler's step, is to be told
    ours: str  # flags of `iddpm sample` that draw the same images from the same noise


def scheduler(config: Config) -> Scheduler:
    """By which the pipeline draws: flow's Euler steps, or those of the run's chain, ancestral or DDIM."""
    d, s = config.diffusion, config.sample
    if not is_chain(d):
        steps = int(s.sampling_steps) if s.sampling_steps.isdigit() else 100
        end = 1 / steps if steps > 1 and d.snr_shift == 1 else None  # the last level, as ours; theirs is 1/1000 for any steps
        settings: dict[str, Any] = dict(num_train_timesteps=1000, shift=d.snr_shift, shift_terminal=end)
        ours = f"--solver ddim --eta 0 --sampling_steps {steps} --clip_denoised False"
        return Scheduler("FlowMatchEulerDiscreteScheduler", settings, steps, "", ours if d.snr_shift == 1 else "")
    chain, ancestral = build.schedule(config), s.solver == "ancestral"
    assert isinstance(chain, Chain)
    settings = dict(
        num_train_timesteps=d.diffusion_steps,
        trained_betas=chain.betas.tolist(),
        prediction_type=PREDICTION[d.parametrization],
        clip_sample=s.clip_denoised,
        clip_sample_range=1.0,
        timestep_spacing="linspace" if ancestral else "leading",
    )
    steps, spec = _steps(config, ancestral)
    ours = f"--sampling_steps {spec} --clip_denoised {s.clip_denoised}"
    if ancestral:
        settings["variance_type"] = "learned_range" if d.learn_sigma else "fixed_small" if d.sigma_small else "fixed_large"
        return Scheduler("DDPMScheduler", settings, steps, "", f"--solver ancestral {ours}")
    settings |= dict(set_alpha_to_one=True, steps_offset=0)
    return Scheduler("DDIMScheduler", settings, steps, "use_clipped_model_output=True", f"--solver ddim --eta 0 {ours}")


def _steps(config: Config, ancestral: bool) -> tuple[int, str]:
    """So many steps as the run samples with, or the nearest number for which both take the same steps; and our name for it."""
    total, asked = config.diffusion.diffusion_steps, config.sample.sampling_steps
    wanted = min(sum(int(part) for part in asked.removeprefix("ddim").split(",")) if asked != "all" else total, total)
    for steps in sorted(range(1, total + 1), key=lambda steps: abs(steps - wanted)):
        if ancestral:
            theirs, spec = np.linspace(0, total - 1, steps).round().astype(int).tolist(), str(steps)
        elif total % steps == 0:
            theirs, spec = list(range(0, total, total // steps)), f"ddim{steps}"
        else:
            continue
        if getattr(build.grid(config, spec), "kept", None) == theirs:
            return steps, spec
    raise AssertionError("all steps of a chain are the same ones")


# ---- the folder


def exported(weights: Weights, folder: Path, solver: str = "") -> list[str]:
    """Write the folder; returns what to tell of it. UserError for the first setting that diffusers cannot express.

    The pipeline draws by `solver`, ancestral or ddim; "": by the run's if it is one of these, else by ddim.
    """
    config = weights.config.updated({"solver": solver or weights.config.sample.solver, "grid": "respaced", "augment": 0.0})
    with torch.device("meta"):
        net = build.network(config)
    require_expressible(config, net)
    assert isinstance(net, UNet)
    unet, by = unet_config(config, net), scheduler(config)
    # Of --augment: in drawing a network is told of no change, so the layer that reads them says nothing.
    tensors = to_theirs({n: t for n, t in weights.tensors.items() if not n.startswith("augment_embed.")}, net)
    if unet["time_embedding_type"] == "learned":
        chain = build.schedule(config)
        assert isinstance(chain, Chain)
        tensors["time_proj.weight"] = timestep_embedding(chain.table.time, net.num_channels, net.max_period)
    notes = []
    if by.name == "DDIMScheduler" and config.diffusion.learn_sigma:
        channels = unet["out_channels"] = config.model.image_channels
        tensors |= {name: tensors[name][:channels].contiguous() for name in ("conv_out.weight", "conv_out.bias")}
        notes = ["the channels of the learned variance are left out, which DDIM does not read (--solver ancestral keeps them)"]

    pipeline = "DDIMPipeline" if by.name == "DDIMScheduler" else "DDPMPipeline"
    index = dict(_class_name=pipeline, unet=["diffusers", "UNet2DModel"], scheduler=["diffusers", by.name])
    files: dict[str, bytes | str] = {
        "unet/diffusion_pytorch_model.safetensors": save(tensors, {"format": "pt"}),
        "unet/config.json": _json(_class_name="UNet2DModel", **unet),
        "scheduler/scheduler_config.json": _json(_class_name=by.name, **by.settings),
        "README.md": card(weights, "diffusers", _draw(config, by)),
        "model_index.json": _json(**index),  # last: without it there is no pipeline
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_file(folder / name, content)
    use = (
        f"next: in Python, diffusers.DiffusionPipeline.from_pretrained({str(folder)!r}); {folder / 'README.md'} shows how to draw"
    )
    return [f"wrote in {folder}: {', '.join(files)}", *notes, use]


def _draw(config: Config, by: Scheduler) -> str:
    """How to draw with the folder, and what of ours gives the same."""
    more, labels = f", {by.call}" * bool(by.call), config.model.num_classes
    if config.model.class_cond:  # no pipeline of diffusers takes classes
        height, width = image_size(config.model)
        lines = [
            "import torch",
            "",
            f"x, labels = torch.randn(8, {config.model.image_channels}, {height}, {width}), torch.arange(8) % {labels}",
            f"pipeline.scheduler.set_timesteps({by.steps})",
            "for t in pipeline.scheduler.timesteps:",
            "    with torch.no_grad():",
            "        output = pipeline.unet(x, t, class_labels=labels).sample",
            f"    x = pipeline.scheduler.step(output, t, x{more}).prev_sample",
            "images = pipeline.numpy_to_pil((x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy())",
        ]
    else:
        lines = [f"images = pipeline(batch_size=8, num_inference_steps={by.steps}{more}).images"]
    code = "\n".join(["from diffusers import DiffusionPipeline", "", 'pipeline = DiffusionPipeline.from_pretrained(".")', *lines])
    same = f"From the same noise, `iddpm sample RUN {by.ours}` draws the same images.\n" if by.ours else ""
    return f"```python\n{code}\n```\n\n{same}"


def _json(**content: Any) -> str:
    return json.dumps({"_diffusers_version": VERSION} | content, indent=2) + "\n"
