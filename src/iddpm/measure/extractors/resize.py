"""Resizing as the metrics' networks had it: each network's own, since a distance changes with it."""

import torch
from torch import Tensor


def tensorflow_bilinear(images: Tensor, size: int) -> Tensor:
    """Images (n, c, H, W) float to (n, c, size, size) as TensorFlow 1's ResizeBilinear does by default, to the last bit.

    Pixel i of an output row lies at s = i W/size of the input, which the pixels floor(s) and floor(s) + 1 make (the last one
    repeated): corners are shared at the upper left only, not pixel centres, and what shrinks is not smoothed (Parmar et al.
    2022 draw what that does). Rows first, then columns: the order of rounding is TensorFlow's too.
    """
    for axis in (3, 2):
        length = images.shape[axis]
        scale = torch.tensor(length / size, dtype=torch.float32)  # rounded to float32 before the product, as there
        s = torch.arange(size, dtype=torch.float32) * scale
        low = s.long()
        part = (s - low).to(images.device).view(-1, *[1] * (3 - axis))
        a = images.index_select(axis, low.to(images.device))
        b = images.index_select(axis, (low + 1).clamp(max=length - 1).to(images.device))
        images = a + (b - a) * part
    return images
