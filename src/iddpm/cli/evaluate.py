"""`iddpm evaluate`: how good samples are, by the metrics of the field, against real images."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iddpm.cli.flags import Parser, Verb
from iddpm.config import Evaluate, Sample, Which, fields_of, make
from iddpm.errors import UserError
from iddpm.sampling.open import beside, open_weights
from iddpm.store.remote import place, remote

if TYPE_CHECKING:
    import torch

    from iddpm.measure.extractors import Extractor
    from iddpm.measure.features import Features
    from iddpm.measure.image_sets import ImageSet
    from iddpm.measure.sides import Side

OF_A_RUN = 2048  # samples drawn unless told otherwise


def _parser(parser: Parser) -> None:
    parser.add_argument("samples", help="a run, whose samples are drawn; or an .npz (arr_0), a folder, a .zip or .tar of images")
    parser.add_fields(Evaluate)
    parser.add_fields(Sample, "How a run draws them", inherited=True)
    parser.add_fields(Which)


def _evaluate(samples: str, **given: Any) -> None:
    settings, which = make(Evaluate, given), make(Which, given)
    if not settings.reference or not samples:
        raise UserError(
            "which images are compared? iddpm evaluate SAMPLES --reference DATA: folders, .npz files or archives, or a run"
        )
    if settings.save_statistics:
        if place(settings.save_statistics).suffix != ".npz":
            raise UserError(f"--save_statistics {settings.save_statistics}: give a name that ends in .npz")
        _require_writable(place(settings.save_statistics), "--save_statistics")
    from iddpm import build
    from iddpm.look import figures as report
    from iddpm.measure import compare as comparison
    from iddpm.measure import extractors, figures
    from iddpm.measure.sides import Side
    from iddpm.parallel import processes

    with processes.session(build.device(which.device)) as device:
        extractor = extractors.open(settings.extractor, _weights(settings), device)
        names = comparison.wanted(settings.metrics)
        sets = _sample_sets(samples, settings, given, device)
        out = _out(place(samples), sets[0], settings)
        figures.read(out)  # what is no file of figures is refused before the work
        reference, real = _reference(settings, sets[0], extractor)
        drawn = [_extract(images, extractor, which.batch_size, settings.num_samples, settings.seed) for images in sets]
        if processes.rank() == 0:
            both = [comparison.Comparison(Side.of(f), reference, extractor, settings.neighbours) for f in drawn]
            names = comparison.possible(both[0], names, bool(settings.metrics), print)
            report.warn(both[0])
            report.figures_of(both, names, drawn, real, settings, out, device)
            if real and "memorisation" in names:
                report.write_neighbours(both[0], drawn[0], real, out)
            if settings.save_statistics:
                report.write_statistics(reference, extractor, settings)
            if sets[0].about:
                report.next_steps(samples, drawn, out, named=bool(settings.out))


def _weights(settings: Evaluate) -> str:
    """The file of the extractor's weights, where one is named."""
    files = {"inception": settings.inception_weights, "dinov2": settings.dinov2_weights}
    kind = settings.extractor.partition("-")[0]
    if useless := next((name for name, file in files.items() if file and name != kind), None):
        raise UserError(f"--{useless}_weights has no effect with --extractor {settings.extractor}")
    return files.get(kind, "")


# ---- what is compared


def _is_run(path: Path) -> bool:
    from iddpm.store.files import MANIFEST, STEP_DIR

    checkpoint = bool(STEP_DIR.search(path.name)) and (path / MANIFEST).exists()
    return path.suffix == ".safetensors" or (path / "checkpoints").is_dir() or checkpoint


def _sample_sets(name: str, settings: Evaluate, given: dict[str, Any], device: "torch.device") -> "list[ImageSet]":
    """The samples: of a run, a set for each draw."""
    from iddpm.measure.image_sets import drawn, open_images
    from iddpm.sampling import draw as sample

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
    from iddpm.measure import statistics
    from iddpm.measure.image_sets import open_images
    from iddpm.measure.sides import Side
    from iddpm.parallel import processes

    path, held = place(settings.reference), None
    if path.suffix in (".npz", ".pt") and path.exists():
        held = statistics.read(path, extractor)
        if held and not (path.suffix == ".npz" and statistics.has_images(path)):
            if settings.num_reference:
                raise UserError(f"--num_reference has no effect: {path} holds statistics, of which there is no choosing")
            return Side.of_statistics(held), None
    images = open_images(settings.reference, samples.like())
    if processes.rank() == 0:
        for line in _conversions(samples, images, settings.labels):
            print(f"note: {line}")
    features = _extract(images, extractor, 64, settings.num_reference, settings.seed)
    side = Side.of(features)
    return (side.with_statistics(held) if held else side), features


def _conversions(samples: "ImageSet", real: "ImageSet", labels: str) -> list[str]:
    """What is done to real images that are not as the samples are."""
    lines = []
    if labels:
        lines.append(f"the samples are of the classes {labels} alone, and are compared with all images of {real.name}")
    if real.kind != samples.kind:
        how = f"are read as {samples.kind}" if real.channels == samples.channels else "are compared as colour"
        lines.append(f"the samples are {samples.kind}, and the images of {real.name}, which are {real.kind}, {how}")
    if real.native and real.native != real.size:
        sizes = [f"{h}x{w}" for h, w in (real.native, real.size)]
        lines.append(f"the images of {real.name} are {sizes[0]}, and are scaled and cropped to the samples' {sizes[1]}")
    return lines


def _extract(images: "ImageSet", extractor: "Extractor", block: int, n: int, seed: int) -> "Features":
    """The features of all images, or of n of them, in an order drawn by the seed; those of a run in their own."""
    import numpy as np
    from tqdm import tqdm

    from iddpm.data import Order
    from iddpm.measure import features
    from iddpm.parallel import processes

    if images.n < 2:
        raise UserError(f"{images.name} holds {images.n} image: metrics need at least 2, and mean little below 1,000")
    if n > images.n:
        raise UserError(f"{images.name} holds {images.n} images: {n} cannot be compared")
    if n == 1:
        raise UserError("metrics need at least 2 images a side, and mean little below 1,000")
    chosen = np.arange(images.n) if images.about else Order(images.n, seed).indices(0, n or images.n)
    what = f"{'drawing' if images.about else 'reading'} {images.name}"
    quiet = None if processes.rank() == 0 else True
    with tqdm(total=len(chosen), unit="image", desc=what, disable=quiet) as bar:
        return features.extract(images, chosen, extractor, block=block, say=bar.write, tick=bar.update)


def _out(samples: Path, images: "ImageSet", settings: Evaluate) -> Path:
    """Where the figures go; UserError where nothing can be written there."""
    if images.about:
        out = images.home / "metrics.json"
    else:
        samples = samples.resolve()
        out = samples.with_name(f"{samples.name}.metrics.json")
    if settings.out:
        out = place(settings.out)
        if out.suffix != ".json" or out.is_dir():
            raise UserError(f"--out {settings.out}: the figures are one file of JSON: give a name that ends in .json")
    _require_writable(out, "--out")
    return out


def _require_writable(path: Path, flag: str) -> None:
    """Make the folder of a file that is to be written; UserError where that cannot be."""
    if remote(path):
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{path} cannot be written ({e.strerror}): give another {flag}") from None
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path} cannot be written (its folder is read-only): give another {flag}")


VERB = Verb(
    _evaluate,
    _parser,
    "SAMPLES --reference DATA",
    "the quality of samples: FID and its kin, precision, recall, copies",
    resumes=True,
)
