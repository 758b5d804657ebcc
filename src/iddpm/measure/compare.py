"""How good samples are: every metric of two sets of features, with its error and what real images get in its place."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from iddpm.errors import UserError
from iddpm.measure.extractors import Extractor
from iddpm.measure.metrics.frechet import frechet_distance, frechet_error
from iddpm.measure.metrics.inception_score import Scores
from iddpm.measure.metrics.kernel import kernel_distance
from iddpm.measure.metrics.memorisation import memorised
from iddpm.measure.metrics.neighbours import manifold, nearest
from iddpm.measure.metrics.probe import consistency, too_few
from iddpm.measure.metrics.rows import BLOCK, Estimate
from iddpm.measure.sides import Side

NEAREST = 3  # real images that are told of each sample
SMALL = 10_000  # samples below which a figure is shown beside that of real images


@dataclass(frozen=True, eq=False)
class Comparison:
    """What a metric may look at."""

    samples: Side
    reference: Side
    extractor: Extractor
    neighbours: int  # the k of precision, recall, density and coverage

    @cached_property
    def nearest(self) -> tuple[np.ndarray, np.ndarray]:
        """The rows of the (up to) NEAREST real images nearest to each sample, and their distances, (n, k) each."""
        samples, reference = self.samples.rows["pool"], self.reference.rows["pool"]
        return nearest(samples, reference, min(NEAREST, len(reference)), device=self.extractor.device)


class Finding(NamedTuple):
    """A figure of a metric.

    `real` is what real images get in the place of the samples, where the metric knows itself; `reference_n` how many real images
    the samples were compared with, None where nobody says.
    """

    name: str
    estimate: Estimate
    reference_n: int | None
    real: float | None = None


def _frechet(c: Comparison, tap: str, name: str) -> list[Finding]:
    ours, theirs = c.samples.gaussian(tap), c.reference.gaussian(tap)
    assert ours and theirs
    estimate = Estimate(frechet_distance(ours, theirs), frechet_error(c.samples.rows[tap], ours, theirs))
    return [Finding(name, estimate, c.reference.behind(tap))]


def fd(c: Comparison) -> list[Finding]:
    """The Frechet distance."""
    return _frechet(c, "pool", c.extractor.called("FD"))


def sfd(c: Comparison) -> list[Finding]:
    """The Frechet distance on features that know where things are."""
    return _frechet(c, "spatial", c.extractor.called("sFD"))


def score(c: Comparison) -> list[Finding]:
    """The Inception Score, which looks at the samples alone: the mean over ten parts, as papers have it, and of all as one."""
    rows, classify, name = c.samples.rows["pool"], c.extractor.probabilities, c.extractor.called("IS")
    assert classify
    scores = None
    for a in range(0, len(rows), BLOCK):
        p = classify(torch.from_numpy(rows[a : a + BLOCK]).to(c.extractor.device)).double().cpu().numpy()
        scores = scores or Scores(len(rows), p.shape[1])
        scores.add(np.arange(a, a + len(p)), p)
    assert scores
    found = scores.result()
    return [Finding(name, found.score, None), Finding(f"{name} of all at once", Estimate(found.whole, None), None)]


def kd(c: Comparison) -> list[Finding]:
    """The kernel distance."""
    found = kernel_distance(c.samples.rows["pool"], c.reference.rows["pool"], device=c.extractor.device)
    return [Finding(c.extractor.called("KD"), found, c.reference.n)]


def prdc(c: Comparison) -> list[Finding]:
    """Precision, recall, density and coverage."""
    found = manifold(c.samples.rows["pool"], c.reference.rows["pool"], c.neighbours, device=c.extractor.device)
    return [Finding(name, estimate, c.reference.n) for name, estimate in found._asdict().items()]


def labels(c: Comparison) -> list[Finding]:
    """The share of samples that are of the class they were asked for."""
    assert c.samples.labels is not None and c.reference.labels is not None
    found = consistency(c.samples.rows["pool"], c.samples.labels, c.reference.rows["pool"], c.reference.labels)
    return [Finding("label consistency", found.samples, c.reference.n, found.ceiling.value)]


def memorisation(c: Comparison) -> list[Finding]:
    """How many samples are nearer to a real image than 99 % of real images are to each other."""
    reference, (_, ours) = c.reference.rows["pool"], c.nearest
    _, theirs = nearest(reference, reference, exclude_self=True, device=c.extractor.device)
    found = memorised(ours[:, 0], theirs[:, 0])
    findings = [Finding("near copies (1 % expected)", found.share, c.reference.n)]
    if found.ratio is not None:
        findings.append(Finding("nearest distance ratio", Estimate(found.ratio, None), c.reference.n))
    return findings


class Metric(NamedTuple):
    """A row of the table: what computes it, and what it cannot do without."""

    run: Callable[[Comparison], list[Finding]]
    lacks: Callable[[Comparison], str]  # "" where nothing is missing
    knows_real: bool = False  # and so needs no floor


def _gaussians(tap: str) -> Callable[[Comparison], str]:
    def lacks(c: Comparison) -> str:
        if tap not in c.extractor.widths:
            return f"{c.extractor.name} has no {tap} features"
        return "" if c.reference.gaussian(tap) else f"the reference's statistics have none of its {tap} features"

    return lacks


def _images(least: int) -> Callable[[Comparison], str]:
    def lacks(c: Comparison) -> str:
        if not c.reference.rows:
            return "the reference is a file of statistics, not of images"
        few = min(c.samples.n or 0, c.reference.n or 0)
        return f"it needs at least {least} images on both sides" if few < least else ""

    return lacks


def _neighbours(c: Comparison) -> str:
    return _images(c.neighbours + 1)(c)


def _probabilities(c: Comparison) -> str:
    if (c.samples.n or 0) < 20:
        return "ten parts need at least 20 samples"
    return "" if c.extractor.probabilities else f"{c.extractor.name} tells no classes"


def _classes(c: Comparison) -> str:
    ours, theirs = c.samples, c.reference
    if not theirs.rows or ours.labels is None or theirs.labels is None:
        return _images(4)(c) or "the samples or the reference have no classes"
    if ours.classes and theirs.classes and ours.classes != theirs.classes:
        mine, others = (", ".join(names[:5]) + (" ..." if len(names) > 5 else "") for names in (ours.classes, theirs.classes))
        return f"the samples have the classes {mine}, the reference {others}"
    if ours.labels.max() > theirs.labels.max():
        return "the samples have classes that the reference has not"
    return too_few(theirs.labels)


def wanted(text: str) -> list[str]:
    """The names of --metrics, all where it is empty; UserError for an unknown one."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in METRICS]:
        raise UserError(f"--metrics {unknown[0]} is not one of: {', '.join(METRICS)}")
    return list(dict.fromkeys(names or METRICS))


class Floor(NamedTuple):
    """What real images get in the place of the samples: `n` of the reference against its `reference_n` others."""

    n: int
    reference_n: int
    values: Mapping[str, float]


class Result(NamedTuple):
    """A finding, and what real images get in its place: their figure, and how many against how many where it is a floor."""

    finding: Finding
    real: float | None
    real_n: tuple[int, int] | None


def possible(c: Comparison, names: Sequence[str], asked: bool, say: Callable[[str], None]) -> list[str]:
    """Those metrics that can be computed; `say` hears why another cannot, UserError where it was `asked` for by name."""
    out = []
    for name in names:
        if not (why := METRICS[name].lacks(c)):
            out.append(name)
        elif asked:
            raise UserError(f"--metrics {name}: {why}")
        else:
            say(f"without {name}: {why}")
    return out


def floor(c: Comparison, names: Sequence[str]) -> Floor | None:
    """Real images in the place of the samples, as many of them and at most half of the reference, against the others.

    None for SMALL samples or more, and where the reference has no images or no metric needs it.
    """
    n, total = c.samples.n or 0, c.reference.n or 0
    if n >= SMALL or not c.reference.rows or total < 4:
        return None
    few = min(n, total // 2)
    real = replace(c, samples=c.reference.part(0, few), reference=c.reference.part(few, total))
    able = [METRICS[name] for name in names if not METRICS[name].knows_real and not METRICS[name].lacks(real)]
    if not able:
        return None
    return Floor(few, total - few, {f.name: f.estimate.value for metric in able for f in metric.run(real)})


def compare(c: Comparison, names: Sequence[str], beside: Floor | None) -> list[Result]:
    """The figures of metrics that are `possible`."""
    results = []
    for found in (f for name in names for f in METRICS[name].run(c)):
        if found.real is None and beside and found.name in beside.values:
            results.append(Result(found, beside.values[found.name], (beside.n, beside.reference_n)))
        else:
            results.append(Result(found, found.real, None))
    return results


def over_draws(draws: Sequence[Sequence[Result]]) -> list[Result]:
    """The mean of each figure over several draws, with the standard error that their spread gives it."""
    means = []
    for same in zip(*draws, strict=True):
        mean = Estimate.mean(np.array([result.finding.estimate.value for result in same]))
        means.append(same[0]._replace(finding=same[0].finding._replace(estimate=mean)))
    return means


METRICS: dict[str, Metric] = {
    "fd": Metric(fd, _gaussians("pool")),
    "sfd": Metric(sfd, _gaussians("spatial")),
    "is": Metric(score, _probabilities),
    "kd": Metric(kd, _images(4)),
    "prdc": Metric(prdc, _neighbours),
    "labels": Metric(labels, _classes, knows_real=True),
    "memorisation": Metric(memorisation, _images(2)),
}
