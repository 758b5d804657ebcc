"""From a config to the things it names: network, schedule, grid, denoiser, objective, law of t, solver."""

import dataclasses
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from iddpm.config import FOUND, Config, given_shape, half_bin, image_size, is_chain
from iddpm.config.choices import choices, make, row
from iddpm.diffusion.denoiser import (
    Cond,
    Denoise,
    Denoiser,
    Network,
    Threshold,
    clip,
    fixed_large,
    fixed_small,
    learned_range,
)
from iddpm.diffusion.grid import Chain, Grid, from_noise, respace, steps_at, walk
from iddpm.diffusion.guidance import Steering, Taught, autoguided, cfg, classifier_free, first_known, limited, told
from iddpm.diffusion.law import Uniform
from iddpm.diffusion.objective import Terms, clean_cross_entropy, cross_entropy
from iddpm.diffusion.parametrization import Scalings
from iddpm.diffusion.schedule import Adjusted, Schedule, Shifted
from iddpm.diffusion.solvers import Solver
from iddpm.diffusion.weighting import Weighting
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
        # with --class_dropout one more stands for no class
        classes=m.num_classes + (m.class_dropout > 0) if m.class_cond and not task.classifies else None,
        logits=task.classifies,
        given=(given_shape(m) or (0,))[0],
        small_level=m.low_res_noise > 0,
        scale=m.trained_guidance > 0,
        augment=m.augment > 0,
    )
    made = make("network", m.network, config.numbers())
    try:
        net: nn.Module = made(asked, m) if takes(made, "settings") else made(asked)  # ours read the fields of Model, too
    except ValueError as e:
        raise UserError(f"--network {m.network}, --image_size {m.image_size}: {e}") from None
    return net


def schedule(config: Config) -> Schedule:
    """The schedule of a config, as training sees it: the whole chain, or a continuous one."""
    d = config.diffusion
    if not is_chain(d):
        made: Schedule = make("noise_schedule", d.noise_schedule, config.numbers())
        return made if d.snr_shift == 1 else Shifted(made, d.snr_shift)
    return _chain(config, None)


def grid(config: Config, sampling_steps: str = "") -> Grid:
    """The grid that solvers and the bound walk, of so many steps, by default the config's; UserError where the spec does not fit.

    On a continuous schedule "all" stands for 1000.
    """
    d, spec = config.diffusion, sampling_steps or config.sample.sampling_steps
    try:
        if not is_chain(d):
            return walk(schedule(config), _levels(config, 1000 if spec == "all" else int(spec)))
        if config.sample.grid != "respaced":
            return _chain(config, steps_at(_levels(config, d.diffusion_steps if spec == "all" else int(spec)), d.diffusion_steps))
        kept = respace(d.diffusion_steps, "" if spec == "all" else spec)
        return _chain(config, kept if config.sample.published else from_noise(kept, _chain(config, None).table.alpha))
    except ValueError as e:
        raise UserError(f"--sampling_steps {spec}: {e}") from None


def _levels(config: Config, steps: int) -> Tensor:
    """The u of so many steps on the config's grid."""
    if config.sample.grid in FOUND:
        if len(config.sample.found) != steps:
            raise UserError(f"--grid {config.sample.grid} is found for a trained model: iddpm sample RUN --find_grid STEPS")
        return torch.tensor(config.sample.found, dtype=torch.float64)
    levels: Tensor = make("grid", config.sample.grid, config.numbers())(schedule(config), steps)
    return levels


def _chain(config: Config, kept: list[int] | None) -> Chain:
    d, numbers = config.diffusion, config.numbers()
    own = {k: numbers[k] for k in choices("noise_schedule")[d.noise_schedule].numbers}
    made = row("noise_schedule", d.noise_schedule)(d.diffusion_steps, **own)
    if d.snr_shift != 1 or d.zero_terminal_snr:
        made = Adjusted(made, d.snr_shift, d.zero_terminal_snr)
    return Chain(made, kept, rescale_time=d.rescale_timesteps)


def parametrization(config: Config) -> Callable[[Any], Scalings]:
    """What the output of a config's network means."""
    made: Callable[[Any], Scalings] = make("parametrization", config.diffusion.parametrization, config.numbers())
    return made


def denoiser(config: Config, net: Network, *after: Callable[[Tensor], Tensor]) -> Denoiser:
    """The denoiser of a config around a network; `after` is done to its x0, in turn."""
    d = config.diffusion
    variance = learned_range if d.learn_sigma else fixed_small if d.sigma_small else fixed_large
    return Denoiser(net, parametrization(config), variance, after, half_bin(config.model))


def sampling_denoiser(config: Config, net: Network, *after: Callable[[Tensor], Tensor]) -> Denoiser:
    """As `denoiser`, to draw with: x0 is clipped first where --clip_denoised says so.

    Between the levels of a continuous schedule the variance is the posterior's. Beta's, which is right for the many small steps
    of a chain, adds far too much noise in few large ones (measured: docs/log.md).
    """
    made = denoiser(config, net, *_limits(config), *after)
    return made if is_chain(config.diffusion) else dataclasses.replace(made, variance=fixed_small)


def bound_denoiser(config: Config, net: Network) -> Denoiser:
    """As `denoiser`, to measure likelihood with: clipped likewise, of the config's own variance, whose bound is the tighter."""
    return denoiser(config, net, *((clip,) if config.sample.clip_denoised else ()))


def _limits(config: Config) -> tuple[Callable[[Tensor], Tensor], ...]:
    s = config.sample
    return (Threshold(s.dynamic_threshold),) if s.dynamic_threshold else (clip,) if s.clip_denoised else ()


class Weak(NamedTuple):
    """A model to guide away from, and how far."""

    config: Config
    net: Network
    scale: float


def drawing(config: Config, net: Network, cond: Cond, *after: Callable[[Tensor], Tensor], weak: Weak | None = None) -> Denoise:
    """What a solver walks with: the sampling denoiser with its conditions, and the guidance that the config asks for.

    One is made for each path, whose steps guidance may remember. `after` is done to x0, in turn.
    """
    s, made = config.sample, sampling_denoiser(config, net, *after)
    denoise: Denoise = partial(made, cond=cond)
    if knows_guidance(config) and not weak:
        denoise = told(made, cond, s.guidance, s.guidance_low, s.guidance_high)
    elif s.guidance != 1 or weak:
        bare = dataclasses.replace(made, after=())
        denoise = partial(bare, cond=cond)
        if knows_guidance(config):
            denoise = told(bare, cond, s.guidance, s.guidance_low, s.guidance_high)
        elif s.guidance != 1:
            denoise = classifier_free(bare, cond, _dropped(config, cond), _steering(config, s.guidance))
        if weak:
            other = dataclasses.replace(sampling_denoiser(weak.config, weak.net), after=())
            seen = {name: value for name, value in cond.items() if name != "y" or weak.config.model.class_cond}
            denoise = autoguided(denoise, partial(other, cond=seen), _steering(config, weak.scale))
        denoise = limited(denoise, *made.after)
    return first_known(denoise) if s.skip_first else denoise


def _dropped(config: Config, cond: Cond) -> dict[str, Tensor]:
    """The conditions without what is dropped in training: the class, the image given."""
    m, without = config.model, dict(cond)
    if m.class_dropout:
        without["y"] = torch.full_like(cond["y"], m.num_classes)
    if m.given_dropout:
        without["given"] = torch.zeros_like(cond["given"])
    return without


def knows_guidance(config: Config) -> bool:
    """Whether the network itself is to guide, by what it learned."""
    return config.model.trained_guidance > 0 and config.sample.guidance_kind == "auto"


def _steering(config: Config, scale: float) -> Steering:
    s = config.sample
    kind = cfg if s.guidance_kind == "auto" else make("guidance_kind", s.guidance_kind, config.numbers())
    return Steering(kind(scale), s.guidance_low, s.guidance_high, s.guidance_rescale)


def weighting(config: Config) -> Weighting:
    """The weighting of a config; one that has a `state_dict` remembers what it was shown."""
    made: Weighting = make("weighting", config.diffusion.weighting, config.numbers())
    return made


def objective(
    config: Config, weighted: Weighting | None = None, progress: Callable[[], float] = lambda: 1.0
) -> Callable[..., Terms]:
    """The loss of a config; with `weighted`, a weighting that may remember, in the place of a new one.

    `progress` tells the share of the run that is done, to a loss that changes with it.
    """
    d = config.diffusion
    if config.task.classifies:
        return cross_entropy if d.noised else clean_cross_entropy
    loss = make("objective", d.objective_name, config.numbers())
    asks: dict[str, Any] = {"weighting": weighted or weighting(config)} if takes(loss, "weighting") else {}
    if config.model.trained_guidance:
        asks["toward"] = Taught(config.model.num_classes)
    if takes(loss, "progress"):
        asks["progress"] = progress
    return partial(loss, **asks) if asks else loss


def path_levels(config: Config) -> int:
    """The levels of the paths that a config's loss learns in the place of images; 0 where it learns images."""
    steps: int = getattr(make("objective", config.diffusion.objective_name, config.numbers()), "path_steps", 0)
    return 0 if config.task.classifies else steps


def law(config: Config) -> Uniform:
    """The law of t of a config."""
    name, numbers = config.diffusion.schedule_sampler, config.numbers()
    own = {k: numbers[k] for k in choices("schedule_sampler")[name].numbers}
    made: Uniform = row("schedule_sampler", name)(schedule(config), **own)
    return made


def solver(config: Config) -> Solver:
    """The solver of a config, its numbers filled in; UserError where it reads more steps than there are."""
    made: Solver = make("solver", config.sample.solver, config.numbers())
    if (needs := getattr(made, "order", 1)) > (has := grid(config).steps):
        raise UserError(
            f"--solver {config.sample.solver} reads {needs} steps, and there are {has}: more --sampling_steps, or --solver ddim"
        )
    return made


def takes(f: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(f).parameters


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


DTYPES = {"auto": None, "fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def in_precision(net: nn.Module, device: torch.device, precision: str) -> Network:
    """The network, run in the given precision; what goes in and comes out stays float32."""
    dtype = DTYPES[precision]

    def run(x: Tensor, time: Tensor, **cond: Tensor) -> Tensor:
        context: AbstractContextManager = nullcontext() if dtype is None else torch.autocast(device.type, dtype)
        with context:
            return net(x, time, **cond)

    return run
