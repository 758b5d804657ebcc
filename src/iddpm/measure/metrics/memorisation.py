"""Whether samples are copies: their distances to training images against those of training images to each other."""

from typing import NamedTuple

import numpy as np

from iddpm.measure.metrics.rows import Estimate


class Memorised(NamedTuple):
    share: Estimate
    ratio: float | None


def memorised(samples: np.ndarray, training: np.ndarray) -> Memorised:
    """From the distances to the nearest training image: of each sample (n,), and of each training image to another (m,).

    share: of samples that lie as near as the nearest 1 % of training images do. Fresh images of the same source give 1 %, but for
    the scatter of that 1 % (0.5 % either way at a thousand training images), and copies 100 %; where more than 1 % of training
    images are doubles, fresh images give the share of these.
    ratio: the samples' median over the training images'; 1 for fresh images, 0 for copies, None where half of the training
    images or more are doubles, whose median is 0.
    """
    share = Estimate.mean((samples <= np.quantile(training, 0.01)).astype(np.float64))
    typical = float(np.median(training))
    return Memorised(share, float(np.median(samples)) / typical if typical else None)
