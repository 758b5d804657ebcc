"""Which choices of a config go together: each is fine alone, and checked by `config.check`; here they are taken together."""

from collections.abc import Collection

import torch

from iddpm import build
from iddpm.config import ENDS, Config, is_chain
from iddpm.config.choices import choices, make, row
from iddpm.diffusion.objective import CHAIN_ONLY, LEARN_VARIANCE, simple
from iddpm.diffusion.parametrization import previous, v
from iddpm.errors import UserError


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
    _require_beginning(config)
    if d.snr_shift != 1 and not is_chain(d) and build.schedule(config)(torch.ones(1, dtype=torch.float64)).alpha:
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


STEERING = ("guidance_kind", "guidance_low", "guidance_high", "guidance_rescale")  # of --guidance and of --autoguide


def require_steering(config: Config, asked: Collection[str], away: bool = False) -> Config:
    """The config itself; UserError where settings of guidance are asked for that nothing guides by, be it `away` from a model."""
    if flag := next((f for f in STEERING if f in asked and config.sample.guidance == 1 and not away), ""):
        raise UserError(f"--{flag} has no effect without --guidance W or --autoguide RUN")
    return config


def _require_beginning(config: Config) -> None:
    """UserError where a loss is to learn paths, and nothing walks them, or a setting is of images."""
    if not build.path_levels(config):
        return
    name = f"--objective {config.diffusion.objective_name}"
    if not config.train.init_from:
        raise UserError(f"{name} learns the paths of a trained model: which? --init_from RUN")
    if config.task.inputs:
        raise UserError(f"{name} makes its images of noise alone, and this is {config.task.help}: take --objective consistency")
    idle = dict(noise_candidates=config.train.noise_candidates > 1, validation=config.data.validation)
    idle |= dict(schedule_sampler=build.law(config).looks, trained_guidance=config.model.trained_guidance > 0)
    if flag := next((flag for flag, there in idle.items() if there), ""):
        raise UserError(f"--{flag} has no part in {name}, which learns no images but paths: leave it out")


def _require_known_guidance(config: Config) -> None:
    """UserError where the network is to guide by what it learned, and did not learn that."""
    most, s = config.model.trained_guidance, config.sample
    if most and not build.takes(row("objective", config.diffusion.objective_name), "toward"):
        raise UserError(f"--trained_guidance has no part in --objective {config.diffusion.objective_name}: take simple")
    if most and config.model.given_dropout:
        raise UserError("--trained_guidance is by the class alone: leave out --given_dropout")
    if 0 < most <= 1:
        raise UserError(f"--trained_guidance {most:g} teaches nothing, for 1 is no guidance: as 3, or 0 for none")
    if build.knows_guidance(config) and not 1 <= s.guidance <= most:
        raise UserError(
            f"--guidance {s.guidance:g}: this network learned guidance from 1 to {most:g}; --guidance_kind cfg goes beyond, "
            "in two calls"
        )
    if build.knows_guidance(config) and s.guidance_rescale:
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
    if leaps(config) and not any(getattr(config.train, end) for end in ENDS):
        raise UserError(f"--objective {name} changes over the run: how long is it? --steps N or --time 2h")
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
    level = build.schedule(config)(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    if made is v and (level.alpha**2 + level.sigma**2 - 1).abs().max() > 1e-6:
        return "is for alpha^2 + sigma^2 = 1, not for the levels"
    c = made(next(iter(build.grid(config))))
    finite = all(torch.isfinite(x).all() for x in (c.skip, c.out, c.time))
    return "" if finite else "divides by alpha, which is 0 at the noisiest level"
