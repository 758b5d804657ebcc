"""What a run's folder tells: its config, log, figures and pictures, whatever state it is in."""

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from iddpm.config import ENDLESS, Config, total_steps
from iddpm.errors import UserError, reason
from iddpm.measure import figures
from iddpm.records import decode
from iddpm.store.log import read_rows
from iddpm.store.remote import Unreachable

Row = Mapping[str, Any]
AXES = ("step", "images", "time")  # of the log: against these the rest is drawn


@dataclass(frozen=True)
class Run:
    """A run as it lies there. What of it cannot be read is told in `notes`, a sentence each."""

    path: Path
    name: str
    config: Config
    rows: list[Row]  # the log's, by step
    events: list[tuple[int, str]]
    figures: list[Row]  # of metrics.json
    sheets: list[tuple[int, Path]]  # samples by step
    bound: Row  # of nll.json; empty where there is none
    notes: list[str]

    @property
    def step(self) -> int:
        """The last step that is logged; 0: none is."""
        return max((row["step"] for row in self.rows), default=0)

    @property
    def end(self) -> int:
        """The step at which it is to end; 0 where it has no end."""
        with contextlib.suppress(UserError):
            return 0 if (steps := total_steps(self.config.train)) >= ENDLESS else steps
        return 0

    @property
    def images(self) -> int:
        """How many images it was trained on so far, repeated ones counted again."""
        return int(self.images_at(np.array([self.step]))[0])

    def images_at(self, steps: np.ndarray) -> np.ndarray:
        """The images (n,) of training until some steps (n,): as logged, for a run's batches may change."""
        known = [(row["step"], row["images"]) for row in self.rows if number(row.get("images"))]
        at, images = np.array([(0, 0), *known, *([] if known else [(1, self.config.train.batch_size)])], np.float64).T
        beyond = np.maximum(steps - at[-1], 0) * self.config.train.batch_size  # after the last that tells
        return np.interp(steps, at, images) + beyond

    @cached_property
    def columns(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """What is logged, in the order of its first rows: the steps (n,) and values (n,) float64, where these are numbers."""
        found: dict[str, list[tuple[int, float]]] = {}
        for row in self.rows:
            for name, value in row.items():
                if number(value):
                    found.setdefault(name, []).append((row["step"], value))
        both = {name: np.array(pairs, np.float64) for name, pairs in found.items() if name not in AXES}
        return {name: (pairs[:, 0].astype(np.int64), pairs[:, 1]) for name, pairs in both.items()}

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The steps (n,) and values (n,) of what is logged by a name; none where nothing is."""
        return self.columns.get(name, (np.zeros(0, np.int64), np.zeros(0)))

    def hours(self, steps: np.ndarray) -> np.ndarray:
        """The hours of training until some steps (n,), without the time between a stop and its resuming."""
        at, pace = self.column("images_per_second")
        kept = pace > 0
        at, pace = at[kept], pace[kept]
        spent = np.diff(self.images_at(at), prepend=0) / pace / 3600
        return np.interp(steps, np.r_[0, at], np.r_[0.0, spent.cumsum()])


def number(value: object) -> TypeGuard[float]:
    """Whether a value of a file is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300 and math.isfinite(value)


def read_run(path: Path) -> Run:
    """The run in a folder; UserError where it is none, or of a newer version. What else is damaged is noted and left out."""
    record, notes = path / "config.json", list[str]()
    if not path.exists():
        raise UserError(f"{path} does not exist: give the folder of a run")
    if path.is_file():
        raise UserError(f"{path} is a file: give the folder of a run, which has the log and the samples beside the weights")
    if not record.exists():
        raise UserError(f"{path} is no run: it has no config.json")
    config = Config.from_json(record.read_bytes().decode("utf-8", "surrogateescape"), str(record))
    log = path / "log.jsonl"
    rows = [row for row in read_rows(path) if 0 <= row.get("step", -1) < ENDLESS]
    if lost := sum(1 for line in log.read_bytes().splitlines()[:-1] if line.strip()) + 1 - len(rows) if log.exists() else 0:
        torn = lost == 1 and not log.read_bytes().endswith(b"\n")  # being written, or cut off by a kill
        notes += [] if torn or lost < 0 else [f"{lost} of {lost + len(rows)} lines of log.jsonl cannot be read and are left out."]
    rows = sorted(rows, key=lambda row: row["step"])
    events = [(row["step"], str(row["event"])) for row in rows if "event" in row]
    measured = _noting(
        notes, lambda: [row for row in figures.read(path / "metrics.json") if isinstance(row.get("name"), str)], []
    )
    bound = path / "nll.json"
    found = _noting(notes, lambda: decode(bound.read_bytes(), dict[str, Any], bound) if bound.exists() else {}, {})
    name = path.resolve().name or str(path)
    return Run(path, name, config, [r for r in rows if "event" not in r], events, measured, _sheets(path), found, notes)


def _noting(notes: list[str], read: Any, otherwise: Any) -> Any:
    try:
        return read()
    except Unreachable:
        raise
    except (OSError, UserError) as e:
        notes.append(f"{reason(e)}.")
        return otherwise


def _sheets(path: Path) -> list[tuple[int, Path]]:
    folder = path / "samples"
    found = folder.glob("step_*.png") if folder.is_dir() else []
    named = [(file.stem.removeprefix("step_"), file) for file in found]
    return sorted((int(step), file) for step, file in named if step.isdecimal())


def command(config: Config, run: str) -> str:
    """The command that makes such a run, as the flags of the one that began it tell; "" where they are not kept."""
    import shlex

    asked = {}
    with contextlib.suppress(ValueError):
        asked = json.loads(config.data.asked or "{}")
    preset = ["--preset", config.preset] if config.preset else []
    asked = asked if isinstance(asked, dict) else {}
    given = [part for name, value in asked.items() if name != "run" for part in (f"--{name}", str(value))]
    return shlex.join(["iddpm", "train", config.data.path or "DATA", *preset, *given, "--run", run])
