"""How good samples are: every metric of two sets of features, with its error and what real images get in its place."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from iddpm.errors import UserError
from iddpm.evaluate.features import Features
from iddpm.extractors import Extractor
from iddpm.metrics.frechet import Gaussian, frechet_distance, frechet_error
from iddpm.metrics.inception_score import Scores
from iddpm.metrics.kernel import kernel_distance
from iddpm.metrics.memorisation import memorised
from iddpm.metrics.moments import Moments
from iddpm.metrics.neighbours import manifold, nearest
from iddpm.metrics.probe import consistency
from iddpm.metrics.rows import BLOCK, Estimate, Rows

SMALL = 10_000  # samples below which a figure is shown beside that of real images


class Side(NamedTuple):
    """One side of a comparison: rows (n, d) of features by tap, or for a file of statistics their Gaussians alone."""

    n: int | None  # None where a file of statistics does not say
    rows: Mapping[str, Rows]
    gaussian: Callable[[str], Gaussian | None]
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()

    @staticmethod
    def of_statistics(held: Mapping[str, Gaussian]) -> "Side":
        """A side of which only Gaussians are known."""
        return Side(None, {}, held.get)

    def with_statistics(self, held: Mapping[str, Gaussian]) -> "Side":
        """This side with the Gaussians of a file, where it has them, in the place of those of its own rows."""
        return self._replace(gaussian=lambda tap: held.get(tap) or self.gaussian(tap))

    @staticmethod
    def of(features: Features) -> "Side":
        rows = {tap: features.rows(tap) for tap in features.extractor.widths}
        return Side(len(features), rows, features.gaussian, features.labels, features.images.classes)

    def part(self, start: int, stop: int) -> "Side":
        """Rows start .. stop - 1."""
        rows = {tap: _Part(held, start, stop - start) for tap, held in self.rows.items()}
        labels = None if self.labels is None else self.labels[start:stop]

        @cache
        def gaussian(tap: str) -> Gaussian:
            few = stop - start <= rows[tap].shape[1]
            return Gaussian.of_few(rows[tap][:]) if few else Gaussian.of(Moments.of(rows[tap]))

        return Side(stop - start, rows, gaussian, labels, self.classes)


class _Part:
    """Some consecutive rows of others."""

    def __init__(self, rows: Rows, start: int, n: int):
        self.rows, self.start, self.shape = rows, start, (n, rows.shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        a, b, _ = rows.indices(len(self))
        return self.rows[self.start + a : self.start + b]


class Comparison(NamedTuple):
    """What a metric may look at."""

    samples: Side
    reference: Side
    extractor: Extractor
    neighbours: int  # the k of precision, recall, density and coverage


class Finding(NamedTuple):
    """A figure of a metric; `real` is what real images get in the place of the samples, where the metric knows itself."""

    name: str
    estimate: Estimate
    real: float | None = None


def named(c: Comparison, metric: str, of_inception: str) -> str:
    """FID and its kin are names of Inception's features alone; on others a metric is called by theirs."""
    return of_inception if c.extractor.name == "inception" else f"{metric}-{c.extractor.name}"


def _frechet(c: Comparison, tap: str, name: str) -> list[Finding]:
    ours, theirs = c.samples.gaussian(tap), c.reference.gaussian(tap)
    assert ours and theirs
    return [Finding(name, Estimate(frechet_distance(ours, theirs), frechet_error(c.samples.rows[tap], ours, theirs)))]


def fd(c: Comparison) -> list[Finding]:
    """The Frechet distance."""
    return _frechet(c, "pool", named(c, "FD", "FID"))


def sfd(c: Comparison) -> list[Finding]:
    """The Frechet distance on features that know where things are."""
    return _frechet(c, "spatial", named(c, "sFD", "sFID"))


def score(c: Comparison) -> list[Finding]:
    """The Inception Score, which looks at the samples alone: the mean over ten parts, as papers have it, and of all as one."""
    rows, classify, name = c.samples.rows["pool"], c.extractor.probabilities, named(c, "IS", "IS")
    assert classify
    scores = None
    for a in range(0, len(rows), BLOCK):
        p = classify(torch.from_numpy(rows[a : a + BLOCK]).to(c.extractor.device)).double().cpu().numpy()
        scores = scores or Scores(len(rows), p.shape[1])
        scores.add(np.arange(a, a + len(p)), p)
    assert scores
    found = scores.result()
    return [Finding(name, found.score), Finding(f"{name} of all at once", Estimate(found.whole, None))]


def kd(c: Comparison) -> list[Finding]:
    """The kernel distance."""
    found = kernel_distance(c.samples.rows["pool"], c.reference.rows["pool"], device=c.extractor.device)
    return [Finding(named(c, "KD", "KID"), found)]


def prdc(c: Comparison) -> list[Finding]:
    """Precision, recall, density and coverage."""
    found = manifold(c.samples.rows["pool"], c.reference.rows["pool"], c.neighbours, device=c.extractor.device)
    return [Finding(name, estimate) for name, estimate in found._asdict().items()]


def labels(c: Comparison) -> list[Finding]:
    """The share of samples that are of the class they were asked for."""
    assert c.samples.labels is not None and c.reference.labels is not None
    found = consistency(c.samples.rows["pool"], c.samples.labels, c.reference.rows["pool"], c.reference.labels)
    return [Finding("label consistency", found.samples, found.ceiling.value)]


def memorisation(c: Comparison) -> list[Finding]:
    """How many samples are nearer to a real image than 99 % of real images are to each other."""
    samples, reference = c.samples.rows["pool"], c.reference.rows["pool"]
    _, ours = nearest(samples, reference, device=c.extractor.device)
    _, theirs = nearest(reference, reference, exclude_self=True, device=c.extractor.device)
    found = memorised(ours[:, 0], theirs[:, 0])
    return [Finding("near copies (1 % expected)", found.share), Finding("nearest distance ratio", Estimate(found.ratio, None))]


class Metric(NamedTuple):
    """A row of the table: what computes it, and what it cannot do without."""

    run: Callable[[Comparison], list[Finding]]
    lacks: Callable[[Comparison], str]  # "" where nothing is missing


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
        return "the samples have other classes than the reference"
    return "" if ours.labels.max() <= theirs.labels.max() else "the samples have classes that the reference has not"


METRICS: dict[str, Metric] = {
    "fd": Metric(fd, _gaussians("pool")),
    "sfd": Metric(sfd, _gaussians("spatial")),
    "is": Metric(score, _probabilities),
    "kd": Metric(kd, _images(4)),
    "prdc": Metric(prdc, _neighbours),
    "labels": Metric(labels, _classes),
    "memorisation": Metric(memorisation, _images(2)),
}


def wanted(text: str) -> list[str]:
    """The names of --metrics, all where it is empty; UserError for an unknown one."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in METRICS]:
        raise UserError(f"--metrics {unknown[0]} is not one of: {', '.join(METRICS)}")
    return names or list(METRICS)


class Result(NamedTuple):
    """A figure, and what real images get in the place of the samples."""

    name: str
    estimate: Estimate
    floor: float | None
    floor_of: tuple[int, int] | None  # how many real images against how many others, where it is that


def compare(c: Comparison, names: Sequence[str], asked: bool, say: Callable[[str], None], floor: bool = True) -> list[Result]:
    """Each metric of a comparison. Fewer than SMALL samples get the floor, too: one half of the reference against the other.

    Of what cannot be computed `say` hears why; UserError where it was `asked` for by name.
    """
    halves = _halves(c) if floor else None
    results = []
    for name in names:
        if why := METRICS[name].lacks(c):
            if asked:
                raise UserError(f"--metrics {name}: {why}")
            say(f"without {name}: {why}")
            continue
        real = {f.name: f.estimate.value for f in METRICS[name].run(halves)} if halves and not METRICS[name].lacks(halves) else {}
        sizes = (halves.samples.n or 0, halves.reference.n or 0) if halves else None
        for found in METRICS[name].run(c):
            least = found.real if found.real is not None else real.get(found.name)
            results.append(Result(found.name, found.estimate, least, sizes if found.real is None and least is not None else None))
    return results


def _halves(c: Comparison) -> Comparison | None:
    """As many real images as there are samples (at most half of them) against the others; None where that tells nothing."""
    n, total = c.samples.n or 0, c.reference.n or 0
    if n >= SMALL or not c.reference.rows or total < 4:
        return None
    few = min(n, total // 2)
    return c._replace(samples=c.reference.part(0, few), reference=c.reference.part(few, total))


def over_draws(results: Sequence[Sequence[Result]]) -> list[Result]:
    """The mean of each figure over several draws, with the standard error that their spread gives it."""
    return [
        Result(same[0].name, Estimate.mean(np.array([r.estimate.value for r in same])), same[0].floor, same[0].floor_of)
        for same in zip(*results, strict=True)
    ]
