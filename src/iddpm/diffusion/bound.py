"""The variational bound on -log2 p(x_0), in bits per dimension, term by term (Nichol & Dhariwal 2021, eq. 4-7)."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from iddpm.diffusion.denoiser import Denoise, Prediction, wide
from iddpm.diffusion.grid import Grid, Step, as_step
from iddpm.diffusion.schedule import Level

Noise = Callable[[int], Tensor]  # k -> the k-th standard normal draw, shaped like the batch


def mean_flat(x: Tensor) -> Tensor:
    """The mean over all but the first dimension, (B, ...) -> (B,)."""
    return x.flatten(1).mean(1)


def gaussian_kl(mean1: Tensor, log_var1: Tensor, mean2: Tensor, log_var2: Tensor) -> Tensor:
    """KL(N(mean1, var1) || N(mean2, var2)) of each element, in nats."""
    inverse = torch.exp(-log_var2)
    return 0.5 * (log_var2 - log_var1 - 1 + torch.exp(log_var1) * inverse + (mean1 - mean2) ** 2 * inverse)


HALF_BIN = 1 / 255  # half of an 8-bit pixel's width, in units of [-1, 1]


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor, half_bin: float = HALF_BIN) -> Tensor:
    """log of a Gaussian's mass in each pixel's bin, in nats; the outer bins are open (Ho et al. 2020, eq. 13).

    x holds images mapped to [-1, 1], of 8 bits unless `half_bin` says otherwise. Parity: the published code's
    tanh approximation of the normal distribution function.
    """

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    kind = x.dtype
    if half_bin < HALF_BIN:  # of a bin so narrow float32's rounding of both ends would be a part
        x, mean, log_scale = x.double(), mean.double(), log_scale.double()
    inverse, edge = torch.exp(-log_scale), max(0.999, 1 - half_bin)
    upper, lower = cdf(inverse * (x - mean + half_bin)), cdf(inverse * (x - mean - half_bin))
    mass = torch.where(x < -edge, upper, torch.where(x > edge, 1 - lower, upper - lower))
    return mass.clamp(min=1e-12).log().to(kind)


def vlb_term(p: Prediction, x0: Tensor, xt: Tensor, step: Level | Step, half_bin: float = HALF_BIN) -> Tensor:
    """The bound's term of each image (B,), in bits/dim: the decoder's at the last step, a KL at every other."""
    s = Step(*wide(as_step(step, "the bound"), x0))
    assert p.mean is not None and p.log_var is not None  # as every denoiser gives them at a step
    kl = mean_flat(gaussian_kl(s.coef_x0 * x0 + s.coef_xt * xt, s.log_min, p.mean, p.log_var))
    if not s.last.ndim and not s.last:  # a step of a walk, but the last one: the decoder costs as much again
        return kl / math.log(2)
    decoder = mean_flat(-discretized_log_likelihood(x0, p.mean, 0.5 * p.log_var, half_bin))
    return (torch.where(s.last.flatten() > 0, decoder, kl) if s.last.ndim else decoder) / math.log(2)


def prior_term(grid: Grid, x0: Tensor) -> Tensor:
    """KL(q(x_T | x_0) || N(0, start^2)) of each image (B,), in bits/dim."""
    alpha, sigma = grid.table.alpha[-1], grid.table.sigma[-1]
    zero = torch.zeros_like(alpha)
    start = zero + 2 * math.log(grid.start)
    return mean_flat(gaussian_kl(alpha * x0, 2 * sigma.log(), zero, start)) / math.log(2)


class Term(NamedTuple):
    """One step's share of the bound, and the squared errors there, for each image: all (B,)."""

    i: int
    vb: Tensor  # bits/dim
    x0_mse: Tensor
    eps_mse: Tensor


def bound_terms(denoise: Denoise, x0: Tensor, grid: Grid, noise: Noise, half_bin: float = HALF_BIN) -> Iterator[Term]:
    """All terms but the prior's, from the noisiest step down to 0; x0 (B, C, H, W) in [-1, 1], of pixels of that width.

    Their sum over the steps plus `prior_term` is the bound. Step i uses the draw noise(steps - 1 - i).
    """
    for k, step in enumerate(grid):
        eps = noise(k)
        xt = step.alpha * x0 + step.sigma * eps
        p = denoise(xt, step)
        eps_hat = (xt - step.alpha * p.x0) / step.sigma
        vb = vlb_term(p, x0, xt, step, half_bin)
        yield Term(grid.steps - 1 - k, vb, mean_flat((p.x0 - x0) ** 2), mean_flat((eps_hat - eps) ** 2))
