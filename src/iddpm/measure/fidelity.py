"""How faithful enlarged images are to the originals."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from iddpm.config import Config
from iddpm.data.preparation import signed
from iddpm.sampling.images import as_float
from iddpm.sampling.job import enlarged


def fidelity(config: Config, drawn: np.ndarray, small: np.ndarray, originals: np.ndarray) -> dict[str, Any]:
    """Mean PSNR (dB) and SSIM to the originals (N, C, H, W) uint8 or uint16, of the model's images and of the bicubic ones."""
    truth = signed(originals)
    out: dict[str, Any] = {"images": len(drawn)}
    for name, made in (("model", drawn), ("bicubic", enlarged(config, small))):
        x = as_float(made)
        out[f"psnr_{name}"] = psnr(x, truth).clamp(max=100).mean().item()  # an exact copy would be infinite
        if min(x.shape[2:]) >= 11:
            out[f"ssim_{name}"] = ssim(x, truth).mean().item()
    return out


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair (B,), in dB, of images (B, C, H, W) in [-1, 1]."""
    return 10 * torch.log10(4 / ((x - y).double() ** 2).flatten(1).mean(1))


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity of each pair (B,), of images (B, C, H, W) in [-1, 1] of at least 11 pixels a side.

    Wang et al. 2004: Gaussian windows of 11 pixels with deviation 1.5, K1 = 0.01, K2 = 0.03, windows inside the image only,
    the mean over windows and channels. ValueError for smaller images.
    """
    if min(x.shape[2:]) < 11:
        raise ValueError(f"SSIM needs images of at least 11 pixels a side, not {tuple(x.shape[2:])}")
    pairs, channels = x.shape[:2]
    x, y = (z.double().flatten(0, 1)[:, None] + 1 for z in (x, y))  # bc 1 h w, from 0: luminance counts from black
    taps = torch.exp(-0.5 * ((torch.arange(11, dtype=torch.float64, device=x.device) - 5) / 1.5) ** 2)
    taps /= taps.sum()

    def blur(z: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(z, taps.view(1, 1, 1, 11)), taps.view(1, 1, 11, 1))

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # the range of the values is 2
    each = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return each.reshape(pairs, channels, -1).mean((1, 2))
