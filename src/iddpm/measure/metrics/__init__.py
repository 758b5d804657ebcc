"""Metrics by name: each file of this folder that holds some ends in the table of its own."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from iddpm.errors import UserError
from iddpm.measure.metrics.interface import Metric
from iddpm.measure.tables import made, rows_of

METRICS: dict[str, Any] = rows_of(__name__, __path__, "METRICS")


def chosen(text: str, own: Mapping[str, Any]) -> dict[str, Metric]:
    """The metrics of a comma-separated list, all where it is empty, with their own numbers; UserError for an unknown one."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in METRICS]:
        raise UserError(f"--metrics {unknown[0]} is not one of: {', '.join(METRICS)}")
    return {name: made(METRICS[name], own) for name in names or METRICS}


def numbers(own: Mapping[str, Any]) -> dict[str, Any]:
    """Every number of every metric, as given or by default: all figures tell them."""
    rows = [made(row, own) for row in METRICS.values() if isinstance(row, type)]
    return {name: value for row in rows for name, value in dataclasses.asdict(row).items()}
