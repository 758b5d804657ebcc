"""Images in an .npz as the original's commands write them: arr_0 uint8 (N, H, W, C), and arr_1 labels where there are any.

Ours have the classes' names beside them, without which a label is a number that may stand for any class.
"""

import math
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from iddpm.errors import UserError, readable
from iddpm.store.remote import opened, remote

MOST = 1024  # channels


class Arrays(NamedTuple):
    """What an .npz of images holds."""

    images: np.ndarray  # (N, H, W, C) uint8
    labels: np.ndarray | None  # (N,) int64
    classes: tuple[str, ...]  # names by label; empty where the file has none


def open_npz(path: Path, any_kind: bool = False) -> Arrays:
    """The images, labels and classes of an .npz; UserError where they are of another type or shape (`require_images`).

    Images that are not compressed stay on the disk until they are indexed.
    """
    with readable(path, "is not a readable .npz"), opened(path) as raw, np.load(raw) as file:
        if "arr_0" not in file:
            raise UserError(f"{path} holds no arr_0 but {', '.join(file.files) or 'nothing'}: give an .npz of samples")
        labels = (told := file["arr_1"]).astype(np.int64) if "arr_1" in file else None
        names = file["classes"] if "classes" in file and labels is not None else np.array([], "U")
        there = None if remote(path) else mapped(path, "arr_0.npy")
        images = file["arr_0"] if there is None else there
    require_images(path, images, any_kind)
    if labels is not None and (labels.shape != (len(images),) or labels.min() < 0 or (labels != told).any()):
        raise UserError(f"{path}: arr_1 must hold one label, a whole number from 0, for each of the {len(images)} images")
    if names.dtype.kind != "U" or names.ndim != 1 or (len(names) and labels is not None and labels.max() >= len(names)):
        raise UserError(f"{path}: classes must be the names of the classes that arr_1 numbers")
    return Arrays(images, labels, tuple(names.tolist()))


def read_npz(path: Path, size: tuple[int, int], channels: int) -> Arrays:
    """As `open_npz`, but the images are (N, C, H, W) in memory; UserError where they are not of this size and type."""
    images, labels, classes = open_npz(path)
    if images.shape[1:] != (*size, channels):
        shape, wanted = (" x ".join(map(str, s)) for s in (images.shape, (*size, channels)))
        raise UserError(f"{path} holds {images.dtype} {shape}; images N x {wanted} are needed")
    return Arrays(np.ascontiguousarray(images.transpose(0, 3, 1, 2)), labels, classes)


def require_images(path: Path, images: np.ndarray, any_kind: bool = True) -> np.ndarray:
    """The images themselves; UserError where they are not uint8 or uint16, of `any_kind` also floats, N x H x W x C."""
    able = images.dtype in (np.uint8, np.uint16, *((np.float16, np.float32, np.float64) if any_kind else ()))
    if not able or images.ndim != 4 or not images.size or images.shape[3] > MOST:
        kinds, shape = f"uint8{', uint16 or float' if any_kind else ' or uint16'}", " x ".join(map(str, images.shape))
        raise UserError(f"{path} holds {images.dtype} {shape}; {kinds} images N x H x W x C (1 to {MOST} channels) are needed")
    return images


def mapped(path: Path, member: str) -> np.ndarray | None:
    """An array of an .npz in its place on the disk; None where it is compressed."""
    with zipfile.ZipFile(path) as held, open(path, "rb") as file:
        info = held.getinfo(member)
        if info.compress_type != zipfile.ZIP_STORED:
            return None
        with held.open(info) as content:  # once to its end, where its checksum is compared: a map knows none
            while content.read(1 << 22):
                pass
        file.seek(info.header_offset + 26)  # in the member's own header, the lengths of its name and of what follows that
        begin = info.header_offset + 30 + sum(np.frombuffer(file.read(4), "<u2").tolist())
        file.seek(begin)
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        if dtype.hasobject or fortran or not math.prod(shape):
            return None
        if math.prod(shape) * dtype.itemsize > begin + info.file_size - file.tell():
            raise ValueError("it holds less than its header says")
        return np.memmap(path, dtype, "r", file.tell(), shape)
