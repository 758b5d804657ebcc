"""`iddpm nll`: bits per dimension of a data set, alone or against another run on the same images and noise."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from iddpm.cli.flags import Parser, Verb, file_to_write
from iddpm.config import BOUND, Measure, Sample, Which, image_size, make
from iddpm.errors import UserError
from iddpm.saying import say
from iddpm.store.remote import place
from iddpm.words import many

if TYPE_CHECKING:
    from iddpm.sampling.open import Opened


def _parser(parser: Parser) -> None:
    parser.add_argument("run", help="a run's folder, one of its checkpoints, or a .safetensors file of weights")
    parser.add_argument("data", help="a folder of images")
    parser.add_fields(Measure)
    parser.add_fields(Sample, "The steps of the bound", inherited=True, only=BOUND)
    parser.add_fields(Which, "Which weights (of both runs), and on what they run")


def _nll(run: str, data: str, **given: Any) -> None:
    measure, which = make(Measure, given), make(Which, given)
    changes = {k: v for k, v in given.items() if k in BOUND}
    if measure.curve and "sampling_steps" in changes:
        raise UserError("--curve and --sampling_steps both say how many steps: give one")
    if measure.curve and measure.per_image:
        raise UserError("--per_image is of one chain, and --curve of several: give one")
    if flag := next((f for f in ("curve", "per_image", "against", "clip_denoised") if f in given and measure.ode), ""):
        raise UserError(f"--{flag} is of the bound, not of --ode: give one")
    folder = place(data)
    from iddpm import build
    from iddpm.look import bounds as report
    from iddpm.look.report import keep
    from iddpm.measure import figures
    from iddpm.measure.likelihood import bound_of, chains_of, describe, open_held_out, was_trained_on
    from iddpm.parallel import processes
    from iddpm.sampling.open import open_weights

    with processes.session(build.device(which.device)):
        runs = [open_weights(place(source), which, changes) for source in (run, *filter(None, [measure.against]))]
        _require_same_images(runs, measure.given)
        beside = runs[0].home / ("nll_ode.json" if measure.ode else "nll_curve.json" if measure.curve else "nll.json")
        out = file_to_write(measure.out or beside, "--out", ".json", "")
        if measure.ode:
            figures.read(out.parent / report.FIGURES)
            _by_ode(measure, runs[0], folder, out)
            return
        per_image = file_to_write(measure.per_image, "--per_image", ".csv", ".npz") if measure.per_image else None
        chains = chains_of(measure.curve, runs)
        figures.read(out.parent / report.FIGURES)  # a file that is none of ours is refused now, not after hours
        images = [
            open_held_out(o.config, folder, measure.given, name_classes=bool(per_image), keep=not measure.num_samples)
            for o in runs
        ]
        leads = processes.rank() == 0
        if leads:
            print(describe(images[0]))
            for opened in runs:
                if was_trained_on(opened.config, images[0]):
                    print(f"{opened.home} was trained on these images, and so knows them better than others")
        points: list[list[report.Measured]] = []
        states: list[Path] = []  # a file for each run on each chain, from which the same command goes on
        for name, chain in chains.items():
            own = [out.with_name(f"{out.name}{name}{end}.partial") for end in ("", ".against")]
            done = [report.Measured(o, i, bound_of(o, grid, i, measure, s)) for (o, grid), i, s in zip(chain, images, own)]
            points.append(done)
            states += own
            if leads:
                report.tell(done, folder, out)
        if leads:
            if measure.curve:
                report.write_curve(points, out, folder)
            else:
                report.write(points[0], out, folder, per_image)
            for state in states:
                state.unlink(missing_ok=True)
            keep(runs[0].home)


def _by_ode(measure: Measure, opened: "Opened", folder: Path, out: Path) -> None:
    """The likelihood of the probability-flow ODE, told and written."""
    import json
    import time

    from iddpm.look.bounds import record_ode, replaced
    from iddpm.measure.likelihood import describe, open_held_out, was_trained_on
    from iddpm.measure.ode import bits_by_ode
    from iddpm.parallel import processes
    from iddpm.store.remote import write_file

    images = open_held_out(opened.config, folder, measure.given, keep=not measure.num_samples)
    if not processes.rank():
        print(describe(images))
        if was_trained_on(opened.config, images):
            print(f"{opened.home} was trained on these images, and so knows them better than others")
    state = out.with_name(f"{out.name}.partial")  # from which the same command goes on
    began = time.monotonic()
    found = bits_by_ode(opened, images, measure, state)
    if processes.rank():
        return
    about, told = opened.weights.about, replaced(out, folder)
    record_ode(found, opened, folder, out, time.monotonic() - began)
    write_file(out, json.dumps(found | dict(step=about["step"], ema_rate=about.get("ema_rate", 0), data=str(folder)), indent=1))
    state.unlink(missing_ok=True)
    error = f" +- {found['standard_error']:.4f}" if found["images"] > 1 else ""
    how = f"{found['steps']} steps, error of these about {found['solver_error']:.4f}"
    how += f"; {found['trace']} trace, {found['dequantization']} dequantization"
    text = f"{found['bits_per_dim']:.4f}{error} bits/dim of {many(found['images'], 'image')} by the ODE ({how}): {out}{told}"
    say(text, "bits_per_dim", value=found["bits_per_dim"], images=found["images"], path=out)


def _require_same_images(runs: "list[Opened]", given: str) -> None:
    """UserError where a run has no likelihood, or two of them cannot see the same images."""
    shapes = []
    for opened in runs:
        if opened.config.task.classifies:
            raise UserError(f"{opened.weights.path} is a classifier: bits/dim are those of a model of images")
        if opened.config.task.translates != bool(given):
            fix = "--given has no effect" if given else "of images given which? --given FOLDER, with the names of DATA"
            raise UserError(f"{opened.weights.path} is {opened.config.task.help}: {fix}")
        m, d, (height, width) = opened.config.model, opened.config.data, image_size(opened.config.model)
        fit = ", whole in white" * (d.fit == "contain")
        of = f", of the classes {d.only_classes}" * bool(d.only_classes)
        shapes.append(f"{height}x{width} with {m.image_channels} channels{' of 16 bits' * (m.bit_depth == '16')}{fit}{of}")
    if shapes[0] != shapes[-1]:
        raise UserError(f"--against: {runs[1].weights.path} models images of {shapes[1]}, and the run {shapes[0]}")


VERB = Verb(_nll, _parser, "RUN DATA", "bits per dimension of a data set, and every term of the bound", resumes=True)
