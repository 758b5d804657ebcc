"""Super-resolution: the small image that a model is trained and asked to enlarge."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def shrink(x0: Tensor, size: tuple[int, int]) -> Tensor:
    """The small images (B, C, h, w) of x0 (B, C, H, W), both in [-1, 1]: means over areas, rounded to 8 bits.

    As the published training makes them, but rounded, since whatever is enlarged later comes from files of 8 bits.
    """
    small = F.interpolate(x0, size, mode="area")
    return ((small + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1


def consistent(low_res: Tensor) -> Callable[[Tensor], Tensor]:
    """The projection of x0 (B, C, H, W) onto the images whose means over areas are low_res (B, C, h, w).

    x0 + enlarge(low_res - means of x0): what the small image tells is taken from it, the rest from the model (Wang et al. 2023,
    DDNM, eq. 12). For small images that `shrink` makes; H and W are whole multiples of h and w.
    """

    def project(x0: Tensor) -> Tensor:
        missing = low_res - F.interpolate(x0, low_res.shape[2:], mode="area")
        return x0 + F.interpolate(missing, x0.shape[2:], mode="nearest")

    return project


def bicubic(low_res: Tensor, size: tuple[int, int]) -> Tensor:
    """The baseline: bicubic enlargement of low_res (B, C, h, w) to `size`, in [-1, 1]."""
    return F.interpolate(low_res, size, mode="bicubic", align_corners=False).clamp(-1, 1)
