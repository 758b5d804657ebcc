"""`iddpm evaluate`: how good samples are, by the metrics of the field, against real images."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iddpm.cli.flags import Parser, Verb, file_to_write
from iddpm.config import Evaluate, Sample, Which, make, settings_of
from iddpm.errors import UserError
from iddpm.store.remote import place

if TYPE_CHECKING:
    from iddpm.measure.image_sets import ImageSet

OF_A_RUN = 2048  # samples drawn unless told otherwise


def _parser(parser: Parser) -> None:
    parser.add_argument("samples", help="a run, whose samples are drawn; or an .npz (arr_0), a folder, a .zip or .tar of images")
    parser.add_fields(Evaluate)
    parser.add_fields(Sample, "How a run draws them", inherited=True)
    parser.add_fields(Which)


def _evaluate(samples: str, **given: Any) -> None:
    settings, which = make(Evaluate, given), make(Which, given)
    changes = {k: v for k, v in given.items() if k in settings_of(Sample)}
    if not settings.reference or not samples:
        raise UserError(
            "which images are compared? iddpm evaluate SAMPLES --reference DATA: folders, .npz files or archives, or a run"
        )
    from iddpm.store.files import MANIFEST, STEP_DIR

    path = place(samples)
    run = path.suffix == ".safetensors" or (path / "checkpoints").is_dir()
    run = run or (bool(STEP_DIR.search(path.name)) and (path / MANIFEST).exists())  # or one of its checkpoints
    of_a_run = {*settings_of(Sample, Which), "labels", "draws"} - {"device", "batch_size"}
    if not run and (useless := next((k for k in given if k in of_a_run), None)):
        raise UserError(f"--{useless} has no effect: {samples} holds images that are drawn already")
    if settings.save_statistics:
        file_to_write(settings.save_statistics, "--save_statistics", ".npz")
    from iddpm import build
    from iddpm.look import figures as words
    from iddpm.look import report
    from iddpm.measure import compare, figures
    from iddpm.measure.image_sets import open_images
    from iddpm.parallel import processes

    with processes.session(build.device(which.device)) as device:
        sets = of_run(path, settings, which, changes) if run else [open_images(samples)]
        beside = sets[0].home / "metrics.json" if run else path.resolve().with_name(f"{path.resolve().name}.metrics.json")
        out = file_to_write(settings.out or beside, "--out", ".json")
        figures.read(out)  # what is no file of figures is refused before the work
        found = compare.evaluate(sets, settings, device, batch_size=which.batch_size)
        if found:  # on the first process
            words.tell(found, settings, out)
            if run:
                words.next_steps(samples, found.samples, out, named=bool(settings.out))
                report.keep(sets[0].home)


def of_run(run: Path, settings: Evaluate, which: Which, changes: Mapping[str, Any]) -> "list[ImageSet]":
    """The samples of a run: a set for each draw, of seeds of its own."""
    from iddpm import fit
    from iddpm.measure.image_sets import drawn
    from iddpm.sampling.job import job
    from iddpm.sampling.open import open_weights

    opened, n = open_weights(run, which, changes), settings.num_samples or OF_A_RUN
    task = fit.require_steering(opened.config, changes).task
    if task.inputs:
        raise UserError(f"{run} is {task.help}: draw some with iddpm sample --{task.inputs[-1]}, and give their .npz")
    if not task.draws:
        raise UserError(f"{run} is a classifier, which draws nothing")
    starts = range(settings.seed, settings.seed + settings.draws * n, n)
    return [drawn(opened, job(opened.config, range(a, a + n), settings.labels)) for a in starts]


HELP = "the quality of samples: FID and its kin, precision, recall, copies"
VERB = Verb(_evaluate, _parser, "SAMPLES --reference DATA", HELP, resumes=True)
