"""Super-resolution: the small image a model is trained and asked to enlarge, and how good an enlargement is."""

from collections.abc import Callable

import torch
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
