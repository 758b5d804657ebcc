"""From a config to the things it names: network, schedule, grid, denoiser, objective, law of t, solver."""

import dataclasses
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from iddpm.config import Config, image_size, is_chain
from iddpm.config.choices import choices, make, row
from iddpm.diffusion.denoiser import Denoiser, Network, clip, fixed_large, fixed_small, learned_range
from iddpm.diffusion.grid import Chain, Grid, from_noise, respace, walk
from iddpm.diffusion.law import Uniform
from iddpm.diffusion.objective import CHAIN_ONLY, LEARN_VARIANCE, Terms, clean_cross_entropy, cross_entropy, simple
from iddpm.diffusion.parametrization import Scalings, previous, v
from iddpm.diffusion.schedule import Schedule
from iddpm.diffusion.solvers import Solver
from iddpm.errors import UserError
from iddpm.nn import Asked


def network(config: Config) -> nn.Module:
    """The untrained network of a config; UserError where the sizes do not fit together."""
    m, task = config.model, config.task
    if m.num_head_channels == 0:
        raise UserError("--num_head_channels 0: give a number of channels, or -1 to have --num_heads decide")
    asked = Asked(
        image_size(m),
        in_channels=m.image_channels,
        out_channels=m.num_classes if task.classifies else m.image_channels * (2 if config.diffusion.learn_sigma else 1),
        classes=m.num_classes if m.class_cond and not task.classifies else None,
        logits=task.classifies,
        small=task.enlarges,
        small_level=m.low_res_noise > 0,
    )
    made = make("network", m.network, config.numbers())
    try:
        # ours reads the settings of a U-Net; a row with numbers of its own has them already
        net: nn.Module = made(asked) if choices("network")[m.network].numbers or not _takes(made, "settings") else made(asked, m)
    except ValueError as e:
        raise UserError(f"--image_size {m.image_size}: {e}") from None
    return net


def schedule(config: Config) -> Schedule:
    """The schedule of a config, as training sees it: the whole chain, or a continuous one."""
    d = config.diffusion
    if not is_chain(d):
        made: Schedule = make("noise_schedule", d.noise_schedule, config.numbers())
        return made
    return _chain(config, None)


def grid(config: Config, sampling_steps: str = "") -> Grid:
    """The grid that solvers and the bound walk, of so many steps, by default the config's; UserError where the spec does not fit.

    On a continuous schedule "all" stands for 1000.
    """
    d, spec = config.diffusion, sampling_steps or config.sample.sampling_steps
    if not is_chain(d):
        return walk(schedule(config), 1000 if spec == "all" else int(spec))
    try:
        kept = respace(d.diffusion_steps, "" if spec == "all" else spec)
        return _chain(config, kept if config.sample.published else from_noise(kept, _chain(config, None).table.alpha))
    except ValueError as e:
        raise UserError(f"--sampling_steps {spec}: {e}") from None


def _chain(config: Config, kept: list[int] | None) -> Chain:
    d, numbers = config.diffusion, config.numbers()
    own = {k: numbers[k] for k in choices("noise_schedule")[d.noise_schedule].numbers}
    return Chain(row("noise_schedule", d.noise_schedule)(d.diffusion_steps, **own), kept, rescale_time=d.rescale_timesteps)


def parametrization(config: Config) -> Callable[[Any], Scalings]:
    """What the output of a config's network means."""
    made: Callable[[Any], Scalings] = make("parametrization", config.diffusion.parametrization, config.numbers())
    return made


def denoiser(config: Config, net: Network, *after: Callable[[Tensor], Tensor]) -> Denoiser:
    """The denoiser of a config around a network; `after` is done to its x0, in turn."""
    d = config.diffusion
    variance = learned_range if d.learn_sigma else fixed_small if d.sigma_small else fixed_large
    return Denoiser(net, parametrization(config), variance, after)


def sampling_denoiser(config: Config, net: Network, *after: Callable[[Tensor], Tensor]) -> Denoiser:
    """As `denoiser`, to draw with: x0 is clipped first where --clip_denoised says so.

    Between the levels of a continuous schedule the variance is the posterior's. Beta's, which is right for the many small steps
    of a chain, adds far too much noise in few large ones (measured: docs/log.md).
    """
    made = denoiser(config, net, *_clipping(config), *after)
    return made if is_chain(config.diffusion) else dataclasses.replace(made, variance=fixed_small)


def bound_denoiser(config: Config, net: Network) -> Denoiser:
    """As `denoiser`, to measure likelihood with: clipped likewise, of the config's own variance, whose bound is the tighter."""
    return denoiser(config, net, *_clipping(config))


def _clipping(config: Config) -> tuple[Callable[[Tensor], Tensor], ...]:
    return (clip,) if config.sample.clip_denoised else ()


def objective(config: Config) -> Callable[..., Terms]:
    """The loss of a config."""
    d = config.diffusion
    if config.task.classifies:
        return cross_entropy if d.noised else clean_cross_entropy
    loss = make("objective", d.objective_name, config.numbers())
    return partial(loss, weighting=make("weighting", d.weighting, config.numbers())) if _takes(loss, "weighting") else loss


def law(config: Config) -> Uniform:
    """The law of t of a config."""
    name, numbers = config.diffusion.schedule_sampler, config.numbers()
    own = {k: numbers[k] for k in choices("schedule_sampler")[name].numbers}
    made: Uniform = row("schedule_sampler", name)(schedule(config), **own)
    return made


def solver(config: Config) -> Solver:
    """The solver of a config, its numbers filled in."""
    made: Solver = make("solver", config.sample.solver, config.numbers())
    return made


def _takes(f: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(f).parameters


def require_fit(config: Config) -> Config:
    """The config itself, or UserError where its choices, each fine alone, do not go together."""
    d = config.diffusion
    if config.task.classifies:
        return config
    loss, name = row("objective", d.objective_name), d.noise_schedule
    if d.learn_sigma and loss is simple:
        raise UserError("--objective simple does not train the variance of --learn_sigma: take hybrid or vlb")
    if not d.learn_sigma and loss in LEARN_VARIANCE:
        raise UserError(f"--objective {d.objective} needs --learn_sigma True")
    if not is_chain(d) and loss in CHAIN_ONLY:
        raise UserError(
            f"--objective {d.objective} reads the steps of a chain: take --noise_schedule linear or cosine, not {name}"
        )
    if fault := _misfit(config, d.parametrization):
        others = [other for other in choices("parametrization") if not _misfit(config, other)]
        raise UserError(f"--parametrization {d.parametrization} {fault} of --noise_schedule {name}: take {' or '.join(others)}")
    return config


def _misfit(config: Config, name: str) -> str:
    """Why a parametrization does not go with the schedule of a config; empty where it does."""
    made = make("parametrization", name, config.numbers())
    if made is previous and not is_chain(config.diffusion):
        return "reads the steps of a chain, not levels"
    level = schedule(config)(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    if made is v and (level.alpha**2 + level.sigma**2 - 1).abs().max() > 1e-6:
        return "is for alpha^2 + sigma^2 = 1, not for the levels"
    c = made(next(iter(grid(config))))
    finite = all(torch.isfinite(x).all() for x in (c.skip, c.out, c.time))
    return "" if finite else "divides by alpha, which is 0 at the noisiest level"


def device(name: str) -> torch.device:
    """The device of a --device flag; UserError where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        found = torch.device(name)
        torch.zeros(1, device=found).item()  # which a device without memory, "meta", cannot give back
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
