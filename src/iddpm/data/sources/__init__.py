"""Sources of images: names and bytes. What trains and what measures reads through the same ones, so that they cannot differ."""

from pathlib import Path
from typing import BinaryIO, Protocol

from iddpm.data.sources.archive import ENDINGS, Archive
from iddpm.data.sources.folder import Folder
from iddpm.errors import UserError


class Source(Protocol):
    """Images by name, sorted, without hidden ones; and the files of labels beside them."""

    @property
    def path(self) -> Path:
        """The folder or archive, as it is told to a user."""
        ...

    @property
    def home(self) -> Path:
        """The folder in or beside which what is worked out of the images is kept."""
        ...

    @property
    def names(self) -> list[str]:
        """The images' names, relative, with "/" between folders, in order."""
        ...

    def read(self, name: str) -> bytes:
        """The content of an image, or of another file; OSError or UserError where it cannot be had."""
        ...

    def open_file(self, name: str) -> BinaryIO:
        """The same as a file, of which little may be read."""
        ...

    def has(self, name: str) -> bool:
        """Whether there is such a file, image or not."""
        ...


def open_source(path: Path) -> Source:
    """The images below a folder, of one file, or in a .zip or .tar; UserError where there are none."""
    if not path.exists():
        raise UserError(f"{path} does not exist: give a folder of images, or a .zip or .tar of them")
    if path.name.lower().endswith(ENDINGS) and not path.is_dir():
        return Archive(path)
    return Folder.open(path)
