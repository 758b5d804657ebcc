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
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from iddpm.errors import UserError
from iddpm.measure.ahead import later
from iddpm.measure.extractors import Extractor, rgb
from iddpm.measure.image_sets import ImageSet
from iddpm.measure.metrics.interface import Side
from iddpm.measure.metrics.moments import Gaussian
from iddpm.parallel import processes
from iddpm.records import Count, decode
from iddpm.store.remote import alone, lock, remote, replace, write_file

READ = 1000  # images whose content is looked at in one go
SAVE_EVERY = 1.0  # seconds of work that a kill may cost, beside the blocks at work


class Features:
    """What an extractor makes of the chosen images of a set. The files may lie where only the first process can read them."""

    def __init__(self, folder: Path, images: ImageSet, chosen: np.ndarray, extractor: Extractor):
        self.folder, self.images, self.chosen, self.widths = folder, images, chosen, extractor.widths
        self.gaussian = cache(self._gaussian)

    def __len__(self) -> int:
        return len(self.chosen)

    @cached_property
    def rows(self) -> dict[str, np.ndarray]:
        """(n, width) float32 by tap: maps of the files, of which only what is looked at is read."""
        how: Any = "c"  # nothing writes, but torch warns of arrays that cannot be written to
        return {tap: np.memmap(_rows(self.folder, tap), np.float32, how, shape=(len(self), w)) for tap, w in self.widths.items()}

    @cached_property
    def side(self) -> Side:
        labels = None if self.images.labels is None else self.images.labels[self.chosen]
        return Side(self.rows, self.gaussian, labels, self.images.classes)

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
        known, hashes = _done(folder, extractor) if leads else (0, {})
        done = processes.same(known)
        if leads and 0 < done < len(chosen):
            say(f"going on: the features of {done} of {len(chosen)} images are there")
        tick(done)
        saved = time.monotonic()
        for rows in _blocks(images, chosen[done:], extractor, block):
            if leads:
                _append(folder, rows, done, hashes)
            done += len(rows["pool"])
            if leads and (done == len(chosen) or time.monotonic() - saved > SAVE_EVERY):
                _promise(folder, hashes, done)
                saved = time.monotonic()
            tick(len(rows["pool"]))
    return Features(folder, images, chosen, extractor)


def _blocks(images: ImageSet, chosen: np.ndarray, extractor: Extractor, block: int) -> Iterator[dict[str, np.ndarray]]:
    """The features of a round of blocks in order, one of each process: all of them on every process."""
    rounds = list(processes.rounds(len(chosen), block))

    def take(r: processes.Round) -> np.ndarray:
        return images.take(chosen[r.call.start : r.call.stop].tolist())

    # the next block is read while the extractor is at work; what is drawn needs the same device, so nothing would be won
    for r, pixels in zip(rounds, (partial(take, r) for r in rounds) if images.about else later(take, rounds)):
        found = features_of(processes.together(pixels), extractor)  # a fault of one process alone ends all alike
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


def _rows(folder: Path, tap: str) -> Path:
    """The file of a tap's features, float32 row after row."""
    return folder / f"{tap}.f32"


Hashes = dict[str, Any]  # of hashlib: of each tap's rows so far


def _append(folder: Path, rows: dict[str, np.ndarray], done: int, hashes: Hashes) -> None:
    """Put rows behind the first `done` of each tap; what lies there is from a job that was killed."""
    for tap, part in rows.items():
        with open(_rows(folder, tap), "ab") as file:
            file.truncate(4 * part.shape[1] * done)
            file.write(content := np.ascontiguousarray(part, np.float32).tobytes())
        hashes[tap].update(content)


def _promise(folder: Path, hashes: Hashes, done: int) -> None:
    """Say in about.json how many images' features are there, and their digests, once they are on the disk."""
    for tap in hashes:
        with open(_rows(folder, tap), "r+b") as file:
            os.fsync(file.fileno())
    about = json.dumps({"done": done, "digests": {tap: digest.hexdigest() for tap, digest in hashes.items()}})
    write_file(folder / "about.json", about)


class About(TypedDict):
    """about.json: how many images' features are kept."""

    done: Count
    digests: dict[str, str]


def _done(folder: Path, extractor: Extractor) -> tuple[int, Hashes]:
    """How many images' features are there: as many as about.json says, if they are what it says; and their digests so far."""
    try:
        said = decode((folder / "about.json").read_bytes(), About, "about.json")
        hashes = {tap: _hash(_rows(folder, tap), 4 * width * said["done"]) for tap, width in extractor.widths.items()}
        if {tap: digest.hexdigest() for tap, digest in hashes.items()} == said["digests"]:
            return said["done"], hashes
    except (OSError, UserError, EOFError):
        pass
    for left in folder.glob("*.moments.npz"):  # what was worked out of them is worth no more
        left.unlink()
    return 0, {tap: hashlib.sha256() for tap in extractor.widths}


def _hash(path: Path, size: int) -> Any:
    """The digest of the first bytes of a file; EOFError where it has fewer."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while size and (block := file.read(min(size, 1 << 22))):
            digest.update(block)
            size -= len(block)
    if size:
        raise EOFError
    return digest


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
    settings: list[Any] = [digests, images.size, images.channels, extractor.identity, dict(extractor.widths)]
    read = [images.how.fit == "contain", images.how.floats]  # "anywhere" measures the centre, as "cover" does
    settings += [read] if any(read) else []  # so that what was kept before there was a choice is still found
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
