"""The runs that a studio was given, and what the page shows of them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from iddpm.errors import UserError, reason
from iddpm.look import report
from iddpm.look.parts import progress, what
from iddpm.look.runs import Run, number, read_run
from iddpm.store.files import step_dirs

MOST = 500  # runs that are listed: of more the newest
TOGETHER = 8  # that are compared: as many colours as there are


class Shelf:
    """Runs by name, found anew whenever they are asked for; nothing outside the folders given is ever read.

    Each of these is a run, or a folder of runs. What was read of one is kept until its files change.
    """

    def __init__(self, folders: Sequence[Path]):
        self.folders, self.begun = folders, list[Path]()  # also runs that were begun from the page, wherever they lie
        self.read = dict[Path, tuple[object, Run]]()

    def runs(self) -> dict[str, Path]:
        """The folders of runs by name, those that share one with the folders above."""
        found = dict.fromkeys(path for folder in self.folders for path in _runs_in(folder))
        found |= dict.fromkeys(path for path in self.begun if (path / "config.json").exists())
        return by_name(list(found) if len(found) <= MOST else sorted(found, key=_changed, reverse=True)[:MOST])

    def path(self, name: str) -> Path:
        """The folder of a run that is on the shelf; UserError for any other name."""
        runs = self.runs()
        if name not in runs:
            raise UserError(f"there is no run {name!r} here: {', '.join(list(runs)[:8]) or 'none yet'}")
        return runs[name]

    def listing(self) -> list[dict[str, Any]]:
        """A row on each run, the newest first; of one that cannot be read, why."""
        rows, runs = [], self.runs()
        for gone in set(self.read) - set(runs.values()):
            self.read.pop(gone, None)
        for name, path in runs.items():
            try:
                run = self._run(path)
            except Exception as e:  # whatever is wrong with one, the others are shown
                rows.append(dict(name=name, fault=reason(e), changed=_changed(path)))
                continue
            share = min(1.0, run.step / run.end) if run.end else None
            rows.append(
                dict(
                    name=name, what=what(run), progress=progress(run), share=share, task=run.config.model.task,
                    loss=_last(run, "loss"), pace=_last(run, "images_per_second"), changed=_changed(path),
                    draws=bool(step_dirs(path)) and not run.config.task.classifies,
                )
            )  # fmt: skip
        return sorted(rows, key=lambda row: -row["changed"])

    def chosen(self, names: Sequence[str]) -> tuple[list[Run], list[str]]:
        """The runs of some names, and a sentence on each that cannot be read; UserError where none can."""
        if not 1 <= len(names) <= TOGETHER:
            raise UserError(f"choose 1 to {TOGETHER} runs")
        runs, faults = list[Run](), list[str]()
        for name in names:
            try:
                runs.append(self._run(self.path(name)))
            except (OSError, UserError) as e:
                faults.append(reason(e))
        if not runs:
            raise UserError(faults[0])
        return report.told_apart(runs), faults

    def view(self, names: Sequence[str]) -> dict[str, Any]:
        """What the page shows of some runs: HTML, the charts' numbers, and a mark that changes with what is no curve."""
        runs, faults = self.chosen(names)
        html, data = report.body(runs, faults)
        return dict(html=html, data=data, mark=_mark(runs))

    def curves(self, names: Sequence[str]) -> dict[str, Any]:
        """The numbers of the charts alone, and that mark."""
        runs, _ = self.chosen(names)
        return dict(runs=report.numbers(runs)["runs"], mark=_mark(runs))

    def _run(self, path: Path) -> Run:
        now = _stamp(path)
        if path not in self.read or self.read[path][0] != now:
            self.read[path] = now, read_run(path)
        return self.read[path][1]


def by_name(paths: Sequence[Path]) -> dict[str, Path]:
    """Paths by their last part, with as many before it as tell them apart; letters that are none of UTF-8 are written out."""
    parts = [path.resolve().parts for path in paths]
    shared = Counter(own[-n:] for own in parts for n in range(1, len(own) + 1))
    names = [next((own[-n:] for n in range(1, len(own)) if shared[own[-n:]] == 1), own) for own in parts]
    return {"/".join(name).encode("utf-8", "backslashreplace").decode(): path for name, path in zip(names, paths)}


def _runs_in(folder: Path) -> Iterator[Path]:
    """The runs in a folder: itself, or those right below it, in the order of their names."""
    if (folder / "config.json").exists() or not folder.is_dir():
        yield folder
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir() and (path / "config.json").exists():
            yield path


def _stamp(path: Path) -> object:
    """What changes when a run's files do."""
    files = [path / name for name in ("config.json", "log.jsonl", "metrics.json", "nll.json", "samples")]
    return [(s.st_mtime_ns, s.st_size) for file in files if file.exists() for s in [file.stat()]]


def _changed(path: Path) -> float:
    files = [file for file in (path / "log.jsonl", path / "config.json") if file.exists()]
    return max((file.stat().st_mtime for file in files), default=0.0)


def _mark(runs: Sequence[Run]) -> str:
    """Other than before where more than the curves have changed: sheets, figures, or which columns are logged."""
    return repr([(r.name, len(r.sheets), len(r.figures), len(r.events), bool(r.bound), sorted(r.columns)) for r in runs])


def _last(run: Run, name: str) -> float | None:
    """The mean of the last tenth of what was logged by a name."""
    values = run.column(name)[1]
    found = values[-max(1, len(values) // 10) :].mean() if len(values) else None
    return float(found) if number(found) else None
