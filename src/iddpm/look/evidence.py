"""What the rules of a diagnosis ask of a run's numbers."""

import contextlib
import json
from collections.abc import Iterator

import numpy as np

from iddpm.look.runs import Row, Run, number
from iddpm.measure.figures import OUTCOME
from iddpm.store.remote import place
from iddpm.words import many

LEAST = 12  # values of a log below which its course says nothing
SURE = 3.0  # standard errors that a difference must have
COPIES, COPIED = "near copies (1 % expected)", 0.03  # the figure, and the share from which they are too many
DISTANCES = ("FID", "KID", "sFID", "FD-", "KD-", "sFD-")  # figures of which less is better


def few(values: np.ndarray) -> str:
    """Why these are too few; "" where they are enough."""
    return "" if len(values) >= LEAST else f"{many(len(values), 'value')} logged, of at least {LEAST}: lower --log_interval"


def middle(values: np.ndarray) -> float:
    """The median: a loss has rare and high spikes, which say nothing of its course."""
    return float(np.median(values))


def rise(early: np.ndarray, late: np.ndarray, share: float) -> float:
    """By how much the median has risen, where that is more than a share of it and more than chance; else 0."""
    found = middle(late) - middle(early)
    return found if found > max(share * abs(middle(early)), SURE * (_error(early) + _error(late))) else 0.0


def _error(values: np.ndarray) -> float:
    """The standard error of a median, from the median deviation, both as of a normal law; a trend makes it the larger."""
    return 1.2533 * 1.4826 * middle(abs(values - np.median(values))) / len(values) ** 0.5


def loss_of(run: Run) -> str:
    """What the log calls the loss whose course is looked at: the squared error of a hybrid loss, whose bound is far noisier."""
    return "mse" if run.config.diffusion.objective_name == "hybrid" and len(run.column("mse")[0]) else "loss"


def counted(run: Run) -> int:
    """The number of images that the run's record of its data tells; 0 where it tells none."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return int(json.loads(run.config.data.identity)["count"])
    return 0


def same_place(one: object, other: str) -> bool:
    return isinstance(one, str) and bool(one and other) and place(one).resolve() == place(other).resolve()


def misplaced(images: np.ndarray, own: np.ndarray) -> tuple[float, np.ndarray, np.ndarray, float]:
    """How images (n, H, W, C) uint8 of classes `own` (n,) lie among each other, by their pixels averaged to some 8 x 8.

    The share of the five nearest that are of the same class; which images have four or five of one other class (n,), and which
    that is (n,); and the share of these to expect where two classes only look alike.
    """
    n, h, w, _ = images.shape
    y, x = (np.linspace(0, side, min(side, 8), endpoint=False).astype(int) for side in (h, w))
    small = np.add.reduceat(np.add.reduceat(images.astype(np.float32), y, 1), x, 2).reshape(n, -1)
    small -= small.mean(1, keepdims=True)
    small /= np.linalg.norm(small, axis=1, keepdims=True) + 1e-6
    alike = small @ small.T
    np.fill_diagonal(alike, -np.inf)
    near = own[np.argsort(-alike, axis=1)[:, :5]]
    often = np.stack([(near == c).sum(1) for c in range(own.max() + 1)], axis=1)  # (n, classes)
    p = np.array([np.delete(often[own == c].mean(0) / 5, c).max() for c in own])  # of the class most like each one's own
    likely = often.argmax(1)
    chance = (5 * p**4 * (1 - p) + p**5).mean()
    return float((near == own[:, None]).mean()), (often.max(1) >= 4) & (likely != own), likely, float(chance)


def uncertainty(*rows: Row) -> float:
    """The sum of the standard errors of figures, as far as they are known."""
    return sum(row["error"] for row in rows if number(row.get("error")))


def pairs(run: Run, what: str) -> Iterator[tuple[Row, Row]]:
    """Distances, the best one and each other, measured under conditions equal but for `what` and what follows from it."""
    follows, kinds = OUTCOME | {what, "weights", "samples_key", "steps"}, dict[str, list[Row]]()
    for row in run.figures:
        if row["name"].startswith(DISTANCES) and number(row.get("value")) and what in row:
            kinds.setdefault(json.dumps({k: v for k, v in row.items() if k not in follows}, sort_keys=True), []).append(row)
    for rows in kinds.values():
        best = min(rows, key=lambda row: row["value"])
        yield from ((best, row) for row in rows if row[what] != best[what])
