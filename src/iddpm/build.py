"""From a config to the things it names: network, chain, denoiser, objective, law of t, solver."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from iddpm.config import Config, Diffusion, Sample, image_size, numbers
from iddpm.diffusion.denoiser import Denoiser, Network, fixed_large, fixed_small, learned_range
from iddpm.diffusion.law import LAWS, Uniform
from iddpm.diffusion.objective import OBJECTIVES, Terms, clean_cross_entropy, cross_entropy
from iddpm.diffusion.parametrization import PARAMETRIZATIONS
from iddpm.diffusion.schedule import SCHEDULES, Chain, respace
from iddpm.diffusion.solvers import SOLVERS, State
from iddpm.errors import UserError
from iddpm.nn import Classifier, SuperResUNet, UNet, attention_rates, channel_mult_for


def network(config: Config) -> UNet | Classifier:
    """The untrained network of a config; UserError where the sizes do not fit together."""
    m = config.model
    side = min(image_size(m))
    mult = numbers(m.channel_mult, "channel_mult", float) if m.channel_mult else channel_mult_for(side)
    try:
        common: dict[str, Any] = dict(
            in_channels=m.image_channels,
            num_channels=m.num_channels,
            num_res_blocks=m.num_res_blocks,
            attention=attention_rates(numbers(m.attention_resolutions, "attention_resolutions"), side, len(mult)),
            dropout=m.dropout,
            channel_mult=mult,
            use_checkpoint=m.use_checkpoint,
            num_heads=m.num_heads,
            num_head_channels=m.num_head_channels,
            use_scale_shift_norm=m.use_scale_shift_norm,
            resblock_updown=m.resblock_updown,
            new_attention_order=m.new_attention_order,
        )
        net = NETWORKS[m.network](config, common)
    except ValueError as e:
        raise UserError(str(e)) from None
    if bad := [s for s in image_size(m) if s % 2 ** (len(mult) - 1)]:
        raise UserError(f"--image_size {m.image_size}: {len(mult)} levels need multiples of {2 ** (len(mult) - 1)}, not {bad[0]}")
    return net


def _unet(config: Config, common: dict[str, Any]) -> UNet:
    return UNet(**common, **_outputs(config))


def _super_res(config: Config, common: dict[str, Any]) -> UNet:
    return SuperResUNet(**common, **_outputs(config), sees_noise_level=config.model.low_res_noise > 0)


def _outputs(config: Config) -> dict[str, Any]:
    m = config.model
    return dict(
        out_channels=m.image_channels * (2 if config.diffusion.learn_sigma else 1),
        num_classes=m.num_classes if m.class_cond else None,
        num_heads_upsample=m.num_heads_upsample,
    )


def _classifier(config: Config, common: dict[str, Any]) -> Classifier:
    m = config.model
    if len(set(image_size(m))) > 1 and m.classifier_pool == "attention":
        raise ValueError(f"--image_size {m.image_size}: a classifier of this shape needs --classifier_pool adaptive")
    return Classifier(**common, image_size=min(image_size(m)), out_channels=m.num_classes, pool=m.classifier_pool)


NETWORKS: dict[str, Callable[[Config, dict[str, Any]], UNet | Classifier]] = {
    "unet": _unet,
    "super_res": _super_res,
    "classifier": _classifier,
}


def chain(d: Diffusion, sampling_steps: str = "all") -> Chain:
    """The chain of a config, whole or respaced; UserError where the spec does not fit."""
    schedule = SCHEDULES[d.noise_schedule](d.diffusion_steps)
    try:
        kept = respace(d.diffusion_steps, "" if sampling_steps == "all" else sampling_steps)
    except ValueError as e:
        raise UserError(f"--sampling_steps {sampling_steps}: {e}") from None
    return Chain(schedule, kept, rescale_time=d.rescale_timesteps)


def denoiser(d: Diffusion, net: Network, sampling_steps: str = "all", clip: bool = False) -> Denoiser:
    """The denoiser of a config around a network."""
    variance = learned_range if d.learn_sigma else fixed_small if d.sigma_small else fixed_large
    return Denoiser(net, chain(d, sampling_steps), PARAMETRIZATIONS[d.parametrization], variance, clip)


def objective(config: Config) -> Callable[..., Terms]:
    """The loss of a config."""
    d = config.diffusion
    if config.model.network == "classifier":
        return cross_entropy if d.noised else clean_cross_entropy
    return OBJECTIVES[("hybrid" if d.learn_sigma else "simple") if d.objective == "auto" else d.objective]


def law(d: Diffusion) -> Uniform:
    """The law of t of a config."""
    return LAWS[d.schedule_sampler](d.diffusion_steps)


def solver(s: Sample) -> Callable[..., Iterator[State]]:
    """The solver of a config, its numbers filled in."""
    return partial(SOLVERS[s.solver], eta=s.eta) if s.solver == "ddim" else SOLVERS[s.solver]


def device(name: str) -> torch.device:
    """The device of a --device flag; UserError where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        found = torch.device(name)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {name} cannot be used here ({str(e).splitlines()[0]}): try --device cpu") from None
    return found


DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def in_precision(net: nn.Module, device: torch.device, precision: str) -> Network:
    """The network, run in the given precision; what goes in and comes out stays float32."""
    dtype = DTYPES[precision]

    def run(x: Tensor, time: Tensor, **cond: Tensor) -> Tensor:
        context: AbstractContextManager = nullcontext() if dtype is None else torch.autocast(device.type, dtype)
        with context:
            return net(x, time, **cond)

    return run
