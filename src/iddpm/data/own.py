"""A data set of the program's own, in the place of files: anything with a length and (image, label) by number."""

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from iddpm.data.decode import prepare
from iddpm.errors import UserError


class Dataset(Protocol):
    """As torch.utils.data.Dataset with a length: data[k] is an image, or (image, label).

    An image is a PIL.Image, uint8 (H, W, C) or (H, W), or float (C, H, W) in [-1, 1]; a label a whole number from 0.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, k: int) -> Any: ...


class Own:
    """What training asks of images, of a program's data set; the arguments are those of `Images.open`."""

    def __init__(self, data: Dataset, image_size: tuple[int, int], channels: int, classes: Sequence[str] | None = None):
        if not len(data):
            raise UserError("the data set is empty: len(data) is 0")
        self.data, self.image_size, self.channels, self.rule = data, image_size, channels, "the data set's"
        self.files: list[Any] = [f"image {k}" for k in range(len(data))]
        first = data[0]
        self.labels: np.ndarray | None = None
        self.classes: tuple[str, ...] = ()
        if isinstance(first, (tuple, list)):
            # one pass over all, which costs as much as an epoch of reading: training must know every label before it starts
            self.labels = np.array([int(data[k][1]) for k in range(len(data))], np.int64)
            if self.labels.min() < 0:
                raise UserError(f"the data set has the label {self.labels.min()}: labels are whole numbers from 0")
            self.classes = tuple(classes or map(str, range(int(self.labels.max()) + 1)))
            if self.labels.max() >= len(self.classes):
                raise UserError(f"the data set has the label {self.labels.max()}; the run knows {len(self.classes)} classes")
        self._pixels(0, first)  # what cannot be read is told before a run is begun

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The images at `indices`: uint8 (n, C, H, W)."""
        return np.stack([self._pixels(int(k), self.data[int(k)]) for k in indices])

    def describe(self) -> str:
        """A line to print: how many images, and what labels."""
        classes = f", {len(self.classes)} classes" if self.labels is not None else ""
        height, width = self.image_size
        return f"{len(self)} images at {height}x{width}, {self.channels} channels, of the program's own{classes}"

    def identity(self) -> dict[str, str]:
        """What tells it from another, part by part, as `Images.identity`: the length, the first image, the labels."""
        parts = dict(
            contents=self._pixels(0, self.data[0]).tobytes(), labels=b"" if self.labels is None else self.labels.tobytes()
        )
        return {"count": str(len(self)), **{k: hashlib.blake2b(part, digest_size=8).hexdigest() for k, part in parts.items()}}

    def _pixels(self, k: int, item: Any) -> np.ndarray:
        """An image as (C, H, W) uint8 of the run's size; one of another size is scaled and cropped as files are."""
        image = item[0] if isinstance(item, (tuple, list)) else item
        if isinstance(image, Image.Image):
            return prepare(image.convert({1: "L", 3: "RGB", 4: "RGBA"}[self.channels]), *self.image_size)
        array = np.asarray(image)
        if array.dtype.kind == "f":
            if not (array.ndim == 3 and np.isfinite(array).all() and abs(array).max() <= 1.001):
                raise UserError(f"image {k} of the data set: floats must be (C, H, W) in [-1, 1], not {array.shape}")
            array = np.rint((array.transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8)
        array = array[..., None] if array.ndim == 2 else array
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != self.channels:
            raise UserError(
                f"image {k} of the data set is {array.dtype} {array.shape}: give PIL images, uint8 (H, W, {self.channels}), "
                f"or floats ({self.channels}, H, W) in [-1, 1]"
            )
        if array.shape[:2] == self.image_size:
            return np.ascontiguousarray(array.transpose(2, 0, 1))
        return prepare(Image.fromarray(array[..., 0] if self.channels == 1 else array), *self.image_size)
