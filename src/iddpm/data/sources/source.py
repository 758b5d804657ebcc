"""What a source of images is."""

from pathlib import Path
from typing import BinaryIO, Protocol

LABEL_FILES = ("labels.json", "labels.csv", "dataset.json")  # beside the images; the last is EDM's name


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
