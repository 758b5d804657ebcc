"""What `iddpm evaluate` says and writes of what it measured."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from iddpm.config import Evaluate
from iddpm.look.evidence import COPIED, COPIES, DISTANCES, SURE
from iddpm.measure import statistics
from iddpm.measure.compare import Evaluation
from iddpm.measure.features import Features
from iddpm.measure.figures import record
from iddpm.measure.metrics.interface import Finding
from iddpm.sampling.sheets import comparison
from iddpm.saying import say
from iddpm.store.remote import alone, place, replace, write_file

SHOWN = 8  # pairs of the picture


def tell(found: Evaluation, settings: Evaluate, out: Path) -> None:
    """Print and record every figure, of each draw and of all; write the nearest real images where a metric looked for them."""
    n = len(found.samples[0])
    for warning in dict.fromkeys(f.warning for f in found.findings if f.warning):
        print(f"warning: {warning}")
    if floor := next((f.real_n for f in found.findings if f.real_n), None):
        few = ": fewer than the samples, which alone makes a Frechet distance larger" if floor[0] < n else ""
        print(f"beside each figure, that of real images: {floor[0]} of the reference against its {floor[1]} others{few}")
    for k, finding in enumerate(found.findings):
        draws, (value, error) = [draw[k].estimate.value for draw in found.draws], finding.estimate
        say(_line(finding, draws), "figure", name=finding.name, value=value, error=error, real=finding.real, n=n, draws=draws)
    record(out, found.figures)
    against = f"{found.reference.n} images" if found.reference.n else "the statistics"
    say(f"{n} samples against {against} of {settings.reference}: {out}", "wrote", path=out)
    if found.real and (nearest := next((f.nearest for f in found.draws[0] if f.nearest), None)):
        _write_neighbours(found.samples[0], found.real, *nearest, out)
    if settings.save_statistics:
        _write_statistics(found, settings)
    if says := verdict(found.findings):
        say(says, "verdict")


def verdict(findings: Sequence[Finding]) -> str:
    """One sentence on how near to real images the samples are, and what to do; "" where no figure says it.

    Told apart from real images is what lies more than three errors above what these get; "much" is ten times that.
    """
    near = next((f for f in findings if f.name.startswith(DISTANCES) and f.real is not None and f.estimate.error), None)
    copied = next((f for f in findings if f.name == COPIES), None)
    parts, advice = [], ""
    if near and near.real is not None and near.estimate.error:
        above = (near.estimate.value - near.real) / (SURE * near.estimate.error)
        worse = "much worse than" if above > 10 else "worse than" if above > 1 else "not told apart from"
        parts.append(f"{worse} real images ({near.name} {near.estimate.value:.4g}, theirs {near.real:.4g})")
        advice = "train longer, or draw with more --guidance" if above > 1 else "compare more of them to be surer"
    if copied:
        value, error = copied.estimate
        many = value > COPIED + SURE * (error or 0.0)
        parts.append(f"{value:.0%} near copies of the reference" if many else "no more near copies than by chance")
        advice = "more images, or --dropout, against learning by heart" if many else advice
    return f"verdict: {', '.join(parts)}" + (f": {advice}" if advice else "") if parts else ""


def _line(finding: Finding, draws: list[float]) -> str:
    value, error = finding.estimate
    margin = f"+- {error:.2g}" if error is not None else ""
    real = f"real images {finding.real:.5g}" if finding.real is not None else ""
    each = f"draws {', '.join(f'{v:.5g}' for v in draws)}" if len(draws) > 1 else ""
    return f"{finding.name:28} {value:>10.5g} {margin:12} {real:24} {each}".rstrip()


def _write_neighbours(drawn: Features, real: Features, numbers: np.ndarray, distances: np.ndarray, out: Path) -> None:
    """Of each sample's nearest real images (n, k): the first one, as a table, and a picture of the nearest pairs."""
    stem = out.name.removesuffix(".json")
    start = "" if stem == "metrics" else f"{stem.removesuffix('.metrics')}."
    table, picture = (out.with_name(f"{start}neighbours{end}") for end in (".csv", ".png"))
    order = np.argsort(distances[:, 0], kind="stable")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["sample", "nearest real image", "distance"])
    for k in order:
        theirs = real.images.title(int(real.chosen[numbers[k, 0]]))
        writer.writerow([drawn.images.title(int(drawn.chosen[k])), theirs, f"{distances[k, 0]:.6g}"])
    first = order[:SHOWN]
    columns = {"sample": _pictures(drawn, first)}
    for j in range(numbers.shape[1]):
        columns["nearest" if j == 0 else f"{j + 1}."] = _pictures(real, numbers[first, j])
    sheet = comparison(columns)
    with alone(out.parent):
        write_file(table, text.getvalue())
        replace(picture, lambda file: sheet.save(file, format="PNG"))
    print(f"nearest real images: {table}; the nearest pairs: {picture}")
    trained_on = drawn.images.about.get("trained_on")
    if trained_on and place(trained_on).resolve() != place(real.images.name).resolve():
        print(f"note: the run was trained on {trained_on}; to see whether it copies, give --reference {trained_on}")


def _pictures(features: Features, rows: np.ndarray) -> np.ndarray:
    """(n, H, W, C) uint8."""
    return features.images.take(features.chosen[rows].tolist()).transpose(0, 2, 3, 1)


def _write_statistics(found: Evaluation, settings: Evaluate) -> None:
    """The reference's Gaussians, for other tools."""
    path, extractor = place(settings.save_statistics), found.extractor
    gaussians = {tap: g for tap in extractor.widths if (g := found.reference.gaussian(tap))}
    about = dict(extractor=extractor.name, identity=extractor.identity, n=gaussians["pool"].n, of=settings.reference)
    statistics.write(path, gaussians, about)
    print(f"the reference's statistics: {path}")


def next_steps(run: str, drawn: Sequence[Features], out: Path, named: bool) -> None:
    """Where the features of a run's samples lie, and what else may be measured of it."""
    size = sum(file.stat().st_size for features in drawn for file in features.folder.iterdir()) / 2**20
    print(f"features, for other metrics of the same samples: {drawn[0].folder.parent} ({size:.0f} MB of this; delete at will)")
    print(f"next: iddpm nll {run} HELD_OUT_IMAGES" + ("" if named else f", whose bits/dim join {out.name}"))
