"""What scripts of that time use of the package blobfile, for any path or address that fsspec opens."""

from posixpath import basename, dirname, join
from typing import Any

import fsspec

__all__ = ["BlobFile", "basename", "dirname", "exists", "isdir", "join", "listdir"]


def BlobFile(path: str, mode: str = "r", **settings: Any) -> Any:
    """A file to be opened by `with`; a local file's folder is made where it is missing."""
    return fsspec.open(path, mode, auto_mkdir="w" in mode and "://" not in path, **settings)


def exists(path: str) -> bool:
    """Whether there is a file or folder."""
    files, place = fsspec.core.url_to_fs(path)
    return bool(files.exists(place))


def isdir(path: str) -> bool:
    """Whether there is a folder."""
    files, place = fsspec.core.url_to_fs(path)
    return bool(files.isdir(place))


def listdir(path: str) -> list[str]:
    """The names in a folder, sorted; none where there is no such folder."""
    files, place = fsspec.core.url_to_fs(path)
    return sorted(basename(found.rstrip("/")) for found in files.ls(place, detail=False)) if files.exists(place) else []
