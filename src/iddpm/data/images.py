"""Images of a source as a data set: what is in it, how it is labelled, and its pixels by index."""

import hashlib
import io
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from shlex import quote
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from iddpm.data.decode import MODES, decode, decode_deep, opened_image, prepare
from iddpm.data.given import Others, Unlike, paired, require_alike, size_of
from iddpm.data.labels import chosen, label, number, splits
from iddpm.data.preparation import AS_EVER, Places, Preparation, levels, recoloured, require_meant
from iddpm.data.sources import Source, open_source
from iddpm.errors import UserError, readable
from iddpm.store.remote import Unreachable, place, remote
from iddpm.words import many

ON_BROKEN = ("skip", "fail", "leave")  # others stand in, as in training; an error; left out, as in measuring
REMOTE_THREADS = 16  # that read at once, where reading is mostly waiting
PROGRESS_FROM = 2000  # files; fewer are decoded before a bar would be read
LOOKED_AT = 64  # images, where all would cost as much as an epoch
SAMPLED = 16  # images whose content stands for that of all in `Images.identity`


class Files(Sequence[Path]):
    """Names as they are told to a user; made when they are asked for, since a path takes more memory than a small image."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self.path, self.names = path, names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, k: Any) -> Any:
        return [self.path / name for name in self.names[k]] if isinstance(k, slice) else self.path / self.names[k]


class Images:
    """N images at one size, with labels where the source has any; made by `Images.open`.

    `names` and `files` (N, as they are told to a user), `labels` (N, int64) or None, `classes` (names by label),
    `rule` (their source, or why there are none), `broken` (path and reason of each unreadable file met so far), `image_size`
    (H, W), `channels`.

    A broken file keeps its index, so that every process and every run agrees on the order; the next good
    image (of its class, if there is one) stands in for it. With `others` images lie in pairs, and so are broken or stand in.
    """

    def __init__(
        self,
        source: Source,
        image_size: tuple[int, int],
        channels: int = 3,
        on_broken: str = "skip",
        others: Others | None = None,
        how: Preparation = AS_EVER,
    ) -> None:
        self.source, self.names, self.others = source, source.names, others
        self.files: Sequence[Path] = Files(source.path, source.names)
        self.image_size = image_size
        self.channels = channels
        self.depth = channels + (others.channels if others else 0)  # channels of all that `batch` gives
        self.on_broken, self.how = on_broken, how
        self.labels: np.ndarray | None = None
        self.classes: tuple[str, ...] = ()
        self.rule = "none"
        self.broken: list[tuple[Path, str]] = []
        self._notes: dict[str, set[int]] = defaultdict(set)  # how images are taken otherwise than they lie there: which
        self._guard = Lock()
        self.divided = ""  # a line on the part of the images that this is
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
        given: str | Path = "",
        given_channels: int = 0,
        part: tuple[float, float] = (0, 1),
        how: Preparation = AS_EVER,
    ) -> "Images":
        """Find the images under `path`, a folder or an archive, label them, and decode them all if they fit in `cache_bytes`.

        `labels` is 'auto', 'none' or a rule of `labels.RULES`; labels are mapped onto `classes` if given. `given` is a folder or
        archive of other images, one for each, of the same name, which are read with `given_channels`. Of all images
        those are kept whose content, as a number from 0 to 1, lies in `part`: equal files are in one part, whatever their names.
        `how` is what is done to each, and of which classes they are.
        Raises UserError for a missing, unreadable or empty folder, a broken file if `on_broken` is 'fail',
        labels that cannot be had by the rule, labels that `classes` does not hold, and images without a partner.
        """
        if on_broken not in ON_BROKEN:
            raise UserError(f"on_broken={on_broken!r} is not known: use one of {', '.join(ON_BROKEN)}")
        source = open_source(place(path))
        if given and given_channels not in MODES:
            raise UserError(f"--given_channels {given_channels}: files have 1 (grey), 3 (colour) or 4 (with transparency)")
        others = paired(source, open_source(place(given)), given_channels) if given else None
        data = cls(source, image_size, channels, on_broken, others, how)
        require_meant(source.pixels(source.names[0]), how, source.path)
        found, data.rule = label(source, labels, classes)
        if how.only:
            found, kept = chosen(found, how.only, source, data.rule, strict=classes is None)
            data.divided = f"\n{len(kept):,} of {many(len(data), 'image')}: those of --only_classes {', '.join(how.only)}"
            data._keep(kept)
        if found is not None and len(found):
            data.labels, data.classes = number(found, classes)
        if part != (0, 1):
            data._divide(part)
        size = len(data) * data.depth * math.prod(image_size) * (how.bits // 8)
        keep = size <= cache_bytes and how.fit != "anywhere"  # which is cut anew in every epoch
        if keep or on_broken == "leave":
            data._decode_all(keep)
        elif others:  # pairs that do not match are refused now, as far as some tell
            list(data._read(data._few()))
        return data

    def __len__(self) -> int:
        return len(self.names)

    def batch(self, indices: Sequence[int] | np.ndarray, at: Places = None) -> np.ndarray:
        """The images at `indices`: (n, C, H, W) uint8, or uint16 of 16 bits; a broken file raises UserError or has a stand-in.

        Of pairs the other's channels follow behind the image's. `at` (n), from 0 to 1, is where each is cut, by --fit anywhere.
        """
        if self._cache is not None:
            return self._cache[np.asarray(indices, np.int64)]
        wanted = [self._stand_in.get(int(i), int(i)) for i in indices]
        out = np.empty((len(wanted), self.depth, *self.image_size), self.how.dtype)
        places = self.how.places(at, len(wanted))
        for row, pixels in enumerate(self._read(wanted, places)):
            out[row] = self._replace(wanted[row], pixels, places[row]) if isinstance(pixels, UserError) else pixels
        return out

    def require_size(self, size: tuple[int, int], fix: str) -> None:
        """UserError, with what to do about it, for the first file that is not `size` (H, W) pixels as it lies there."""
        for k, file in enumerate(self.files):
            found = self.size(k)
            if found != size:
                raise UserError(f"{file} has {found[0]}x{found[1]} pixels: {size[0]}x{size[1]} are needed; {fix}")

    def describe(self) -> str:
        """Lines to print: how many images, what labels, what is left out, taken otherwise or broken."""
        height, width = self.image_size
        shown = self.classes if len(self.classes) <= 6 else (*self.classes[:4], "...", self.classes[-1])
        deep = " of 16 bits" if self.how.bits == 16 else ""
        text = f"{many(len(self), 'image')} at {height}x{width}, {self.channels} channels{deep}; labels: {self.rule}"
        if self.labels is not None:
            text += f", {len(self.classes)} classes ({', '.join(shown)})"
        text += self.divided
        if self.others:
            text += f"\n{self.others.describe()}"
        if self.source.left_out:
            text += f"\nleft out: {self.source.rest()}"
        if told := self.told():
            text += f"\n{told}"
        if parts := splits(self.source, self.names):
            one = next(iter(parts.values()))
            text += f"\n{' and '.join(parts)} look like parts of one set, and all are used: give {quote(str(one))} to use one"
        if self.broken:
            path, how = self.broken[0][0], "left out" if self.on_broken == "leave" else "replaced by other images"
            text += f"\n{many(len(self.broken), 'unreadable file')}, {how}; the first is {path}"
        return text

    def identity(self) -> dict[str, str]:
        """What tells this set of images from another, by part: their number, names, sizes in bytes, some contents, labels."""
        parts = ("names", "sizes", "contents", "labels", *(("given",) if self.others else ()))
        digests = {part: hashlib.blake2b(digest_size=8) for part in parts}
        some = np.linspace(0, len(self) - 1, min(SAMPLED, len(self))).round().astype(int)
        digests["names"].update(self.source.sealed.encode())
        for name in () if self.source.sealed else self.names:  # of millions of rows it would cost seconds
            digests["names"].update(name.encode("utf-8", "surrogateescape") + b"\0")
            digests["sizes"].update(b"%d\0" % self.source.size(name))
        for k in some:
            digests["contents"].update(self.source.read(self.names[k]))
        if self.others:
            source, names = self.others.source, [self.others.names[name] for name in self.names]
            for name in names:
                digests["given"].update(name.encode("utf-8", "surrogateescape") + b"\0%d\0" % source.size(name))
            for k in some:
                digests["given"].update(source.read(names[k]))
        if self.labels is not None:
            digests["labels"].update(repr(self.classes).encode() + self.labels.tobytes())
        return {"count": str(len(self)), **{part: digest.hexdigest() for part, digest in digests.items()}}

    def picture(self, index: int) -> Image.Image:
        """An image as it lies there, in the channels asked for and 8 bits; UserError where it cannot be read."""
        content = io.BytesIO(self.source.read(self.names[index]))
        content.name = str(self.files[index])  # which `decode` tells
        return decode(content, self.channels, floats=self.how.floats)

    @property
    def floats(self) -> bool:
        """Whether the first image is of floats, of which somebody must say what they span."""
        if (held := self.source.pixels(self.names[0])) is not None:
            return held.dtype.kind == "f"
        with readable(self.files[0]), self.source.open_file(self.names[0]) as file, opened_image(file) as header:
            return header.mode == "F"

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of an image as it lies there; UserError where it cannot be read."""
        held = self.source.pixels(self.names[index])
        return held.shape[:2] if held is not None else self.picture(index).size[::-1]

    def _held(self, index: int, source: Source, name: str, channels: int) -> Image.Image | np.ndarray:
        """An image in the channels and at the depth asked for, of its own size."""

        def say(note: str) -> None:
            with self._guard:  # threads read at once
                self._notes[note].add(index)

        array = source.pixels(name)
        plain = array is None or (array.dtype == np.uint8 and array.shape[2] in MODES)
        if array is not None and not (plain and self.how.bits == 8 and channels in MODES):
            with readable(source.path / name):
                require_meant(array, self.how, source.path)
                return recoloured(levels(array, self.how, say), channels, say)
        content = io.BytesIO(source.read(name))
        content.name = str(source.path / name)  # which `decode` tells
        return (decode if self.how.bits == 8 else decode_deep)(content, channels, say, self.how.floats)

    def told(self) -> str:
        """A line on the images that are taken otherwise than they lie there; of many that are not kept, some are looked at."""
        few = self._few()
        if self._cache is None:
            list(self._read(few))
        how = ", ".join(f"{len(which)} ({note})" for note, which in sorted(self._notes.items()))
        of = "" if self._cache is not None or len(few) == len(self) else f" (of {len(few)} looked at)"
        return f"taken otherwise than stored{of}: {how}" if how else ""

    def _few(self) -> list[int]:
        """Some images, from the first to the last."""
        few: list[int] = np.linspace(0, len(self) - 1, min(LOOKED_AT, len(self))).round().astype(int).tolist()
        return few

    def load(self, index: int, at: float = 0.5) -> np.ndarray | UserError:
        """An image (C, H, W) uint8, or uint16 of 16 bits, cut out `at` a place between both ends; or why it cannot be read."""
        held = None if self.others else self.source.pixels(self.names[index])
        as_it_lies = held is not None and held.dtype == self.how.dtype and held.shape == (*self.image_size, self.channels)
        if held is not None and as_it_lies:  # what preparing it would leave as it is
            return np.ascontiguousarray(held.transpose(2, 0, 1))
        try:
            image = self._held(index, self.source, self.names[index], self.channels)
            if not self.others:
                return prepare(image, *self.image_size, self.how.fit, at)
            source, name = self.others.source, self.others.names[self.names[index]]
            other = self._held(index, source, name, self.others.channels)
            require_alike(self.files[index], size_of(image), source.path / name, size_of(other))
            return np.concatenate([prepare(each, *self.image_size, self.how.fit, at) for each in (image, other)])
        except (Unreachable, Unlike):  # no answer is no broken file, and no other pair stands in for one that does not match
            raise
        except UserError as error:
            return error

    def _read(self, indices: Sequence[int], places: Sequence[float] = ()) -> Generator[np.ndarray | UserError, None, None]:
        places = places or [0.5] * len(indices)
        if len(indices) and self.source.pixels(self.names[indices[0]]) is not None:  # to begin threads would cost more
            yield from map(self.load, indices, places)
            return
        threads = REMOTE_THREADS if remote(self.source.path) else os.cpu_count() or 1
        size = max(1, min(64, len(indices) // (2 * threads)))  # in blocks: small images cost less than a task
        blocks = [range(k, min(k + size, len(indices))) for k in range(0, len(indices), size)]
        with ThreadPoolExecutor(threads) as pool:
            for block in pool.map(lambda wanted: [self.load(indices[k], places[k]) for k in wanted], blocks):
                yield from block

    def _decode_all(self, keep: bool) -> None:
        """Decode all images, to keep them or only to know the broken ones: others stand in for these, or they are left out."""
        cache = np.empty((len(self) if keep else 0, self.depth, *self.image_size), self.how.dtype)
        quiet = None if len(self) > PROGRESS_FROM else True  # None: a bar on a terminal only
        with closing(self._read(range(len(self)))) as read:  # so that an error stops the threads at once
            for index, pixels in enumerate(tqdm(read, "images", len(self), disable=quiet)):
                if isinstance(pixels, UserError):
                    self._note(index, pixels)
                elif keep:
                    cache[index] = pixels
        self._cache = cache if keep else None
        if not self._bad.any():
            return
        counts = f"{len(self.broken)} of {len(self)}"
        if self.on_broken == "leave":
            self._leave_out()
            how = "files are broken and left out"
        else:
            for index in np.flatnonzero(self._bad).tolist():
                cache[index] = cache[self._find_stand_in(index)]
            how = "images are broken and others stand in"
        warnings.warn(f"{counts} {how}; the first: {self.broken[0][1]}", stacklevel=3)

    def _divide(self, part: tuple[float, float]) -> None:
        """Keep those whose content lies in `part`, which costs reading every file once."""
        n = len(self)
        with ThreadPoolExecutor(REMOTE_THREADS if remote(self.source.path) else os.cpu_count() or 1) as pool:
            places = np.fromiter(pool.map(self._place, self.names), float, n)
        kept = np.flatnonzero((part[0] <= places) & (places < part[1]))
        self.divided += f"\n{len(kept):,} of {many(n, 'image')}: {part[1] - part[0]:.2%} of them, by their content"
        if not len(kept):
            raise UserError(
                f"--validation: of {many(n, 'image')} none are in the part of {part[1] - part[0]:.2%}; give another share"
            )
        self._keep(kept)

    def _place(self, name: str) -> float:
        """The content of a file as a number from 0 to below 1; of one that cannot be read its name."""
        try:
            content = self.source.read(name)
        except Unreachable:
            raise
        except UserError:
            content = name.encode("utf-8", "surrogateescape")
        return int.from_bytes(hashlib.blake2b(content, digest_size=6).digest(), "big") / 2**48

    def _leave_out(self) -> None:
        """Forget the broken files, of which nothing can be measured."""
        kept = np.flatnonzero(~self._bad)
        if not len(kept):
            raise self._none()
        self._keep(kept)

    def _keep(self, kept: np.ndarray) -> None:
        self.names = [self.names[k] for k in kept.tolist()]
        self.files = Files(self.source.path, self.names)
        self.labels = None if self.labels is None else self.labels[kept]
        self._cache = None if self._cache is None else self._cache[kept]
        self._bad = self._bad[kept]

    def _none(self) -> UserError:
        return UserError(f"none of the {len(self)} images is readable; the first problem: {self.broken[0][1]}")

    def _replace(self, index: int, error: UserError, at: float) -> np.ndarray:
        if index not in self._stand_in:  # else met before in this very batch
            self._note(index, error)
            other = self._find_stand_in(index)
            warnings.warn(f"{error}; {self.files[other]} stands in for it", stacklevel=3)
        pixels = self.load(self._stand_in[index], at)
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
            if self._cache is not None or isinstance(self.load(k), np.ndarray):  # what is kept was decoded
                self._stand_in[index] = k
                if self.labels is not None:
                    self.labels[index] = self.labels[k]
                return k
            self._bad[k] = True  # noted when it is asked for itself
        raise self._none()
