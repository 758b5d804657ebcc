"""A data set of the program's own, in the place of files: anything with a length and (image, label) by number."""

import hashlib
import operator
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from iddpm.data.decode import MODES, prepare
from iddpm.data.given import require_alike
from iddpm.data.preparation import AS_EVER, Places, Preparation, levels
from iddpm.errors import UserError


class Dataset(Protocol):
    """As torch.utils.data.Dataset with a length: data[k] is an image, or (image, label).

    An image is a PIL.Image, uint8 (H, W, C) or (H, W), with --bit_depth 16 also uint16, or float (C, H, W) in [-1, 1]; a label a
    whole number from 0.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, k: int) -> Any: ...


class Own:
    """What training asks of images, of a program's data set; the arguments are those of `Images.open`.

    `given` is a data set of the same length, whose image k is given with image k; it may have any number of channels.
    """

    def __init__(
        self,
        data: Dataset,
        image_size: tuple[int, int],
        channels: int,
        classes: Sequence[str] | None = None,
        given: Dataset | None = None,
        given_channels: int = 0,
        how: Preparation = AS_EVER,
    ):
        self.labels, self.how, self.floats = labels_of(data), how, False  # whose span its protocol says
        if given is not None and len(given) != len(data):
            raise UserError(f"{len(data)} images and {len(given)} given with them: image k is given with image k, one for each")
        self.given, self.given_channels = given, given_channels
        self.data, self.image_size, self.channels, self.rule = data, image_size, channels, "the data set's"
        self.files: list[Any] = [f"image {k}" for k in range(len(data))]
        self.classes: tuple[str, ...] = ()
        if self.labels is not None:
            self.classes = tuple(classes or map(str, range(int(self.labels.max()) + 1)))
            if self.labels.max() >= len(self.classes):
                raise UserError(f"the data set has the label {self.labels.max()}; the run knows {len(self.classes)} classes")
        self._pair(0, data[0], 0.5)  # what cannot be read is told before a run is begun

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, indices: Sequence[int] | np.ndarray, at: Places = None) -> np.ndarray:
        """The images at `indices`, as `Images.batch`."""
        places = self.how.places(at, len(indices))
        return np.stack([self._pair(int(k), self.data[int(k)], place) for k, place in zip(indices, places)])

    def describe(self) -> str:
        """A line to print: how many images, and what labels."""
        classes = f", {len(self.classes)} classes" if self.labels is not None else ""
        height, width = self.image_size
        return f"{len(self)} images at {height}x{width}, {self.channels} channels, of the program's own{classes}"

    def identity(self) -> dict[str, str]:
        """What tells it from another, part by part, as `Images.identity`: the length, the first image, the labels."""
        labels = b"" if self.labels is None else self.labels.tobytes()
        parts = dict(contents=self._pair(0, self.data[0], 0.5).tobytes(), labels=labels)
        return {"count": str(len(self)), **{k: hashlib.blake2b(part, digest_size=8).hexdigest() for k, part in parts.items()}}

    def _pair(self, k: int, item: Any, at: float) -> np.ndarray:
        """An image, with the one given with it where there are such: (C, H, W) uint8, or uint16 of 16 bits."""
        image = image_of(item)
        pixels = self._pixels(k, image, self.channels, at)
        if self.given is None:
            return pixels
        other = image_of(self.given[k])
        require_alike(f"image {k} of the data set", _size(image), f"image {k}", _size(other))
        return np.concatenate([pixels, self._pixels(k, other, self.given_channels, at)])

    def _pixels(self, k: int, image: Any, channels: int, at: float) -> np.ndarray:
        """An image as (C, H, W) of the run's size and depth; one of another size is scaled and cropped as files are."""
        how = self.how
        if isinstance(image, Image.Image):
            if channels not in MODES:
                raise UserError(f"image {k} of the data set is a PIL image, and {channels} channels are asked for: give arrays")
            image = np.asarray(image.convert(MODES[channels]))
        array = np.asarray(image)
        if array.dtype.kind == "f":
            if not (array.ndim == 3 and np.isfinite(array).all() and abs(array).max() <= 1.001):
                raise UserError(f"image {k} of the data set: floats must be (C, H, W) in [-1, 1], not {array.shape}")
            array = np.rint((array.transpose(1, 2, 0) + 1) * (127.5 if how.bits == 8 else 32767.5)).clip(0, 2**how.bits - 1)
            array = array.astype(how.dtype)
        array = array[..., None] if array.ndim == 2 else array
        if array.dtype == np.uint8 and how.bits == 16:
            array = levels(array, how, lambda note: None)
        if array.dtype != (kind := np.dtype(how.dtype)) or array.ndim != 3 or array.shape[2] != channels:
            raise UserError(
                f"image {k} of the data set is {array.dtype} {array.shape}: give PIL images, {kind} (H, W, {channels}), "
                f"or floats ({channels}, H, W) in [-1, 1]"
            )
        if array.shape[:2] == self.image_size:
            return np.ascontiguousarray(array.transpose(2, 0, 1))
        if how.bits == 8 and channels in MODES:
            picture = Image.fromarray(array[..., 0] if channels == 1 else array)
            return prepare(picture, *self.image_size, how.fit, at)
        return prepare(array, *self.image_size, how.fit, at)


def labels_of(data: Dataset) -> np.ndarray | None:
    """The labels of a data set, (n,) int64, None where its items are images alone; UserError where one is no whole number from 0.

    One pass over all, which costs as much as an epoch of reading: training must know every label before it starts.
    """
    if not len(data):
        raise UserError("the data set is empty: len(data) is 0")
    if not isinstance(data[0], (tuple, list)):
        return None
    labels = np.zeros(len(data), np.int64)
    for k in range(len(data)):
        label = data[k][1]
        try:
            labels[k] = operator.index(label.item() if hasattr(label, "item") else label)  # torch's and numpy's numbers too
        except (TypeError, ValueError, RuntimeError, OverflowError):
            labels[k] = -1
        if labels[k] < 0:
            raise UserError(f"image {k} of the data set has the label {label!r}: labels are whole numbers from 0")
    return labels


def image_of(item: Any) -> Any:
    """The image of an item, which may have a label, too."""
    return item[0] if isinstance(item, (tuple, list)) else item


def _size(image: Any) -> tuple[int, int]:
    """(width, height) of an image as a program gives it."""
    if isinstance(image, Image.Image):
        return image.size
    shape = np.shape(image)
    if len(shape) < 2:
        return 0, 0  # `Own._pixels` refuses it
    return (shape[2], shape[1]) if np.asarray(image).dtype.kind == "f" and len(shape) == 3 else (shape[1], shape[0])
