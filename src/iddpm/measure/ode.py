"""Bits per dimension of a run by the probability-flow ODE, beside those of the bound."""

import math
from functools import partial
from typing import Any

import numpy as np
import torch

from iddpm import build, rng
from iddpm.config import Measure
from iddpm.data import Images, Order
from iddpm.diffusion.ode import DEQUANTIZATIONS, log_density
from iddpm.errors import UserError
from iddpm.measure.bound import batch_of
from iddpm.measure.metrics.rows import Estimate
from iddpm.parallel import processes
from iddpm.sampling.open import Opened

EXACT = 64  # dimensions up to which `auto` takes the exact trace: a backward pass for each, at every step


def bits_by_ode(opened: Opened, images: Images, measure: Measure) -> dict[str, Any]:
    """The figures of --ode, the same on every process: mean, its standard error over images, and the solver's own error.

    The last is a third of the difference to half as many steps, as of a method of order 2. UserError where it is not finite.
    """
    config, which = opened.config, opened.which
    build.require_density(config, "--ode")
    grid = build.grid(config)
    if grid.steps < 2:
        raise UserError(f"--ode follows a path: {grid.steps} step is none; take --sampling_steps 2 or more")
    denoiser = build.denoiser(config, opened.net)  # not clipped: a clipped x0 has no divergence
    chosen = Order(len(images), measure.seed).indices(0, min(measure.num_samples or len(images), len(images)))
    exact = measure.trace == "exact" or (measure.trace == "auto" and math.prod(images.image_size) * images.channels <= EXACT)
    coarse = grid.only(_half(grid.steps))
    kept: list[np.ndarray] = []
    for r in processes.rounds(len(chosen), which.batch_size):
        x0, cond = batch_of(config, images, chosen[r.call.start : r.call.stop], opened.device)
        with torch.inference_mode(False):
            x0, cond = x0.clone(), {name: value.clone() for name, value in cond.items()}
        draw = partial(rng.normal, measure.seed, rng.LIKELIHOOD, indices=r.call, shape=x0.shape[1:])
        u = torch.special.ndtr(draw(0).double()).to(x0)  # uniform, of each image's own stream
        x, log_q = DEQUANTIZATIONS[measure.dequantization](x0, u, next(iter(reversed(list(grid)))))
        probe = None if exact else draw(1).sign().to(x0)
        pair = [log_density(partial(denoiser, cond=cond), x, g, probe).cpu() for g in (grid, coarse)]
        bits = torch.stack([-(log_p - log_q) / math.log(2) for log_p in pair], dim=1)
        kept.append(processes.gather(bits[: len(r.mine)]).numpy())
    bits, half = np.concatenate(kept).T
    if not np.isfinite(bits).all():
        raise UserError("the path of the ODE is not finite: these weights diverged, or need --precision fp32")
    mean, error = Estimate.mean(bits)
    return dict(
        bits_per_dim=mean, standard_error=error, solver_error=abs(float(np.mean(bits - half))) / 3, images=len(bits),
        steps=grid.steps, grid=config.sample.grid, trace="exact" if exact else "hutchinson",
        dequantization=measure.dequantization, seed=measure.seed, per_image=bits.tolist(),
    )  # fmt: skip


def _half(steps: int) -> list[int]:
    """Every other level, with the first and the last."""
    return sorted({*range(0, steps, 2), steps - 1})
