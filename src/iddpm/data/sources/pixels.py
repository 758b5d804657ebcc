"""Images that lie as pixels: arrays of .npz and .npy, ImageNet-64's batches, and what `iddpm data pack` writes."""

import io
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from iddpm.data.arrays import Arrays, mapped, open_npz, require_images
from iddpm.data.sources.rows import Rows, ranked
from iddpm.data.sources.source import Ranked
from iddpm.errors import UserError, readable
from iddpm.records import decode
from iddpm.store.remote import opened, remote

INDEX = "pack.json"  # of a packed set, written last


class Pixels(Rows):
    """Arrays (N, H, W, C) uint8, uint16 or float, one behind the other; they stay on the disk where they are not compressed."""

    def __init__(self, path: Path, parts: Sequence[np.ndarray], labelled: Callable[[], Ranked | None], sealed: str = "") -> None:
        self._parts, self._ends = parts, np.cumsum([len(part) for part in parts]).tolist()
        super().__init__(path, self._ends[-1] if parts else 0, labelled, "ppm")
        self.sealed = sealed

    def pixels(self, name: str) -> np.ndarray:
        k = self._names.row(name)
        part = bisect_right(self._ends, k)
        return np.asarray(self._parts[part][k - self._ends[part]])

    def row(self, k: int) -> bytes:
        pixels = np.ascontiguousarray(self.pixels(self.names[k]))
        height, width, channels = pixels.shape
        if channels in (1, 3) and pixels.dtype == np.uint8:
            return b"P%d %d %d 255\n" % (6 if channels == 3 else 5, width, height) + pixels.tobytes()
        file = io.BytesIO()
        if channels == 4 and pixels.dtype == np.uint8:
            Image.fromarray(pixels).save(file, "TIFF")
        else:  # what no picture holds: `Images` takes `pixels`, and these bytes only tell it from others
            np.save(file, pixels)
        return file.getvalue()

    def size(self, name: str) -> int:
        return int(self._parts[0][0].nbytes)


def arrays(path: Path) -> Pixels:
    """An .npz as samples are written, a batch of ImageNet-64, or an .npy of (N, H, W, C)."""
    if path.suffix.lower() == ".npy":
        with readable(path, "is not a readable .npy"), opened(path) as file:
            images = np.load(file, allow_pickle=False) if remote(path) else np.load(path, mmap_mode="r", allow_pickle=False)
        return Pixels(path, [require_images(path, images)], lambda: None)
    with readable(path, "is not a readable .npz"), opened(path) as file, np.load(file) as held:
        kinds = set(held.files)
    if "arr_0" not in kinds and {"data", "labels"} <= kinds:
        return batches(path, [path])
    found: Arrays = open_npz(path, any_kind=True)
    return Pixels(path, [found.images], lambda: None if found.labels is None else ranked(path, found.labels, found.classes))


def batches(path: Path, files: Sequence[Path]) -> Pixels:
    """ImageNet-64's train_data_batch_1.npz, ...: `data` (N, 3 S S) uint8, a colour after the other, `labels` from 1."""
    parts, labels = [], []
    for file in files:
        with readable(file, "is no batch of ImageNet's"), opened(file) as raw, np.load(raw) as held:
            there = None if remote(file) else mapped(file, "data.npy")
            data, numbers = held["data"] if there is None else there, np.asarray(held["labels"]).reshape(-1).astype(np.int64)
        side = round((data.shape[-1] / 3) ** 0.5) if data.ndim == 2 else 0
        if data.dtype != np.uint8 or not side or data.shape != (len(numbers), 3 * side * side):
            raise UserError(f"{file} holds {data.dtype} {data.shape} and {len(numbers)} labels; uint8 N x 3 S S are needed")
        if numbers.min() < 1:
            raise UserError(f"{file} has the label {numbers.min()}: those of ImageNet-64 count from 1")
        parts.append(data.reshape(-1, 3, side, side).transpose(0, 2, 3, 1))
        labels.append(numbers - 1)
    return Pixels(path, parts, partial(ranked, path, np.concatenate(labels)))


def packed(path: Path) -> Pixels:
    """What `iddpm data pack` wrote; UserError where a part is missing or of another size."""
    index = decode((path / INDEX).read_bytes(), dict[str, object], path / INDEX)
    with readable(path / INDEX, "is no index of a packed set", "pack it again"):
        parts, shape = [], tuple(map(int, index["shape"]))  # type: ignore[call-overload]
        for name, rows in index["parts"]:  # type: ignore[attr-defined]
            file = path / f"part-{int(name):05d}.npy"
            part = np.load(io.BytesIO(file.read_bytes())) if remote(path) else np.load(file, mmap_mode="r", allow_pickle=False)
            if part.shape != (rows, *shape):
                raise UserError(f"{file} holds {part.shape}, and {INDEX} says {(rows, *shape)}: pack the set again")
            parts.append(require_images(file, part))
        labelled = None
        if index["classes"]:
            with opened(path / "labels.npy") as numbers:
                ranks = np.load(numbers, allow_pickle=False)
            classes = [value if isinstance(value, int) else str(value) for value in index["classes"]]  # type: ignore[attr-defined]
            fits = ranks.shape == (sum(map(len, parts)),) and ranks.dtype == np.int64
            if not fits or ranks.min() < 0 or ranks.max() >= len(classes):
                raise UserError(f"{path / 'labels.npy'} does not fit the images: pack the set again")
            labelled = Ranked(ranks, classes)
    return Pixels(path, parts, lambda: labelled, str(index["sealed"]))
