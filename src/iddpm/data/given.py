"""The image that a network is given beside noise: a small one to enlarge, or another one, paired with the image by its name."""

import difflib
import posixpath
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple
from unicodedata import normalize

import numpy as np
from PIL import Image
from torch import Tensor

from iddpm.config import Config, small_size
from iddpm.data.sources import Source
from iddpm.data.super_res import shrink
from iddpm.errors import UserError
from iddpm.words import many

SHOWN = 3  # names in a line that refuses
MOST = 1000  # names of which the nearest is sought


def shown(config: Config, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
    """The images x0 (B, C, H, W), and what the network is given of each, (B, G, h, w) or None; all in [-1, 1].

    `pixels` are a data set's: the image's C channels and, where images lie in pairs, those of the other one behind them.
    """
    task, channels = config.task, config.model.image_channels
    if task.enlarges:
        return pixels, shrink(pixels, small_size(config.model))
    if task.translates:
        return pixels[:, :channels], pixels[:, channels:]
    return pixels, None


# ---- pairs of files


class Others(NamedTuple):
    """The images given beside those of a data set."""

    source: Source
    channels: int
    names: dict[str, str]  # of each, by the name of the image that it is given for
    around: tuple[str, str] = ("", "")  # folders that were left out of the names to find the pairs

    def describe(self) -> str:
        """A line to print."""
        below = f"; names are those below {' and '.join(f'{folder}/' for folder in self.around if folder)}"
        how = below if any(self.around) else ""
        return f"each with the one of its name in {self.source.path}, {many(self.channels, 'channel')}{how}"


def paired(source: Source, others: Source, channels: int) -> Others:
    """The images of two sources in pairs of equal names but for the ending; UserError where one has no partner, or several.

    Names are compared with their folders; a folder around all images of a source is no part of them.
    """
    ours, theirs, around = _keys(source), _keys(others), ("", "")
    if ours.keys() != theirs.keys():
        around = _around(ours), _around(theirs)
        ours, theirs = _below(around[0], ours), _below(around[1], theirs)
    if ours.keys() != theirs.keys():
        raise _unpaired(source, others)
    return Others(others, channels, {name: theirs[key] for key, name in ours.items()}, around)


def _keys(source: Source) -> dict[str, str]:
    """The names by what two of a pair have in common; UserError where that is not one image's alone."""
    keys = {name: normalize("NFC", posixpath.splitext(name)[0]) for name in source.names}
    key, most = Counter(keys.values()).most_common(1)[0]
    if most > 1:
        twins = ", ".join(name for name in source.names if keys[name] == key)
        raise UserError(f"{source.path} holds {twins}: which of these is of the pair {key}? Take out the others")
    return {key: name for name, key in keys.items()}


def _around(keys: Iterable[str]) -> str:
    """The folder around all; "" where there is none."""
    return posixpath.commonpath([posixpath.dirname(key) for key in keys])


def _below(folder: str, keys: dict[str, str]) -> dict[str, str]:
    return {posixpath.relpath(key, folder or "."): name for key, name in keys.items()}


def _unpaired(source: Source, others: Source) -> UserError:
    ours, theirs = _keys(source), _keys(others)
    alone = [name for key, name in ours.items() if key not in theirs]
    left = [name for key, name in theirs.items() if key not in ours]
    parts = [
        f"{many(len(names), 'image')} of {where.path} without a partner in {partner.path} ({_some(names)})"
        for names, where, partner in ((alone, source, others), (left, others, source))
        if names
    ]
    fix = f"rename the partner of {alone[0]}, perhaps {near}" if (near := _nearest(alone, left)) else "add the partners"
    return UserError(f"images are paired by equal names, whatever the ending: {' and '.join(parts)}; {fix}, or take these out")


def _nearest(alone: Sequence[str], left: Sequence[str]) -> str:
    """Of the names that are left, the one most like the first that is alone, from the same folder if there is one; or ""."""
    if not alone:
        return ""
    stems = {posixpath.splitext(name)[0]: name for name in left[:MOST]}
    beside = [stem for stem in stems if posixpath.dirname(stem) == posixpath.dirname(alone[0])]
    near = difflib.get_close_matches(posixpath.splitext(alone[0])[0], beside or stems, n=1, cutoff=0.4)
    return stems[near[0]] if near else ""


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def size_of(image: Image.Image | np.ndarray) -> tuple[int, int]:
    """(width, height) of a picture, or of an array (H, W, C)."""
    return (image.shape[1], image.shape[0]) if isinstance(image, np.ndarray) else image.size


def require_alike(name: object, size: tuple[int, int], other: object, other_size: tuple[int, int]) -> None:
    """UserError where two images (width, height) differ in shape by more than a pixel: cut alike they would show other parts."""
    (w, h), (v, u) = size, other_size
    if abs(w * u - v * h) > max(w, h, v, u):
        raise Unlike(f"{name} has {h}x{w} pixels, and {other}, given with it, {u}x{v}: crop one, so that both are of one shape")


class Unlike(UserError):
    """Two images of a pair do not show the same part of the world: no broken file, for which another could stand in."""
