"""Networks whose features images are compared by: each file of this folder that holds some ends in the table of its own."""

import difflib
from collections.abc import Callable

import torch
from torch import Tensor

from iddpm.errors import UserError
from iddpm.measure.extractors.interface import Extractor as Extractor
from iddpm.measure.tables import rows_of

EXTRACTORS: dict[str, Callable[[str, torch.device], Extractor]] = rows_of(__name__, __path__, "EXTRACTORS")


def open(name: str, weights: str = "", device: torch.device | str = "cpu") -> Extractor:
    """The extractor of a name of EXTRACTORS; `weights` is the user's file of them, or "" for where they usually are.

    UserError for an unknown name, for weights that are absent or damaged, and for a file that would be ignored.
    """
    if name not in EXTRACTORS:
        near = difflib.get_close_matches(name, EXTRACTORS, n=1, cutoff=0)[0]
        raise UserError(f"there is no extractor {name!r}: did you mean {near}? There are {', '.join(EXTRACTORS)}")
    return EXTRACTORS[name](weights, torch.device(device))


def rgb(images: Tensor) -> Tensor:
    """Images (n, C, H, W) uint8 as (n, 3, H, W): grey (C = 1) repeated, transparency (C = 4) laid over white, colour as it is."""
    channels = images.shape[1]
    assert images.dtype == torch.uint8 and channels in (1, 3, 4), (images.dtype, channels)
    if channels < 4:
        return images.expand(-1, 3, -1, -1)
    colour, alpha = images[:, :3].int(), images[:, 3:].int()
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).to(torch.uint8)
