"""Guidance bends a denoiser's predictions towards what is wanted. Each kind wraps `denoise`: any solver takes it, and they stack.

Where a better and a poorer guess are at hand (with and without the class, of a longer and a shorter training), the difference
says where better lies. A row of GUIDANCES makes of a scale the function (better, poorer, x_t, level) -> x0: 1 is the better guess
itself, more goes on past it. One is made for each path, for it may remember the steps before.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from iddpm.diffusion.denoiser import Cond, Denoise, Denoiser, Network, Prediction, beside, moved, times, wide
from iddpm.diffusion.grid import SEEN, Step
from iddpm.diffusion.schedule import Level

Gradient = Callable[[Tensor, Any], Tensor]  # (x_t (B, C, H, W), level) -> the scaled gradient, like x_t
Combine = Callable[[Tensor, Tensor, Tensor, Any], Tensor]  # (better x0, poorer x0, x_t, level) -> x0


# ---- by a poorer guess


def cfg(scale: float) -> Combine:
    """poorer + scale (better - poorer) (Ho & Salimans 2021, eq. 6, where w is scale - 1)"""
    return lambda better, poorer, x, level: poorer + scale * (better - poorer)


@dataclass(frozen=True)
class Apg:
    """Adaptive projected guidance: the part along the image, which burns it, is left out (Sadat et al. 2025, algorithm 1)"""

    apg_parallel: Annotated[float, "share of the difference along the image that is kept", 0.0, 1.0] = 0.0
    apg_norm: Annotated[float, "longest difference, in units of [-1, 1] over all pixels; 0: any", 0.0, 1e6] = 0.0
    apg_momentum: Annotated[float, "share of the last steps' differences added; below 0: repeats count less", -1.0, 1.0] = -0.5

    def __call__(self, scale: float) -> Combine:
        kept: list[Tensor] = []

        def combine(better: Tensor, poorer: Tensor, x: Tensor, level: Any) -> Tensor:
            d = better - poorer
            if kept:
                d = d + self.apg_momentum * kept.pop()
            kept.append(d)
            if self.apg_norm:
                d = d * (self.apg_norm / _norm(d)).clamp(max=1)
            unit = better / _norm(better)
            along = beside((d * unit).flatten(1).sum(1), x) * unit
            return better + (scale - 1) * (d - along + self.apg_parallel * along)

        return combine


@dataclass(frozen=True)
class CfgZero:
    """CFG-Zero*: the poorer velocity is scaled to fit, and the noisiest steps stand still (Fan et al. 2025, algorithm 1)"""

    zero_init: Annotated[float, "share of the flow's path, at its noisy end, without any movement", 0.0, 0.5] = 0.04

    def __call__(self, scale: float) -> Combine:
        def combine(better: Tensor, poorer: Tensor, x: Tensor, level: Any) -> Tensor:
            alpha, sigma = wide((level.alpha, level.sigma), x)
            good, poor = ((x - (alpha + sigma) * x0) / sigma for x0 in (better, poorer))  # eps - x0: the velocity of the flow
            fit = beside((good * poor).flatten(1).sum(1) / poor.square().flatten(1).sum(1), x) * poor
            moves = sigma / (alpha + sigma) < 1 - self.zero_init
            return (x - sigma * moves * (fit + scale * (good - fit))) / (alpha + sigma)

        return combine


def _norm(x: Tensor) -> Tensor:
    return beside(x.flatten(1).norm(dim=1), x).clamp(min=1e-12)


@dataclass(frozen=True)
class Steering:
    """How a poorer guess is used.

    Between the sigma/alpha `low` and `high` alone (Kynkaanniemi et al. 2024); `rescale` is how far the result is brought back to
    the spread of the better guess (Lin et al. 2024, eq. 15-16): 0 not at all, 1 whole.
    """

    combine: Combine
    low: float = 0.0
    high: float = float("inf")
    rescale: float = 0.0

    def __call__(self, better: Denoise, both: Callable[[Tensor, Any], tuple[Prediction, Tensor]]) -> Denoise:
        """`better`, bent where it counts; `both` also gives the x0 of the poorer guess."""

        def denoise(x: Tensor, level: Any) -> Prediction:
            ratio = level.sigma / level.alpha
            inside = (ratio >= self.low) & (ratio <= self.high)
            if not inside.any():
                return better(x, level)
            p, poorer = both(x, level)
            x0 = self.combine(p.x0, poorer, x, level)
            if self.rescale:
                spread = p.x0.flatten(1).std(1) / x0.flatten(1).std(1).clamp(min=1e-12)
                x0 = x0 * (1 + self.rescale * (beside(spread, x) - 1))
            return moved(p, torch.where(beside(inside, x), x0, p.x0), x, level)

        return denoise


def classifier_free(denoiser: Denoiser, cond: Cond, without: Cond, steering: Steering) -> Denoise:
    """Away from what the same network says `without` the condition (Ho & Salimans 2021): one call on a doubled batch."""
    twice = {name: torch.cat([value, without[name]]) for name, value in cond.items()}

    def both(x: Tensor, level: Any) -> tuple[Prediction, Tensor]:
        levels = type(level)(*(c.repeat(2) if c.ndim else c for c in level))
        p = denoiser(torch.cat([x, x]), levels, twice)
        half = [part[: len(x)] if part is not None and part.ndim else part for part in p]
        return Prediction(*half), p.x0[len(x) :]  # type: ignore[arg-type]

    return steering(lambda x, level: denoiser(x, level, cond), both)


def autoguided(denoise: Denoise, weak: Denoise, steering: Steering) -> Denoise:
    """Away from what a smaller or less trained model says (Karras et al. 2024, autoguidance)."""
    return steering(denoise, lambda x, level: (denoise(x, level), weak(x, level).x0))


# ---- trained in


def told(denoiser: Denoiser, cond: Cond, scale: float, low: float = 0.0, high: float = float("inf")) -> Denoise:
    """Guidance by a network that learned it: one plain call, which is told the scale: 1 outside sigma/alpha `low` to `high`."""

    def denoise(x: Tensor, level: Any) -> Prediction:
        ratio = level.sigma / level.alpha
        scales = torch.where((ratio >= low) & (ratio <= high), scale, 1.0).float().to(x.device).expand(len(x))
        return denoiser(x, level, {**cond, "scale": scales})

    return denoise


@dataclass(frozen=True)
class Taught:
    """What is added to the target of images with cond["scale"] (B,): (scale - 1) (output with the class - output without).

    Both from the network itself at scale 1, without a gradient, so that what it learns for a scale is what `classifier_free`
    makes of it in two calls (Tang et al. 2025, model guidance, eq. 9 and section 3.3; their w is scale - 1). An objective's
    `toward`. Costs a call on a doubled batch.
    """

    none: int  # the class that stands for no class

    @torch.no_grad()
    def __call__(self, denoiser: Denoiser, x: Tensor, level: Any, cond: Cond) -> Tensor:
        if "scale" not in cond:
            return torch.zeros_like(x)
        y, one = cond["y"], torch.ones_like(cond["scale"])
        twice = {name: torch.cat([value, value]) for name, value in cond.items()}
        twice |= {"y": torch.cat([y, torch.full_like(y, self.none)]), "scale": torch.cat([one, one])}
        levels = type(level)(*(c.repeat(2) if c.ndim else c for c in level))
        better, poorer = denoiser(torch.cat([x, x]), levels, twice).raw.chunk(2)
        return beside(cond["scale"] - 1, x) * (better - poorer)


# ---- by a classifier


def classifier_gradient(net: Network, y: Tensor, scale: float = 1.0) -> Gradient:
    """scale times the gradient of log p(y | x_t) of a classifier (x_t, time) -> logits (B, K), for classes y (B,)."""

    def gradient(x: Tensor, level: Level) -> Tensor:
        time = times(level, x)
        with torch.inference_mode(False), torch.enable_grad():
            x = x.detach().clone().requires_grad_(True)
            log_p = F.log_softmax(net(x, time.clone()).float(), dim=1)
            (grad,) = torch.autograd.grad(log_p.gather(1, y.clone()[:, None]).sum(), x)
        return scale * grad

    return gradient


def guided(denoise: Denoise, gradient: Gradient) -> Denoise:
    """The denoiser, bent by a classifier's gradient (Dhariwal & Nichol 2021, section 4).

    The mean moves by variance times gradient (algorithm 1), which `ancestral` reads; x0 by that of the score, sigma^2/alpha
    times gradient (algorithm 2), which all others read. Of pure noise, where alpha is 0, a classifier says nothing: x0 stays.
    """

    def bent(x: Tensor, step: Any) -> Prediction:
        p, g = denoise(x, step), gradient(x, step)
        mean = p.mean + p.log_var.exp() * g if p.mean is not None and p.log_var is not None else None
        pull = torch.where(step.alpha > 0, step.sigma**2 / step.alpha, 0.0)
        return p._replace(x0=p.x0 + (wide((pull,), x)[0] if pull.ndim else pull) * g, mean=mean)

    return bent


# ---- afterwards


def limited(denoise: Denoise, *after: Callable[[Tensor], Tensor]) -> Denoise:
    """What is done in turn to the x0 of a guided denoiser, as `Denoiser.after` is to a plain one's; the mean moves along."""

    def denoise_limited(x: Tensor, level: Any) -> Prediction:
        p = denoise(x, level)
        x0 = p.x0
        for f in after:
            x0 = f(x0)
        return moved(p, x0, x, level)

    return denoise_limited


def first_known(denoise: Denoise) -> Denoise:
    """The denoiser without its first call, where that is at almost pure noise: there x0 is guessed as 0, so that eps = x / sigma.

    Where x_t shows more of the image (its share of the variance is above `SEEN`), the network is called as ever.
    """
    called: list[bool] = []

    def known(x: Tensor, level: Any) -> Prediction:
        before, noisy = bool(called), level.alpha**2 <= SEEN * (level.alpha**2 + level.sigma**2)
        called.append(True)
        if before or not noisy.all():
            return denoise(x, level)
        x0 = torch.zeros_like(x)
        if isinstance(level, Step):
            return Prediction(x0, None, x0, wide((level.coef_xt,), x)[0] * x, level.log_min)
        return Prediction(x0, None, x0, None, None)

    return known


GUIDANCES: dict[str, Any] = {"cfg": cfg, "apg": Apg, "cfg_zero": CfgZero}
