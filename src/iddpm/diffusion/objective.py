"""Training objectives: (denoiser, schedule, x0, eps, u) -> the loss of each image, and the terms it is made of.

x0 (B, C, H, W) in [-1, 1], eps standard normal like it, u (B,) float64 in [0, 1): the levels are schedule(u).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from iddpm.diffusion.bound import mean_flat, vlb_term
from iddpm.diffusion.denoiser import Cond, Denoiser, times, wide
from iddpm.diffusion.grid import as_step
from iddpm.diffusion.schedule import Schedule
from iddpm.diffusion.weighting import Weighting, pace, uniform

Toward = Callable[[Denoiser, Tensor, Any, Cond], Tensor]  # (denoiser, x_t, level, cond) -> what is added to the target, like x_t
Terms = dict[str, Tensor]  # "loss" and what it is made of, each (B,)


def simple(
    denoiser: Denoiser, schedule: Schedule, x0: Tensor, eps: Tensor, u: Tensor, cond: Cond = {}, *,
    weighting: Weighting = uniform, toward: Toward | None = None,
) -> Terms:  # fmt: skip
    """Squared error of the network's output, weighted by level (Ho et al. 2020, eq. 14)"""
    return _squared_error(denoiser, schedule, x0, eps, u, cond, weighting, toward=toward)


def hybrid(
    denoiser: Denoiser, schedule: Schedule, x0: Tensor, eps: Tensor, u: Tensor, cond: Cond = {}, *, weighting: Weighting = uniform
) -> Terms:
    """simple + T/1000 vlb, where the bound trains only the variance (Nichol & Dhariwal 2021, eq. 16, lambda 0.001 T steps)"""
    return _squared_error(denoiser, schedule, x0, eps, u, cond, weighting, vb_scale=schedule.steps / 1000)


def hybrid_unscaled(
    denoiser: Denoiser, schedule: Schedule, x0: Tensor, eps: Tensor, u: Tensor, cond: Cond = {}, *, weighting: Weighting = uniform
) -> Terms:
    """simple + one term of the bound as it is (the published code's MSE with a learned variance)"""
    return _squared_error(denoiser, schedule, x0, eps, u, cond, weighting, vb_scale=1.0)


def vlb(denoiser: Denoiser, schedule: Schedule, x0: Tensor, eps: Tensor, u: Tensor, cond: Cond = {}) -> Terms:
    """The whole bound, estimated from one step: T times its term, in bits/dim (the published code's RESCALED_KL)"""
    return {"loss": schedule.steps * vlb_unscaled(denoiser, schedule, x0, eps, u, cond)["loss"]}


def vlb_unscaled(denoiser: Denoiser, schedule: Schedule, x0: Tensor, eps: Tensor, u: Tensor, cond: Cond = {}) -> Terms:
    """One term of the bound, in bits/dim (the published code's KL)"""
    step = schedule(u)
    alpha, sigma = wide((step.alpha, step.sigma), x0)
    xt = alpha * x0 + sigma * eps
    return {"loss": vlb_term(denoiser(xt, step, cond), x0, xt, step)}


def clean_cross_entropy(denoiser: Denoiser, schedule: Schedule, x0: Tensor, eps: Tensor, u: Tensor, cond: Cond = {}) -> Terms:
    """cross_entropy of the clean images, at the least noisy time: a plain classifier"""
    return _ranked(denoiser.net(x0, times(schedule(torch.zeros_like(u)), x0)), cond["y"])


def cross_entropy(denoiser: Denoiser, schedule: Schedule, x0: Tensor, eps: Tensor, u: Tensor, cond: Cond = {}) -> Terms:
    """-log p(y | x_t), in nats, of a classifier in the place of the network, which classes cond["y"] (B,) teach.

    Beside it acc@1 and acc@5, the share whose class is the first, or among the first five (Dhariwal & Nichol 2021, appendix H).
    """
    level = schedule(u)
    alpha, sigma = wide((level.alpha, level.sigma), x0)
    return _ranked(denoiser.net(alpha * x0 + sigma * eps, times(level, x0)), cond["y"])


def _ranked(logits: Tensor, y: Tensor) -> Terms:
    logits = logits.float()  # b k
    rank = (logits > logits.gather(1, y[:, None])).sum(1)
    loss = F.cross_entropy(logits, y, reduction="none")
    return {"loss": loss, "acc@1": (rank < 1).float(), "acc@5": (rank < 5).float()}


def _squared_error(
    denoiser: Denoiser, schedule: Schedule, x0: Tensor, eps: Tensor, u: Tensor, cond: Cond, weighting: Weighting,
    vb_scale: float = 0.0, toward: Toward | None = None,
) -> Terms:  # fmt: skip
    level = schedule(u)
    c = denoiser.parametrization(level)
    columns = level.alpha, level.sigma, c.of_x0, c.of_eps, weighting(level, c, lambda: pace(schedule, u))
    alpha, sigma, of_x0, of_eps, weight = wide(columns, x0)
    xt = alpha * x0 + sigma * eps
    p = denoiser(xt, level, cond)
    target = of_x0 * x0 + of_eps * eps  # as it is, not by way of x0: 1/alpha is large
    if toward:
        target = target + toward(denoiser, xt, level, cond)
    mse = mean_flat((p.raw - target) ** 2)
    loss = weight.flatten() * mse
    if not vb_scale or p.values is None:
        return {"loss": loss, "mse": mse}
    step = as_step(level, "a learned variance")
    assert p.mean is not None  # as every denoiser gives it at a step
    frozen = p._replace(mean=p.mean.detach())  # the bound must not pull at the mean: its gradient is far noisier
    vb = vb_scale * vlb_term(frozen, x0, xt, step)
    return {"loss": loss + vb, "mse": mse, "vb": vb}


# What a row asks of the rest of a config is said here, and checked before anything is trained.
LEARN_VARIANCE = (hybrid, hybrid_unscaled)  # nothing to train without a learned variance
CHAIN_ONLY = (hybrid, hybrid_unscaled, vlb, vlb_unscaled)  # read the terms of a chain's bound

OBJECTIVES: dict[str, Callable[..., Terms]] = {
    "simple": simple,
    "hybrid": hybrid,
    "hybrid_unscaled": hybrid_unscaled,
    "vlb": vlb,
    "vlb_unscaled": vlb_unscaled,
}
