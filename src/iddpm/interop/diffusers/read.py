"""A folder of diffusers' UNet2DModel and its scheduler, as weights and config of ours; nothing in it is executed."""

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec
import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from iddpm import build, fit
from iddpm.config import Config, check
from iddpm.diffusion.grid import Chain
from iddpm.errors import UserError
from iddpm.interop.diffusers.names import to_ours, to_theirs
from iddpm.interop.diffusers.write import PREDICTION
from iddpm.interop.openai.formats import files
from iddpm.interop.openai.formats.convert import agreed, named
from iddpm.nn import timestep_embedding
from iddpm.nn.layers import GroupNorm
from iddpm.nn.unet import UNet
from iddpm.records import decode
from iddpm.store.checkpoint import Saved
from iddpm.store.weights import require_finite

WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
Size = Annotated[int, msgspec.Meta(ge=1, le=65536)]
Sizes = Annotated[list[Size], msgspec.Meta(min_length=1, max_length=16)]


class NetworkFile(TypedDict, total=False):
    """The settings of a UNet2DModel that are read, as its config.json has them."""

    sample_size: Size | Sizes | None
    in_channels: Size
    out_channels: Size
    center_input_sample: bool
    time_embedding_type: str
    time_embedding_dim: int | None
    freq_shift: Annotated[int, msgspec.Meta(ge=0, le=1)]
    flip_sin_to_cos: bool
    down_block_types: Annotated[list[str], msgspec.Meta(min_length=1)]
    mid_block_type: str | None
    up_block_types: list[str]
    block_out_channels: Sizes
    layers_per_block: Size
    mid_block_scale_factor: float
    downsample_padding: Annotated[int, msgspec.Meta(ge=0, le=1)]
    downsample_type: str | None
    upsample_type: str | None
    dropout: float
    act_fn: str
    attention_head_dim: Size | None
    norm_num_groups: Size
    attn_norm_num_groups: Size | None
    norm_eps: float
    resnet_time_scale_shift: str
    add_attention: bool
    class_embed_type: str | None
    num_class_embeds: Size | None
    num_train_timesteps: Size | None


class SchedulerFile(TypedDict, total=False):
    """The settings of a scheduler that are read, as its scheduler_config.json has them."""

    _class_name: str
    num_train_timesteps: Size
    beta_start: float
    beta_end: float
    beta_schedule: str
    trained_betas: list[float] | None
    variance_type: str
    clip_sample: bool
    prediction_type: str
    rescale_betas_zero_snr: bool
    shift: float
    use_dynamic_shifting: bool
    invert_sigmas: bool
    use_karras_sigmas: bool
    use_exponential_sigmas: bool
    use_beta_sigmas: bool
    stochastic_sampling: bool


DEFAULTS = NetworkFile(  # of UNet2DModel; old folders leave out what came later
    sample_size=None, in_channels=3, out_channels=3, center_input_sample=False, time_embedding_type="positional",
    time_embedding_dim=None, freq_shift=0, flip_sin_to_cos=True, block_out_channels=[224, 448, 672, 896],
    down_block_types=["DownBlock2D", *["AttnDownBlock2D"] * 3], up_block_types=[*["AttnUpBlock2D"] * 3, "UpBlock2D"],
    mid_block_type="UNetMidBlock2D", layers_per_block=2, mid_block_scale_factor=1.0, downsample_padding=1, downsample_type="conv",
    upsample_type="conv", dropout=0.0, act_fn="silu", attention_head_dim=8, norm_num_groups=32, attn_norm_num_groups=None,
    norm_eps=1e-5, resnet_time_scale_shift="default", add_attention=True, class_embed_type=None, num_class_embeds=None,
    num_train_timesteps=None,
)  # fmt: skip
ONLY = {  # what our U-Net has in one way
    "center_input_sample": (False,), "time_embedding_type": ("positional", "learned"), "time_embedding_dim": (None,),
    "mid_block_type": ("UNetMidBlock2D",), "mid_block_scale_factor": (1,), "act_fn": ("silu", "swish"), "add_attention": (True,),
    "class_embed_type": (None,), "resnet_time_scale_shift": ("default", "scale_shift"),
}  # fmt: skip
BLOCKS = {"DownBlock2D": False, "ResnetDownsampleBlock2D": True, "UpBlock2D": False, "ResnetUpsampleBlock2D": True}
ATTEND = ("AttnDownBlock2D", "AttnUpBlock2D")
OLD = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}  # names before diffusers 0.13


def imported(folder: Path, given: Mapping[str, Any] = {}, classes: str = "") -> tuple[Saved, Config, list[str]]:
    """The weights of a pipeline's folder, their config, and how that came about; `given` and `classes` as in `convert.imported`.

    unet/ and scheduler/ may be in it, or all files side by side. UserError where ours cannot compute what diffusers does.
    """
    at, weights, config = read(folder)
    config = named(agreed(config, given, at), classes)
    return Saved(0, weights, {}, {}, dict(step=0, images=0, weights_only=True)), config, [f"config: {at} and the scheduler's"]


def read(folder: Path) -> tuple[Path, dict[str, Tensor], Config]:
    """The U-Net's config.json in a folder, its weights and its config as ours."""
    at = _file(folder, "unet", "config.json")
    theirs: dict[str, Any] = {**DEFAULTS, **decode(at.read_bytes(), NetworkFile, at)}
    for name, able in ONLY.items():
        if theirs[name] not in able:
            raise UserError(f"{at}: {name} {theirs[name]!r} is not for iddpm's U-Net, which has {' or '.join(map(str, able))}")
    tensors = _tensors(at.parent)
    config = Config().updated(_network(theirs, at) | _process(folder, theirs))
    config = fit.require_fit(check(config))
    with torch.device("meta"):
        net = build.network(config)
    assert isinstance(net, UNet)
    groups, of_middle = theirs["norm_num_groups"], theirs["attn_norm_num_groups"]
    if of_middle is None and theirs["resnet_time_scale_shift"] == "default":
        of_middle = groups  # with scale_shift there would be no norm
    if {m.num_groups for m in net.modules() if isinstance(m, GroupNorm)} != {groups, of_middle}:
        raise UserError(f"{at}: group norm in {groups} groups, {of_middle} in the middle: iddpm has gcd(32, channels) everywhere")
    config = _time(config, net, theirs, tensors, at)
    wanted = {name: t.shape for name, t in net.state_dict().items()}
    expected = to_theirs({name: torch.empty(shape, device="meta") for name, shape in wanted.items()}, net)
    wrong = {name for name in tensors.keys() | expected.keys() if _shape(tensors, name) != _shape(expected, name)}
    if wrong:
        raise UserError(f"{at.parent}: its weights are not those of its config.json, as {min(wrong)}")
    weights = to_ours(tensors, net)
    if not theirs["flip_sin_to_cos"]:  # sines first: the layer that reads them has its columns in that order
        half = net.num_channels // 2
        weights["time_embed.0.weight"] = weights["time_embed.0.weight"].roll(half, dims=1)
    return at, require_finite(weights, at.parent), config


# ---- files


def _file(folder: Path, part: str, name: str) -> Path:
    for path in (folder / part / name, folder / name):
        if path.is_file():
            return path
    raise UserError(f"{folder} holds no {part}/{name}: give the folder of a diffusers pipeline, or a file of weights")


def _tensors(folder: Path) -> dict[str, Tensor]:
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder} holds neither {' nor '.join(WEIGHTS)}")
    try:
        found = load_file(path) if path.suffix == ".safetensors" else files.read(path)
    except safetensors.SafetensorError as e:
        raise UserError(f"{path} is damaged or no .safetensors file ({e})") from None
    for old, new in OLD.items():
        found = {name.replace(old, new): t for name, t in found.items()}
    return {name: t.float() for name, t in found.items()}


# ---- settings


def _network(theirs: Mapping[str, Any], at: Path) -> dict[str, Any]:
    """The fields of the U-Net."""
    down, up = ([kind.removeprefix("UNetRes") for kind in theirs[f"{way}_block_types"]] for way in ("down", "up"))
    widths, attends = theirs["block_out_channels"], [kind in ATTEND for kind in down]
    resized = {BLOCKS[kind] for kind in (*down[:-1], *up[:-1]) if kind in BLOCKS}  # the last ones change no size
    if any(attends[:-1]):
        resized.add(theirs["downsample_type"] == "resnet")
    if any(attends[1:]):
        resized.add(theirs["upsample_type"] == "resnet")
    known = all(kind in BLOCKS or kind in ATTEND for kind in (*down, *up)) and len(down) == len(widths)
    if not known or attends != [kind in ATTEND for kind in up[::-1]] or len(resized) > 1:
        raise UserError(f"{at}: blocks {', '.join([*down, *up])} are put together as no U-Net of iddpm is")
    size = theirs["sample_size"]
    if size is None:
        raise UserError(f"{at} tells no sample_size: write the height and width of the images into it")
    height, width = (size[0], size[-1]) if isinstance(size, list) else (size, size)
    side, classes, head = min(height, width), theirs["num_class_embeds"], theirs["attention_head_dim"]
    own = dict(norm_eps=theirs["norm_eps"], freq_shift=theirs["freq_shift"], pad_after=theirs["downsample_padding"] == 0)
    fields: dict[str, Any] = dict(
        image_size=str(height) if height == width else f"{height}x{width}",
        image_channels=theirs["in_channels"],
        learn_sigma=theirs["out_channels"] == 2 * theirs["in_channels"],
        num_channels=widths[0],
        num_res_blocks=theirs["layers_per_block"],
        channel_mult=",".join(f"{width / widths[0]:.10g}" for width in widths),
        attention_resolutions=",".join(str(side // 2**level) for level, attend in enumerate(attends) if attend),
        resblock_updown=True in resized,
        use_scale_shift_norm=theirs["resnet_time_scale_shift"] == "scale_shift",
        dropout=float(theirs["dropout"]),
        network="unet",
    )
    fields |= dict(num_heads=1) if head is None else dict(num_head_channels=head)
    if classes:
        fields |= dict(class_cond=True, num_classes=classes)
    return fields if own == dict(norm_eps=1e-5, freq_shift=0, pad_after=False) else fields | own | dict(network="unet_ddpm")


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None


def _time(config: Config, net: UNet, theirs: Mapping[str, Any], tensors: dict[str, Tensor], at: Path) -> Config:
    """The config with the times that the network is told; a table of them is taken out of the tensors."""
    if theirs["time_embedding_type"] != "learned":
        return config
    table, steps = tensors.pop("time_proj.weight", torch.zeros(0)), theirs["num_train_timesteps"] or 1
    times = torch.arange(steps) * (1000 / steps)
    ours = timestep_embedding(times, net.num_channels, net.max_period)
    if table.shape != ours.shape or (table - ours).abs().max() > 1e-4:
        raise UserError(f"{at}: its table of times was learned, and iddpm's are computed")
    return config.updated({"rescale_timesteps": True})


def _process(folder: Path, theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the process, and how it is sampled from."""
    at = _file(folder, "scheduler", "scheduler_config.json")
    s = decode(at.read_bytes(), SchedulerFile, at)
    name = s.get("_class_name", "")
    if name.startswith("FlowMatch"):
        if s.get("num_train_timesteps", 1000) != 1000:
            raise UserError(
                f"{at}: num_train_timesteps {s['num_train_timesteps']}: iddpm tells a flow's network times up to 1000"
            )
        others = ("use_dynamic_shifting", "invert_sigmas", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
        if odd := [name for name, value in s.items() if name in (*others, "stochastic_sampling") and value]:
            raise UserError(f"{at}: {odd[0]} True: iddpm draws by flow matching with a fixed shift alone")
        fields = dict(noise_schedule="flow", parametrization="flow", snr_shift=float(s.get("shift", 1.0)), ema_rate="")
        return fields | dict(solver="ddim", sampling_steps="50", clip_denoised=False)
    called = {value: key for key, value in PREDICTION.items()}
    predicts, steps = s.get("prediction_type", "epsilon"), s.get("num_train_timesteps", 1000)
    if predicts not in called or name.startswith(("EDM", "KarrasVe", "ScoreSdeVe")):
        raise UserError(f"{at}: {name} with prediction_type {predicts!r}: iddpm reads {', '.join(called)}, and flow matching")
    ancestral, learned = name == "DDPMScheduler", theirs["out_channels"] == 2 * theirs["in_channels"]
    variance = s.get("variance_type", "fixed_small")
    if ancestral and learned != (variance == "learned_range"):
        raise UserError(
            f"{at}: variance_type {variance} with {theirs['out_channels']} output channels: learned_range alone has twice"
        )
    return _schedule(s, steps, at) | dict(
        parametrization=called[predicts],
        rescale_timesteps=steps == 1000,  # then both ways are the same; else the network is told the steps as they are
        diffusion_steps=steps,
        sigma_small=ancestral and variance.startswith("fixed_small"),
        ema_rate="",
        solver="ancestral" if ancestral else "ddim",
        sampling_steps=str(min(steps, 250)) if ancestral else "all" if steps < 50 else "50",
        clip_denoised=bool(s.get("clip_sample", True)),
    )


def _schedule(s: SchedulerFile, steps: int, at: Path) -> dict[str, Any]:
    """The noise schedule of ours that has these betas."""
    kind, zero = s.get("beta_schedule", "linear"), bool(s.get("rescale_betas_zero_snr", False))
    if s.get("trained_betas") is None and kind == "squaredcos_cap_v2":
        return dict(noise_schedule="cosine", zero_terminal_snr=zero)
    if s.get("trained_betas") is None and kind != "linear":
        raise UserError(f"{at}: beta_schedule {kind!r}: iddpm has linear and squaredcos_cap_v2 (cosine)")
    ends = s.get("beta_start", 1e-4), s.get("beta_end", 0.02)
    betas = torch.tensor(s["trained_betas"]) if s.get("trained_betas") is not None else torch.linspace(*ends, steps)
    if len(betas) != steps or not bool(((betas > 0) & (betas <= 1)).all()):
        raise UserError(f"{at}: {len(betas)} betas for {steps} steps, or some that are not above 0 and at most 1")
    found = schedule_of(betas)
    if not found:
        raise UserError(f"{at}: its betas are those of no noise schedule of iddpm (linear, cosine)")
    return found | dict(zero_terminal_snr=found["zero_terminal_snr"] or zero)


def schedule_of(betas: Tensor) -> dict[str, Any]:
    """The fields of the chain of ours that has these betas, each above 0 and at most 1; none where there is no such."""
    theirs, steps = (1 - betas.double()).cumprod(0), len(betas)
    for name, stretched in product(("linear", "cosine", "sigmoid_chain"), (False, True)):
        first = _alphas(noise_schedule=name, diffusion_steps=steps)[0] ** 2
        shift = round((((1 - theirs[0]) / theirs[0]) / ((1 - first) / first)).sqrt().item(), 4)
        found = dict(noise_schedule=name, diffusion_steps=steps, snr_shift=shift, zero_terminal_snr=stretched)
        if torch.allclose(_alphas(**found), theirs.sqrt(), rtol=1e-4, atol=1e-6):
            return found
    return {}


def _alphas(**process: Any) -> Tensor:
    """alpha of each step of a chain."""
    chain = build.schedule(Config().updated(process))
    assert isinstance(chain, Chain)
    return chain.table.alpha
