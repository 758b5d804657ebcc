"""`iddpm ema`: averages of any width, made after the training."""

from pathlib import Path
from typing import Any

from iddpm.cli.evaluate import of_run
from iddpm.cli.flags import Parser, Verb, file_to_write
from iddpm.config import Evaluate, Sample, Which, make, settings_of
from iddpm.errors import UserError
from iddpm.saying import say
from iddpm.store.remote import place

WHICH = ("device", "precision", "batch_size")
DISTANCES = ("kd", "fd", "sfd")


def _parser(parser: Parser) -> None:
    parser.add_argument("run", help="a run that was trained with --ema_power")
    parser.add_flag(
        "std", float, "the relative width of the average: 0.05 is made of about the last tenth of the run", default=0.0
    )
    parser.add_flag("step", int, "as of the newest snapshot up to this step; -1: of all", default=-1)
    parser.add_flag("best", bool, "instead: search the width whose samples are nearest to --reference", default=False)
    parser.add_argument("--out", default="", metavar="FILE", help="where the weights go [RUN/ema-STD.safetensors]")
    parser.add_fields(Evaluate, "How --best measures")
    parser.add_fields(Sample, "How --best draws", inherited=True)
    parser.add_fields(Which, "On what", only=WHICH)


def _ema(run: str, std: float, step: int, best: bool, out: str, **given: Any) -> None:
    if best == bool(std):
        raise UserError("which average? --std 0.05, or --best --reference DATA, which searches it")
    if given and not best:
        raise UserError(f"--{next(iter(given))} has no effect without --best")
    from iddpm.training.after import keep, made

    folder = place(run)
    if not best:
        path = file_to_write(out or folder / f"ema-{std:g}.safetensors", "--out", ".safetensors")
        average = made(folder, std, step)
        keep(average, std, path)
        missed = f"of its profile {average.missed:.1%} is missed"
        text = f"{path}: the average of relative width {std:g} at step {average.step}; {missed}"
        say(text, "wrote", path=path, std=std, step=average.step)
        print(f"next: iddpm sample {path}")
        return
    _search(folder, step, out, given)


def _search(run: Path, step: int, out: str, given: dict[str, Any]) -> None:
    settings, which = make(Evaluate, {"metrics": "kd", **given}), make(Which, given)
    changes, metric = {k: v for k, v in given.items() if k in settings_of(Sample)}, settings.metrics.upper()
    if not settings.reference:
        raise UserError("--best compares samples with real images: --reference DATA")
    if settings.metrics not in DISTANCES:
        raise UserError(f"--metrics {settings.metrics}: --best goes by one distance: {', '.join(DISTANCES)}")
    if out:  # what cannot be written is refused before the work
        file_to_write(out, "--out", ".safetensors")
    from iddpm import build
    from iddpm.measure import compare
    from iddpm.parallel import processes
    from iddpm.training.after import keep, made, search

    with processes.session(build.device(which.device)) as device:
        leads = processes.rank() == 0

        def distance(std: float) -> float:
            average, path = made(run, std, step), run / f".ema-{std:g}.safetensors"  # for as long as it is measured
            try:
                if leads:
                    keep(average, std, path)
                processes.barrier()
                found = compare.evaluate(of_run(path, settings, which, changes), settings, device, batch_size=which.batch_size)
                value: float = processes.same(found.findings[0].estimate.value if found else None)
            finally:
                if leads:
                    path.unlink(missing_ok=True)
            if leads:
                text = f"--std {std:<6g} {metric} {value:.4g}   ({average.missed:.1%} of its profile missed)"
                say(text, "figure", name=metric, value=value, std=std)
            return value

        found = search(distance)
        chosen = min(found, key=lambda std: found[std])
        if leads:
            path = file_to_write(out or run / f"ema-{chosen:g}.safetensors", "--out", ".safetensors")
            keep(made(run, chosen, step), chosen, path)
            say(f"the best: --std {chosen:g}, {metric} {found[chosen]:.4g}: {path}", "wrote", path=path, std=chosen)
            say(f"next: iddpm sample {path}")


HELP = "averages of any width, made after the training from its snapshots"
VERB = Verb(_ema, _parser, "RUN --std X", HELP)
