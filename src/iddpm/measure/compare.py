"""How good samples are: every metric of two sets of features, with its error and what real images get in their place."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from iddpm.config import Evaluate, Sample, own_numbers, settings_of
from iddpm.config.choices import choices, make
from iddpm.data import Order
from iddpm.data.decode import MODES
from iddpm.data.preparation import SCALED
from iddpm.errors import UserError
from iddpm.measure import extractors, statistics
from iddpm.measure.extractors import Extractor
from iddpm.measure.features import Features, extract
from iddpm.measure.figures import Figure, circumstances
from iddpm.measure.image_sets import ImageSet, open_images
from iddpm.measure.metrics.frechet import SMALL
from iddpm.measure.metrics.interface import Comparison, Finding, Metric, Side
from iddpm.measure.metrics.moments import Gaussian
from iddpm.measure.metrics.rows import Estimate
from iddpm.parallel import processes
from iddpm.saying import Progress
from iddpm.store.remote import place
from iddpm.words import many

MADE = ("weights", "checkpoint_step", "ema_rate", "precision", "steps", *sorted(settings_of(Sample)))  # how samples came to be


class Evaluation(NamedTuple):
    """What was found, and of what."""

    findings: list[Finding]  # of all draws together: with several, each value is their mean
    draws: list[list[Finding]]  # of each draw
    figures: list[Figure]  # all of these, each under all that decides it
    extractor: Extractor
    samples: list[Features]  # of each draw
    reference: Side
    real: Features | None  # of the reference; None where it is a file of statistics


def evaluate(
    sets: Sequence[ImageSet],
    settings: Evaluate,
    device: torch.device,
    *,
    batch_size: int = 64,
    say: Callable[[str], None] = print,
) -> Evaluation | None:
    """Every metric of some draws of samples against real images. All processes call this; the first one has the result.

    UserError for a metric that was asked for by name and cannot be computed; `say` hears of one that was not.
    """
    own, leads = dict(settings.own), processes.rank() == 0
    asked = [name.strip() for name in settings.metrics.split(",") if name.strip()]
    metrics = {name: make("metrics", name, own) for name in asked or choices("metrics")}
    extractor = extractors.open(settings.extractor, own, device)
    held, real = _reference(settings, sets[0], extractor, say if leads else lambda line: None)
    samples = [_features(images, extractor, batch_size, settings.num_samples, settings.seed) for images in sets]
    if not leads:
        return None
    reference = _side(held, real)
    both = [Comparison(features.side, reference, extractor) for features in samples]
    draws = compare(both, possible(both[0], metrics, bool(asked), say))
    abouts = [_about(features, real, extractor, settings, device) for features in samples]
    every = [_figure(f, about) for about, found in zip(abouts, draws) for f in found]
    findings = draws[0]
    if len(draws) > 1:
        findings = [_mean(same) for same in zip(*draws, strict=True)]
        every += [_figure(f, abouts[0] | dict(seeds=None, draws=len(draws), samples_key=None)) for f in findings]
    return Evaluation(findings, draws, every, extractor, samples, reference, real)


# ---- what is compared


def _reference(
    settings: Evaluate, samples: ImageSet, extractor: Extractor, say: Callable[[str], None]
) -> tuple[dict[str, Gaussian] | None, Features | None]:
    """The statistics of the reference where it is a file that holds some, and the features of its images where it has any."""
    path, held = place(settings.reference), None
    if path.suffix in (".npz", ".pt") and path.exists():
        held = statistics.read(path, extractor)
        if held and not (path.suffix == ".npz" and statistics.has_images(path)):
            if settings.num_reference:
                raise UserError(f"--num_reference has no effect: {path} holds statistics, of which there is no choosing")
            return held, None
    images = open_images(settings.reference, samples.like())
    for line in _conversions(samples, images, settings.labels):
        say(f"note: {line}")
    return held, _features(images, extractor, 64, settings.num_reference, settings.seed)


def _side(held: Mapping[str, Gaussian] | None, real: Features | None) -> Side:
    """The reference as metrics see it: where a file has statistics beside its images, these are not computed of the images."""
    if real and held:
        return dataclasses.replace(real.side, gaussian=lambda tap: held.get(tap) or real.gaussian(tap))
    assert real or held
    return real.side if real else Side({}, (held or {}).get)


def _conversions(samples: ImageSet, real: ImageSet, labels: str) -> list[str]:
    """What is done to real images that are not as the samples are."""
    lines = []
    if labels:
        lines.append(f"the samples are of the classes {labels} alone, and are compared with all images of {real.name}")
    if only := samples.how.only:
        which = "those of these classes" if real.how.only else "all, since they say no such classes,"
        lines.append(f"the run learned --only_classes {', '.join(only)}: of the images of {real.name} {which} are compared")
    if real.kind != samples.kind:
        how = f"are read as {samples.kind}" if real.channels == samples.channels else "are compared as colour"
        lines.append(f"the samples are {samples.kind}, and the images of {real.name}, which are {real.kind}, {how}")
    if real.native and real.native != real.size:
        sizes = [f"{h}x{w}" for h, w in (real.native, real.size)]
        found = f"of several sizes (the first {sizes[0]})" if real.mixed else sizes[0]
        lines.append(f"the images of {real.name} are {found}, and are {SCALED[real.how.fit]} to the samples' {sizes[1]}")
    return lines


def _features(images: ImageSet, extractor: Extractor, block: int, n: int, seed: int) -> Features:
    """The features of all images, or of n of them, in an order drawn by the seed; those of a run in their own."""
    if images.n < 2:
        raise UserError(f"{images.name} holds {many(images.n, 'image')}: metrics need at least 2, and mean little below 1,000")
    if images.channels not in MODES:
        raise UserError(f"{images.name} has {images.channels} channels: metrics see 1, 3 or 4; take iddpm nll")
    if n > images.n:
        raise UserError(f"{images.name} holds {many(images.n, 'image')}: {n} cannot be compared")
    if n == 1:
        raise UserError("metrics need at least 2 images a side, and mean little below 1,000")
    numbers = np.arange(images.n) if images.about else Order(images.n, seed).indices(0, n or images.n)
    what = f"{'drawing' if images.about else 'reading'} {images.name}"
    with Progress(len(numbers), "image", what, shown=not processes.rank()) as bar:
        return extract(images, numbers, extractor, block=block, say=bar.write, tick=bar.update)


# ---- the metrics


def possible(
    c: Comparison, metrics: Mapping[str, Metric], asked: bool, say: Callable[[str], None] = lambda line: None
) -> list[Metric]:
    """Those that can be computed; `say` hears why another cannot, UserError where it was `asked` for by name."""
    able = []
    for name, metric in metrics.items():
        if not (why := metric.lacks(c)):
            able.append(metric)
        elif asked:
            raise UserError(f"--metrics {name}: {why}")
        else:
            say(f"without {name}: {why}")
    return able


def compare(draws: Sequence[Comparison], metrics: Sequence[Metric]) -> list[list[Finding]]:
    """The findings of each draw of samples, by metrics that are `possible`, beside what real images get in their place."""
    found = [[metric(c) for metric in metrics] for c in draws]
    unknown = [metric for metric, first in zip(metrics, found[0]) if any(f.real is None for f in first)]
    beside, real_n = _floor(draws[0], unknown)

    def told(f: Finding) -> Finding:
        return f._replace(real=beside[f.name], real_n=real_n) if f.real is None and f.name in beside else f

    return [[told(f) for own in each for f in own] for each in found]


def _floor(c: Comparison, metrics: Sequence[Metric]) -> tuple[dict[str, float], tuple[int, int]]:
    """Figures of real images in the place of the samples, and of how many against how many; none beside many samples.

    They are as many as the samples, and at most half of the reference, against its others.
    """
    n = c.reference.n
    few = min(c.samples.n, n // 2)
    if c.samples.n >= SMALL or few < 2:  # as where the reference is a file of statistics
        return {}, (0, 0)
    real = dataclasses.replace(c, samples=c.reference.part(0, few), reference=c.reference.part(few, n))
    able = [metric for metric in metrics if not metric.lacks(real)]
    return {f.name: f.estimate.value for metric in able for f in metric(real)}, (few, n - few)


def _mean(draws: Sequence[Finding]) -> Finding:
    """The mean of a figure over several draws, with the standard error that their spread gives it."""
    return draws[0]._replace(estimate=Estimate.mean(np.array([f.estimate.value for f in draws])))


# ---- as figures


def _about(
    features: Features, real: Features | None, extractor: Extractor, settings: Evaluate, device: torch.device
) -> dict[str, Any]:
    """What every figure carries; the keys name the images by their content."""
    images = features.images
    own = dict(settings.own)
    numbers = {k: own.get(k, f.default) for k, f in own_numbers(Evaluate).items() if "metrics" in f.rows}
    ends = [images.title(k).removeprefix("seed ") for k in (0, images.n - 1)]
    return dict(
        n=len(features), samples=images.name, samples_key=features.folder.name, **{k: images.about.get(k) for k in MADE},
        seeds="-".join(ends) if images.about else None, draws=None, seed=settings.seed, labels=settings.labels or None,
        extractor=extractor.name, extractor_identity=extractor.identity, **numbers,
        reference=settings.reference, reference_key=real.folder.name if real else None,
        reference_size=list(real.images.native) if real and real.images.native else None, **circumstances(device),
    )  # fmt: skip


def _figure(f: Finding, about: Mapping[str, Any]) -> Figure:
    n, reference_n = f.real_n or (None, None)
    floor = None if f.real is None else {"value": f.real, "n": n, "reference_n": reference_n}
    return Figure(f.name, *f.estimate, {**about, "reference_n": f.reference_n, "floor": floor})
