"""Training objectives: (denoiser, x0, eps, steps) -> the loss of each image, and the terms it is made of."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from iddpm.diffusion.bound import mean_flat, vlb_term
from iddpm.diffusion.denoiser import Cond, Denoiser

Terms = dict[str, Tensor]  # "loss" and what it is made of, each (B,)


def simple(denoiser: Denoiser, x0: Tensor, eps: Tensor, i: Tensor, cond: Cond = {}) -> Terms:
    """Squared error of the network's output (Ho et al. 2020, eq. 14)."""
    return _squared_error(denoiser, x0, eps, i, cond, vb_scale=0.0)


def hybrid(denoiser: Denoiser, x0: Tensor, eps: Tensor, i: Tensor, cond: Cond = {}) -> Terms:
    """simple + T/1000 vlb, where the bound trains only the variance (Nichol & Dhariwal 2021, eq. 16, lambda 0.001 T steps)."""
    return _squared_error(denoiser, x0, eps, i, cond, vb_scale=denoiser.chain.steps / 1000)


def hybrid_unscaled(denoiser: Denoiser, x0: Tensor, eps: Tensor, i: Tensor, cond: Cond = {}) -> Terms:
    """simple + one term of the bound as it is (the published code's MSE with a learned variance)."""
    return _squared_error(denoiser, x0, eps, i, cond, vb_scale=1.0)


def vlb(denoiser: Denoiser, x0: Tensor, eps: Tensor, i: Tensor, cond: Cond = {}) -> Terms:
    """The whole bound, estimated from one step: T times its term, in bits/dim (the published code's RESCALED_KL)."""
    return {"loss": denoiser.chain.steps * vlb_unscaled(denoiser, x0, eps, i, cond)["loss"]}


def vlb_unscaled(denoiser: Denoiser, x0: Tensor, eps: Tensor, i: Tensor, cond: Cond = {}) -> Terms:
    """One term of the bound, in bits/dim (the published code's KL)."""
    step = denoiser.chain.at(i, x0)
    xt = step.alpha * x0 + step.sigma * eps
    return {"loss": vlb_term(denoiser(xt, i, cond), x0, xt, step)}


def clean_cross_entropy(denoiser: Denoiser, x0: Tensor, eps: Tensor, i: Tensor, cond: Cond) -> Terms:
    """cross_entropy of the clean images, at the time of step 0: a plain classifier."""
    zero = torch.zeros_like(i)
    return _ranked(denoiser.net(x0, denoiser.chain.at(zero, zero).time), cond["y"])


def cross_entropy(denoiser: Denoiser, x0: Tensor, eps: Tensor, i: Tensor, cond: Cond) -> Terms:
    """-log p(y | x_t), in nats, of a classifier in the place of the network, which classes cond["y"] (B,) teach.

    Beside it acc@1 and acc@5, the share whose class is the first, or among the first five (Dhariwal & Nichol 2021, appendix H).
    """
    step = denoiser.chain.at(i, x0)
    return _ranked(denoiser.net(step.alpha * x0 + step.sigma * eps, denoiser.chain.at(i, i).time), cond["y"])


def _ranked(logits: Tensor, y: Tensor) -> Terms:
    logits = logits.float()  # b k
    rank = (logits > logits.gather(1, y[:, None])).sum(1)
    loss = F.cross_entropy(logits, y, reduction="none")
    return {"loss": loss, "acc@1": (rank < 1).float(), "acc@5": (rank < 5).float()}


def _squared_error(denoiser: Denoiser, x0: Tensor, eps: Tensor, i: Tensor, cond: Cond, vb_scale: float) -> Terms:
    step, scale = denoiser.chain.at(i, x0), denoiser.scalings(i, x0)
    xt = step.alpha * x0 + step.sigma * eps
    p = denoiser(xt, i, cond)
    mse = mean_flat((p.raw - (scale.of_x0 * x0 + scale.of_eps * eps)) ** 2)
    if not vb_scale or p.values is None:
        return {"loss": mse, "mse": mse}
    frozen = p._replace(mean=p.mean.detach())  # the bound must not pull at the mean: its gradient is far noisier
    vb = vb_scale * vlb_term(frozen, x0, xt, step)
    return {"loss": mse + vb, "mse": mse, "vb": vb}


OBJECTIVES: dict[str, Callable[..., Terms]] = {f.__name__: f for f in (simple, hybrid, hybrid_unscaled, vlb, vlb_unscaled)}
