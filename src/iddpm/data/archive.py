"""The images in a .zip or .tar, read where they lie."""

import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from iddpm.data.folder import is_image
from iddpm.errors import UserError
from iddpm.places import opened

ENDINGS = (".zip", ".tar", ".tgz", ".tar.gz")


class Archive:
    """`names` of its images, sorted, without hidden ones; `read(name)` gives the bytes of one. UserError where it is damaged."""

    read: Callable[[str], bytes]

    def __init__(self, path: Path):
        self._file = opened(path)
        try:
            if path.suffix == ".zip":
                held = zipfile.ZipFile(self._file)
                found, self.read = held.namelist(), held.read
            else:
                tar = tarfile.open(fileobj=self._file)  # noqa: SIM115
                members = {m.name: m for m in tar.getmembers() if m.isfile()}
                found, self.read = list(members), partial(_read_tar, tar, members)
        except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError) as e:
            self._file.close()
            raise UserError(f"{path} is not a readable archive ({e})") from None
        self.names = sorted(name for name in found if _shown(name.strip("/").split("/")))
        if not self.names:
            self._file.close()
            raise UserError(f"{path} holds no images")

    def __del__(self) -> None:
        self._file.close()


def _read_tar(tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo], name: str) -> bytes:
    file = tar.extractfile(members[name])
    assert file
    return file.read()


def _shown(parts: list[str]) -> bool:
    return is_image(parts[-1]) and not any(part.startswith((".", "__MACOSX")) for part in parts[:-1])
