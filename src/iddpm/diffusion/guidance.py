"""Classifier guidance: the gradient of log p(y | x_t) bends each step towards a class (Dhariwal & Nichol 2021, section 4)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from iddpm.diffusion.denoiser import Network, Prediction
from iddpm.diffusion.schedule import Chain, Step

Gradient = Callable[[Tensor, Tensor], Tensor]  # (x_t (B, C, H, W), steps i (B,)) -> the scaled gradient, like x_t


def classifier_gradient(net: Network, chain: Chain, y: Tensor, scale: float = 1.0) -> Gradient:
    """scale times the gradient of log p(y | x_t) of a classifier (x_t, time) -> logits (B, K), for classes y (B,)."""

    def gradient(xt: Tensor, i: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            x = xt.detach().clone().requires_grad_(True)
            log_p = F.log_softmax(net(x, chain.at(i, i).time.clone()).float(), dim=1)
            (grad,) = torch.autograd.grad(log_p.gather(1, y.clone()[:, None]).sum(), x)
        return scale * grad

    return gradient


def shift_mean(p: Prediction, gradient: Tensor) -> Prediction:
    """The prediction with its mean moved by variance times gradient (algorithm 1): for `ancestral`."""
    return p._replace(mean=p.mean + p.log_var.exp() * gradient)


def shift_score(p: Prediction, xt: Tensor, s: Step, gradient: Tensor) -> Prediction:
    """The prediction with its eps moved by -sigma times gradient, and x0 and mean to match (algorithm 2): for `ddim`."""
    x0 = p.x0 + s.sigma**2 / s.alpha * gradient
    return p._replace(x0=x0, mean=s.coef_x0 * x0 + s.coef_xt * xt)
