"""Images of a source as a data set: what is in it, how it is labelled, and its pixels by index."""

import hashlib
import io
import os
import warnings
from collections import defaultdict
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Lock

import numpy as np
from PIL import Image
from tqdm import tqdm

from iddpm.data.decode import decode, prepare
from iddpm.data.labels import label, number, splits
from iddpm.data.sources import Source, open_source
from iddpm.errors import UserError
from iddpm.store.remote import Unreachable, place, remote
from iddpm.words import many

ON_BROKEN = ("skip", "fail", "leave")  # others stand in, as in training; an error; left out, as in measuring
REMOTE_THREADS = 16  # that read at once, where reading is mostly waiting
PROGRESS_FROM = 2000  # files; fewer are decoded before a bar would be read
LOOKED_AT = 64  # images, where all would cost as much as an epoch
SAMPLED = 16  # images whose content stands for that of all in `Images.identity`


class Images:
    """N images at one size, with labels where the source has any; made by `Images.open`.

    `names` and `files` (N, as they are told to a user), `labels` (N, int64) or None, `classes` (names by label),
    `rule` (their source, or why there are none), `broken` (path and reason of each unreadable file met so far), `image_size`
    (H, W), `channels`.

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
        self._notes: dict[str, set[int]] = defaultdict(set)  # how images are taken otherwise than they lie there: which
        self._guard = Lock()
        self._stand_in: dict[int, int] = {}  # index of a broken file -> index of the image shown instead
        self._bad = np.zeros(len(source.names), bool)  # the broken ones met so far
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
        found, data.rule = label(source, labels, classes)
        if found:
            data.labels, data.classes = number(found, classes)
        height, width = image_size
        if len(data) * channels * height * width <= cache_bytes:
            data._fill()
        if on_broken == "leave":
            data._leave_out()
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
        """Lines to print: how many images, what labels, what is left out, taken otherwise or broken."""
        height, width = self.image_size
        shown = self.classes if len(self.classes) <= 6 else (*self.classes[:4], "...", self.classes[-1])
        text = f"{many(len(self), 'image')} at {height}x{width}, {self.channels} channels; labels: {self.rule}"
        if self.labels is not None:
            text += f", {len(self.classes)} classes ({', '.join(shown)})"
        if self.source.left_out:
            text += f"\nleft out: {self.source.rest()}"
        text += self._told()
        if parts := splits(self.names):
            names = " and ".join(parts)
            text += f"\n{names} look like parts of one set, and all are used: give {self.source.path / parts[0]} to use one"
        if self.broken:
            path, how = self.broken[0][0], "left out" if self.on_broken == "leave" else "replaced by other images"
            text += f"\n{many(len(self.broken), 'unreadable file')}, {how}; the first is {path}"
        return text

    def identity(self) -> dict[str, str]:
        """What tells this set of images from another, by part: their number, names, sizes in bytes, some contents, labels."""
        digests = {part: hashlib.blake2b(digest_size=8) for part in ("names", "sizes", "contents", "labels")}
        for name in self.names:
            digests["names"].update(name.encode("utf-8", "surrogateescape") + b"\0")
            digests["sizes"].update(b"%d\0" % self.source.size(name))
        for k in np.linspace(0, len(self) - 1, min(SAMPLED, len(self))).round().astype(int):
            digests["contents"].update(self.source.read(self.names[k]))
        if self.labels is not None:
            digests["labels"].update(repr(self.classes).encode() + self.labels.tobytes())
        return {"count": str(len(self)), **{part: digest.hexdigest() for part, digest in digests.items()}}

    def picture(self, index: int) -> Image.Image:
        """An image as it lies there, in the channels asked for; UserError where it cannot be read."""
        content = io.BytesIO(self.source.read(self.names[index]))
        content.name = str(self.files[index])  # which `decode` tells

        def say(note: str) -> None:
            with self._guard:  # threads read at once
                self._notes[note].add(index)

        return decode(content, self.channels, say)

    def _told(self) -> str:
        """A line on the images that are taken otherwise than they lie there; of many that are not kept, some are looked at."""
        few = np.linspace(0, len(self) - 1, min(LOOKED_AT, len(self))).round().astype(int).tolist()
        if self._cache is None:
            list(self._read(few))
        how = ", ".join(f"{len(which)} ({note})" for note, which in sorted(self._notes.items()))
        of = "" if self._cache is not None or len(few) == len(self) else f" (of {len(few)} looked at)"
        return f"\ntaken otherwise than stored{of}: {how}" if how else ""

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
        quiet = None if len(self) > PROGRESS_FROM else True  # None: a bar on a terminal only
        with closing(self._read(range(len(self)))) as read:  # so that an error stops the threads at once
            for index, pixels in enumerate(tqdm(read, "images", len(self), disable=quiet)):
                if isinstance(pixels, UserError):
                    self._note(index, pixels)
                else:
                    cache[index] = pixels
        self._cache = cache
        bad = np.flatnonzero(self._bad).tolist()
        if bad and self.on_broken == "skip":
            for index in bad:
                cache[index] = cache[self._find_stand_in(index)]
            counts = f"{len(bad)} of {len(self)} images are broken and others stand in"
            warnings.warn(f"{counts}; the first: {self.broken[0][1]}", stacklevel=3)

    def _leave_out(self) -> None:
        """Forget the broken files, of which nothing can be measured; where nothing is kept this costs one decoding of all."""
        if self._cache is None:
            for index, pixels in enumerate(self._read(range(len(self)))):
                if isinstance(pixels, UserError):
                    self._note(index, pixels)
        kept = np.flatnonzero(~self._bad)
        if not len(kept):
            raise UserError(f"none of the {len(self)} images is readable; the first problem: {self.broken[0][1]}")
        if len(kept) == len(self):
            return
        warnings.warn(f"{len(self) - len(kept)} of {len(self)} files are broken and left out; the first: {self.broken[0][1]}")
        self.names = [self.names[k] for k in kept]
        self.files = [self.files[k] for k in kept]
        self.labels = None if self.labels is None else self.labels[kept]
        self._cache = None if self._cache is None else self._cache[kept]
        self._bad = self._bad[kept]

    def _replace(self, index: int, error: UserError) -> np.ndarray:
        if index not in self._stand_in:  # else met before in this very batch
            self._note(index, error)
            other = self._find_stand_in(index)
            warnings.warn(f"{error}; {self.files[other]} stands in for it", stacklevel=3)
        pixels = self._load(self._stand_in[index])
        assert isinstance(pixels, np.ndarray)
        return pixels

    def _note(self, index: int, error: UserError) -> None:
        if self.on_broken == "fail":
            raise error
        self._bad[index] = True
        self.broken.append((self.files[index], str(error)))

    def _find_stand_in(self, index: int) -> int:
        """The next good image after a broken one, of its class where there is any, else of all."""
        while len(good := np.flatnonzero(~self._bad)):
            if self.labels is not None and (same := self.labels[good] == self.labels[index]).any():
                good = good[same]
            k = int(good[np.searchsorted(good, index) % len(good)])
            if self._cache is not None or isinstance(self._load(k), np.ndarray):  # what is kept was decoded
                self._stand_in[index] = k
                if self.labels is not None:
                    self.labels[index] = self.labels[k]
                return k
            self._bad[k] = True  # noted when it is asked for itself
        raise UserError(f"none of the {len(self)} images is readable; the first problem: {self.broken[0][1]}")
