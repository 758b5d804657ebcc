"""What a comparison compares: features of images, or a file of their statistics."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import NamedTuple

import numpy as np

from iddpm.measure.features import Features
from iddpm.measure.metrics.frechet import Gaussian
from iddpm.measure.metrics.moments import Moments
from iddpm.measure.metrics.rows import Rows
from iddpm.measure.statistics import Statistics


class Side(NamedTuple):
    """One side of a comparison: rows (n, d) of features by tap, or for a file of statistics their Gaussians alone."""

    n: int | None  # images of which there are rows; None for a file of statistics
    rows: Mapping[str, Rows]
    gaussian: Callable[[str], Gaussian | None]
    behind: Callable[[str], int | None]  # how many images a Gaussian is of; None where a file does not say
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()

    @staticmethod
    def of(features: Features) -> "Side":
        """A side of images."""
        rows, n = {tap: features.rows(tap) for tap in features.extractor.widths}, len(features)
        return Side(n, rows, features.gaussian, lambda tap: n, features.labels, features.images.classes)

    @staticmethod
    def of_statistics(held: Statistics) -> "Side":
        """A side of which only Gaussians are known."""
        return Side(None, {}, held.gaussians.get, lambda tap: held.n)

    def with_statistics(self, held: Statistics) -> "Side":
        """This side with the Gaussians of a file, where it has them, in the place of those of its own rows."""
        return self._replace(
            gaussian=lambda tap: held.gaussians.get(tap) or self.gaussian(tap),
            behind=lambda tap: held.n if tap in held.gaussians else self.behind(tap),
        )

    def part(self, start: int, stop: int) -> "Side":
        """Rows start .. stop - 1."""
        rows = {tap: _Part(held, start, stop - start) for tap, held in self.rows.items()}
        labels = None if self.labels is None else self.labels[start:stop]

        @cache
        def gaussian(tap: str) -> Gaussian:
            few = stop - start <= rows[tap].shape[1]
            return Gaussian.of_few(rows[tap][:]) if few else Gaussian.of(Moments.of(rows[tap]))

        return Side(stop - start, rows, gaussian, lambda tap: stop - start, labels, self.classes)


class _Part:
    """Some consecutive rows of others."""

    def __init__(self, rows: Rows, start: int, n: int):
        self.rows, self.start, self.shape = rows, start, (n, rows.shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        a, b, _ = rows.indices(len(self))
        return self.rows[self.start + a : self.start + b]
