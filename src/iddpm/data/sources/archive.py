"""The images in a .zip or .tar, read where they lie."""

import gzip
import shutil
import tarfile
import tempfile
import weakref
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO, cast

from iddpm.data.images import is_image
from iddpm.errors import UserError
from iddpm.store.remote import opened, scratch

ENDINGS = (".zip", ".tar", ".tgz", ".tar.gz")


class Archive:
    """`names` of its images, sorted, without hidden ones; `read(name)` gives the bytes of one. UserError where it is damaged.

    Names may be read in any order at the same cost: a .tar that is compressed as a whole is unpacked into this process's scratch
    folder first, since every step back would unpack it from its start.
    """

    read: Callable[[str], bytes]

    def __init__(self, path: Path):
        try:
            file = opened(path)
            if path.suffix != ".zip":
                file = _plain(file)
            weakref.finalize(self, file.close)
            if path.suffix == ".zip":
                held = zipfile.ZipFile(file)
                found, self.read = held.namelist(), held.read
            else:
                tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115
                members = {m.name: m for m in tar.getmembers() if m.isfile()}
                found, self.read = list(members), partial(_read_tar, tar, members)
        except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError) as e:
            raise UserError(f"{path} is not a readable archive ({e})") from None
        self.names = sorted(name for name in found if _shown(name.strip("/").split("/")))
        if not self.names:
            raise UserError(f"{path} holds no images")


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


def _shown(parts: list[str]) -> bool:
    return is_image(parts[-1]) and not any(part.startswith((".", "__MACOSX")) for part in parts[:-1])
