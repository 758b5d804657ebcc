"""What every metric reads and gives: rows of features, block by block, and a number with its error."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch

from iddpm.errors import UserError

BLOCK = 2048  # rows held at a time; a block of distances is then 32 MiB


class Rows(Protocol):
    """Features (n, d) in memory or on disk, of which slices are arrays."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> np.ndarray: ...


class Estimate(NamedTuple):
    """A number and its standard error (None where there is none).

    The error is over a new draw of the samples, with the reference as it is, except where the function that gives it says more.
    """

    value: float
    error: float | None

    @staticmethod
    def mean(values: np.ndarray) -> "Estimate":
        """The mean of independent values (n,)."""
        n = len(values)
        return Estimate(float(values.mean()), float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else None)


def exact(device: torch.device | str) -> torch.device:
    """The device for float64 arithmetic: the CPU in the place of Apple's GPUs, which have none."""
    return torch.device("cpu" if torch.device(device).type == "mps" else device)


def held(rows: Rows, at: slice) -> np.ndarray:
    """These rows as float64. UserError where one of all is not finite."""
    x = np.asarray(rows[at], np.float64)
    if not_finite(x):
        bad = sum(not_finite(rows[a : a + BLOCK]) for a in range(0, len(rows), BLOCK))
        raise refusal(bad, len(rows))
    return x


def blocks(rows: Rows, block: int = BLOCK) -> Iterator[tuple[slice, np.ndarray]]:
    """Each slice of at most `block` rows, and these rows as float64. UserError where one is not finite."""
    for a in range(0, len(rows), block):
        at = slice(a, min(a + block, len(rows)))
        yield at, held(rows, at)


def not_finite(x: np.ndarray) -> int:
    """How many rows of x (n, d) hold a nan or an infinity."""
    return int((~np.isfinite(x).all(axis=1)).sum())


def refusal(bad: int, n: int) -> UserError:
    return UserError(
        f"{bad} of {n} rows of features are not finite: "
        "look for damaged images or a diverged model, or run the extractor in float32"
    )


def require(least: int, what: str, *sides: Rows) -> None:
    """UserError where a side has fewer than `least` rows, or they are of other widths."""
    if (n := min(map(len, sides))) < least:
        raise UserError(f"{what} needs at least {least} images, not {n}: give more")
    if len(widths := {rows.shape[1] for rows in sides}) > 1:
        raise UserError(f"features of widths {sorted(widths)} do not compare: use one extractor for both sides")
