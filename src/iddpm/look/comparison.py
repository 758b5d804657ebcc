"""Runs beside each other: how their configs differ, and how far they came."""

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from iddpm.look.runs import Row, Run, number

OF_A_RUN = ("asked", "identity", "rule", "found", "num_classes", "eval_reference")  # which say nothing of the recipe
Cells = dict[str, Any]


def differences(runs: Sequence[Run]) -> list[Cells]:
    """Of each run the settings in which they differ; those that a run does not have are left out."""
    flats = [run.config.flat() | {"preset": run.config.preset} for run in runs]
    names = dict.fromkeys(name for flat in flats for name in flat if name not in OF_A_RUN)
    unlike = [name for name in names if len({repr(flat.get(name)) for flat in flats}) > 1]
    return [{name: flat[name] for name in unlike if name in flat} for flat in flats]


def outcomes(run: Run) -> Cells:
    """How far a run came: steps, images, hours, its last losses and figures."""
    found: Cells = {"step": run.step, "images seen": run.images}
    if run.step:
        found["hours"] = float(run.hours(np.array([run.step]))[0])
    for name, what in (("loss", "loss"), ("val_loss", "held-out loss")):
        if len(values := run.column(name)[1]):
            found[what] = float(values[-max(1, len(values) // 10) :].mean())
    for row in run.figures:
        if number(row.get("value")):
            found[", ".join((row["name"], f"n {row.get('n')}", *_way(run, row)))] = row["value"]
    return found


def _way(run: Run, row: Row) -> Iterator[str]:
    """How a figure was measured, so that no two of them share a place."""
    for name in ("solver", "steps", "guidance", "reference_n"):
        if row.get(name) is not None:
            yield f"{name.replace('_n', '')} {row[name]}"
    if row.get("ema_rate") == 0:
        yield "raw weights"
    if row.get("reference") not in (None, run.config.data.path):
        yield f"against {row['reference']}"


def rows(runs: Sequence[Run]) -> tuple[list[str], list[list[Any]]]:
    """A table with a row for each run: its name, the settings in which they differ, then the outcomes; None where it has none."""
    cells = [{"run": run.name} | a | outcomes(run) for run, a in zip(runs, differences(runs))]
    unlike = dict.fromkeys(name for own in differences(runs) for name in own)
    head = list(dict.fromkeys(["run", *unlike, *(name for own in cells for name in own)]))
    return head, [[own.get(name) for name in head] for own in cells]


def as_csv(runs: Sequence[Run]) -> str:
    """The same as text for a spreadsheet."""
    head, body = rows(runs)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([["" if cell is None else cell for cell in row] for row in body])
    return out.getvalue()
