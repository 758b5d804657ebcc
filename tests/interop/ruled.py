"""Weights by their names: the rule by which the goldens of other programs' networks were made."""

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def ruled(name: str, shape: Sequence[int]) -> Tensor:
    """Normal numbers of the name's seed, such that a layer keeps the size of what it is given; gains ".g" are about 1."""
    w = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).standard_normal(tuple(shape)).astype(np.float32)
    if name.endswith(".g"):
        return torch.from_numpy(1 + 0.1 * w)
    return torch.from_numpy(w / np.sqrt(np.prod(shape[1:])) if w.ndim > 1 else 0.1 * w).float()
