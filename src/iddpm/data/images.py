"""Images of a source as a data set: what is in it, how it is labelled, and its pixels by index."""

import io
import os
import warnings
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from iddpm.data.decode import decode, prepare
from iddpm.data.labels import label, number
from iddpm.data.sources import Source, open_source
from iddpm.errors import UserError
from iddpm.store.remote import Unreachable, place, remote

ON_BROKEN = ("skip", "fail")
REMOTE_THREADS = 16  # that read at once, where reading is mostly waiting
PROGRESS_FROM = 2000  # files; fewer are decoded before a bar would be read


class Images:
    """N images at one size, with labels where the source has any; made by `Images.open`.

    `names` and `files` (N, as they are told to a user), `labels` (N, int64) or None, `classes` (names by label),
    `rule` (their source),
    `broken` (path and reason of each unreadable file met so far), `image_size` (H, W), `channels`.

    A broken file keeps its index, so that every process and every run agrees on the order; the next good
    image (of its class, if there is one) stands in for it.
    """

    def __init__(self, source: Source, image_size: tuple[int, int], channels: int = 3, on_broken: str = "skip") -> None:
        self.source, self.names = source, source.names
        self.files = [source.path / name for name in source.names]
        self.image_size = image_size
        self.channels = channels
        self.on_broken = on_broken
        self.labels: np.ndarray | None = None
        self.classes: tuple[str, ...] = ()
        self.rule = "none"
        self.broken: list[tuple[Path, str]] = []
        self._stand_in: dict[int, int] = {}  # index of a broken file -> index of the image shown instead
        self._cache: np.ndarray | None = None

    @classmethod
    def open(
        cls,
        path: str | Path,
        image_size: tuple[int, int],
        channels: int = 3,
        on_broken: str = "skip",
        cache_bytes: int = 2 << 30,
        labels: str = "auto",
        classes: Sequence[str] | None = None,
    ) -> "Images":
        """Find the images under `path`, a folder or an archive, label them, and decode them all if they fit in `cache_bytes`.

        `labels` is 'auto', 'none' or a rule of `labels.RULES`; labels are mapped onto `classes` if given.
        Raises UserError for a missing, unreadable or empty folder, a broken file if `on_broken` is 'fail',
        labels that cannot be had by the rule, and labels that `classes` does not hold.
        """
        if on_broken not in ON_BROKEN:
            raise UserError(f"on_broken={on_broken!r} is not known: use one of {', '.join(ON_BROKEN)}")
        source = open_source(place(path))
        data = cls(source, image_size, channels, on_broken)
        found, data.rule = label(source, source.names, labels)
        if found:
            data.labels, data.classes = number(found, classes)
        height, width = image_size
        if len(data) * channels * height * width <= cache_bytes:
            data._fill()
        return data

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The images at `indices`: uint8 (n, C, H, W); a broken file raises UserError or has a stand-in."""
        if self._cache is not None:
            return self._cache[np.asarray(indices, np.int64)]
        wanted = [self._stand_in.get(int(i), int(i)) for i in indices]
        out = np.empty((len(wanted), self.channels, *self.image_size), np.uint8)
        for row, pixels in enumerate(self._read(wanted)):
            out[row] = self._replace(wanted[row], pixels) if isinstance(pixels, UserError) else pixels
        return out

    def require_size(self, size: tuple[int, int]) -> None:
        """UserError for the first file that is not `size` (H, W) pixels as it lies there."""
        for k, file in enumerate(self.files):
            found = self.picture(k).size[::-1]
            if found != size:
                raise UserError(f"{file} has {found[0]}x{found[1]} pixels: {size[0]}x{size[1]} are needed")

    def describe(self) -> str:
        """One or two lines to print: how many images, what labels, and what is broken."""
        height, width = self.image_size
        shown = self.classes if len(self.classes) <= 6 else (*self.classes[:4], "...", self.classes[-1])
        text = f"{len(self)} images at {height}x{width}, {self.channels} channels; labels: {self.rule}"
        if self.labels is not None:
            text += f", {len(self.classes)} classes ({', '.join(shown)})"
        if self.broken:
            path, _ = self.broken[0]
            text += f"\n{len(self.broken)} unreadable files, replaced by other images; the first is {path}"
        return text

    def picture(self, index: int) -> Image.Image:
        """An image as it lies there, in the channels asked for; UserError where it cannot be read."""
        try:
            content = io.BytesIO(self.source.read(self.names[index]))
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{self.files[index]} is not a readable image ({reason}): repair or remove it") from None
        content.name = str(self.files[index])  # which `decode` tells
        return decode(content, self.channels)

    def _load(self, index: int) -> np.ndarray | UserError:
        try:
            return prepare(self.picture(index), *self.image_size)
        except Unreachable:  # no answer is no broken file
            raise
        except UserError as error:
            return error

    def _read(self, indices: Sequence[int]) -> Generator[np.ndarray | UserError, None, None]:
        threads = REMOTE_THREADS if remote(self.source.path) else os.cpu_count() or 1
        size = max(1, min(64, len(indices) // (2 * threads)))  # in blocks: small images cost less than a task
        blocks = [indices[k : k + size] for k in range(0, len(indices), size)]
        with ThreadPoolExecutor(threads) as pool:
            for block in pool.map(lambda wanted: [self._load(k) for k in wanted], blocks):
                yield from block

    def _fill(self) -> None:
        cache = np.empty((len(self), self.channels, *self.image_size), np.uint8)
        bad = set()
        quiet = None if len(self) > PROGRESS_FROM else True  # None: a bar on a terminal only
        with closing(self._read(range(len(self)))) as read:  # so that an error stops the threads at once
            for index, pixels in enumerate(tqdm(read, "images", len(self), disable=quiet)):
                if isinstance(pixels, UserError):
                    self._note(index, pixels)
                    bad.add(index)
                else:
                    cache[index] = pixels
        for index in sorted(bad):
            cache[index] = cache[self._find_stand_in(index, lambda k: k not in bad)]
        if bad:
            counts = f"{len(bad)} of {len(self)} images are broken and others stand in"
            warnings.warn(f"{counts}; the first: {self.broken[0][1]}", stacklevel=3)
        self._cache = cache

    def _replace(self, index: int, error: UserError) -> np.ndarray:
        if index not in self._stand_in:  # else met before in this very batch
            self._note(index, error)
            other = self._find_stand_in(index, lambda k: isinstance(self._load(k), np.ndarray))
            warnings.warn(f"{error}; {self.files[other]} stands in for it", stacklevel=3)
        pixels = self._load(self._stand_in[index])
        assert isinstance(pixels, np.ndarray)
        return pixels

    def _note(self, index: int, error: UserError) -> None:
        if self.on_broken == "fail":
            raise error
        self.broken.append((self.files[index], str(error)))

    def _find_stand_in(self, index: int, good: Callable[[int], bool]) -> int:
        others = np.roll(np.arange(len(self)), -index - 1)[:-1]
        if self.labels is not None:  # its own class first, each part still in order
            others = others[np.argsort(self.labels[others] != self.labels[index], kind="stable")]
        for k in others.tolist():
            if good(k):
                self._stand_in[index] = k
                if self.labels is not None:
                    self.labels[index] = self.labels[k]
                return int(k)
        raise UserError(f"none of the {len(self)} images is readable; the first problem: {self.broken[0][1]}")
