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

    from iddpm.measure.image_sets import ImageSet

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
    from iddpm.measure import compare, figures
    from iddpm.parallel import processes

    with processes.session(build.device(which.device)) as device:
        sets = _sample_sets(samples, settings, given, device)
        out = _out(place(samples), sets[0], settings)
        figures.read(out)  # what is no file of figures is refused before the work
        found = compare.evaluate(sets, settings, device, batch_size=which.batch_size)
        if found:
            report.tell(found, settings, out)
            if sets[0].about:
                report.next_steps(samples, found.samples, out, named=bool(settings.out))


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
