"""What scripts of that time use of the package blobfile, for any path or address that fsspec opens."""

from posixpath import basename, dirname, join
from typing import Any

import fsspec

from iddpm.store.remote import place

__all__ = ["BlobFile", "basename", "dirname", "exists", "isdir", "join", "listdir"]


def BlobFile(path: str, mode: str = "r", **settings: Any) -> Any:
    """A file to be opened by `with`; a local file's folder is made where it is missing."""
    return fsspec.open(path, mode, auto_mkdir="w" in mode and "://" not in path, **settings)


def exists(path: str) -> bool:
    """Whether there is a file or folder."""
    return place(path).exists()


def isdir(path: str) -> bool:
    """Whether there is a folder."""
    return place(path).is_dir()


def listdir(path: str) -> list[str]:
    """The names in a folder, sorted; none where there is no such folder."""
    return sorted(found.name for found in place(path).iterdir()) if exists(path) else []
