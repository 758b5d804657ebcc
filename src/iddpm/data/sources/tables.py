"""Images in tables: parquet and `datasets` folders in Hugging Face's layout (extra `parquet`), LMDB in LSUN's (extra `lmdb`)."""

import json
import os
import tempfile
import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar, NamedTuple

import numpy as np

from iddpm.data.sources.rows import Rows, ranked
from iddpm.data.sources.source import LARGEST, Ranked
from iddpm.errors import UserError, readable
from iddpm.store.remote import opened, remote, scratch

LABELS = ("label", "labels", "class", "cls", "fine_label")  # names of columns, where the table says of none that it holds classes


def _needed(module: str, extra: str, path: Path) -> Any:
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError:
        raise UserError(f"{path}: to read it, pip install 'iddpm[{extra}]'") from None


class Columns(NamedTuple):
    """Which columns of a table hold the images and their labels, and the names of the classes."""

    image: str
    label: str = ""
    classes: tuple[str, ...] = ()


def _columns(path: Path, schema: Any) -> Columns:
    """By what `datasets` keeps in a schema's metadata, else by types and names; UserError where there are no images."""
    held = (schema.metadata or {}).get(b"huggingface", b"{}")
    features = json.loads(held).get("info", {}).get("features", {})
    kinds = {name: about.get("_type") for name, about in features.items() if isinstance(about, dict)}
    binary = [f.name for f in schema if "binary" in str(f.type) and ("struct<" not in str(f.type) or "bytes: " in str(f.type))]
    images = [name for name in binary if kinds.get(name) == "Image"] or binary
    if not images:
        raise UserError(f"{path} has no column of images, but {', '.join(schema.names)}")
    if len(images) > 1 and "image" not in images:
        raise UserError(f"{path} has several columns of images, {', '.join(images)}: name one of them image")
    image = "image" if "image" in images else images[0]
    told = [name for name, kind in kinds.items() if kind == "ClassLabel" and name in schema.names]
    label = next((name for name in [*told, *LABELS] if name in schema.names), "")
    names = features.get(label, {}).get("names", ()) if label in told else ()
    return Columns(image, label, tuple(map(str, names)))


def _labels(path: Path, columns: Columns, values: Any) -> Ranked | None:
    """Labels of a column; None where there is none, or all are missing (`datasets` writes -1, as tests have no classes)."""
    if not columns.label or values.null_count == len(values):
        return None
    if values.null_count:
        least = f"{values.null_count:,} of {len(values):,} rows"
        raise UserError(f"{path} has no {columns.label} in {least}: add them, or --labels none takes none of them")
    if values.type.num_fields:  # lists and the like
        raise UserError(f"{path}: its {columns.label} is {values.type}, and an image has one; --labels none takes none of them")
    found = values.to_numpy()
    found = found.astype(str) if found.dtype == object else found
    return None if found.dtype.kind == "i" and (found == -1).all() else ranked(path, found, columns.classes)


def _bytes(value: Any) -> Any:
    """The image of a cell: a struct of bytes and path, or bytes."""
    held = value.as_py()
    return held.get("bytes") if isinstance(held, dict) else held


class Parquet(Rows):
    """The rows of parquet files. A group of rows can only be read as a whole, so what is touched is kept, unpacked, in a scratch
    file of this process: each group is unpacked once, in whatever order its rows are asked for."""

    def __init__(self, path: Path, files: Sequence[Path]) -> None:
        self._pq = _needed("pyarrow.parquet", "parquet", path)
        self._one, self._groups, counts, labels = Lock(), list[tuple[Path, int]](), list[int](), []
        columns, first = Columns(""), None
        for file in files:
            with readable(file, "is not a readable parquet file"), opened(file) as raw:
                table = self._pq.ParquetFile(raw)
                own = _columns(file, schema := table.schema_arrow)
                columns = columns if first else own
                kind = own.image, own.label, schema.field(own.label).type if own.label else None
                if kind != (first := first or kind) or own.classes not in ((), columns.classes):
                    raise UserError(f"{file} keeps its images or labels otherwise than {files[0].name}: write both alike")
                for k in range(table.num_row_groups):
                    self._groups.append((file, k))
                    counts.append(table.metadata.row_group(k).num_rows)
                if columns.label:
                    labels.append(table.read([columns.label]).column(0))
        self.files, self._columns, self._ends = files, columns, list(accumulate(counts))
        self._kept: dict[int, np.ndarray] = {}  # of a group, where its rows begin in the scratch file, and the last ends
        self._scratch = tempfile.TemporaryFile(dir=scratch())  # noqa: SIM115
        weakref.finalize(self, self._scratch.close)
        pa = _needed("pyarrow", "parquet", path)
        values = pa.chunked_array([c for held in labels for c in held.chunks], first[2]) if first and columns.label else None
        super().__init__(path, self._ends[-1] if counts else 0, partial(_labels, path, columns, values))

    def row(self, k: int) -> bytes | None:
        group = bisect_right(self._ends, k)
        with self._one:
            if group not in self._kept:
                self._kept[group] = self._unpacked(group)
        at = k - (self._ends[group - 1] if group else 0)
        begin, end = self._kept[group][at : at + 2].tolist()
        return os.pread(self._scratch.fileno(), end - begin, begin) if end > begin else None

    def _unpacked(self, group: int) -> np.ndarray:
        file, number = self._groups[group]
        places = [self._scratch.seek(0, os.SEEK_END)]
        with opened(file) as raw:
            table = self._pq.ParquetFile(raw)
            for batch in table.iter_batches(16, row_groups=[number], columns=[self._columns.image]):
                for value in batch.column(0):
                    content = _bytes(value) or b""
                    self._scratch.write(content if len(content) <= LARGEST else b"")
                    places.append(self._scratch.tell())
        self._scratch.flush()
        expected = self._ends[group] - (self._ends[group - 1] if group else 0)
        if len(places) != expected + 1:
            raise ValueError(f"{len(places) - 1} rows where {expected} are promised")
        return np.array(places)


class Arrow(Rows):
    """A folder of `datasets`' save_to_disk: its .arrow files, mapped into memory; those that state.json names, in that order."""

    def __init__(self, path: Path) -> None:
        pa = _needed("pyarrow", "parquet", path)
        if remote(path):
            raise UserError(f"{path}: a folder of `datasets` is mapped into memory, so copy it here; or write parquet files")
        with readable(path, "is no folder of datasets"):
            state = json.loads((path / "state.json").read_bytes())
            if state.get("_indices_data_files"):
                raise UserError(f"{path} is a selection of rows, which is not read: save what flatten_indices() gives")
            names = [str(part["filename"]) for part in state["_data_files"]]
            if any("/" in name or name.startswith(".") for name in names):
                raise UserError(f"{path / 'state.json'} names files elsewhere: none but its own are read")
            table = pa.concat_tables([pa.ipc.open_stream(pa.memory_map(str(path / name))).read_all() for name in names])
            columns = _columns(path, table.schema)
            self._images = table.column(columns.image)
            values = table.column(columns.label) if columns.label else None
        super().__init__(path, len(self._images), partial(_labels, path, columns, values))
        self.home = path.parent

    def row(self, k: int) -> bytes | None:
        held: bytes | None = _bytes(self._images[k])
        return held


def parts(path: Path) -> Arrow:
    """A folder of several sets of `datasets`, as train and test, of which one is to be named: raises UserError."""
    found = [str(state.parent) for state in sorted(path.glob("*/state.json"))]
    raise UserError(f"{path} holds several sets of datasets: give one of them, {' or '.join(found) or 'but none is there'}")


class Lmdb(Rows):
    """LSUN's layout: an image under each key. A file that is cut off is refused: reading it would end the process."""

    _opened: ClassVar["weakref.WeakValueDictionary[str, Any]"] = (
        weakref.WeakValueDictionary()
    )  # a process may open each only once

    def __init__(self, path: Path) -> None:
        lmdb = _needed("lmdb", "lmdb", path)
        if remote(path):
            raise UserError(f"{path}: an LMDB is mapped into memory, so copy it here")
        file = path / "data.mdb" if path.is_dir() else path
        with readable(path, "is not a readable LMDB"):
            size = file.stat().st_size
            held = self._opened.get(key := str(path.resolve()))
            self._env = held or lmdb.open(key, readonly=True, lock=False, readahead=False, subdir=path.is_dir(), create=False)
            self._opened[key] = self._env
            if (self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"] > size:
                raise ValueError("it is cut off")
            with self._env.begin(buffers=True) as reading:  # what is shorter than any image is a count, as some programs keep
                self._keys = [bytes(key) for key, value in reading.cursor() if len(value) > 20]
                short = reading.stat()["entries"] - len(self._keys)
        super().__init__(path, len(self._keys), ending="webp")
        self.left_out = Counter({"too short for an image": short} if short else {})

    def row(self, k: int) -> bytes:
        with self._env.begin() as reading:
            held: bytes = reading.get(self._keys[k])
            return held
