"""The Inception Score (Salimans et al. 2016), as probabilities stream by."""

from typing import NamedTuple

import numpy as np

from iddpm.errors import UserError
from iddpm.measure.metrics.rows import Estimate


class InceptionScore(NamedTuple):
    """Between 1 and the number of classes, higher is better; of real images, what the classifier makes of them."""

    score: Estimate  # the mean over the parts, which papers call IS; its standard error
    deviation: float  # the parts' standard deviation, which papers write behind the +-
    whole: float  # of all images as one part; above `score`, and further above the smaller the parts are


class Scores:
    """exp(mean KL(p(y|x) || mean p(y|x))) in each of `splits` consecutive parts of n images, and in all of them.

    Held are each part's sums of p and of p log p, so memory does not grow with n and batches may come in any order, from any
    process. Parts of few images score low, as their mean p is too near to each p: 50,000 images in 10 parts are the custom; at
    far fewer, quote `whole`, and compare at equal n only. UserError for fewer than 2 images in a part.
    """

    def __init__(self, n: int, classes: int, splits: int = 10):
        if n < 2 * splits:
            raise UserError(f"an Inception Score in {splits} parts needs at least {2 * splits} images, not {n}: give more")
        self.ends = np.arange(1, splits + 1) * n // splits
        self.count = np.zeros(splits, np.int64)
        self.mass = np.zeros((splits, classes))  # sums of p
        self.entropy = np.zeros(splits)  # sums of p log p over images and classes

    def add(self, indices: np.ndarray, probabilities: np.ndarray) -> None:
        """Take in the probabilities (b, K) of the images with these indices (b,), each once. UserError where they are none."""
        p = np.asarray(probabilities, np.float64)
        if bad := int((~(np.abs(p.sum(1) - 1) < 1e-3) | (p < 0).any(1)).sum()):
            raise UserError(f"{bad} of {len(p)} rows are not probabilities: look for damaged images or weights")
        part = np.searchsorted(self.ends, indices, side="right")
        np.add.at(self.count, part, 1)
        np.add.at(self.mass, part, p)
        np.add.at(self.entropy, part, _p_log_p(p).sum(1))

    def merged(self, other: "Scores") -> "Scores":
        """Of both, which took in different images of the same n: in two processes, say, or of two files."""
        both = Scores(int(self.ends[-1]), self.mass.shape[1], len(self.ends))
        both.count, both.mass, both.entropy = self.count + other.count, self.mass + other.mass, self.entropy + other.entropy
        return both

    def result(self) -> InceptionScore:
        assert (np.cumsum(self.count) == self.ends).all(), "not all images are in"
        parts = _score(self.count, self.mass, self.entropy)
        whole = _score(self.count.sum(keepdims=True), self.mass.sum(0, keepdims=True), self.entropy.sum(keepdims=True))
        return InceptionScore(Estimate.mean(parts), float(parts.std()), float(whole[0]))


def _score(count: np.ndarray, mass: np.ndarray, entropy: np.ndarray) -> np.ndarray:
    """exp(mean over images of sum p log p - sum q log q) of each part, with q the mean p."""
    return np.exp(entropy / count - _p_log_p(mass / count[:, None]).sum(1))


def _p_log_p(p: np.ndarray) -> np.ndarray:
    return p * np.log(np.where(p > 0, p, 1))  # 0 log 0 = 0
