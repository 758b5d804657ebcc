"""metrics.json: every figure measured of a run or of a file of samples, each with all that decides it."""

import fcntl
import json
import math
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import iddpm
from iddpm import distributed
from iddpm.errors import UserError
from iddpm.places import remote, replace

if TYPE_CHECKING:
    import torch

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
    with _alone(path):
        rows = {_conditions(row): row for row in read(path)}
        for figure in figures:
            row = figure.row()
            rows[_conditions(row)] = row
        text = json.dumps({"figures": list(rows.values())}, indent=1, allow_nan=False)
        replace(path, lambda file: file.write(text.encode()))


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Of the commands that write a file at one time on this machine, one after the other."""
    if remote(path):
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def circumstances(device: "torch.device") -> dict[str, Any]:
    """When, by what version and on what a figure was measured."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    each = f"{distributed.world()} processes, each " if distributed.world() > 1 else ""
    return dict(time=time.strftime("%Y-%m-%dT%H:%M:%S%z"), iddpm=iddpm.__version__, machine=f"{each}{platform.machine()} {name}")


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
