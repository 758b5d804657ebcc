"""From a config to the things it names: network, schedule, grid, denoiser, objective, law of t, solver."""

import dataclasses
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from iddpm.config import FOUND, Config, given_shape, image_size, is_chain
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
from iddpm.diffusion.objective import CHAIN_ONLY, LEARN_VARIANCE, Terms, clean_cross_entropy, cross_entropy, simple
from iddpm.diffusion.parametrization import Scalings, previous, v
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
    )
    made = make("network", m.network, config.numbers())
    try:
        net: nn.Module = made(asked, m) if _takes(made, "settings") else made(asked)  # ours read the fields of Model, too
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
    return Denoiser(net, parametrization(config), variance, after)


def sampling_denoiser(config: Config, net: Network, *after: Callable[[Tensor], Tensor]) -> Denoiser:
    """As `denoiser`, to draw with: x0 is clipped first where --clip_denoised says so.

    Between the levels of a continuous schedule the variance is the posterior's. Beta's, which is right for the many small steps
    of a chain, adds far too much noise in few large ones (measured: docs/log.md).
    """
    made = denoiser(config, net, *_limits(config), *after)
    return made if is_chain(config.diffusion) else dataclasses.replace(made, variance=fixed_small)


def bound_denoiser(config: Config, net: Network) -> Denoiser:
    """As `denoiser`, to measure likelihood with: clipped likewise, of the config's own variance, whose bound is the tighter."""
    require_density(config, "bits per dimension")
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
    if _knows_guidance(config) and not weak:
        denoise = told(made, cond, s.guidance, s.guidance_low, s.guidance_high)
    elif s.guidance != 1 or weak:
        bare = dataclasses.replace(made, after=())
        denoise = partial(bare, cond=cond)
        if _knows_guidance(config):
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


def _knows_guidance(config: Config) -> bool:
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
    asks: dict[str, Any] = {"weighting": weighted or weighting(config)} if _takes(loss, "weighting") else {}
    if config.model.trained_guidance:
        asks["toward"] = Taught(config.model.num_classes)
    if _takes(loss, "progress"):
        asks["progress"] = progress
    return partial(loss, **asks) if asks else loss


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
    if config.sample.guidance != 1 and not (config.model.class_dropout or config.model.given_dropout):
        dropout = "--given_dropout 0.1 or --class_dropout 0.1" if config.task.translates else "--class_dropout 0.1"
        raise UserError(
            f"--guidance needs a model trained with {dropout}, which this is not: guide by --classifier or --autoguide"
        )
    changes = [("--noise_candidates", "the law of the noise")] * (config.train.noise_candidates > 1)
    changes += [("--trained_guidance", "what is learned")] * (config.model.trained_guidance > 0)
    if changes and loss in CHAIN_ONLY:
        raise UserError(
            f"{changes[0][0]} changes {changes[0][1]}, of which --objective {d.objective_name} is the likelihood: "
            "take --objective simple" + ", --learn_sigma False" * d.learn_sigma
        )
    _require_known_guidance(config)
    _require_leaps(config)
    if d.snr_shift != 1 and not is_chain(d) and schedule(config)(torch.ones(1, dtype=torch.float64)).alpha:
        raise UserError(f"--snr_shift is for schedules that end in pure noise: of --noise_schedule {name} change --sigma_max")
    if d.zero_terminal_snr and d.diffusion_steps < 2:
        raise UserError("--zero_terminal_snr stretches a chain: --diffusion_steps 2 or more")
    if config.sample.guidance_low > config.sample.guidance_high:
        raise UserError(
            f"--guidance_low {config.sample.guidance_low:g} is above --guidance_high {config.sample.guidance_high:g}: nothing "
            "would be guided"
        )
    if not is_chain(d) and loss in CHAIN_ONLY:
        raise UserError(
            f"--objective {d.objective} reads the steps of a chain: take --noise_schedule linear or cosine, not {name}"
        )
    if fault := _misfit(config, d.parametrization):
        others = [other for other in choices("parametrization") if not _misfit(config, other)]
        raise UserError(f"--parametrization {d.parametrization} {fault} of --noise_schedule {name}: take {' or '.join(others)}")
    return config


def _require_known_guidance(config: Config) -> None:
    """UserError where the network is to guide by what it learned, and did not learn that."""
    most, s = config.model.trained_guidance, config.sample
    if most and not _takes(row("objective", config.diffusion.objective_name), "toward"):
        raise UserError(f"--trained_guidance has no part in --objective {config.diffusion.objective_name}: take simple")
    if most and config.model.given_dropout:
        raise UserError("--trained_guidance is by the class alone: leave out --given_dropout")
    if 0 < most <= 1:
        raise UserError(f"--trained_guidance {most:g} teaches nothing, for 1 is no guidance: as 3, or 0 for none")
    if _knows_guidance(config) and not 1 <= s.guidance <= most:
        raise UserError(
            f"--guidance {s.guidance:g}: this network learned guidance from 1 to {most:g}; --guidance_kind cfg goes beyond, "
            "in two calls"
        )
    if _knows_guidance(config) and s.guidance_rescale:
        raise UserError("--guidance_rescale needs to know what is drawn without guidance: add --guidance_kind cfg, for two calls")


def leaps(config: Config) -> bool:
    """Whether a model's x0 is an image, not the mean of all that x_t may come from."""
    return not config.task.classifies and getattr(row("objective", config.diffusion.objective_name), "leaps", False)


def require_density(config: Config, what: str) -> None:
    """UserError where a model leaps, for `what` needs one that knows how likely images are."""
    if leaps(config):
        raise UserError(
            f"{what}: a model of --objective {config.diffusion.objective} leaps to images: take the one it was tuned from"
        )


def _require_leaps(config: Config) -> None:
    """UserError where a solver that leaps is to draw with a model that does not, or another with one that does."""
    name, solver = config.diffusion.objective_name, config.sample.solver
    if leaps(config) and not (config.train.steps or config.train.images):
        raise UserError(f"--objective {name} changes over the run: how long is it? --steps N")
    fits = [n for n in choices("solver") if getattr(row("solver", n), "leaps", False) == leaps(config)]
    if solver not in fits and leaps(config):
        raise UserError(
            f"--solver {solver} walks from level to level, a model of --objective {name} leaps: take {' or '.join(fits)}"
        )
    if solver not in fits:
        raise UserError(
            f"--solver {solver} is for a model that leaps: make one of this by iddpm train --init_from, --objective {solver}"
        )
    if leaps(config) and config.sample.skip_first:
        raise UserError("--skip_first would leave out the very call that makes the image")


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


DTYPES = {"auto": None, "fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def in_precision(net: nn.Module, device: torch.device, precision: str) -> Network:
    """The network, run in the given precision; what goes in and comes out stays float32."""
    dtype = DTYPES[precision]

    def run(x: Tensor, time: Tensor, **cond: Tensor) -> Tensor:
        context: AbstractContextManager = nullcontext() if dtype is None else torch.autocast(device.type, dtype)
        with context:
            return net(x, time, **cond)

    return run
