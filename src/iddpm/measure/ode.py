"""Bits per dimension of a run by the probability-flow ODE, beside those of the bound."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from iddpm import build, fit, rng
from iddpm.config import Measure, half_bin
from iddpm.data import Images, Order
from iddpm.diffusion.ode import DEQUANTIZATIONS, log_density
from iddpm.errors import UserError
from iddpm.measure.bound import Resumable, batch_of, job_of, rounds_left
from iddpm.measure.likelihood import identity_of
from iddpm.measure.metrics.rows import Estimate
from iddpm.parallel import processes
from iddpm.sampling.open import Opened

EXACT = 64  # dimensions up to which `auto` takes the exact trace: a backward pass for each, at every step


class Paths(Resumable):
    """The bits/dim of each image whose path was followed, in a file that a killed measurement goes on from."""

    KEPT = ("done", "bits", "seconds")

    def __init__(self, n: int, path: Path | None, job: str):
        self.done = np.zeros(n, np.int64)  # 1 where it is
        self.bits = np.zeros((n, 2))  # on the grid, and on half of it
        super().__init__(path, job)

    def share(self) -> float:
        return float(self.done.mean())

    def add(self, images: slice, rows: np.ndarray) -> None:
        """Take in neighbouring images (b, 2)."""
        self.bits[images], self.done[images] = rows, 1
        self.keep()


def bits_by_ode(
    opened: Opened, images: Images, measure: Measure, state: Path | None = None, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """The figures of --ode, the same on every process: mean, its standard error over images, and the solver's own error.

    `state` is a file of the images that are in so far, batch by batch: the same measurement goes on from there. The solver's
    error is a third of the difference to half as many steps, as of a method of order 2. UserError where it is not finite.
    """
    config, which = opened.config, opened.which
    fit.require_density(config, "--ode")
    grid = build.grid(config)
    if grid.steps < 2:
        raise UserError(f"--ode follows a path: {grid.steps} step is none; take --sampling_steps 2 or more")
    denoiser = build.denoiser(config, opened.net)  # not clipped: a clipped x0 has no divergence
    chosen = Order(len(images), measure.seed).indices(0, min(measure.num_samples or len(images), len(images)))
    exact = measure.trace == "exact" or (measure.trace == "auto" and math.prod(images.image_size) * images.channels <= EXACT)
    coarse = grid.only(_half(grid.steps))
    identity = identity_of(opened, images, measure) | dict(ode=True, exact=exact, dequantization=measure.dequantization)
    leads = processes.rank() == 0
    paths = Paths(len(chosen), state if leads else None, job_of(config, chosen, measure.seed, identity))
    paths.resume(say)
    for r in rounds_left(paths.done, 1, which.batch_size):
        x0, cond = batch_of(config, images, chosen[r.call.start : r.call.stop], opened.device)
        with torch.inference_mode(False):
            x0, cond = x0.clone(), {name: value.clone() for name, value in cond.items()}
        draw = partial(rng.normal, measure.seed, rng.LIKELIHOOD, indices=r.call, shape=x0.shape[1:])
        u = torch.special.ndtr(draw(0).double()).to(x0)  # uniform, of each image's own stream
        x, log_q = DEQUANTIZATIONS[measure.dequantization](x0, u, next(iter(reversed(list(grid)))), half_bin(config.model))
        probe = None if exact else draw(1).sign().to(x0)
        pair = [log_density(partial(denoiser, cond=cond), x, g, probe).cpu() for g in (grid, coarse)]
        rows = torch.stack([-(log_p - log_q) / math.log(2) for log_p in pair], dim=1)
        paths.add(slice(r.every.start, r.every.stop), processes.gather(rows[: len(r.mine)]).numpy())
    paths.keep(at_once=True)
    bits, half = paths.bits.T
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
