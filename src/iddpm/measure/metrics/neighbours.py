"""Nearest neighbours, and what is counted of them: precision, recall, density and coverage."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
import torch
from torch import Tensor

from iddpm.measure.metrics.interface import Comparison, Finding, images
from iddpm.measure.metrics.rows import BLOCK, Estimate, Rows, blocks, exact, require

CLOSE = 1e-6  # of |x|^2 + |y|^2: a squared distance below it has lost too many digits in |x|^2 + |y|^2 - 2 x.y
MANY = 1 / 16  # share of close pairs, as of a model that draws few images again and again, above which all at once is faster


def nearest(
    samples: Rows,
    reference: Rows,
    k: int = 1,
    *,
    exclude_self: bool = False,
    block: int = BLOCK,
    device: torch.device | str = "cpu",
) -> tuple[np.ndarray, np.ndarray]:
    """The indices (n, k) of the k nearest reference rows of each sample, nearest first, and their Euclidean distances (n, k).

    `exclude_self` is for rows against themselves: no row is its own neighbour, but an equal one is, at distance 0. UserError
    for fewer reference rows than that needs, or features that are not finite or of other widths.
    """
    require(k + exclude_self, f"finding the {k} nearest", reference)
    require(1, "finding neighbours", samples, reference)
    indices, distances = np.empty((len(samples), k), np.int64), np.empty((len(samples), k))
    for at, x in _on(device, samples, block):
        best, who = x.new_full((len(x), k), torch.inf), torch.zeros(len(x), k, dtype=torch.int64, device=x.device)
        for to, y in _on(device, reference, block):
            squares = squared_distances(x, y)
            if exclude_self and at == to:
                squares.fill_diagonal_(torch.inf)
            values, order = torch.cat([best, squares], 1).topk(k, largest=False)
            number = torch.arange(to.start, to.stop, device=x.device).expand(len(x), -1)
            best, who = values, torch.cat([who, number], 1).gather(1, order)
        indices[at], distances[at] = who.cpu().numpy(), best.sqrt().cpu().numpy()
    return indices, distances


class Manifold(NamedTuple):
    """How far samples and reference lie within one another; 1 for equal laws, nearly (density may be more)."""

    precision: Estimate
    recall: Estimate
    density: Estimate
    coverage: Estimate


def manifold(samples: Rows, reference: Rows, k: int = 5, *, block: int = BLOCK, device: torch.device | str = "cpu") -> Manifold:
    """Balls around rows, each reaching to its k-th nearest other row; a row on the edge is outside, as in Naeem et al.'s code.

    precision: share of samples in any reference ball; recall: share of reference rows in any sample's (Kynkaanniemi et al. 2019,
    eq. 1-2, who take k = 3 and count the edge); density: reference balls that a sample is in, over k; coverage: share of
    reference balls with any sample in (Naeem et al. 2020, eq. 5-6, who take k = 5 for all four, as here by default).
    The errors of recall and coverage are jackknives over the samples, with the balls' sizes as they are. UserError for k rows or
    fewer on a side, or features that are not finite or of other widths.
    """
    require(k + 1, f"precision and recall with {k} neighbours", samples, reference)
    n, m, device = len(samples), len(reference), exact(device)
    around_samples, around_reference = (
        torch.from_numpy(nearest(rows, rows, k, exclude_self=True, block=block, device=device)[1][:, -1]).to(device)
        for rows in (samples, reference)
    )
    over = torch.zeros(n, dtype=torch.int64, device=device)  # reference balls over each sample
    holding, within = (torch.zeros(2, m, dtype=torch.int64, device=device) for _ in range(2))  # samples: how many, sum of indices
    for to, y in _on(device, reference, block):
        for at, x in _on(device, samples, block):
            distances = squared_distances(y, x).sqrt()
            in_reference, in_sample = distances < around_reference[to, None], distances < around_samples[at]
            over[at] += in_reference.sum(0)
            number = torch.arange(at.start, at.stop, device=x.device)
            for count, inside in ((holding, in_reference), (within, in_sample)):
                count[:, to] += torch.stack([inside.sum(1), (inside * number).sum(1)])
    balls = over.cpu().numpy()
    precision, density = Estimate.mean((balls > 0).astype(np.float64)), Estimate.mean(balls / k)
    return Manifold(precision, _covered(within.cpu().numpy(), n), density, _covered(holding.cpu().numpy(), n))


def _covered(count: np.ndarray, n: int) -> Estimate:
    """The share of reference rows with any of n samples, and its jackknife; count (2, m): how many, and the sum of their indices.

    Leaving sample j out takes away the rows that have it alone.
    """
    how_many, who = count
    lost = np.bincount(who[how_many == 1], minlength=n) / len(who)
    return Estimate(float((how_many > 0).mean()), float(np.sqrt((n - 1) * lost.var())))


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x - y|^2 of each pair, (n, d), (m, d) -> (n, m); 0 for equal rows, and nearly equal ones keep their digits."""
    size = (x**2).sum(1)[:, None] + (y**2).sum(1)
    squares = torch.addmm(size, x, y.T, alpha=-2)
    close = squares <= CLOSE * size
    if close.sum() > MANY * close.numel():
        return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist") ** 2
    for i, j in (pairs.T for pairs in close.nonzero().split(BLOCK)):
        squares[i, j] = ((x[i] - y[j]) ** 2).sum(1)
    return squares


def _on(device: torch.device | str, rows: Rows, block: int) -> Iterator[tuple[slice, Tensor]]:
    for at, x in blocks(rows, block):
        yield at, torch.from_numpy(x).to(exact(device))


@dataclass(frozen=True)
class Manifolds:
    """Precision, recall, density and coverage."""

    neighbours: Annotated[int, "the k of precision, recall, density and coverage", 1, 100] = 5

    def lacks(self, c: Comparison) -> str:
        return images(self.neighbours + 1)(c)

    def __call__(self, c: Comparison) -> list[Finding]:
        found = manifold(c.samples.rows["pool"], c.reference.rows["pool"], self.neighbours, device=c.extractor.device)
        return [Finding(name, estimate, c.reference.n) for name, estimate in found._asdict().items()]


METRICS: dict[str, type[Manifolds]] = {"prdc": Manifolds}
