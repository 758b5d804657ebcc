"""`iddpm train`: train a new run, or go on with one."""

import time
from typing import Any

from iddpm.cli.flags import Parser, Verb, listed
from iddpm.config import Config
from iddpm.config.presets import PRESETS

FIRST = (  # what the help shows before all other flags
    "time", "steps", "image_size", "class_cond", "random_flip", "validation", "batch_size", "lr", "init_from", "device",
)  # fmt: skip


def _parser(parser: Parser) -> None:
    parser.add_argument("data", nargs="?", default="", help="a folder, .zip or .tar of images; a resumed run remembers it")
    parser.add_argument(
        "--preset",
        default="",
        metavar="NAME",
        help="a recipe to start from, or several, as digits,edm [auto, unless flags of the network or the process are given]",
    )
    parser.add_argument("--config", default="", help="the config.json of another run, to begin as it did", metavar="FILE")
    parser.add_argument(
        "--run", default="", help="the run's folder [runs/PRESET or runs/DATA, with -2 for other flags]", metavar="DIR"
    )
    parser.add_flag("dry_run", bool, "say what would be done, time a step, and stop", default=False)
    for group in Config().parts:
        parser.add_fields(type(group), "What most people need", only=FIRST)
    for group in Config().parts:
        parser.add_fields(type(group))
    rows = listed({name: text for name, (text, _) in PRESETS.items()})
    parser.epilog = f"presets (a later one wins over those before it, a flag given beside them over all):\n{rows}"


def _train(data: str, preset: str, config: str, run: str, dry_run: bool, **given: Any) -> None:
    began = time.monotonic()  # before torch is imported, which takes seconds: they count with --time
    from iddpm.look import report
    from iddpm.store.remote import place
    from iddpm.training.start import start

    start(place(run) if run else None, data, preset, given, dry_run, recipe=config, began=began, look=report.keep)


VERB = Verb(_train, _parser, "DATA", "train a model on a folder of images; the same command resumes")
