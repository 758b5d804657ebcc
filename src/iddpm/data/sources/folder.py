"""The images below a folder, on this machine or on a remote storage."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from iddpm.data.sources.source import Source, hidden, require_small
from iddpm.errors import UserError, readable
from iddpm.store.remote import opened, remote


class Folder(Source):
    """Files below a folder, by relative name; or one file alone; or, with `names`, those images and no others."""

    def __init__(self, path: Path, names: list[str] | None = None) -> None:
        self.root = path.parent if path.is_file() else path
        if names is not None:
            self.path, self.home, self.names, self.left_out = path, path, names, Counter()
            return
        super().__init__(path, self.root, [path.name] if path.is_file() else walk(path))
        self.path = self.root

    def read(self, name: str) -> bytes:
        with readable(self.root / name):
            require_small(self.root / name, self.size(name))
            return (self.root / name).read_bytes()

    def open_file(self, name: str) -> BinaryIO:
        return opened(self.root / name)

    def has(self, name: str) -> bool:
        return (self.root / name).is_file()

    def size(self, name: str) -> int:
        return -1 if remote(self.root) else os.stat(os.path.join(self.root, name)).st_size  # twice as fast as through a Path


def walk(root: Path) -> Iterator[str]:
    """Relative names of the files below `root`: regular ones, for a fifo or a device would never end.

    Links to folders are followed where they lead out of `root`; what lies inside is met under its own name.
    """
    if remote(root):
        yield from (file.relative_to(root).as_posix() for file in root.rglob("*"))
        return
    top, waiting = os.path.realpath(root), [""]
    seen = {top}
    while waiting:  # a list and no recursion: folders may be deeper than Python's stack
        prefix = waiting.pop()
        try:
            with os.scandir(root / prefix) as held:
                for entry in held:
                    name = prefix + entry.name
                    if os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file():
                        yield name
                    elif entry.is_symlink():
                        real = os.path.realpath(entry.path)
                        if os.path.isdir(real) and real not in seen and not real.startswith(f"{top}/"):
                            seen.add(real)
                            waiting.append(f"{name}/")
                    elif entry.is_dir() and not hidden(f"{name}/"):
                        waiting.append(f"{name}/")
        except OSError as e:
            raise UserError(f"{e.filename}: {e.strerror}; make it readable or remove it") from e
