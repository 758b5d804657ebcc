"""How faithful enlarged images are to the originals."""

from typing import Any

import numpy as np
import torch

from iddpm.config import Config
from iddpm.data.super_res import psnr, ssim
from iddpm.sampling.images import as_float
from iddpm.sampling.job import enlarged


def fidelity(config: Config, drawn: np.ndarray, small: np.ndarray, originals: np.ndarray) -> dict[str, Any]:
    """Mean PSNR (dB) and SSIM to the originals (N, C, H, W) uint8, of the model's images and of the bicubic ones."""
    truth = torch.from_numpy(originals).float() / 127.5 - 1
    out: dict[str, Any] = {"images": len(drawn)}
    for name, made in (("model", drawn), ("bicubic", enlarged(config, small))):
        x = as_float(made)
        out[f"psnr_{name}"] = psnr(x, truth).clamp(max=100).mean().item()  # an exact copy would be infinite
        if min(x.shape[2:]) >= 11:
            out[f"ssim_{name}"] = ssim(x, truth).mean().item()
    return out
