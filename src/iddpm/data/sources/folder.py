"""The images below a folder, on this machine or on a remote storage."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from iddpm.data.decode import EXTENSIONS
from iddpm.errors import UserError
from iddpm.store.remote import opened, remote


class Folder(NamedTuple):
    """Files below `path`, by relative name."""

    path: Path
    names: list[str]

    @staticmethod
    def open(path: Path) -> "Folder":
        """The images below a folder, or one image; UserError where there are none."""
        if path.is_file():
            folder = Folder(path.parent, [path.name] if is_image(path.name) else [])
        else:
            folder = Folder(path, sorted(walk(path)))
        if not folder.names:
            raise UserError(f"{path} holds no images: looked for files ending in {', '.join(EXTENSIONS)}")
        return folder

    @property
    def home(self) -> Path:
        return self.path

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def open_file(self, name: str) -> BinaryIO:
        return opened(self.path / name)

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()


def walk(root: Path) -> Iterator[str]:
    """Relative paths of the images below `root`, through links to folders, without hidden files."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: {error.strerror}; make it readable or remove it") from error

    if remote(root):
        yield from (name for file in root.rglob("*") if shown(name := file.relative_to(root).as_posix()))
        return
    seen = set()
    for folder, below, files in os.walk(root, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        below[:] = sorted(name for name in below if not name.startswith(".") and real not in seen)
        if real not in seen:  # a link may lead back up
            yield from (Path(folder, name).relative_to(root).as_posix() for name in files if is_image(name))
        seen.add(real)


def shown(name: str) -> bool:
    """Whether a relative path is that of an image, and no part of it hidden."""
    *folders, file = name.split("/")
    return is_image(file) and not any(part.startswith(".") for part in folders)


def is_image(name: str) -> bool:
    """Whether a file name is that of an image and not hidden."""
    stem, _, ending = name.rpartition(".")
    return bool(stem) and not name.startswith(".") and ending.lower() in EXTENSIONS
