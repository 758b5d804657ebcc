"""A world where the answer is known: each pixel is N(m, s^2), so the best denoiser is a formula."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from iddpm.diffusion.denoiser import Denoiser, fixed_large, fixed_small, learned
from iddpm.diffusion.grid import Chain, respace
from iddpm.diffusion.parametrization import x0 as predicts_x0
from iddpm.diffusion.schedule import Cosine, Discrete

THOUSAND = Cosine(1000)


@dataclass(frozen=True)
class Gaussian:
    """The data, and what a network that knows it gives at every step of a schedule."""

    mean: float
    std: float
    schedule: Discrete = THOUSAND

    def best_x0(self, x: Tensor, t: Tensor) -> Tensor:
        """E[x_0 | x_t]."""
        alpha, sigma = self.at(t)
        gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        return (self.mean + gain * (x.double() - alpha * self.mean)).float()

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        bar = (1 - self.schedule.betas()).cumprod(0)[t.long()].reshape(-1, 1, 1, 1)
        return bar.sqrt(), (1 - bar).sqrt()

    def chain(self, spec: str = "") -> Chain:
        """Its steps; networks see their plain number, to look up the noise level."""
        return Chain(self.schedule, respace(self.schedule.steps, spec), rescale_time=False)

    def denoiser(self, spec: str = "", small: bool = True) -> tuple[Denoiser, Chain]:
        """The best mean, with one of the two fixed variances; and the chain."""
        return Denoiser(self.best_x0, predicts_x0, fixed_small if small else fixed_large), self.chain(spec)

    def exact(self, spec: str = "") -> tuple[Denoiser, Chain]:
        """The best mean and the true variance of x_{t-1} given x_t: the chain's own reversal; and the chain."""
        chain = self.chain(spec)
        table = chain.table
        unsure = 1 / (1 / self.std**2 + (table.alpha / table.sigma) ** 2)  # Var[x_0 | x_t]
        between = chain.betas * (table.sigma_to / table.sigma) ** 2  # Var[x_{t-1} | x_t, x_0]
        log_var = (between + table.coef_x0**2 * unsure).log()
        row = {kept: k for k, kept in enumerate(chain.kept)}

        def net(x: Tensor, t: Tensor) -> Tensor:
            variance = log_var[[row[int(step)] for step in t]].float().reshape(-1, 1, 1, 1).expand_as(x)
            return torch.cat([self.best_x0(x, t), variance], dim=1)

        return Denoiser(net, predicts_x0, learned), chain

    def bits(self, x: Tensor) -> Tensor:
        """-log2 of the mass in a pixel's bin of 2/255, for each image (B,), to second order in the bin."""
        nats = ((x - self.mean) / self.std) ** 2 / 2 + math.log(self.std * math.sqrt(2 * math.pi) * 127.5)
        return nats.flatten(1).mean(1) / math.log(2)


@pytest.fixture(scope="session")
def world() -> type[Gaussian]:
    return Gaussian
