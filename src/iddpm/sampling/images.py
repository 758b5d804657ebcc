"""Images as bytes and as numbers."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from iddpm.data.preparation import signed

Watch = Callable[[Tensor, Tensor], object]  # looks on as x and the guess x0, (B, C, H, W) both, change from step to step


def unwatched(x: Tensor, x0: Tensor) -> None:
    """Nobody looks on."""


def as_uint8(x: Tensor) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] as (B, H, W, C) uint8, rounded to the nearest level."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def as_float(images: np.ndarray) -> Tensor:
    """Images (B, H, W, C) uint8, or uint16 of 16 bits, as (B, C, H, W) in [-1, 1]."""
    return signed(images).permute(0, 3, 1, 2)
