"""The images in a .zip or .tar, read where they lie."""

import gzip
import io
import shutil
import tarfile
import tempfile
import weakref
import zipfile
import zlib
from functools import partial
from pathlib import Path
from threading import Lock
from typing import BinaryIO, cast

from iddpm.data.decode import EXTENSIONS
from iddpm.data.sources.folder import shown
from iddpm.data.sources.source import LABEL_FILES
from iddpm.errors import UserError
from iddpm.store.remote import opened, scratch

ENDINGS = (".zip", ".tar", ".tgz", ".tar.gz")


class Archive:
    """Its files by name; a single folder around all of them is left out of the names. UserError where it is damaged.

    Names may be read in any order at the same cost: a .tar that is compressed as a whole is unpacked into this process's scratch
    folder first, since every step back would unpack it from its start.
    """

    def __init__(self, path: Path):
        self.path, self.home = path, path.parent
        self._one = Lock()  # an archive is one file, with one place in it: threads take turns
        try:
            file = opened(path)
            if path.suffix.lower() != ".zip":
                file = _plain(file)
            weakref.finalize(self, file.close)
            if path.suffix.lower() == ".zip":
                held = zipfile.ZipFile(file)
                files, self._read = {name: name for name in held.namelist() if not name.endswith("/")}, held.read
            else:
                tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115
                members = {m.name: m for m in tar.getmembers() if m.isfile()}
                files, self._read = {name: name for name in members}, partial(_read_tar, tar, members)
        except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError) as e:
            raise UserError(f"{path} is not a readable archive ({e})") from None
        self._files = _unwrapped(files)
        self.names = sorted(name for name in self._files if shown(name))
        if not self.names:
            raise UserError(f"{path} holds no images: looked for files ending in {', '.join(EXTENSIONS)}")

    def read(self, name: str) -> bytes:
        """The content of a file; UserError where it is damaged."""
        try:
            with self._one:
                return self._read(self._files[name])
        except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as e:
            raise UserError(f"{self.path}:{name} cannot be read ({e}): repair or remove it") from None

    def open_file(self, name: str) -> BinaryIO:
        return io.BytesIO(self.read(name))

    def has(self, name: str) -> bool:
        return name in self._files


def _unwrapped(files: dict[str, str]) -> dict[str, str]:
    """Relative name -> name in the archive, without what hidden folders hold, and without one folder around all images."""
    clean = {name.strip("/").removeprefix("./"): name for name in files}
    clean = {name: own for name, own in clean.items() if not any(part.startswith("__MACOSX") for part in name.split("/"))}
    tops = {name.partition("/")[0] for name in clean if shown(name)}
    inside = all("/" in name for name in clean if shown(name))
    deeper = {name.split("/")[1] for name in clean if shown(name) and name.count("/") > 1}
    if len(tops) != 1 or not inside or not (deeper or _labelled(clean, tops)):
        return clean  # one folder of images alone may be their class
    top = next(iter(tops))
    return {name.removeprefix(f"{top}/"): own for name, own in clean.items()}


def _labelled(names: dict[str, str], tops: set[str]) -> bool:
    return any(f"{top}/{file}" in names for top in tops for file in LABEL_FILES)


def _plain(file: BinaryIO) -> BinaryIO:
    """The file itself, or what it unpacks to where it is one of gzip's."""
    gzipped = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    if not gzipped:
        return file
    plain = cast(BinaryIO, tempfile.TemporaryFile(dir=scratch()))  # noqa: SIM115
    try:
        with file, gzip.open(file) as packed:
            shutil.copyfileobj(packed, plain, 1 << 20)
    except BaseException:
        plain.close()
        raise
    plain.seek(0)
    return plain


def _read_tar(tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo], name: str) -> bytes:
    file = tar.extractfile(members[name])
    assert file
    return file.read()
