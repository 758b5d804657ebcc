"""metrics.json: every figure measured of a run or of a file of samples, each with all that decides it."""

import json
import math
import platform
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import iddpm
from iddpm.errors import UserError
from iddpm.parallel import processes
from iddpm.records import decode
from iddpm.store.remote import alone, write_file

if TYPE_CHECKING:
    import torch

OUTCOME = set("value error interval floor unit time seconds machine iddpm note".split())  # what may change when measured again


class Figure(NamedTuple):
    """One number: what it is called, its standard error (None: unknown), and under what conditions it was measured.

    `about` holds what JSON holds: n, seed, solver, steps, extractor, reference, weights and so on; None where it does not apply.
    """

    name: str  # FID, FD-lite0-128, bits/dim ...
    value: float
    error: float | None
    about: Mapping[str, Any]

    def row(self) -> dict[str, Any]:
        """As JSON holds it, with the interval that holds the true value 95 times in 100 where the error is known."""
        known = math.isfinite(self.value)
        error = self.error if known and self.error is not None and math.isfinite(self.error) else None
        interval = None if error is None else [self.value - 1.96 * error, self.value + 1.96 * error]
        note = {} if known else {"note": f"the value is {self.value}"}
        found = dict(name=self.name, value=self.value if known else None, error=error, interval=interval)
        return {**found, **self.about, **note}


def record(path: Path, figures: Iterable[Figure]) -> None:
    """Put figures in a file, each in the place of one measured before under the same conditions; UserError for a foreign file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with alone(path.parent):
        rows = {_conditions(row): row for row in read(path)}
        for figure in figures:
            row = figure.row()
            rows[_conditions(row)] = row
        text = json.dumps({"figures": list(rows.values())}, indent=1, allow_nan=False)
        write_file(path, text)


def circumstances(device: "torch.device") -> dict[str, Any]:
    """When, by what version and on what a figure was measured."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    each = f"{processes.world()} processes, each " if processes.world() > 1 else ""
    return dict(time=time.strftime("%Y-%m-%dT%H:%M:%S%z"), iddpm=iddpm.__version__, machine=f"{each}{platform.machine()} {name}")


def read(path: Path) -> list[dict[str, Any]]:
    """The figures of a file, in the order in which they were first measured; none where there is no file."""
    if not path.exists():
        return []
    try:
        return decode(path.read_bytes(), Kept, path)["figures"]
    except UserError as e:
        raise UserError(f"{path} is not a file of figures ({e}): move it away, or give another --out") from None


class Kept(TypedDict):
    """A file of figures."""

    figures: list[dict[str, Any]]


def _conditions(row: Mapping[str, Any]) -> str:
    return json.dumps({k: v for k, v in row.items() if k not in OUTCOME}, sort_keys=True)
