"""Guidance bends a denoiser's predictions towards what is wanted. It wraps `denoise`, so that any solver takes it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from iddpm.diffusion.denoiser import Denoise, Network, Prediction, times
from iddpm.diffusion.schedule import Level

Gradient = Callable[[Tensor, Any], Tensor]  # (x_t (B, C, H, W), level) -> the scaled gradient, like x_t


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
    """The denoiser, bent by a classifier's gradient (Dhariwal & Nichol 2021, section 4), for steps whose entries are 0-dim.

    The mean moves by variance times gradient (algorithm 1), which `ancestral` reads; x0 by that of the score, sigma^2/alpha
    times gradient (algorithm 2), which all others read. Of pure noise, where alpha is 0, a classifier says nothing: x0 stays.
    """

    def bent(x: Tensor, step: Any) -> Prediction:
        p, g = denoise(x, step), gradient(x, step)
        mean = p.mean + p.log_var.exp() * g if p.mean is not None and p.log_var is not None else None
        x0 = p.x0 + step.sigma**2 / step.alpha * g if step.alpha else p.x0
        return p._replace(x0=x0, mean=mean)

    return bent
