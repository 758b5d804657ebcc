"""What a run is trained on, seen in a second or two: how many images, of which classes, some of them, and which are doubles."""

import hashlib
import time
import warnings
from collections import Counter
from functools import cache
from typing import NamedTuple

import numpy as np

from iddpm.config import Config, image_size
from iddpm.data import Images
from iddpm.data.preparation import Preparation, preparation
from iddpm.errors import UserError
from iddpm.store.remote import place, remote

SOME, BYTES = 256, 1 << 26  # images that are looked at, at most, and the memory that they may take
SECONDS = 1.0  # for decoding them, and as much again for comparing files: what is not done by then is left


class Seen(NamedTuple):
    """What was seen of a data set."""

    n: int
    rule: str  # where its classes come from
    counts: dict[str, int]  # images of each class; empty without classes
    some: np.ndarray  # (k, H, W, C) uint8, a fair sample
    labels: list[int]  # of these; -1: none
    classes: tuple[str, ...]
    compared: int  # files whose content was compared with all others of their size
    doubles: int  # of these, how many repeat an earlier one byte by byte


def see(config: Config) -> Seen:
    """The training images of a run, as they lie there now; UserError where they cannot be reached or are far away."""
    d, m = config.data, config.model
    if not d.path or remote(place(d.path)):
        raise UserError(f"{d.path or 'its place is unknown'}: only images on this machine are looked at")
    return _see(d.path, image_size(m), m.image_channels, d.labels, d.classes, preparation(config, bits=8))


@cache  # a run in training makes its page again and again
def _see(path: str, size: tuple[int, int], channels: int, labels: str, classes: tuple[str, ...], how: Preparation) -> Seen:
    data = Images.open(path, size, channels, cache_bytes=0, labels=labels, classes=classes or None, how=how)
    most = max(8, min(SOME, BYTES // (channels * size[0] * size[1])))
    order = np.random.default_rng(0).permutation(len(data))[:most]  # so that the first k of them are a fair sample, too
    began, parts = time.monotonic(), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of broken files: the run itself has told them
        for a in range(0, len(order), 8):
            parts.append(data.batch(order[a : a + 8]).transpose(0, 2, 3, 1))
            if time.monotonic() - began > SECONDS:
                break
    some = np.concatenate(parts)
    numbers = [-1] * len(some) if data.labels is None else data.labels[order[: len(some)]].tolist()
    counts = {} if data.labels is None else np.bincount(data.labels, minlength=len(data.classes)).tolist()
    return Seen(len(data), data.rule, dict(zip(data.classes, counts)), some, numbers, data.classes, *_doubles(data))


def _doubles(data: Images) -> tuple[int, int]:
    """How many files were compared, and how many of them repeat another: only those of equal size are read."""
    began, seen, doubles, compared = time.monotonic(), set[bytes](), 0, 0
    sizes = [data.source.size(name) for name in data.names]
    often = Counter(sizes)
    for name, size in zip(data.names, sizes):
        if often[size] > 1:
            if time.monotonic() - began > SECONDS:
                continue
            digest = hashlib.blake2b(data.source.read(name), digest_size=16).digest()
            doubles += digest in seen
            seen.add(digest)
        compared += 1
    return compared, doubles
