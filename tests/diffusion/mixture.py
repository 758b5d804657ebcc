"""A mixture of three Gaussians in the plane, whose best denoiser, density and shares are formulas."""

import math
from typing import Any

import torch
from torch import Tensor

from iddpm.diffusion.denoiser import Prediction, fixed_small, wide
from iddpm.diffusion.grid import Step

CENTRES = torch.tensor([[-0.7, -0.4], [0.6, -0.5], [0.2, 0.8]], dtype=torch.float64)
SPREADS = torch.tensor([0.15, 0.2, 0.3], dtype=torch.float64)
SHARES = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
MEAN = SHARES @ CENTRES
COVARIANCE = (CENTRES - MEAN).T @ (SHARES[:, None] * (CENTRES - MEAN)) + (SHARES * SPREADS**2).sum() * torch.eye(2)


def parts(x: Tensor, alpha: Any, sigma: Any) -> Tensor:
    """log of each part's share times its density of x_t (B, 2, 1, 1): (B, 3). Levels are 0-dim or (B, 1)."""
    alpha, sigma = (torch.as_tensor(value, dtype=torch.float64) for value in (alpha, sigma))
    variance = (alpha * SPREADS) ** 2 + sigma**2
    apart = (x.flatten(1)[:, None] - alpha[..., None] * CENTRES).square().sum(2)
    return SHARES.log() - apart / (2 * variance) - (2 * math.pi * variance).log()


def log_density(x: Tensor, alpha: Any = 1.0, sigma: Any = 0.0) -> Tensor:
    """log p of x_t (B,), in nats; of the data itself by default."""
    return parts(x.double(), alpha, sigma).logsumexp(1)


def best_x0(x: Tensor, alpha: Any, sigma: Any) -> Tensor:
    """E[x_0 | x_t], in the dtype of x: the parts' own means, each weighted by how likely x_t is of it."""
    alpha, sigma = (torch.as_tensor(value, dtype=torch.float64) for value in (alpha, sigma))
    wide_x, of = x.double(), parts(x.double(), alpha, sigma).softmax(1)
    gain = alpha * SPREADS**2 / ((alpha * SPREADS) ** 2 + sigma**2)
    own = CENTRES + gain[..., None] * (wide_x.flatten(1)[:, None] - alpha[..., None] * CENTRES)
    return (of[..., None] * own).sum(1).reshape(x.shape).to(x)


def best(x: Tensor, s: Any) -> Prediction:
    """The denoiser that knows the data, at any level of 0-dim entries; with a mean and the posterior's variance at a step."""
    x0 = best_x0(x, s.alpha, s.sigma)
    if not isinstance(s, Step):
        return Prediction(x0, None, x0, None, None)
    step = Step(*wide(s, x)) if x.dtype == torch.float32 else s
    return Prediction(x0, None, x0, step.coef_x0 * x0 + step.coef_xt * x, fixed_small(s, None))


def draw(n: int, seed: int) -> Tensor:
    """Data (n, 2, 1, 1), float64."""
    generator = torch.Generator().manual_seed(seed)
    part = torch.multinomial(SHARES, n, replacement=True, generator=generator)
    x = CENTRES[part] + SPREADS[part, None] * torch.randn(n, 2, dtype=torch.float64, generator=generator)
    return x.reshape(n, 2, 1, 1)
