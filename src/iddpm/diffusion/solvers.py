"""Solvers walk a chain from noise to images. Each is a generator of (step, x, x0): watch it, or `run` it to its end."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from iddpm.diffusion.bound import Noise
from iddpm.diffusion.denoiser import Cond, Denoiser, Prediction
from iddpm.diffusion.guidance import Gradient, shift_mean, shift_score
from iddpm.diffusion.schedule import Step


class State(NamedTuple):
    """Where a solver stands after step i: x is what the next step starts from, x0 the network's present guess."""

    i: int
    x: Tensor
    x0: Tensor


# ---- one step: (prediction, x_t, step, eps) -> x_{t-1}


def ancestral_step(p: Prediction, xt: Tensor, s: Step, eps: Tensor) -> Tensor:
    """A draw from p(x_{t-1} | x_t); the last step gives its mean (Ho et al. 2020, algorithm 2)."""
    return p.mean + (1 - s.first) * torch.exp(0.5 * p.log_var) * eps


def ddim_step(p: Prediction, xt: Tensor, s: Step, eps: Tensor, eta: float = 0.0) -> Tensor:
    """Song et al. 2021 (DDIM), eq. 12; eta = 0 draws nothing, eta = 1 has the variance of `fixed_small`."""
    fresh = eta * torch.exp(0.5 * s.log_min)  # as the mean below, without a difference of nearly equal float32 numbers
    eps_hat = (xt - s.alpha * p.x0) / s.sigma
    mean = s.alpha_prev * p.x0 + ((1 - eta**2) * s.sigma_prev**2 + (eta * s.coef_xt * s.sigma) ** 2).sqrt() * eps_hat
    return mean + (1 - s.first) * fresh * eps


def ddim_inverse_step(p: Prediction, xt: Tensor, s: Step) -> Tensor:
    """One step of the deterministic DDIM path towards noise, x_t -> x_{t+1}."""
    return s.alpha_next * p.x0 + s.sigma_next * (xt - s.alpha * p.x0) / s.sigma


# ---- whole paths


def ancestral(denoiser: Denoiser, x: Tensor, noise: Noise, cond: Cond = {}, gradient: Gradient | None = None) -> Iterator[State]:
    """Draw from the chain itself, x (B, C, H, W) standard normal. Step i uses the draw noise(steps - i); noise(0) made x.

    A `gradient` guides each step by moving its mean.
    """
    for k, (i, at) in enumerate(_down(denoiser, x)):
        p = denoiser(x, at, cond)
        if gradient is not None:
            p = shift_mean(p, gradient(x, at))
        x = ancestral_step(p, x, denoiser.chain.at(at, x), noise(k + 1) if i else torch.zeros_like(x))
        yield State(i, x, p.x0)


def ddim(
    denoiser: Denoiser, x: Tensor, noise: Noise, cond: Cond = {}, gradient: Gradient | None = None, *, eta: float = 0.0
) -> Iterator[State]:
    """DDIM from x (B, C, H, W) standard normal; eta in [0, 1]. Noise is drawn as in `ancestral`, and only where eta > 0.

    A `gradient` guides each step by moving its score.
    """
    for k, (i, at) in enumerate(_down(denoiser, x)):
        p, s = denoiser(x, at, cond), denoiser.chain.at(at, x)
        if gradient is not None:
            p = shift_score(p, x, s, gradient(x, at))
        eps = noise(k + 1) if eta and i else torch.zeros_like(x)
        x = ddim_step(p, x, s, eps, eta)
        yield State(i, x, p.x0)


def ddim_inversion(denoiser: Denoiser, x: Tensor, cond: Cond = {}) -> Iterator[State]:
    """The noise from which DDIM (eta = 0) comes back to the images x (B, C, H, W), in [-1, 1], up to the step size.

    The images are taken as x at step 0; the last of the K - 1 states is what `ddim` starts from.
    """
    for i in range(denoiser.chain.steps - 1):
        at = torch.full((len(x),), i, device=x.device)
        p = denoiser(x, at, cond)
        x = ddim_inverse_step(p, x, denoiser.chain.at(at, x))
        yield State(i, x, p.x0)


def run(path: Iterable[State]) -> Tensor:
    """The x that a path ends at."""
    (last,) = deque(path, maxlen=1)
    return last.x


def _down(denoiser: Denoiser, x: Tensor) -> Iterator[tuple[int, Tensor]]:
    for i in reversed(range(denoiser.chain.steps)):
        yield i, torch.full((len(x),), i, device=x.device)


SOLVERS: dict[str, Callable[..., Iterator[State]]] = {f.__name__: f for f in (ancestral, ddim)}
