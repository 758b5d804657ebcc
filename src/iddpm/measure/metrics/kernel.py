"""The kernel distance: KID's unbiased squared maximum mean discrepancy (Binkowski et al. 2018), and its standard error."""

import numpy as np
import torch
from torch import Tensor

from iddpm.measure.metrics.interface import Comparison, Finding, Metric, images, needs
from iddpm.measure.metrics.rows import BLOCK, Estimate, Rows, exact, held, require

LIMIT = 10_000  # rows a side; the cost is quadratic in it


def kernel(x: Tensor, y: Tensor) -> Tensor:
    """k(x, y) = (x.y/d + 1)^3 of each pair, (n, d), (m, d) -> (n, m)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def kernel_distance(
    samples: Rows, reference: Rows, *, block: int = BLOCK, device: torch.device | str = "cpu", limit: int = LIMIT
) -> Estimate:
    """E k(x, x') + E k(y, y') - 2 E k(x, y), over all pairs of other rows; 0 is expected for equal laws, and less may come out.

    Where both sides have more than `limit` rows it is the mean over ceil(smaller side/limit) disjoint parts, in the order given
    (shuffle first), each of at most `limit` rows a side; what is over is not used. Two parts are held at a time. The error is
    that of new draws of both sides. UserError for fewer than 4 rows a side, or features that are not finite or of other widths.
    """
    require(4, "a kernel distance", samples, reference)
    parts, device = -(-min(len(samples), len(reference)) // limit), exact(device)
    values, errors = np.empty(parts), np.empty(parts)
    for k in range(parts):
        x, y = (torch.from_numpy(held(rows, _part(len(rows), k, parts, limit))).to(device) for rows in (samples, reference))
        values[k], errors[k] = _distance(x, y, block)
    return Estimate(float(values.mean()), float(np.sqrt((errors**2).sum()) / parts))


def _part(n: int, k: int, parts: int, limit: int) -> slice:
    """Part k of n rows."""
    start, stop = k * n // parts, (k + 1) * n // parts
    return slice(start, min(stop, start + limit))


def _distance(x: Tensor, y: Tensor, block: int) -> tuple[float, float]:
    """Of all pairs of rows of x (n, d) and y (m, d): the distance and its standard error.

    Hoeffding's two terms (Sutherland & Deka 2019): the rows' own scatter, 4 var(a)/n + 4 var(b)/m, and that of the pairs,
    2 zeta_xx/n^2 + 2 zeta_yy/m^2 + 4 zeta_xy/(nm), which alone is left for equal laws. The jackknife of the rows (each left out
    once) estimates the first plus twice the second.
    """
    n, m = len(x), len(y)
    (xx, _), (yy, _), (xy, yx) = _sums(x, x, block), _sums(y, y, block), _sums(x, y, block)
    value = xx[0].sum() / (n * (n - 1)) + yy[0].sum() / (m * (m - 1)) - 2 * xy[0].sum() / (n * m)
    a, b = xx[0] / (n - 2) - xy[0] / m, yy[0] / (m - 2) - yx[0] / n
    jackknife = 4 * a.var(ddof=1) / n + 4 * b.var(ddof=1) / m
    pairs = 2 * _within(*xx) / n**2 + 2 * _within(*yy) / m**2 + 4 * _across(xy, yx) / (n * m)
    pairs = max(pairs, 0)
    return float(value), float(np.sqrt(max(jackknife - 2 * pairs, 0) + pairs))


def _sums(x: Tensor, y: Tensor, block: int) -> tuple[np.ndarray, np.ndarray]:
    """The sums of k and of k^2 for each row of x, (2, n), and of y, (2, m); within x (y is x), over the other rows."""
    rows, columns = x.new_zeros(2, len(x)), x.new_zeros(2, len(y))
    for i in range(0, len(x), block):
        for j in range(i if y is x else 0, len(y), block):
            k = kernel(x[i : i + block], y[j : j + block])
            if diagonal := y is x and i == j:
                k.fill_diagonal_(0)
            for power, values in enumerate((k, k**2)):
                rows[power, i : i + block] += values.sum(1)
                if not diagonal:
                    columns[power, j : j + block] += values.sum(0)
    if y is x:
        rows = columns = rows + columns
    return rows.cpu().numpy(), columns.cpu().numpy()


def _within(one: np.ndarray, two: np.ndarray) -> float:
    """zeta: E (k - E_x k - E_y k + E k)^2 = E k^2 - 2 E (E_y k)^2 + (E k)^2, each over rows that are all different.

    From each row's sums of k and k^2 over the n - 1 others.
    """
    n = len(one)
    three = (one**2 - two).sum()  # k(x, y) k(x, z), as many as n (n - 1) (n - 2)
    four = one.sum() ** 2 - 4 * three - 2 * two.sum()
    return (two.sum() - 2 * three / (n - 2) + four / ((n - 2) * (n - 3))) / (n * (n - 1))


def _across(rows: np.ndarray, columns: np.ndarray) -> float:
    """zeta of the pairs between x and y, from the sums of k and k^2 for each row of x, (2, n), and of y, (2, m)."""
    (one, two), (other, _) = rows, columns
    n, m = len(one), len(other)
    in_row, in_column = (one**2).sum() - two.sum(), (other**2).sum() - two.sum()
    apart = one.sum() ** 2 - in_row - in_column - two.sum()
    return (two.sum() - in_row / (m - 1) - in_column / (n - 1) + apart / ((n - 1) * (m - 1))) / (n * m)


@needs(images(4))
def kd(c: Comparison) -> list[Finding]:
    """The kernel distance, without bias at any n: KID on Inception's features."""
    found = kernel_distance(c.samples.rows["pool"], c.reference.rows["pool"], device=c.extractor.device)
    return [Finding(c.extractor.called("KD"), found, c.reference.n)]


METRICS: dict[str, Metric] = {"kd": kd}
