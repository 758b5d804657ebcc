"""The mean and covariance of features in one pass over them, from parts that may be merged."""

from dataclasses import dataclass

import numpy as np

from iddpm.errors import UserError
from iddpm.measure.metrics.rows import BLOCK, Rows, blocks, not_finite, refusal


@dataclass
class Moments:
    """n, the mean (d,), and the sum of outer products about it (d, d), in float64 (Chan, Golub & LeVeque 1983).

    Parts merge by n = n_a + n_b, delta = mean_b - mean_a, mean = mean_a + delta n_b/n and
    outer = outer_a + outer_b + delta delta^T n_a n_b/n: one part or many, the same to rounding.
    """

    n: int
    mean: np.ndarray
    outer: np.ndarray

    @staticmethod
    def blank(d: int) -> "Moments":
        return Moments(0, np.zeros(d), np.zeros((d, d)))

    @staticmethod
    def of(rows: Rows, block: int = BLOCK) -> "Moments":
        """Of features (n, d). UserError where one is not finite."""
        moments = Moments.blank(rows.shape[1])
        for _, x in blocks(rows, block):
            moments.add(x)
        return moments

    def add(self, block: np.ndarray) -> None:
        """Take in features (b, d). UserError where one is not finite."""
        x = np.asarray(block, np.float64)
        if bad := not_finite(x):
            raise refusal(bad, len(x))
        if len(x):
            mean = x.mean(0)
            self._take(len(x), mean, (x - mean).T @ (x - mean))

    def merged(self, other: "Moments") -> "Moments":
        """Of both parts' rows, for who has them in two processes or files; neither part changes."""
        both = Moments(self.n, self.mean.copy(), self.outer.copy())
        both._take(other.n, other.mean, other.outer)
        return both

    def _take(self, n: int, mean: np.ndarray, outer: np.ndarray) -> None:
        total = self.n + n
        if total:
            delta = mean - self.mean
            self.mean += delta * (n / total)
            self.outer += outer + np.outer(delta, delta * (self.n * n / total))
            self.n = total

    @property
    def covariance(self) -> np.ndarray:
        """(d, d), the unbiased one: over n - 1. UserError for fewer than 2 rows."""
        if self.n < 2:
            raise UserError(f"a covariance needs at least 2 images, not {self.n}: give more")
        return self.outer / (self.n - 1)
