"""Averages of weights made after the training, from its snapshots (EDM2), and which of them draws best."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from iddpm.config import Config
from iddpm.errors import UserError
from iddpm.store import averages
from iddpm.store.averages import Snapshot
from iddpm.training.ema import combination, gamma_of

WORST = 0.1  # share of an average that snapshots may miss
WIDTHS = (0.02, 0.03, 0.045, 0.07, 0.1, 0.15, 0.22)  # where a search begins


class Made(NamedTuple):
    """An average, of a relative width, at a step."""

    tensors: dict[str, Tensor]
    config: Config
    step: int
    missed: float  # how far off its profile is: 0 exact, 1 nothing of it


def made(run: Path, width: float, step: int = -1) -> Made:
    """The average of a relative width at the newest snapshot, or the newest up to a step.

    UserError where the run kept none, or where they cannot make this width to a tenth.
    """
    found = [s for s in averages.snapshots(run) if step < 0 or s.step <= step]
    if not found:
        late = f" up to step {step}" if averages.snapshots(run) else ": they are kept by training with --ema_power 0.05,0.10"
        raise UserError(f"{run} has no snapshots of averages{late}")
    kept = {s: averages.read(s) for s in found}
    try:
        profiles = [(gamma_of(s.width), float(kept[s].updates)) for s in found]
        shares, missed = combination(profiles, (gamma_of(width), float(kept[found[-1]].updates)))
    except ValueError as e:
        raise UserError(f"--std {width:g}: {e}") from None
    if missed > WORST:
        have = ", ".join(f"{w:g}" for w in sorted({s.width for s in found}))
        raise UserError(
            f"--std {width:g}: {len(found)} snapshots of {have} miss {missed:.0%} of this average; take one nearer to them, or "
            "train with more --ema_snapshots"
        )
    parts: dict[Snapshot, tuple[averages.Kept, float]] = {s: (kept[s], share) for s, share in zip(found, shares)}
    return Made(averages.combined(parts), kept[found[-1]].config, found[-1].step, missed)


def keep(average: Made, width: float, out: Path) -> None:
    """Write an average as a file of weights that every verb takes."""
    averages.write_weights(out, average.tensors, average.config, dict(step=average.step, ema_std=width))


def search(distance: Callable[[float], float], refinements: int = 2) -> dict[float, float]:
    """The distances of widths, from narrow to wide: of `WIDTHS`, then of those between the best one and its neighbours.

    A width that `distance` refuses by a UserError is left out; UserError where all are.
    """
    found: dict[float, float] = {}
    fault: UserError | None = None

    def try_(width: float) -> None:
        nonlocal fault
        try:
            found[width] = distance(width)
        except UserError as e:
            fault = e

    for width in WIDTHS:
        try_(width)
    if not found:
        raise fault or UserError("no width could be tried")
    for _ in range(refinements):
        widths = sorted(found)
        k = widths.index(min(found, key=lambda width: found[width]))
        for a, b in zip(widths[max(0, k - 1) : k + 1], widths[max(0, k - 1) + 1 : k + 2]):
            try_(float(f"{(a * b) ** 0.5:.3g}"))
    return dict(sorted(found.items()))
