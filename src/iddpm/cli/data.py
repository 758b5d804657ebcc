"""`iddpm data`: fetch a data set and lay it out as folders of images; check one; pack one."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from iddpm.cli.flags import Parser, Verb
from iddpm.config import Config, Model
from iddpm.config import check as check_config
from iddpm.config import image_size as size_of
from iddpm.errors import UserError
from iddpm.saying import say

if TYPE_CHECKING:
    from iddpm.data.preparation import Preparation

NEXT = {"cifar10": "--preset cifar10-tiny", "digits": "--preset digits", "emoji": "--time 1h"}
ONLY = {
    "source": ("cifar10",),
    "image_size": ("pack",),
    "image_channels": ("pack",),
    "workers": ("pack",),
    "labels": ("check", "pack"),
    "only_classes": ("check", "pack"),
    "floats": ("check", "pack"),
    "fit": ("pack",),
    "bit_depth": ("pack",),
}


def _parser(parser: Parser) -> None:
    parser.add_argument(
        "name",
        help="cifar10, digits (scikit-learn's handwritten digits, 8x8 grey), or emoji (Fluent 3D emoji, 256x256): fetched; "
        "check PATH [SHEET.png]: what is in a set, and what to do about it; pack PATH OUT: decode and resize it once",
    )
    parser.add_argument("path", help="the folder to write: OUT/{train,test}/CLASS/CLASS_00000.png; of check and pack, the images")
    parser.add_argument(
        "out", nargs="?", default="", help="of pack, the folder to write; of check, where pictures of the images go"
    )
    parser.add_argument("--source", default="", metavar="FILE", help="cifar10: the official archive, where you have it")
    parser.add_argument("--image_size", default="", metavar="SIZE", help="pack: pixels, or HEIGHTxWIDTH [64]")
    parser.add_argument(
        "--image_channels", type=int, default=0, metavar="N", help="pack: 1 grey, 3 colour, 4 with transparency; or of arrays [3]"
    )
    parser.add_argument("--labels", default="", metavar="RULE", help="check, pack: where classes come from, as of train [auto]")
    parser.add_argument("--only_classes", default="", metavar="A,B", help="check, pack: images of these classes alone")
    parser.add_argument("--fit", default="", metavar="HOW", help="pack: cover or contain, as of train [cover]")
    parser.add_argument("--bit_depth", default="", metavar="N", help="pack: 8 or 16 [8]")
    parser.add_argument("--floats", default="", metavar="SPAN", help="check, pack: what floats span, unit or signed, as of train")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="pack: processes, which change no byte [one a core]")


def _data(name: str, path: str, out: str, **flags: str | int) -> None:
    from iddpm.data.fetch import DATASETS

    if name not in (*DATASETS, *VERBS):
        raise UserError(f"data {name!r} is not one of: {', '.join((*DATASETS, *VERBS))}")
    for flag, where in ONLY.items():
        if flags[flag] and name not in where:
            raise UserError(f"--{flag} has no effect with {name}")
    if name in VERBS:
        VERBS[name](path, out, **flags)
        return
    if out:
        raise UserError(f"data {name} takes one folder: {path} or {out}?")
    if Path(path).name in ("", ".."):
        raise UserError(f"{path!r} has no name: give a new folder, as data/{name}")
    print(DATASETS[name](Path(path), Path(str(flags["source"]))) if flags["source"] else DATASETS[name](Path(path)))
    _next(f"iddpm train {path}/train {NEXT[name]}")


def _next(command: str) -> None:
    say(f"next: {command}", "next", command=command)


def _preparation(fit: str, bit_depth: str, floats: str, only_classes: str) -> "Preparation":
    """The same as of a run with these flags; UserError for what these cannot be."""
    from iddpm.data.preparation import preparation

    config = Config().updated(dict(fit=fit or "cover", bit_depth=bit_depth or "8", floats=floats, only_classes=only_classes))
    if fit == "anywhere":
        raise UserError("--fit anywhere cuts each image anew in every epoch, so it cannot be packed: give it to iddpm train")
    return preparation(check_config(config))


def _check(path: str, out: str, labels: str, floats: str, only_classes: str, **_: object) -> None:
    from iddpm.data.check import check
    from iddpm.store.remote import place, replace

    sheet = place(out or "check.png")
    if sheet.exists() and not out:
        raise UserError(f"{sheet} is there already: iddpm data check {path} OTHER.png, for the pictures of the images")
    if sheet.suffix.lower() != ".png":
        raise UserError(f"{sheet}: give a name that ends in .png, for the pictures of the images")
    found = check(path, labels or "auto", _preparation("", "", floats, only_classes))
    replace(sheet, lambda file: found.sheet.save(file, "PNG"), lasting=False)
    for line in found.lines:
        say(line)
    say(f"pictures: {sheet}", "wrote", path=sheet)


def _pack(path: str, out: str, image_size: str, image_channels: int, labels: str, workers: int, source: str, **how: str) -> None:
    from iddpm.data.pack import pack

    if not out:
        raise UserError(f"iddpm data pack {path} OUT: which folder is to be written?")
    if not 0 <= image_channels <= 1024 or workers < 0:
        raise UserError("--image_channels is 1, 3 or 4, of arrays up to 1024, and --workers 1 or more")
    size = size_of(Model(image_size=image_size or "64"))
    workers = workers or os.cpu_count() or 1
    print(pack(path, out, size, image_channels or 3, labels or "auto", workers, _preparation(**how)))
    channels = f" --image_channels {image_channels}" if image_channels not in (0, 3) else ""
    deep = " --bit_depth 16" * (how["bit_depth"] == "16")
    _next(f"iddpm train {out} --image_size {image_size or 64}{channels}{deep} --time 1h")


VERBS: dict[str, Callable[..., None]] = {"check": _check, "pack": _pack}
VERB = Verb(_data, _parser, "NAME OUT | check PATH | pack PATH OUT", "fetch a data set, check one, or pack one", resumes=True)
