"""Terms of the likelihood bound, under the original's names."""

import math

import torch
from torch import Tensor

from iddpm.diffusion.bound import discretized_log_likelihood, gaussian_kl


def normal_kl(mean1: Tensor | float, logvar1: Tensor | float, mean2: Tensor | float, logvar2: Tensor | float) -> Tensor:
    """KL(N(mean1, var1) || N(mean2, var2)) of each element, in nats; numbers are broadcast, one of the four is a Tensor."""
    like = next((z for z in (mean1, logvar1, mean2, logvar2) if isinstance(z, Tensor)), None)
    assert like is not None, "at least one argument must be a Tensor"
    m1, v1, m2, v2 = (torch.as_tensor(z).to(like) for z in (mean1, logvar1, mean2, logvar2))
    return gaussian_kl(m1, v1, m2, v2)


def approx_standard_normal_cdf(x: Tensor) -> Tensor:
    """The approximation of the normal distribution function that `discretized_gaussian_log_likelihood` is made of."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, *, means: Tensor, log_scales: Tensor) -> Tensor:
    """log of a Gaussian's mass in the bin of each 8-bit value x, given in [-1, 1], in nats."""
    assert x.shape == means.shape == log_scales.shape
    return discretized_log_likelihood(x, means, log_scales)
