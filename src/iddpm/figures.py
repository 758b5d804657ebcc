"""metrics.json: every figure measured of a run or of a file of samples, each with all that decides it."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from iddpm.errors import UserError
from iddpm.places import replace

OUTCOME = {
    "value",
    "error",
    "interval",
    "floor",
    "unit",
    "time",
    "seconds",
    "machine",
    "iddpm",
    "note",
}  # what a second measurement may change


class Figure(NamedTuple):
    """One number: what it is called, its standard error (None: unknown), and under what conditions it was measured.

    `about` holds what JSON holds: n, seed, solver, steps, extractor, reference, weights and so on; None where it does not apply.
    """

    name: str  # FID, FD-lite0-128, KID-..., bits/dim
    value: float
    error: float | None
    about: Mapping[str, Any]

    def row(self) -> dict[str, Any]:
        """As JSON holds it, with the interval that holds the true value 95 times in 100 where the error is known."""
        margin = None if self.error is None or not math.isfinite(self.error) else 1.96 * self.error
        interval = None if margin is None else [self.value - margin, self.value + margin]
        return {
            "name": self.name,
            "value": self.value,
            "error": None if margin is None else self.error,
            "interval": interval,
            **self.about,
        }


def record(path: Path, figures: Iterable[Figure]) -> None:
    """Put figures in a file, each in the place of one measured before under the same conditions; UserError for a foreign file."""
    rows = {_conditions(row): row for row in read(path)}
    for figure in figures:
        row = figure.row()
        rows[_conditions(row)] = row
    text = json.dumps({"figures": list(rows.values())}, indent=1, allow_nan=False)
    replace(path, lambda file: file.write(text.encode()))


def read(path: Path) -> list[dict[str, Any]]:
    """The figures of a file, in the order in which they were first measured; none where there is no file."""
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text())["figures"]
        return [dict(row) for row in rows]
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} is not a file of figures ({e}): move it away, or give another --out") from None


def _conditions(row: Mapping[str, Any]) -> str:
    return json.dumps({k: v for k, v in row.items() if k not in OUTCOME}, sort_keys=True)
