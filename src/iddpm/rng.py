"""Random numbers as a pure function of (seed, what for, step, index of the example): never of rank, batch split or history.

Each example reads its own Philox stream (Salmon et al. 2011): the key is (seed, purpose), the counter starts at (index, step).
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

# what the numbers are for; the values are part of every run's randomness, so they never change
NOISE, TIME, FLIP, SAMPLE, LIKELIHOOD, DROPOUT, LOW_RES, UPSAMPLE, CROP, DROP, EDIT, SCALE, AUGMENT, PLACE, PATH = range(1, 16)


def stream(seed: int, purpose: int, step: int, index: int) -> np.random.Generator:
    """The generator of one example; seed, step and index are any non-negative integers below 2**64."""
    key, counter = (np.array(words, np.uint64) for words in ([seed, purpose], [0, 0, index, step]))  # a list would be floats
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def normal(seed: int, purpose: int, step: int, indices: Iterable[int], shape: Sequence[int]) -> Tensor:
    """Standard normal noise (len(indices), *shape) float32, row by row from each index's own stream."""
    rows = [stream(seed, purpose, step, int(i)).standard_normal(tuple(shape), dtype=np.float32) for i in indices]
    return torch.from_numpy(np.stack(rows))


def uniform(seed: int, purpose: int, step: int, count: int) -> Tensor:
    """Uniform numbers in [0, 1) for examples 0 .. count-1 of a step, (count,) float64: cheap, so every rank draws them all."""
    return torch.from_numpy(stream(seed, purpose, step, 0).random(count))
