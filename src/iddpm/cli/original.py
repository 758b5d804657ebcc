"""The original's commands, `iddpm image_train` and its siblings, with its flags and defaults."""

from typing import Any

from iddpm.cli.flags import Parser, Verb
from iddpm.interop.openai.formats.flags import ADDED, COMMANDS

ROWS = {  # name: our task, the program whose flags they are, and the help
    "image_train": ("images", "improved", "the original's training of a model of images"),
    "image_sample": ("images", "improved", "the original's sampling, to an npz"),
    "image_nll": ("images", "improved", "the original's bits per dimension"),
    "super_res_train": ("enlarge", "improved", "the original's training of a model that enlarges images"),
    "super_res_sample": ("enlarge", "improved", "the original's enlarging of an npz of samples"),
    "classifier_train": ("classify", "guided", "guided-diffusion's training of a classifier of noisy images"),
    "classifier_sample": ("images", "guided", "guided-diffusion's sampling, guided by a classifier"),
}
OURS = dict(  # flags of ours that the original's commands take as well
    seed=(0, "seed of everything random"),
    device=("auto", "cpu, cuda, cuda:1, mps; auto: the best there is"),
    steps=(0, "end training after so many steps; 0: as the original's flags say"),
)


def _verb(name: str, task: str, program: str, help: str) -> Verb:
    defaults, work = dict(COMMANDS[program][name]), name.rpartition("_")[2]
    if program == "improved":
        defaults |= {k: v for k, v in ADDED.items() if k not in defaults}
    if name != "classifier_train":
        defaults.setdefault("sigma_small", False)  # the original forgot it in super-resolution, guided-diffusion everywhere
    flags = {k: (v, "") for k, v in defaults.items()} | {k: v for k, v in OURS.items() if k != "steps" or work == "train"}

    def parser(p: Parser) -> None:
        for flag, (value, text) in flags.items():
            p.add_flag(flag, type(value), f"{text} [{value if value != '' else 'none'}]", default=value)

    def run(**given: Any) -> None:
        from iddpm.interop.openai import commands

        commands.run(work, task, program, given)

    return Verb(run, parser, "", help, resumes=work in ("sample", "nll"))


VERBS = {name: _verb(name, *row) for name, row in ROWS.items()}
