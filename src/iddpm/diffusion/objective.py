"""Training objectives: (denoiser, schedule, x0, eps, u) -> the loss of each image, and the terms it is made of.

x0 (B, C, H, W) in [-1, 1], eps standard normal like it, u (B,) float64 in [0, 1): the levels are schedule(u).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from iddpm.diffusion.bound import mean_flat, vlb_term
from iddpm.diffusion.denoiser import Cond, Denoiser, beside, times, wide
from iddpm.diffusion.grid import MOST, Grid, as_step
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
    return {"loss": vlb_term(denoiser(xt, step, cond), x0, xt, step, denoiser.half_bin)}


@dataclass(frozen=True)
class Consistency:
    """x0 of x_t is to be that of a less noisy x_r of the same noise: a model that leaps (Song et al. 2023, eq. 10; --init_from)

    Tuned as in ECT (Geng et al. 2024, section 3): x_r begins far from x_t, and their gap is halved from stage to stage; with
    h = sigma/alpha, h_r = h (1 - (1 + 8 sigmoid(-h)) / 2^stage). Where that is below the schedule's least, x_r is the image
    itself. The distance of both is the pseudo-Huber one of iCT (Song & Dhariwal 2024, eq. 7), over h - h_r. Both calls drop the
    same features. Costs a call of the network without a gradient. The papers halve 8 times in long runs; in a short one the last
    gaps bring more noise than they remove (measured: docs/log.md).
    """

    leaps: ClassVar[bool] = True  # its x0 is an image, not the mean of all that x_t may come from
    implies: ClassVar[dict[str, str]] = {"solver": "consistency", "sampling_steps": "2"}

    gap_halvings: Annotated[int, "how often the gap between the two levels is halved, evenly over the run", 1, 20] = 4

    def __call__(
        self, denoiser: Denoiser, schedule: Schedule, x0: Tensor, eps: Tensor, u: Tensor, cond: Cond = {}, *,
        progress: Callable[[], float] = lambda: 1.0,
    ) -> Terms:  # fmt: skip
        """`progress` tells the share of the run that is done."""
        level, (nearer, clean) = schedule(u), self.nearer(schedule, u, progress())
        alpha, sigma, alpha_r, sigma_r = wide((level.alpha, level.sigma, nearer.alpha, nearer.sigma), x0)
        with torch.no_grad(), torch.random.fork_rng([x0.device] if x0.is_cuda else []):  # so that the next call drops the same
            target = denoiser(alpha_r * x0 + sigma_r * eps, nearer, cond).x0
        target = torch.where(beside(clean, x0), x0, target)
        terms = _pseudo_huber(denoiser(alpha * x0 + sigma * eps, level, cond).x0, target)
        ratio, h = torch.where(clean, 0.0, nearer.sigma / nearer.alpha / (level.sigma / level.alpha)), level.sigma / level.alpha
        weight = (1 / ((1 - ratio) * h.clamp(1e-3, MOST))).float().to(x0.device)
        return terms | {"loss": weight * terms["loss"]}

    def nearer(self, schedule: Schedule, u: Tensor, progress: float) -> tuple[Any, Tensor]:
        """The less noisy levels beside those of u (B,), and where they stand for the image itself (B,)."""
        h, least = (level.sigma / level.alpha for level in (schedule(u), schedule(torch.zeros(1, dtype=torch.float64))))
        stage = min(1 + int(progress * self.gap_halvings), self.gap_halvings)
        h_r = h * (1 - (1 + 8 * torch.sigmoid(-h)) / 2**stage)
        u_r = schedule.u_of(h_r.clamp(min=1e-9))
        if isinstance(schedule, Grid):  # whose levels lie apart: at least one step down
            u_r = torch.minimum(u_r, u - 1 / schedule.steps)
        return schedule(u_r.clamp(min=0)), (h_r <= least) | (u_r < 0)


@dataclass(frozen=True)
class Path:
    """x0 of each point of a path that the first weights walk is to be its end: a model that leaps, soon (--init_from)

    The mid-training of CMT (Hu et al. 2025, arXiv 2509.24526, eq. 6) with the distance of iCT in the place of LPIPS. The
    program gives ends of paths as x0, and such eps that alpha x0 + sigma eps is the point at u (training/paths.py); the law of t
    has no part. Costs about a call of the network without a gradient.
    """

    leaps: ClassVar[bool] = True
    implies: ClassVar[dict[str, str]] = {"solver": "consistency", "sampling_steps": "1", "schedule_sampler": "uniform"}

    path_steps: Annotated[int, "levels of a path, walked by dpmpp_2m: as many steps see the same paths", 4, 64] = 16

    def __call__(self, denoiser: Denoiser, schedule: Schedule, x0: Tensor, eps: Tensor, u: Tensor, cond: Cond = {}) -> Terms:
        level = schedule(u)
        alpha, sigma = wide((level.alpha, level.sigma), x0)
        return _pseudo_huber(denoiser(alpha * x0 + sigma * eps, level, cond).x0, x0)


def _pseudo_huber(x: Tensor, target: Tensor) -> Terms:
    """The distance of iCT (Song & Dhariwal 2024, eq. 7) as the loss, beside the mean square."""
    off = (x - target).square().flatten(1)
    huber = 0.00054 * off.shape[1] ** 0.5
    return {"loss": (off.sum(1) + huber**2).sqrt() - huber, "mse": off.mean(1)}


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
    vb = vb_scale * vlb_term(frozen, x0, xt, step, denoiser.half_bin)
    return {"loss": loss + vb, "mse": mse, "vb": vb}


# What a row asks of the rest of a config is said here, and checked before anything is trained.
LEARN_VARIANCE = (hybrid, hybrid_unscaled)  # nothing to train without a learned variance
CHAIN_ONLY = (hybrid, hybrid_unscaled, vlb, vlb_unscaled)  # read the terms of a chain's bound

OBJECTIVES: dict[str, Callable[..., Any]] = {
    "simple": simple,
    "hybrid": hybrid,
    "hybrid_unscaled": hybrid_unscaled,
    "vlb": vlb,
    "vlb_unscaled": vlb_unscaled,
    "consistency": Consistency,
    "path": Path,
}
