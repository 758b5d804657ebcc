"""WebDataset's layout: several .tar files that are one set, each image with a .cls or .json of its name."""

import os
import re
import tarfile
import weakref
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import BinaryIO

from iddpm.data.sources.archive import clean, plain
from iddpm.data.sources.source import Source, require_small
from iddpm.errors import UserError, readable
from iddpm.store.remote import opened, remote

MOST = 100_000  # shards that a pattern may name
PACKED = 500  # of them packed by gzip: each stays open


class Shards(Source):
    """The files of several .tar archives by name. Where each lies is kept, so that they are read in any order, and no archive
    stays open; those packed by gzip are unpacked once, into scratch files. Where two shards hold one name, all names get the
    number of their shard: "a.jpg" of shard 3 is "a~3.jpg"."""

    def __init__(self, path: Path, shards: Sequence[Path]) -> None:
        self.files = self._shards = shards
        self._unpacked, found = dict[int, BinaryIO](), list[tuple[str, int, int, int]]()
        weakref.finalize(self, _close, self._unpacked)
        for k, shard in enumerate(shards):
            with readable(shard, "is not a readable .tar"), opened(shard) as raw:
                file = plain(raw, shard)
                if file is not raw:
                    self._unpacked[k] = file
                    if len(self._unpacked) > PACKED:
                        raise UserError(
                            f"{path} has more than {PACKED} packed shards: unpack them (gunzip), or iddpm data pack some"
                        )
                held = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115
                for info in held:
                    name = clean(info.name)
                    if info.isreg() and not name.startswith("../"):
                        require_small(shard / name, info.size)
                        found.append((name, k, info.offset_data, info.size))
                    held.members = []  # type: ignore[attr-defined]  # which it would keep for names that nobody asks for
        twice = len({name for name, *_ in found}) < len(found)
        self._at = {(_numbered(name, k) if twice else name): (k, begin, size) for name, k, begin, size in found}
        super().__init__(path, path.parent, self._at)

    def read(self, name: str) -> bytes:
        k, begin, size = self._at[name]
        shard = self._shards[k]
        with readable(shard / name):
            if k in self._unpacked:
                content = os.pread(self._unpacked[k].fileno(), size, begin)
            elif remote(shard):
                content = shard.read_bytes(begin, begin + size)
            else:
                with open(shard, "rb") as file:
                    file.seek(begin)
                    content = file.read(size)
            if len(content) != size:
                raise ValueError(f"{len(content)} bytes of {size}")
        return content

    def has(self, name: str) -> bool:
        return name in self._at

    def size(self, name: str) -> int:
        return self._at[name][2]


def _close(files: dict[int, BinaryIO]) -> None:
    for file in files.values():
        file.close()


def _numbered(name: str, k: int) -> str:
    folder, slash, file = name.rpartition("/")
    stem, dot, ending = file.partition(".")
    return f"{folder}{slash}{stem}~{k}{dot}{ending}"


def matching(path: Path) -> list[Path]:
    """The files that a pattern names: "train-{000..146}.tar", "train-*.tar"; none where it is no pattern."""
    if not re.search(r"[{*?\[]", path.name):
        return []
    out = list[Path]()
    for name in braces(path.name):
        there = sorted(path.parent.glob(name)) if re.search(r"[*?\[]", name) else [path.parent / name]
        out += there
    return out


def braces(text: str) -> Iterator[str]:
    """Every text that braces stand for: {a,b}, or {00..12} with as many digits."""
    parts = re.split(r"\{([^{}]*)\}", text)
    choices, count = list[list[str]](), 1
    for k, part in enumerate(parts):
        span = re.fullmatch(r"(\d+)\.\.(\d+)", part) if k % 2 else None
        if span:
            first, last = map(int, span.groups())
            if not 0 <= last - first < MOST:
                raise UserError(f"{{{part}}} names {last - first + 1} shards: 1 to {MOST} may be named")
            choices.append([f"{n:0{len(span[1])}d}" for n in range(first, last + 1)])
        else:
            choices.append(part.split(",") if k % 2 else [part])
        count *= len(choices[-1])
    if count > MOST:
        raise UserError(f"{text} names {count} shards: at most {MOST} may be named")
    return map("".join, product(*choices))
