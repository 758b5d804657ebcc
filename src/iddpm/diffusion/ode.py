"""The likelihood by the probability-flow ODE, the path on which a deterministic solver moves (Song et al. 2021, section 4.3).

It is followed from the image to noise along the straight line of rectified flow, whatever the schedule is: y = x/(alpha + sigma)
moves with the slope v = eps - x0 of z = sigma / (alpha + sigma), and log p falls by the divergence of v.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from iddpm.diffusion.bound import HALF_BIN
from iddpm.diffusion.denoiser import Denoise
from iddpm.diffusion.grid import Grid, Step
from iddpm.diffusion.schedule import Level
from iddpm.diffusion.solvers import velocity


class Dequantized(NamedTuple):
    """Images with noise within each pixel's bin, and log q of that noise for each image (B,), in nats a dimension."""

    x0: Tensor
    log_q: Tensor


def uniform(x0: Tensor, u: Tensor, level: Level | Step, half_bin: float = HALF_BIN) -> Dequantized:
    """Anywhere in the bin alike; u (B, C, H, W) uniform in [0, 1) (Theis et al. 2016)."""
    return Dequantized(x0 + (2 * u - 1) * half_bin, torch.full((len(x0),), -math.log(2 * half_bin), dtype=torch.float64))


def truncated_normal(x0: Tensor, u: Tensor, level: Level | Step, half_bin: float = HALF_BIN) -> Dequantized:
    """As the noise of the level itself, cut at the bin: what the network was trained on (Zheng et al. 2023, i-DODE, 4.2)."""
    scale = float(level.sigma / level.alpha)
    inside = math.erf(half_bin / scale / math.sqrt(2))  # of a normal of that deviation, the share within the bin
    n = math.sqrt(2) * torch.erfinv(inside * (2 * u.double() - 1).clamp(-1 + 1e-12, 1 - 1e-12))
    log_q = -(n**2 / 2).flatten(1).mean(1) - math.log(scale * math.sqrt(2 * math.pi) * inside)
    return Dequantized(x0 + scale * n.to(x0), log_q)


DEQUANTIZATIONS: dict[str, Callable[[Tensor, Tensor, Level | Step, float], Dequantized]] = {
    "uniform": uniform,
    "truncated_normal": truncated_normal,
}


def log_density(denoise: Denoise, x: Tensor, grid: Grid, probe: Tensor | None = None) -> Tensor:
    """log p (B,) float64 in nats a dimension of x (B, C, H, W), images at the least noisy level over alpha; Heun's method.

    The divergence is exact, at a backward pass for each dimension, or by a `probe` of random signs like x (Hutchinson 1989;
    Grathwohl et al. 2019). The network must be differentiable, its x0 not clipped.
    """
    levels = [Level(*step[:3]) for step in reversed(list(grid))]
    first, last, d = levels[0], levels[-1], x[0].numel()
    y = (x.double() * first.alpha / (first.alpha + first.sigma)).to(x)
    grown = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    z = [float(at.sigma / (at.alpha + at.sigma)) for at in levels]
    for (at, to), (a, b) in zip(zip(levels, levels[1:]), zip(z, z[1:])):
        v, divergence = _slope(denoise, y, at, probe)
        v_to, divergence_to = _slope(denoise, y + (b - a) * v, to, probe)
        y, grown = y + (b - a) / 2 * (v + v_to), grown + (b - a) / 2 * (divergence + divergence_to)
    spread = grid.start / float(last.alpha + last.sigma)  # of y in noise
    prior = -0.5 * (y.double() / spread).square().flatten(1).sum(1) - d * math.log(spread * math.sqrt(2 * math.pi))
    return (prior + grown) / d + math.log(float(first.alpha / (first.alpha + first.sigma)))


def _slope(denoise: Denoise, y: Tensor, level: Level, probe: Tensor | None) -> tuple[Tensor, Tensor]:
    """The velocity at y, and its divergence (B,) float64."""
    with torch.inference_mode(False), torch.enable_grad():
        y = y.clone().requires_grad_(True)
        x = y * (level.alpha + level.sigma)
        v = velocity(x, denoise(x, level).x0, level).slope
        if probe is not None:
            (g,) = torch.autograd.grad((v * probe).sum(), y)
            return v.detach(), (g * probe).double().flatten(1).sum(1)
        flat, found = v.flatten(1), torch.zeros(len(y), dtype=torch.float64, device=y.device)
        for k in range(flat.shape[1]):
            (g,) = torch.autograd.grad(flat[:, k].sum(), y, retain_graph=k + 1 < flat.shape[1])
            found += g.flatten(1)[:, k].double()
        return v.detach(), found
