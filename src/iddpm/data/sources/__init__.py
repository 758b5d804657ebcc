"""Sources of images: names and bytes. What trains and what measures reads through the same ones, so that they cannot differ."""

from pathlib import Path

from iddpm.data.sources.archive import ENDINGS, Archive
from iddpm.data.sources.folder import Folder
from iddpm.data.sources.source import Source
from iddpm.errors import UserError

__all__ = ["ENDINGS", "Archive", "Folder", "Source", "open_source"]


def open_source(path: Path) -> Source:
    """The images below a folder, of one file, or in a .zip or .tar; UserError where there are none."""
    if not path.exists():
        raise UserError(f"{path} does not exist: give a folder of images, or a .zip or .tar of them")
    if path.name.lower().endswith(ENDINGS) and not path.is_dir():
        return Archive(path)
    return Folder(path)
