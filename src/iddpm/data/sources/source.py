"""What a source of images is: names and bytes; and the one set of rules on which names are images."""

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import BinaryIO, NamedTuple

import numpy as np

from iddpm.data.decode import EXTENSIONS
from iddpm.errors import UserError

LABEL_FILES = ("labels.json", "labels.csv", "dataset.json")  # beside the images; the last is EDM's name
ATTRIBUTE_FILES = ("list_attr_celeba.txt", "list_attr_celeba.csv", "attributes.csv")
# What programs and systems keep beside images: previews, deleted files, attributes.
TOOLS = {"__macosx", "__pycache__", "@eadir", "#recycle", "$recycle.bin", "lost+found", "system volume information"}
LARGEST = 1 << 29  # bytes of a file that are taken into memory; an archive of 20 kB can promise any number


class Ranked(NamedTuple):
    """Labels that a table keeps itself: each image's (N,) int64 place among `values`."""

    ranks: np.ndarray
    values: list[str | int]


class Source:
    """Images by name, in order, and the files of labels beside them.

    `path` is the folder or archive, as it is told to a user; `home` the folder in or beside which what is worked out of the
    images is kept; `names` (N) are the images', relative, with "/" between folders; `left_out` counts by ending what is none.
    Where images are `rows` of a table, their names say nothing of classes: these are `labelled`, or there are none. `files` are
    those of a set that lies in several.
    """

    rows = False
    files: Sequence[Path] = ()
    sealed = ""  # a digest of all that is in it, where it keeps one

    def __init__(self, path: Path, home: Path, files: Iterable[str]) -> None:
        self.path, self.home = path, home
        self.left_out: Counter[str] = Counter()
        names = list[str]()
        for name in sorted(files):
            if hidden(name):
                continue
            if is_image(name):
                names.append(name)
            elif name.rpartition("/")[2] not in LABEL_FILES + ATTRIBUTE_FILES and not name.endswith(".cls"):
                self.left_out[PurePath(name).suffix[1:].lower() or "without an ending"] += 1
        self.names: Sequence[str] = names
        if not names:
            found = f"; it has {self.rest()}" if self.left_out else ""
            raise UserError(f"{path} holds no images: looked for files ending in {', '.join(EXTENSIONS)}{found}")

    def read(self, name: str) -> bytes:
        """The content of an image, or of another file; UserError where it cannot be had, or is above `LARGEST`."""
        raise NotImplementedError

    def pixels(self, name: str) -> np.ndarray | None:
        """An image (H, W, C) uint8, uint16 or float where it lies so; else None, and it is to be read and decoded."""
        return None

    def open_file(self, name: str) -> BinaryIO:
        """The same as a file, of which little may be read."""
        return io.BytesIO(self.read(name))

    def labelled(self) -> Ranked | None:
        """What a table itself says of the classes; UserError where that cannot be, so ask where labels are wanted."""
        return None

    def has(self, name: str) -> bool:
        """Whether there is such a file, image or not."""
        raise NotImplementedError

    def size(self, name: str) -> int:
        """The bytes of a file, or -1 where asking would cost a request for each."""
        raise NotImplementedError

    def rest(self) -> str:
        """What is left out, by ending: "2 heic, 1 mov"."""
        return ", ".join(f"{n} {ending}" for ending, n in sorted(self.left_out.items()))


def hidden(name: str) -> bool:
    """Whether any part of a relative name begins with a dot, or is a folder that programs keep beside images."""
    *folders, _ = parts = name.split("/")
    return any(part.startswith(".") for part in parts) or any(part.lower() in TOOLS for part in folders)


def is_image(name: str) -> bool:
    stem, _, ending = name.rpartition("/")[2].rpartition(".")
    return bool(stem) and ending.lower() in EXTENSIONS


def require_small(what: object, size: int) -> None:
    """UserError for a file that is too large to be an image."""
    if size > LARGEST:
        raise UserError(f"{what} holds {size / 2**30:.1f} GiB: no more than {LARGEST >> 20} MiB of a file are read; remove it")
