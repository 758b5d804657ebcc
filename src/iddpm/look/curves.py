"""The course of runs as the page's charts hold it: numbers thinned to what can be seen, and which of them share a chart."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from iddpm.look.runs import Run, number

POINTS = 600  # of a curve, at most: beyond that a chart has no pixels for them
WHOLE = {  # what a chart of its own shows, and its title
    "loss": "Loss", "val_loss": "Loss of held-out images", "grad_norm": "Gradient norm", "lr": "Learning rate",
    "images_per_second": "Images a second", "skipped": "Steps skipped so far", "lg_loss_scale": "Loss scale of fp16 (log2)",
}  # fmt: skip
QUARTERS = ("nearest to the image", "second", "third", "nearest to noise")  # of the noise levels
QUIET = ("eval_n", "eval_reference_n", "eval_seconds")  # logged beside figures


def numbers(run: Run, points: int = POINTS) -> list[dict[str, Any]]:
    """The columns of a run's log, those of the same steps together: x by step, images and hours, y by name, None where unknown.

    Of more than `points` steps, each point is the mean of as many neighbours.
    """
    together: dict[bytes, tuple[np.ndarray, dict[str, np.ndarray]]] = {}
    for name, (steps, values) in run.columns.items():
        together.setdefault(steps.tobytes(), (steps, {}))[1][name] = values
    groups = []
    for steps, columns in together.values():
        parts = np.array_split(np.arange(len(steps)), min(points, len(steps)))
        starts, sizes = np.array([p[0] for p in parts]), np.array([len(p) for p in parts])
        at = steps[[p[-1] for p in parts]]
        x = dict(step=at, images=run.images_at(at).round().astype(np.int64), hours=run.hours(at))
        y = {name: np.add.reduceat(values, starts) / sizes for name, values in columns.items()}
        groups.append(dict(x=_short(x), y=_short(y)))
    return groups


def charts_of(run: Run, k: int) -> list[dict[str, Any]]:
    """The charts of one run, which is number k of the page: loss, its terms, its quarters, and what else was logged."""
    have, charts, told = run.columns, list[dict[str, Any]](), set[str](QUIET)

    def chart(title: str, lines: dict[str, str], dashed: Sequence[str] = (), **more: Any) -> None:
        there = {name: label for name, label in lines.items() if name in have and name not in told}
        colours = len(lines) - len(dashed)  # a dashed line has that of the one it belongs to
        if there:
            told.update(there)
            drawn = [
                dict(run=k, name=name, label=label, colour=c % colours, dash=name in dashed)
                for c, (name, label) in enumerate(lines.items())
                if name in there
            ]
            charts.append(dict(title=title, lines=drawn, **more))

    chart("Loss", {"loss": "training", "val_loss": "held-out"}, log=True)
    terms = {name[:-3] for name in have if name.endswith("_q0") and not name.startswith("val_")} - {"loss"}
    if len(terms) > 1:
        both = {term: term for term in sorted(terms)} | {f"val_{term}": f"{term}, held-out" for term in sorted(terms)}
        chart("Terms of the loss", both, [name for name in both if name.startswith("val_")], log=True)
    for name in ("loss", "val_loss"):
        title = f"{WHOLE[name]} by noise level"
        chart(title, {f"{name}_q{q}": f"{q + 1}: {where}" for q, where in enumerate(QUARTERS)}, log=True)
    told.update(f"{start}{term}{end}" for term in terms for start in ("", "val_") for end in ("", *(f"_q{q}" for q in range(4))))
    for name in ("grad_norm", "lr", "images_per_second"):
        chart(WHOLE[name], {name: WHOLE[name]})
    told.update(name for name in ("skipped",) if name in have and not run.column(name)[1].any())
    for name in have:
        if not name.endswith("_error"):
            chart(WHOLE.get(name, name), {name: name})
    return charts


def charts_together(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A chart for each number that says how a run does, with a curve for each run that has it."""
    own = [name for name in WHOLE if name != "skipped"]
    measured = dict.fromkeys(name for run in runs for name in run.columns if name.startswith(("kd_", "fd_")))
    charts = []
    for name in [*own, *(name for name in measured if not name.endswith("_error"))]:
        lines = [dict(run=k, name=name, label=r.name, colour=k, dash=False) for k, r in enumerate(runs) if name in r.columns]
        if lines:
            charts.append(dict(title=WHOLE.get(name, name), lines=lines, log="loss" in name.split("_")))
    return charts


def bits(run: Run) -> list[dict[str, Any]]:
    """The chart of a bound's terms by step, where nll.json has them."""
    steps, terms = run.bound.get("kept_steps"), run.bound.get("vb")
    if not (isinstance(steps, list) and isinstance(terms, list) and len(steps) == len(terms) and all(map(number, steps + terms))):
        return []
    at, value = np.array(steps, float) + 1, np.array(terms, float)
    kept = value > 0  # as far as a logarithm goes
    keep = np.unique(np.geomspace(1, max(2, kept.sum()), POINTS).round().astype(int)) - 1
    keep = keep[keep < kept.sum()]
    if not len(keep):
        return []
    drawn = dict(x=_short({"t": at[kept][keep]})["t"], y=_short({"v": value[kept][keep]})["v"])
    line = dict(label="bits/dim of a step", colour=0, dash=False, **drawn)
    return [
        dict(title="Bits/dim of each step (step 1: the image's side)", lines=[line], log=True, xlog=True, own="step of the chain")
    ]


def _short(columns: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """As JSON holds them, in five figures, which is more than a chart shows; counts as they are."""
    return {k: v.tolist() if v.dtype.kind == "i" else [float(f"{n:.5g}") for n in v] for k, v in columns.items()}
