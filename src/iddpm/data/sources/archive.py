"""The images in a .zip or .tar, read where they lie."""

import gzip
import io
import posixpath
import stat
import tarfile
import tempfile
import weakref
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, NamedTuple, cast

from iddpm.data.sources.source import LARGEST, Source, require_small
from iddpm.errors import UserError, readable
from iddpm.store.remote import opened, scratch

ENDINGS = (".zip", ".tar", ".tgz", ".tar.gz")
LINKS = 40  # a link may lead to a link, so many times; as Linux does
UNPACKED = 200  # times its own size, and 1 GiB, to which a .tar.gz of images may unpack: they are compressed already


class Member(NamedTuple):
    """A file in an archive."""

    size: int
    open: Callable[[], Any]
    link: str = ""  # the name that it leads to, where it is a link


class Archive(Source):
    """Its files by name; UserError where it is damaged, or says that an image in it is above `LARGEST`.

    Names may be read in any order at the same cost: a .tar that is compressed as a whole is unpacked into this process's scratch
    folder first, since every step back would unpack it from its start.
    """

    def __init__(self, path: Path):
        self._one = Lock()  # an archive is one file, with one place in it: threads take turns
        with readable(path, "is not a readable archive"), ExitStack() as stack:
            zipped = path.suffix.lower() == ".zip"
            file = stack.enter_context(opened(path))
            if not zipped:
                file = stack.enter_context(plain(file, path))
            held = (_zipped if zipped else _tarred)(file)
            weakref.finalize(self, stack.pop_all().close)
        self._members = {name: member for name in held if (member := _followed(held, name))}
        super().__init__(path, path.parent, self._members)
        for name in self.names:  # an archive that promises gigabytes in a picture is meant to harm: nothing of it is read
            require_small(path / name, self.size(name))

    def read(self, name: str) -> bytes:
        what = self.path / name
        with readable(what), self._one:
            require_small(what, self._members[name].size)
            with self._members[name].open() as file:
                content: bytes = file.read(LARGEST + 1)  # to its end, where a .zip's checksum is compared
        require_small(what, len(content))
        return content

    def has(self, name: str) -> bool:
        return name in self._members

    def size(self, name: str) -> int:
        return self._members[name].size


def _zipped(file: BinaryIO) -> dict[str, Member]:
    held, out = zipfile.ZipFile(file), dict[str, Member]()
    for info in held.infolist():
        name = info.filename
        if info.create_system == 0:  # some programs of Windows write their own separator
            name = name.replace("\\", "/")
        if not name.endswith("/"):
            link = stat.S_ISLNK(info.external_attr >> 16) and info.file_size < 4096
            target = _leads(name, held.read(info).decode("utf-8", "surrogateescape")) if link else ""
            out[clean(name)] = Member(info.file_size, partial(held.open, info), target)
    return out


def _tarred(file: BinaryIO) -> dict[str, Member]:
    held, out = tarfile.open(fileobj=file, mode="r:"), dict[str, Member]()  # noqa: SIM115
    for info in held.getmembers():
        link = clean(info.linkname) if info.islnk() else _leads(info.name, info.linkname) if info.issym() else ""
        if link or info.isreg():
            out[clean(info.name)] = Member(info.size, partial(held.extractfile, info), link)
    return out


def clean(name: str) -> str:
    return posixpath.normpath(name.lstrip("/"))


def _leads(name: str, target: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(clean(name)), target))


def _followed(held: dict[str, Member], name: str) -> Member | None:
    """The file that a name stands for; None for a link that leads to no file in the archive, and for what lies outside."""
    member = None if name.startswith("../") else held[name]
    for _ in range(LINKS):
        if not (member and member.link):
            return member
        member = held.get(member.link)
    return None


def plain(file: BinaryIO, path: Path) -> BinaryIO:
    """The file itself, or what it unpacks to where it is one of gzip's."""
    gzipped = file.read(2) == b"\x1f\x8b"
    most = (1 << 30) + UNPACKED * file.seek(0, io.SEEK_END)
    file.seek(0)
    if not gzipped:
        return file
    plain = cast(BinaryIO, tempfile.TemporaryFile(dir=scratch()))  # noqa: SIM115
    try:
        with gzip.open(file) as packed:
            while plain.tell() <= most and (block := packed.read(1 << 20)):
                plain.write(block)
        if plain.tell() > most:
            raise UserError(f"{path} unpacks to more than {most >> 30} GiB, so to no images: unpack it and give the folder")
    except BaseException:
        plain.close()
        raise
    plain.seek(0)
    return plain
