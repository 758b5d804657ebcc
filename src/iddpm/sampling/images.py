"""Images as bytes and as numbers."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from iddpm.data.preparation import Preparation, levels, signed

Watch = Callable[[Tensor, Tensor], object]  # looks on as x and the guess x0, (B, C, H, W) both, change from step to step


def unwatched(x: Tensor, x0: Tensor) -> None:
    """Nobody looks on."""


def as_pixels(x: Tensor, bits: int = 8) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] as (B, H, W, C) uint8, or uint16 of 16 bits, rounded to the nearest level."""
    most, kind = 2**bits - 1, torch.uint8 if bits == 8 else torch.uint16
    return ((x + 1) * (most / 2)).round().clamp(0, most).to(kind).permute(0, 2, 3, 1).contiguous()


def eight_bits(images: np.ndarray) -> np.ndarray:
    """Images uint8 or uint16, of any shape, as uint8: to look at, and for networks that see no more."""
    return levels(images, Preparation(), lambda told: None)


def as_float(images: np.ndarray) -> Tensor:
    """Images (B, H, W, C) uint8, or uint16 of 16 bits, as (B, C, H, W) in [-1, 1]."""
    return signed(images).permute(0, 3, 1, 2)
