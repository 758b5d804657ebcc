"""What a metric sees, what it gives, and how its row says what it cannot do without."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Protocol, cast

import numpy as np

from iddpm.measure.extractors.interface import Extractor
from iddpm.measure.metrics.moments import Gaussian
from iddpm.measure.metrics.rows import Estimate, Rows


@dataclass(frozen=True, eq=False)
class Side:
    """One side of a comparison: features (n, d) by tap; of a file of statistics there are the Gaussians alone."""

    rows: Mapping[str, Rows]
    gaussian: Callable[[str], Gaussian | None]  # by tap; of a file of statistics also where there are rows beside it
    labels: np.ndarray | None = None  # (n,) int64
    classes: tuple[str, ...] = ()

    @property
    def n(self) -> int:
        """How many images there are features of; 0 for a file of statistics."""
        return len(self.rows["pool"]) if self.rows else 0

    def part(self, start: int, stop: int) -> "Side":
        """Rows start .. stop - 1."""
        rows = {tap: held[start:stop] for tap, held in self.rows.items()}
        labels = None if self.labels is None else self.labels[start:stop]
        return Side(rows, cache(lambda tap: Gaussian.of(rows[tap])), labels, self.classes)


@dataclass(frozen=True, eq=False)
class Comparison:
    """What a metric may look at."""

    samples: Side
    reference: Side
    extractor: Extractor


class Finding(NamedTuple):
    """A figure of a metric."""

    name: str
    estimate: Estimate
    reference_n: int | None  # how many real images the samples were compared with; None where that is unknown, or of none
    real: float | None = None  # what real images get in the place of the samples, where the metric tells it by itself
    real_n: tuple[int, int] | None = None  # how many of them against how many, where others were put in that place
    warning: str = ""  # what a reader must know of it
    nearest: tuple[np.ndarray, np.ndarray] | None = None  # each sample's nearest real rows (n, k), and distances, to be shown


class Metric(Protocol):
    """A row of the table: a function marked by `needs`, or a frozen dataclass with numbers."""

    @property
    def lacks(self) -> Callable[[Comparison], str]: ...

    def __call__(self, c: Comparison, /) -> list[Finding]: ...


Lacks = Callable[[Comparison], str]  # why it cannot be computed, in words; "" where it can


def needs(*checks: Lacks) -> Callable[[Callable[[Comparison], list[Finding]]], Metric]:
    """Marks a metric with what it cannot do without; of several things the first that is absent is told."""

    def mark(run: Callable[[Comparison], list[Finding]]) -> Metric:
        run.lacks = lambda c: next(filter(None, (lacks(c) for lacks in checks)), "")  # type: ignore[attr-defined]
        return cast(Metric, run)

    return mark


def gaussians(tap: str) -> Lacks:
    """Mean and covariance of these features: images, or a file of statistics."""

    def lacks(c: Comparison) -> str:
        if tap not in c.extractor.widths:
            return f"{c.extractor.name} has no {tap} features"
        return "" if c.reference.gaussian(tap) else f"the reference's statistics have none of its {tap} features"

    return lacks


def images(least: int) -> Lacks:
    """So many images on both sides."""

    def lacks(c: Comparison) -> str:
        if not c.reference.rows:
            return "the reference is a file of statistics, not of images"
        return f"it needs at least {least} images on both sides" if min(c.samples.n, c.reference.n) < least else ""

    return lacks
