"""The features of a set of images, kept on the disk: made block by block by all processes, and a killed job goes on.

A block is drawn or read, and put through the extractor, by one process: so the blocks, and with them the features, are the same
for any number of processes, and of the images nothing stays.
"""

import hashlib
import json
import os
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iddpm.errors import UserError
from iddpm.measure.extractors import Extractor, rgb
from iddpm.measure.image_sets import ImageSet
from iddpm.measure.metrics.frechet import Gaussian
from iddpm.measure.metrics.moments import Moments
from iddpm.parallel import processes
from iddpm.store.remote import alone, lock, remote, replace

READ = 1000  # images whose content is looked at in one go
SAVE_EVERY = 1.0  # seconds of work that a kill may cost, beside the blocks at work


class Stored:
    """An (n, d) float32 array in a file, of which only the rows asked for are read."""

    def __init__(self, path: Path, n: int, width: int):
        self.path, self.shape = path, (n, width)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, step = part.indices(self.shape[0])
        assert step == 1
        n, width = max(0, stop - start), self.shape[1]
        return np.fromfile(self.path, np.float32, n * width, offset=4 * start * width).reshape(n, width)


class Features:
    """What an extractor makes of the chosen images of a set: `rows(tap)`, (n, width) each, and their moments."""

    def __init__(self, folder: Path, images: ImageSet, chosen: np.ndarray, extractor: Extractor):
        self.folder, self.images, self.chosen, self.extractor = folder, images, chosen, extractor
        self.gaussian = cache(self._gaussian)

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def labels(self) -> np.ndarray | None:
        return None if self.images.labels is None else self.images.labels[self.chosen]

    def rows(self, tap: str) -> Stored:
        return Stored(self.folder / f"{tap}.f32", len(self), self.extractor.widths[tap])

    def _gaussian(self, tap: str) -> Gaussian:
        """Mean and covariance; of more rows than features, kept beside them."""
        rows, path = self.rows(tap), self.folder / f"{tap}.moments.npz"
        if len(rows) <= rows.shape[1]:
            return Gaussian.of_few(rows[:])
        with alone(self.folder):
            if (kept := _kept(path, rows.shape[1])) is None:
                moments = Moments.of(rows)
                replace(path, lambda file: np.savez(file, mu=moments.mean, sigma=moments.covariance))
                kept = Gaussian.of(moments)
        return kept


def extract(
    images: ImageSet,
    chosen: np.ndarray,
    extractor: Extractor,
    *,
    block: int = 64,
    say: Callable[[str], None] = print,
    tick: Callable[[int], Any] = lambda images: None,
) -> Features:
    """The features of the chosen images, those of an earlier call where it was of the same content and settings.

    Every process calls this; the files are the first one's. `tick` hears how many images were done.
    """
    key = _key(images, chosen, extractor)
    leads = processes.rank() == 0
    folder = Path(processes.same(str(home(images.home, key, say)) if leads else ""))
    held = Features(folder, images, chosen, extractor)
    with _alone(folder, say):
        done = processes.same(_done(folder, extractor) if leads else 0)
        if leads and 0 < done < len(chosen):
            say(f"going on: the features of {done} of {len(chosen)} images are there")
        tick(done)
        if done < len(chosen):
            with _Files(folder, extractor, done) if leads else nullcontext() as files:
                for count, taps in _rounds(images, chosen, extractor, done, block):
                    if files:
                        files.append(taps, count)
                    tick(count)
    return held


def _rounds(
    images: ImageSet, chosen: np.ndarray, extractor: Extractor, start: int, block: int
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Blocks in order, as many at a time as there are processes: how many images, and their features by name."""
    together = block * processes.world()
    for a, (numbers, pixels) in zip(range(start, len(chosen), together), _taken(images, chosen, start, block)):
        found = features_of(pixels, extractor) if numbers else _none(extractor)
        if fault := next(filter(None, processes.every(_fault(images, numbers, found))), None):
            raise UserError(fault)
        yield min(together, len(chosen) - a), {name: processes.gather(found[name]).numpy() for name in extractor.widths}


def _taken(images: ImageSet, chosen: np.ndarray, start: int, block: int) -> Iterator[tuple[list[int], np.ndarray]]:
    """The numbers and pixels of this process's block of each round; the last may be empty."""

    def take(a: int) -> tuple[list[int], np.ndarray]:
        numbers = chosen[a : a + block].tolist()
        return numbers, images.take(numbers) if numbers else np.empty(0, np.uint8)

    starts = range(start + processes.rank() * block, len(chosen) + processes.rank() * block, block * processes.world())
    if images.about:
        yield from map(take, starts)
        return
    with ThreadPoolExecutor(1, "images") as pool:  # reads while the extractor is at work on the block before
        coming = pool.submit(take, starts[0])
        for k in range(len(starts)):
            now = coming.result()
            if k + 1 < len(starts):
                coming = pool.submit(take, starts[k + 1])
            yield now


def features_of(images: np.ndarray, extractor: Extractor) -> dict[str, Tensor]:
    """The features of images (n, C, H, W) uint8, by name, each (n, width) float32 on the CPU."""
    found = extractor.network(rgb(torch.from_numpy(np.ascontiguousarray(images))).to(extractor.device))
    return {name: found[name].float().cpu() for name in extractor.widths}


def _none(extractor: Extractor) -> dict[str, Tensor]:
    return {name: torch.zeros(0, width) for name, width in extractor.widths.items()}


def _fault(images: ImageSet, numbers: list[int], found: dict[str, Tensor]) -> str:
    for tensor in found.values():
        bad = (~torch.isfinite(tensor).all(dim=1)).nonzero()
        if len(bad):
            title = images.title(numbers[int(bad[0])])
            return f"{images.name}: the features of {title} are not finite: are these the extractor's weights?"
    return ""


# ---- files


class _Files:
    """Appends rows, and now and then, once they are on the disk, says so in about.json."""

    def __init__(self, folder: Path, extractor: Extractor, done: int):
        self.folder, self.done, self.saved = folder, done, time.monotonic()
        self.files = {}
        for name, width in extractor.widths.items():
            file = open(folder / f"{name}.f32", "ab")  # noqa: SIM115
            file.truncate(4 * width * done)  # what came after the last word is from a job that was killed
            self.files[name] = file

    def append(self, taps: dict[str, np.ndarray], images: int) -> None:
        for name, rows in taps.items():
            self.files[name].write(np.ascontiguousarray(rows, np.float32).tobytes())
        self.done += images
        if time.monotonic() - self.saved > SAVE_EVERY:
            self.save()

    def save(self) -> None:
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        about = json.dumps({"done": self.done})
        replace(self.folder / "about.json", lambda file: file.write(about.encode()))
        self.saved = time.monotonic()

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *exception: object) -> None:
        self.save()
        for file in self.files.values():
            file.close()


def _done(folder: Path, extractor: Extractor) -> int:
    """How many images' features are there: as many as about.json says, and as every file has. Of damaged files, none."""
    try:
        said = int(json.loads((folder / "about.json").read_text())["done"])
        there = [(folder / f"{tap}.f32").stat().st_size // (4 * width) for tap, width in extractor.widths.items()]
        return max(0, min(said, *there)) if said <= min(there) else 0
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return 0


def _kept(path: Path, width: int) -> Gaussian | None:
    """The moments of a file, if it is there and whole."""
    try:
        with np.load(path) as held:
            mu, sigma = held["mu"], held["sigma"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    whole = mu.shape == (width,) and sigma.shape == (width, width) and np.isfinite(mu).all() and np.isfinite(sigma).all()
    return Gaussian(mu, sigma) if whole else None


def _key(images: ImageSet, chosen: np.ndarray, extractor: Extractor) -> str:
    """Names what decides the features: the images' content, how they were read, the extractor. All processes read."""
    slices = [chosen[a : a + READ].tolist() for a in range(0, len(chosen), READ)]
    mine = [images.digest(numbers) for numbers in slices[processes.rank() :: processes.world()]]
    every = processes.every(mine)
    digests = [every[k % processes.world()][k // processes.world()] for k in range(len(slices))]
    settings = [digests, images.size, images.channels, extractor.identity, dict(extractor.widths)]
    return f"{extractor.name}-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]}"


def home(beside: Path, key: str, say: Callable[[str], None]) -> Path:
    """The folder BESIDE/.iddpm/KEY; below the user's cache where that is remote or read-only, and says so."""
    if not remote(beside):
        folder = beside / ".iddpm" / key
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
        except OSError:
            pass
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "iddpm" / key
    folder.mkdir(parents=True, exist_ok=True)
    say(f"{beside} cannot keep features: they are kept in {folder}")
    return folder


@contextmanager
def _alone(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold a folder, for all processes; waits for another job that makes the same features, and finds them made."""
    handle, told = os.open(folder, os.O_RDONLY) if processes.rank() == 0 else -1, False
    try:
        while not processes.same(lock(handle) if handle >= 0 else None):
            if handle >= 0 and not told:
                say(f"another job makes the same features in {folder}: waiting for it")
            told = True
            time.sleep(0.5)
        yield
    finally:
        if handle >= 0:
            os.close(handle)
