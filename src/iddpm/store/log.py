"""What training tells: sums that stay on the device until they are logged, and the files and lines they end up in."""

import contextlib
import csv
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iddpm.errors import UserError
from iddpm.records import decode, encode
from iddpm.store import remote as places
from iddpm.store.sinks import Sinks

EVERY = 30.0  # seconds between two copies of a log to its remote storage: about what a kill may cost of it


class Meter:
    """Weighted means of named per-image values, whole and by quartile of t, summed on the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor], quartile: Tensor | None = None) -> None:
        """Take in values (B,), and, of images, in which quartile of t each lies (B,), 0 to 3."""
        for name, value in values.items():
            value = value.detach().to(torch.float32 if value.device.type == "mps" else torch.float64)
            rows = 1 if quartile is None else 4
            if name not in self._sums:
                self._sums[name] = torch.zeros(rows, 2, dtype=value.dtype, device=value.device)
            at = torch.zeros(len(value), dtype=torch.int64, device=value.device) if quartile is None else quartile
            self._sums[name].index_add_(0, at, torch.stack([torch.ones_like(value), value], dim=1))

    def read(self, add_up: Callable[[Tensor], None] = lambda table: None) -> dict[str, float]:
        """name and name_q0 .. name_q3, where there were any; then start again. `add_up` sums a table over the processes."""
        out = {}
        for name, table in self._sums.items():
            add_up(table)
            rows = table.tolist()  # the one synchronisation
            count, total = (sum(column) for column in zip(*rows))
            out[name] = total / count
            if len(rows) > 1:
                out |= {f"{name}_q{q}": total / count for q, (count, total) in enumerate(rows) if count}
        self._sums = {}
        return out

    def sums(self, add_up: Callable[[Tensor], None] = lambda table: None) -> dict[str, list[list[str]]]:
        """What is summed so far, as JSON holds it: exactly, and also where it is not finite."""
        out = {}
        for name, table in self._sums.items():
            add_up(whole := table.clone())
            out[name] = [[repr(value) for value in row] for row in whole.tolist()]
        return out

    def load(self, sums: Mapping[str, list[list[str]]], device: torch.device) -> None:
        """Go on from such sums."""
        kind = torch.float32 if device.type == "mps" else torch.float64
        rows = {name: [[float(value) for value in row] for row in table] for name, table in sums.items()}
        self._sums = {name: torch.tensor(table, dtype=kind, device=device) for name, table in rows.items()}


class Logger:
    """log.jsonl (one row per log line), progress.csv (the same as a table), and other programs (`sinks`) where asked.

    Opened at `step` it keeps the rows up to there: a resumed run does not repeat those it had written past its checkpoint.
    A remote storage cannot append: there the files are written on this machine, and copied when a row is written, at most
    every EVERY seconds, before each checkpoint is put in its place (`sync`), and at the end.
    """

    def __init__(self, run: Path, step: int = 0, sinks: str = "", config: Mapping[str, Any] = {}):
        self._target = run if places.remote(run) else None
        folder = Path(tempfile.mkdtemp(dir=places.scratch())) if self._target else run
        self.path, self.csv = folder / "log.jsonl", folder / "progress.csv"
        self._sent: dict[Path, tuple[int, int]] = {}  # size and time of change of what was copied
        self._copying, self._copied, self._told = threading.Lock(), time.monotonic(), False
        kept = b"".join(encode(row) + b"\n" for row in read_rows(run) if row.get("step", 0) <= step)
        places.write_file(self.path, kept)
        self._columns: list[str] = []
        self._write_csv()
        self._sinks = Sinks(sinks, folder, run, step, config) if sinks else None
        if self._target:
            _remote.add(self)

    def row(self, **values: Any) -> None:
        """Append a row of numbers."""
        self._append(values)
        self._write_csv(values)
        if self._sinks:
            self._sinks.row(values)
        self._copy_in_time()

    def event(self, step: int, text: str) -> None:
        """Append a remark, as on a changed setting."""
        self._append({"step": step, "time": time.time(), "event": text})
        self._copy_in_time()

    def close(self) -> None:
        if self._sinks:
            self._sinks.close()
        self.copy()

    def copy(self) -> None:
        """Copy what has changed to the remote storage; UserError where that fails."""
        if not self._target:
            return
        with self._copying:
            self._copied, folder = time.monotonic(), self.path.parent
            for file in sorted(folder.rglob("*")):
                try:
                    stamp = (file.stat().st_size, file.stat().st_mtime_ns)
                    content = file.read_bytes() if file.is_file() and self._sent.get(file) != stamp else None
                except FileNotFoundError:  # of another program that is told: gone again, or a link to nothing
                    continue
                if content is not None:
                    (self._target / file.relative_to(folder).as_posix()).write_bytes(content)
                    self._sent[file] = stamp

    def _copy_in_time(self) -> None:
        if not self._target or time.monotonic() - self._copied < EVERY:
            return
        try:
            self.copy()
        except (OSError, UserError) as e:  # the next time, or with the next save, which says it loudly
            if not self._told:
                print(f"the log waits on this machine: {e}", file=sys.stderr)
            self._told, self._copied = True, time.monotonic()

    def _append(self, row: Mapping[str, Any]) -> None:
        with open(self.path, "ab") as file:
            file.write(encode(row) + b"\n")

    def _write_csv(self, row: Mapping[str, Any] | None = None) -> None:
        if row is not None and set(row) <= set(self._columns):
            with open(self.csv, "a", newline="") as file:
                csv.DictWriter(file, self._columns).writerow(row)
            return
        rows = [r for r in read_rows(self.path.parent) if "event" not in r]  # a new column: write the table anew
        self._columns = list(dict.fromkeys(name for r in rows for name in r))
        with open(self.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)


_remote: "weakref.WeakSet[Logger]" = weakref.WeakSet()  # those in use


def sync() -> None:
    """Copy what the loggers of remote runs have not yet; UserError where that fails."""
    for logger in list(_remote):
        logger.copy()


@contextmanager
def copied() -> Iterator[None]:
    """At its end, also by an error, the logs of remote runs are where they belong, and their loggers done with."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError, UserError):
            sync()
        raise
    else:
        sync()
    finally:
        _remote.clear()


def read_rows(run: Path) -> list[dict[str, Any]]:
    """All rows of a run's log.jsonl; lines that are none, such as a last one cut short by a crash, are left out."""
    path, rows = run / "log.jsonl", []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(UserError):
            row = decode(line, dict[str, Any], path)
            if isinstance(row.get("step", 0), int):
                rows.append(row)
    return rows
