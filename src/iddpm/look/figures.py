"""What `iddpm evaluate` says and writes of what it measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from iddpm.config import Evaluate, Sample, fields_of
from iddpm.look import neighbours
from iddpm.measure import statistics
from iddpm.measure.compare import SMALL, Comparison, Result, compare, floor, over_draws
from iddpm.measure.extractors import Extractor
from iddpm.measure.features import Features
from iddpm.measure.figures import Figure, circumstances, record
from iddpm.measure.sides import Side
from iddpm.store.remote import alone, place

MADE = ("weights", "checkpoint_step", "ema_rate", "precision", "steps", *fields_of(Sample))  # how samples came to be


def warn(c: Comparison) -> None:
    """Say what a reader of the figures must know of their n."""
    n, width = c.samples.n or 0, c.extractor.widths["pool"]
    least = min(n, c.reference.behind("pool") or n)
    if least <= width:
        print(f"warning: {least} images for {width} features: a Frechet distance is far too large;\n"
              f"         read it beside that of real images, or trust the kernel distance")  # fmt: skip
    elif n < SMALL:
        print(f"warning: a Frechet distance of {n} samples is too large: compare it at equal n only, beside real images'")


def figures_of(
    both: Sequence[Comparison], names: Sequence[str], drawn: Sequence[Features], real: Features | None, settings: Evaluate,
    out: Path, device: torch.device,
) -> None:  # fmt: skip
    """Compute, print and record every figure, of each draw and of all."""
    beside, rows, every = floor(both[0], names), [], []
    for c, features in zip(both, drawn):
        every.append(compare(c, names, beside))
        about = _about(features, real, c.extractor, settings, device)
        rows += [_figure(result, dict(about, seeds=_seeds(features), draws=None)) for result in every[-1]]
    final = every[0]
    if len(every) > 1:
        final = over_draws(every)
        rows += [_figure(result, dict(about, seeds=None, draws=len(every), samples_key=None)) for result in final]
    if beside:
        few = ": of fewer images, a distance that n makes larger" if beside.n < len(drawn[0]) else ""
        print(
            f"beside each figure, that of real images: {beside.n} of the reference against its {beside.reference_n} others{few}"
        )
    for k, result in enumerate(final):
        print(_line(result, [results[k].finding.estimate.value for results in every]))
    record(out, rows)
    against = f"{both[0].reference.n} images" if both[0].reference.n else "the statistics"
    print(f"{len(drawn[0])} samples against {against} of {settings.reference}: {out}")


def _about(
    features: Features, real: Features | None, extractor: Extractor, settings: Evaluate, device: torch.device
) -> dict[str, Any]:
    """What every figure carries; the keys name the images by their content."""
    images = features.images
    return dict(
        n=len(features), samples=images.name, samples_key=features.folder.name, **{k: images.about.get(k) for k in MADE},
        seed=settings.seed, labels=settings.labels or None, neighbours=settings.neighbours, extractor=extractor.name,
        extractor_identity=extractor.identity, reference=settings.reference, reference_key=real.folder.name if real else None,
        reference_size=list(real.images.native) if real and real.images.native else None, **circumstances(device),
    )  # fmt: skip


def _figure(result: Result, about: dict[str, Any]) -> Figure:
    n, m = result.real_n or (None, None)
    beside = None if result.real is None else {"value": result.real, "n": n, "reference_n": m}
    name, estimate, reference_n, _ = result.finding
    return Figure(name, *estimate, dict(about, reference_n=reference_n, floor=beside))


def _seeds(features: Features) -> str | None:
    first, last = features.images.title(0), features.images.title(features.images.n - 1)
    return f"{first.removeprefix('seed ')}-{last.removeprefix('seed ')}" if features.images.about else None


def _line(result: Result, draws: list[float]) -> str:
    value, error = result.finding.estimate
    margin = f"+- {error:.2g}" if error is not None else ""
    real = f"real images {result.real:.5g}" if result.real is not None else ""
    each = f"draws {', '.join(f'{v:.5g}' for v in draws)}" if len(draws) > 1 else ""
    return f"{result.finding.name:28} {value:>10.5g} {margin:12} {real:24} {each}".rstrip()


def write_neighbours(c: Comparison, drawn: Features, real: Features, out: Path) -> None:
    """For each sample its nearest real image, as a table; and a picture of the nearest pairs."""
    stem = out.name.removesuffix(".json")
    start = "" if stem == "metrics" else f"{stem.removesuffix('.metrics')}."
    table, picture = (out.with_name(f"{start}neighbours{end}") for end in (".csv", ".png"))
    with alone(out.parent):
        neighbours.write(drawn, real, *c.nearest, table, picture)
    print(f"nearest real images: {table}; the nearest pairs: {picture}")
    trained_on = drawn.images.about.get("trained_on")
    if trained_on and place(trained_on).resolve() != place(real.images.name).resolve():
        print(f"note: the run was trained on {trained_on}; whether it copies is told by --reference {trained_on}")


def write_statistics(reference: Side, extractor: Extractor, settings: Evaluate) -> None:
    """The reference's Gaussians, for other tools."""
    path = place(settings.save_statistics)
    gaussians = {tap: g for tap in extractor.widths if (g := reference.gaussian(tap))}
    about = dict(extractor=extractor.name, identity=extractor.identity, n=reference.behind("pool"), of=settings.reference)
    statistics.write(path, gaussians, about)
    print(f"the reference's statistics: {path}")


def next_steps(run: str, drawn: Sequence[Features], out: Path, named: bool) -> None:
    """Where the features of a run's samples lie, and what else may be measured of it."""
    size = sum(file.stat().st_size for features in drawn for file in features.folder.iterdir()) / 2**20
    print(f"features, for other metrics of the same samples: {drawn[0].folder.parent} ({size:.0f} MB of this; delete at will)")
    print(f"next: iddpm nll {run} HELD_OUT_IMAGES" + ("" if named else f", whose bits/dim join {out.name}"))
