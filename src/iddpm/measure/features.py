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
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iddpm.errors import UserError
from iddpm.measure.ahead import ahead
from iddpm.measure.extractors import Extractor, rgb
from iddpm.measure.image_sets import ImageSet
from iddpm.measure.metrics.interface import Side
from iddpm.measure.metrics.moments import Gaussian
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
    """What an extractor makes of the chosen images of a set: `rows`, (n, width) by tap, and their Gaussians."""

    def __init__(self, folder: Path, images: ImageSet, chosen: np.ndarray, extractor: Extractor):
        self.folder, self.images, self.chosen = folder, images, chosen
        self.rows = {tap: Stored(folder / f"{tap}.f32", len(chosen), width) for tap, width in extractor.widths.items()}
        self.gaussian = cache(self._gaussian)
        labels = None if images.labels is None else images.labels[chosen]
        self.side = Side(self.rows, self.gaussian, labels, images.classes)

    def __len__(self) -> int:
        return len(self.chosen)

    def _gaussian(self, tap: str) -> Gaussian:
        """Mean and covariance; of more rows than features, kept beside them."""
        rows, path = self.rows[tap], self.folder / f"{tap}.moments.npz"
        if len(rows) <= rows.shape[1]:
            return Gaussian.of(rows)
        with alone(self.folder):
            if (kept := _kept(path, *rows.shape)) is None:
                made = kept = Gaussian.of(rows)
                replace(path, lambda file: np.savez(file, mu=made.mean, sigma=made.covariance))
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
    key, leads = _key(images, chosen, extractor), processes.rank() == 0
    folder = Path(processes.same(str(home(images.home, key, say)) if leads else ""))
    with _alone(folder, say):
        done = processes.same(_done(folder, extractor) if leads else 0)
        if leads and 0 < done < len(chosen):
            say(f"going on: the features of {done} of {len(chosen)} images are there")
        tick(done)
        if done < len(chosen):
            with _Files(folder, extractor, done, leads) as files:
                for rows in _blocks(images, chosen[done:], extractor, block):
                    files.append(rows)
                    tick(len(rows["pool"]))
    return Features(folder, images, chosen, extractor)


def _blocks(images: ImageSet, chosen: np.ndarray, extractor: Extractor, block: int) -> Iterator[dict[str, np.ndarray]]:
    """The features of a round of blocks in order, one of each process: all of them on every process."""
    rounds = list(processes.rounds(len(chosen), block))

    def take(r: processes.Round) -> np.ndarray:
        return images.take(chosen[r.call.start : r.call.stop].tolist())

    # the next block is read while the extractor is at work; what is drawn needs the same device, so nothing would be won
    for r, pixels in zip(rounds, map(take, rounds) if images.about else ahead(take, rounds)):
        found = features_of(pixels, extractor)
        if fault := next(filter(None, processes.every(_fault(images, chosen[r.call.start :], found))), None):
            raise UserError(fault)
        yield {tap: processes.gather(rows[: len(r.mine)]).numpy() for tap, rows in found.items()}


def features_of(images: np.ndarray, extractor: Extractor) -> dict[str, Tensor]:
    """The features of images (n, C, H, W) uint8, by tap, each (n, width) float32 on the CPU."""
    found = extractor.network(rgb(torch.from_numpy(np.ascontiguousarray(images))).to(extractor.device))
    return {tap: found[tap].float().cpu() for tap in extractor.widths}


def _fault(images: ImageSet, numbers: np.ndarray, found: dict[str, Tensor]) -> str:
    """What is wrong with features of the images of these numbers; "" where they are finite."""
    for tensor in found.values():
        bad = (~torch.isfinite(tensor).all(dim=1)).nonzero()
        if len(bad):
            title = images.title(int(numbers[int(bad[0])]))
            return f"{images.name}: the features of {title} are not finite: are these the extractor's weights?"
    return ""


# ---- files


class _Files:
    """Appends rows to a file for each tap, and now and then, once they are on the disk, says so in about.json.

    Of several processes one `leads`: the others write nothing.
    """

    def __init__(self, folder: Path, extractor: Extractor, done: int, leads: bool):
        self.folder, self.done, self.saved, self.files = folder, done, time.monotonic(), {}
        for tap, width in extractor.widths.items() if leads else ():
            self.files[tap] = open(folder / f"{tap}.f32", "ab")  # noqa: SIM115
            self.files[tap].truncate(4 * width * done)  # what came after the last word is from a job that was killed

    def append(self, rows: dict[str, np.ndarray]) -> None:
        for tap, file in self.files.items():
            file.write(np.ascontiguousarray(rows[tap], np.float32).tobytes())
        self.done += len(rows["pool"])
        if time.monotonic() - self.saved > SAVE_EVERY:
            self.save()

    def save(self) -> None:
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        if self.files:
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
        return max(0, said) if said <= min(there) else 0
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return 0


def _kept(path: Path, n: int, width: int) -> Gaussian | None:
    """The Gaussian of a file, if it is there and whole."""
    try:
        with np.load(path) as held:
            mu, sigma = held["mu"], held["sigma"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    whole = mu.shape == (width,) and sigma.shape == (width, width) and np.isfinite(mu).all() and np.isfinite(sigma).all()
    return Gaussian(mu, sigma, n) if whole else None


def _key(images: ImageSet, chosen: np.ndarray, extractor: Extractor) -> str:
    """Names what decides the features: the images' content, how they were read, the extractor. All processes read."""
    mine = [chosen[r.mine.start : r.mine.stop].tolist() for r in processes.rounds(len(chosen), READ)]
    every = processes.every([images.digest(numbers) if numbers else "" for numbers in mine])
    digests = [digest for together in zip(*every) for digest in together if digest]
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
