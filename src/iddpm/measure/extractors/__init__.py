"""Networks whose features images are compared by: each file that holds some ends in a table of them, read by `config.choices`."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from iddpm.config.choices import make
from iddpm.measure.extractors.interface import Extractor as Extractor


def open(name: str, own: Mapping[str, Any] = {}, device: torch.device | str = "cpu") -> Extractor:
    """The extractor of a name of the tables; `own` holds, among others, what is its own: the file of its weights.

    UserError for an unknown name, and for weights that are absent or damaged.
    """
    extractor: Extractor = make("extractor", name, own)(torch.device(device))
    return extractor


def rgb(images: Tensor) -> Tensor:
    """Images (n, C, H, W) uint8 as (n, 3, H, W): grey (C = 1) repeated, transparency (C = 4) laid over white, colour as it is."""
    channels = images.shape[1]
    assert images.dtype == torch.uint8 and channels in (1, 3, 4), (images.dtype, channels)
    if channels < 4:
        return images.expand(-1, 3, -1, -1)
    colour, alpha = images[:, :3].int(), images[:, 3:].int()
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).to(torch.uint8)
