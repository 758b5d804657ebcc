"""The Frechet distance of two Gaussians, as in FID (Heusel et al. 2017, eq. 6), and its standard error."""

import numpy as np

from iddpm.measure.metrics.interface import Comparison, Finding, Metric, gaussians, needs
from iddpm.measure.metrics.moments import Gaussian
from iddpm.measure.metrics.rows import BLOCK, Estimate, Rows, blocks, require

SMALL = 10_000  # samples below which a distance is told beside that of real images: it grows as n falls


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


@needs(gaussians("pool"))
def fd(c: Comparison) -> list[Finding]:
    """The Frechet distance of Gaussians: FID on Inception's features."""
    return _between(c, "pool", "FD")


@needs(gaussians("spatial"))
def sfd(c: Comparison) -> list[Finding]:
    """The Frechet distance on features that keep the places in the image: sFID, with an Inception extractor only."""
    return _between(c, "spatial", "sFD")


def _between(c: Comparison, tap: str, metric: str) -> list[Finding]:
    ours, theirs = c.samples.gaussian(tap), c.reference.gaussian(tap)
    assert ours and theirs
    estimate = Estimate(frechet_distance(ours, theirs), frechet_error(c.samples.rows[tap], ours, theirs))
    return [Finding(c.extractor.called(metric), estimate, theirs.n, warning=_warning(c.samples.n, theirs.n, len(ours.mean)))]


def _warning(n: int, reference_n: int | None, width: int) -> str:
    """What a reader must know of a distance of so few images."""
    least = min(n, reference_n or n)
    if least <= width:
        return (
            f"{least} images for {width} features: a Frechet distance is far too large;\n"
            "         read it beside that of real images, or trust the kernel distance"
        )
    return f"a Frechet distance of {n} samples is too large: compare it at equal n only, beside real images'" if n < SMALL else ""


METRICS: dict[str, Metric] = {"fd": fd, "sfd": sfd}
