"""`iddpm evaluate`: how good samples are, by the metrics of the field, against real images."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from iddpm.config import Evaluate, Sample, Which, fields_of
from iddpm.errors import UserError
from iddpm.flags import Parser, Verb, make
from iddpm.places import place
from iddpm.verbs.common import beside, open_weights

if TYPE_CHECKING:
    import torch

    from iddpm.evaluate.comparison import Result, Side
    from iddpm.evaluate.features import Features
    from iddpm.evaluate.image_sets import ImageSet
    from iddpm.extractors import Extractor

OF_A_RUN = 2048  # samples drawn unless told otherwise


def _parser(parser: Parser) -> None:
    parser.add_argument("samples", help="a run, whose samples are drawn; or an .npz (arr_0), a folder, a .zip or .tar of images")
    parser.add_fields(Evaluate)
    parser.add_fields(Sample, "How a run draws them", inherited=True)
    parser.add_fields(Which)


def _evaluate(samples: str, **given: Any) -> None:
    settings, which = make(Evaluate, given), make(Which, given)
    if not settings.reference:
        raise UserError("--reference says which real images to compare with: a folder, an .npz or an archive")
    if settings.save_statistics and place(settings.save_statistics).suffix != ".npz":
        raise UserError(f"--save_statistics {settings.save_statistics}: give a name that ends in .npz")
    from iddpm import build, distributed, extractors
    from iddpm.evaluate import comparison, figures

    with distributed.session(build.device(which.device)) as device:
        extractor = extractors.open(settings.extractor, _weights(settings), device)
        names = comparison.wanted(settings.metrics)
        sets = _sample_sets(samples, settings, given, device)
        out = _out(place(samples), sets[0], settings)
        figures.read(out)  # what cannot be written to is refused before the work
        reference, real = _reference(settings, sets[0], extractor)
        drawn = [_extract(images, extractor, which.batch_size, settings.num_samples, settings.seed) for images in sets]
        if distributed.rank() == 0:
            about = _about(sets[0], extractor, settings, reference.n, device)
            _measure(drawn, reference, extractor, settings, names, about, out)
            if real:
                _write_neighbours(drawn[0], real, extractor, out)
            if settings.save_statistics:
                _write_statistics(reference, extractor, settings)
            if sets[0].about:
                print(f"next: iddpm nll {samples} HELD_OUT_IMAGES, whose bits/dim join {out.name}")


def _weights(settings: Evaluate) -> str:
    """The file of the extractor's weights, where one is named."""
    files = {"inception": settings.inception_weights, "dinov2": settings.dinov2_weights}
    kind = settings.extractor.partition("-")[0]
    if useless := next((name for name, file in files.items() if file and name != kind), None):
        raise UserError(f"--{useless}_weights has no effect with --extractor {settings.extractor}")
    return files.get(kind, "")


# ---- what is compared


def _is_run(path: Path) -> bool:
    from iddpm.storage import STEP_DIR

    return path.suffix == ".safetensors" or (path / "checkpoints").is_dir() or bool(STEP_DIR.search(path.name))


def _sample_sets(name: str, settings: Evaluate, given: dict[str, Any], device: "torch.device") -> "list[ImageSet]":
    """The samples: of a run, a set for each draw."""
    from iddpm import sample
    from iddpm.evaluate.image_sets import drawn, open_images

    if not _is_run(place(name)):
        only = {**fields_of(Sample), **fields_of(Which), "labels": 0, "draws": 0}
        if useless := next((k for k in given if k in only and k not in ("device", "batch_size")), None):
            raise UserError(f"--{useless} has no effect: {name} holds images that are drawn already")
        return [open_images(name)]
    opened = open_weights(name, {**given, "device": str(device)})
    config, home = opened.config, beside(opened.weights.path)
    if config.model.network != "unet":
        what = "enlarges images: draw some with iddpm sample --high_res, and give their .npz"
        raise UserError(f"{name} {what if config.model.network == 'super_res' else 'is a classifier, which draws nothing'}")
    n, sets = settings.num_samples or OF_A_RUN, []
    for k in range(settings.draws):
        seeds = range(settings.seed + k * n, settings.seed + (k + 1) * n)
        job = sample.job(config, seeds, settings.labels)
        sets.append(drawn(config, opened.net, opened.weights, opened.device, job, home, opened.which.precision))
    return sets


def _reference(settings: Evaluate, samples: "ImageSet", extractor: "Extractor") -> "tuple[Side, Features | None]":
    """The real images' side, from a file of statistics, from images, or both; and their features, where there are images."""
    from iddpm.evaluate import comparison, statistics
    from iddpm.evaluate.image_sets import open_images

    path, held = place(settings.reference), {}
    if path.suffix in (".npz", ".pt") and path.exists():
        held = statistics.read(path, extractor.name, extractor.widths)
        if held and not (path.suffix == ".npz" and statistics.has_images(path)):
            return comparison.Side.of_statistics(held), None
    images = open_images(settings.reference, samples.like())
    if images.kind != samples.kind:
        how = f"are read as {samples.kind}" if images.channels == samples.channels else "are compared as colour"
        print(f"note: the samples are {samples.kind}, and the images of {images.name}, which are {images.kind}, {how}")
    features = _extract(images, extractor, 64, settings.num_reference, settings.seed)
    side = comparison.Side.of(features)
    return (side.with_statistics(held) if held else side), features


def _extract(images: "ImageSet", extractor: "Extractor", block: int, n: int = 0, seed: int = 0) -> "Features":
    """The features of all images, or of n of them, in an order drawn by the seed; those of a run in their own."""
    import numpy as np
    from tqdm import tqdm

    from iddpm import distributed
    from iddpm.data import Order
    from iddpm.evaluate import features

    if images.n < 2:
        raise UserError(f"{images.name} holds {images.n} image: metrics need at least 2, and mean little below 1,000")
    chosen = np.arange(images.n) if images.about else Order(images.n, seed).indices(0, min(n or images.n, images.n))
    what = "drawing" if images.about else "reading"
    with tqdm(
        total=len(chosen), unit="image", desc=f"{what} {images.name}", disable=None if distributed.rank() == 0 else True
    ) as bar:
        return features.extract(images, chosen, extractor, block=block, say=bar.write, tick=bar.update)


# ---- what is told


def _out(samples: Path, images: "ImageSet", settings: Evaluate) -> Path:
    """Where the figures go."""
    if settings.out:
        out = place(settings.out)
        if out.suffix != ".json" or out.is_dir():
            raise UserError(f"--out {settings.out}: the figures are one file of JSON: give a name that ends in .json")
        return out
    if images.about:
        return images.home / "metrics.json"
    return samples.with_name(f"{samples.name if samples.is_dir() else samples.stem}.metrics.json")


def _about(
    images: "ImageSet", extractor: "Extractor", settings: Evaluate, reference_n: int | None, device: "torch.device"
) -> dict[str, Any]:
    """What every figure carries."""
    from iddpm.evaluate.figures import circumstances

    made = {
        k: images.about.get(k) for k in ("solver", "steps", "sampling_steps", "eta", "weights", "checkpoint_step", "ema_rate")
    }
    return dict(
        samples=images.name, **made, extractor=extractor.name, extractor_identity=extractor.identity,
        reference=settings.reference, reference_n=reference_n, seed=settings.seed, labels=settings.labels or None,
        neighbours=settings.neighbours, **circumstances(device),
    )  # fmt: skip


def _measure(
    drawn: "list[Features]", reference: "Side", extractor: "Extractor", settings: Evaluate, names: list[str],
    about: dict[str, Any], out: Path,
) -> None:  # fmt: skip
    """Compute, print and record every figure, of each draw and of all."""
    from iddpm.evaluate import comparison, figures

    sides = [comparison.Side.of(features) for features in drawn]
    for line in _warnings(sides[0].n or 0, reference.n, extractor):
        print(line)
    every = []
    for k, side in enumerate(sides):
        both = comparison.Comparison(side, reference, extractor, settings.neighbours)
        every.append(comparison.compare(both, names, bool(settings.metrics), print if k == 0 else _silence))
    rows, n = [], len(drawn[0])
    for k, results in enumerate(every):
        own = dict(about, n=n, seeds=_seeds(drawn[k]), draws=None)
        rows += [_figure(result, own) for result in results]
    final = every[0]
    if len(every) > 1:
        final = comparison.over_draws(every)
        rows += [_figure(result, dict(about, n=n, seeds=None, draws=len(every))) for result in final]
    if sizes := next((result.floor_of for result in final if result.floor_of), None):
        print(f"beside each figure, that of real images: {sizes[0]} of the reference against its {sizes[1]} others")
    for k, result in enumerate(final):
        print(_line(result, [results[k].estimate.value for results in every]))
    out.parent.mkdir(parents=True, exist_ok=True)
    figures.record(out, rows)
    print(
        f"{n} samples against {reference.n or 'the statistics'}{' images' if reference.n else ''} of {settings.reference}: {out}"
    )


def _silence(line: str) -> None: ...


def _figure(result: "Result", about: dict[str, Any]) -> Any:
    from iddpm.evaluate.figures import Figure

    n, m = result.floor_of or (None, None)
    floor = None if result.floor is None else {"value": result.floor, "n": n, "reference_n": m}
    return Figure(result.name, *result.estimate, dict(about, floor=floor))


def _seeds(features: "Features") -> str | None:
    first, last = features.images.title(0), features.images.title(features.images.n - 1)
    return f"{first.removeprefix('seed ')}-{last.removeprefix('seed ')}" if features.images.about else None


def _line(result: "Result", draws: list[float]) -> str:
    value, error = result.estimate
    margin = f"+- {error:.2g}" if error is not None else ""
    real = f"real images {result.floor:.5g}" if result.floor is not None else ""
    each = f"draws {', '.join(f'{v:.5g}' for v in draws)}" if len(draws) > 1 else ""
    return f"{result.name:28} {value:>10.5g} {margin:12} {real:24} {each}".rstrip()


def _warnings(n: int, reference_n: int | None, extractor: "Extractor") -> list[str]:
    """What a reader of the figures must know of their n."""
    from iddpm.evaluate.comparison import SMALL

    width, lines = extractor.widths["pool"], []
    least = min(n, reference_n or n)
    if least <= width:
        lines.append(
            f"warning: {least} images for {width} features: a Frechet distance is then far too large: read it beside that of "
            "real images, or trust the kernel distance"
        )
    elif n < SMALL:
        lines.append(f"warning: a Frechet distance of {n} samples is too large: compare it at equal n only, beside real images'")
    return lines


def _write_neighbours(drawn: "Features", real: "Features", extractor: "Extractor", out: Path) -> None:
    """For each sample its nearest real images, as a table; and a picture of the nearest pairs."""
    from iddpm.evaluate import neighbours

    stem = out.name.removesuffix(".json")
    start = "" if stem == "metrics" else f"{stem.removesuffix('.metrics')}."
    table, picture = (out.with_name(f"{start}neighbours{end}") for end in (".csv", ".png"))
    neighbours.write(drawn, real, table, picture)
    trained_on = drawn.images.about.get("trained_on")
    if trained_on and place(trained_on).resolve() != place(real.images.name).resolve():
        print(f"note: the run was trained on {trained_on}; whether it copies is told by --reference {trained_on}")
    print(f"nearest real images: {table}; the nearest pairs: {picture}")


def _write_statistics(reference: "Side", extractor: "Extractor", settings: Evaluate) -> None:
    from iddpm.evaluate import statistics

    path = place(settings.save_statistics)
    gaussians = {tap: g for tap in extractor.widths if (g := reference.gaussian(tap))}
    statistics.write(
        path, gaussians, dict(extractor=extractor.name, identity=extractor.identity, n=reference.n, of=settings.reference)
    )
    print(f"the reference's statistics: {path}")


VERB = Verb(_evaluate, _parser, "SAMPLES --reference DATA", "the quality of samples: FID and its kin, precision, recall, copies")
