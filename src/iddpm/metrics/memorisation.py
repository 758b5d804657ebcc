"""Whether samples are copies: their distances to training images against those of training images to each other."""

from typing import NamedTuple

import numpy as np

from iddpm.metrics.rows import Estimate


class Memorised(NamedTuple):
    share: Estimate
    ratio: float


def memorised(samples: np.ndarray, training: np.ndarray) -> Memorised:
    """From the distances to the nearest training image: of each sample (n,), and of each training image to another (m,).

    share: of samples that lie nearer than 99 % of training images do; ratio: the samples' median over the training images'.
    """
    share = Estimate.mean((samples < np.quantile(training, 0.01)).astype(np.float64))
    return Memorised(share, float(np.median(samples) / np.median(training)))
