"""The original's commands, `iddpm image_train` and its siblings, with its flags and defaults."""

from typing import Any

from iddpm.cli.flags import Parser, Verb
from iddpm.interop.openai.formats.flags import ADDED, COMMANDS

HELP = {
    "image_train": "the original's training of a model of images",
    "image_sample": "the original's sampling, to an npz",
    "image_nll": "the original's bits per dimension",
    "super_res_train": "the original's training of a model that enlarges images",
    "super_res_sample": "the original's enlarging of an npz of samples",
    "classifier_train": "guided-diffusion's training of a classifier of noisy images",
    "classifier_sample": "guided-diffusion's sampling, guided by a classifier",
}
OURS = dict(  # flags of ours that the original's commands take as well
    seed=(0, "seed of everything random"),
    device=("auto", "cpu, cuda, cuda:1, mps; auto: the best there is"),
    steps=(0, "end training after so many steps; 0: as the original's flags say"),
)


def _verb(name: str) -> Verb:
    program = "guided" if name.startswith("classifier") else "improved"
    defaults: dict[str, Any] = dict(COMMANDS[program][name])
    if program == "improved":
        defaults |= {k: v for k, v in ADDED.items() if k not in defaults}
    if name != "classifier_train":
        defaults.setdefault("sigma_small", False)  # the original forgot it in super-resolution, guided-diffusion everywhere
    added = {k: v for k, v in OURS.items() if k != "steps" or name.endswith("_train")}

    def parser(p: Parser) -> None:
        for flag, (value, text) in {**{k: (v, "") for k, v in defaults.items()}, **added}.items():
            p.add_flag(flag, type(value), f"{text} [{value if value != '' else 'none'}]", default=value)

    def run(**given: Any) -> None:
        from iddpm.interop.openai import commands

        commands.run(name, given)

    return Verb(run, parser, "", HELP[name])


VERBS = {name: _verb(name) for name in HELP}
