"""`iddpm data`: fetch a data set and lay it out as folders of images."""

from pathlib import Path

from iddpm.cli.flags import Parser, Verb
from iddpm.errors import UserError
from iddpm.saying import say

NEXT = {"cifar10": "--preset cifar10-tiny", "digits": "--preset digits", "emoji": "--time 1h"}


def _parser(parser: Parser) -> None:
    parser.add_argument(
        "name", help="cifar10, digits (scikit-learn's handwritten digits, 8x8 grey), or emoji (Fluent 3D emoji, 256x256)"
    )
    parser.add_argument("out", help="the folder to write: OUT/{train,test}/CLASS/CLASS_00000.png")
    parser.add_argument("--source", default="", metavar="FILE", help="cifar10: the official archive, where you have it")


def _data(name: str, out: str, source: str) -> None:
    from iddpm.data.fetch import DATASETS

    if name not in DATASETS:
        raise UserError(f"data {name!r} is not one of: {', '.join(DATASETS)}")
    if source and name != "cifar10":
        raise UserError(f"--source has no effect with {name}")
    if Path(out).name in ("", ".."):
        raise UserError(f"{out!r} has no name: give a new folder, as data/{name}")
    print(DATASETS[name](Path(out), Path(source)) if source else DATASETS[name](Path(out)))
    command = f"iddpm train {out}/train {NEXT[name]}"
    say(f"next: {command}", "next", command=command)


VERB = Verb(_data, _parser, "NAME OUT", "fetch and lay out a data set")
