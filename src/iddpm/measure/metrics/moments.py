"""The mean and covariance of features, in one pass over them."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from iddpm.errors import UserError
from iddpm.measure.metrics.rows import BLOCK, Rows, blocks, not_finite, refusal


@dataclass
class Moments:
    """n, the mean (d,), and the sum of outer products about it (d, d), in float64 (Chan, Golub & LeVeque 1983)."""

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
        if not len(x):
            return
        mean, total = x.mean(0), self.n + len(x)
        delta = mean - self.mean
        self.mean += delta * (len(x) / total)
        self.outer += (x - mean).T @ (x - mean) + np.outer(delta, delta * (self.n * len(x) / total))
        self.n = total

    @property
    def covariance(self) -> np.ndarray:
        """(d, d), the unbiased one: over n - 1. UserError for fewer than 2 rows."""
        if self.n < 2:
            raise UserError(f"a covariance needs at least 2 images, not {self.n}: give more")
        return self.outer / (self.n - 1)


@dataclass(frozen=True, eq=False)
class Gaussian:
    """A mean (d,) and a covariance (d, d), float64."""

    mean: np.ndarray
    covariance: np.ndarray
    n: int | None = None  # images that it is of; None where a file does not say
    few: np.ndarray | None = None  # (n, d) with covariance = few^T few, where there are no more rows than features

    @staticmethod
    def of(rows: Rows) -> "Gaussian":
        """Of features (n, d); where n <= d they are held in memory. UserError for fewer than 2 rows, or one not finite."""
        moments, n = Moments.of(rows), len(rows)
        few = (np.asarray(rows[:n], np.float64) - moments.mean) / np.sqrt(n - 1) if 1 < n <= rows.shape[1] else None
        return Gaussian(moments.mean, moments.covariance, n, few)

    @cached_property
    def factor(self) -> np.ndarray:
        """F (d, rank) with covariance = F F^T; eigenvalues that are rounding of the largest are left out.

        Of few rows it is these, centred: no eigenproblem is solved. UserError for a matrix that is no covariance: one from a
        foreign file.
        """
        if self.few is not None:
            return self.few.T
        values, vectors = np.linalg.eigh(self.covariance)
        if values[0] < -1e-4 * abs(values[-1]):  # rounding of float32 stays above
            raise UserError(f"a covariance has the eigenvalue {values[0]:.3g}: that is none; make its file anew")
        kept = values > np.finfo(float).eps * len(values) * values[-1]
        return vectors[:, kept] * np.sqrt(values[kept])
