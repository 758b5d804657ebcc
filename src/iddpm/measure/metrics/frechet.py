"""The Frechet distance of two Gaussians, as in FID (Heusel et al. 2017, eq. 6), and its standard error."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from iddpm.errors import UserError
from iddpm.measure.metrics.moments import Moments
from iddpm.measure.metrics.rows import BLOCK, Rows, blocks, require


@dataclass(frozen=True, eq=False)
class Gaussian:
    """A mean (d,) and a covariance (d, d), float64."""

    mean: np.ndarray
    covariance: np.ndarray

    @staticmethod
    def of(moments: Moments) -> "Gaussian":
        """UserError for fewer than 2 rows."""
        return Gaussian(moments.mean, moments.covariance)

    @staticmethod
    def of_few(rows: np.ndarray) -> "Gaussian":
        """As `of`, of rows (n, d) in memory; where n <= d the factor is the centred rows, and no eigenproblem is solved."""
        moments = Moments.of(rows)
        gaussian = Gaussian.of(moments)
        if moments.n <= rows.shape[1]:
            gaussian.__dict__["factor"] = (rows - moments.mean).T / np.sqrt(moments.n - 1)  # where cached_property keeps it
        return gaussian

    @cached_property
    def factor(self) -> np.ndarray:
        """F (d, rank) with covariance = F F^T; eigenvalues that are rounding of the largest are left out.

        UserError for a matrix that is no covariance: one from a foreign file.
        """
        values, vectors = np.linalg.eigh(self.covariance)
        if values[0] < -1e-4 * abs(values[-1]):  # rounding of float32 stays above
            raise UserError(f"a covariance has the eigenvalue {values[0]:.3g}: that is none; make its file anew")
        kept = values > np.finfo(float).eps * len(values) * values[-1]
        return vectors[:, kept] * np.sqrt(values[kept])


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mu_a - mu_b|^2 + tr(A) + tr(B) - 2 tr (A B)^(1/2), which is nowhere negative but by rounding.

    The eigenvalues of (A B)^(1/2) are the singular values of F_a^T F_b, since A B = F_a (F_a^T F_b) F_b^T: no root is taken of
    an eigenvalue that is rounding, so a covariance without full rank (n <= d) keeps all its digits.
    """
    root = np.linalg.svd(a.factor.T @ b.factor, compute_uv=False).sum()
    return float(((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * root)


def frechet_error(samples: Rows, a: Gaussian, b: Gaussian, block: int = BLOCK) -> float:
    """The standard error of `frechet_distance` over a new draw of the samples (n, d), of which `a` is the Gaussian; b is fixed.

    std(psi)/sqrt(n), the infinitesimal jackknife (Efron 1982): with y = x - mu_a, sample x has the influence
    psi(x) = 2 (mu_a - mu_b).y + y^T (I - T) y - tr((I - T) A), where T = B^(1/2) (B^(1/2) A B^(1/2))^(-1/2) B^(1/2) carries
    a onto b: T = F_b (F_b^T A F_b)^(-1/2) F_b^T. It says how a figure scatters, not how far a small n biases it upwards; too
    large by a third or so where the laws are equal. UserError for fewer than 2 rows, or where one is not finite.
    """
    require(2, "an error", samples)
    product = a.factor.T @ b.factor
    values, vectors = np.linalg.eigh(product.T @ product)
    kept = values > np.finfo(float).eps * len(a.mean) * values.max(initial=0)  # what is left out weighs nothing in psi
    g = b.factor @ (vectors[:, kept] * values[kept] ** -0.25)  # T = g g^T
    influence = np.empty(len(samples))
    for at, x in blocks(samples, block):
        y = x - a.mean
        influence[at] = 2 * y @ (a.mean - b.mean) + (y**2).sum(1) - ((y @ g) ** 2).sum(1)
    return float(influence.std() / np.sqrt(len(influence)))
