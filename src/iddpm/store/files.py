"""Files of checkpoints: the one place that knows where they lie and how they get there.

A folder is written aside, each file flushed to disk and read back. manifest.json, with size and digest of the others, comes
last; then one rename puts the folder in its place. A remote storage cannot rename: there files are written in their place, and
the manifest alone commits. They are not read back (their sizes are asked for, and the driver guards what it sends); every
reader compares the digests of what it fetches.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypedDict

import safetensors
import torch
from torch import Tensor

from iddpm.errors import UserError, readable, reason
from iddpm.records import Count, Digest, decode, fits
from iddpm.store import log
from iddpm.store import remote as places
from iddpm.store.remote import flush, sha256

STEP_DIR = re.compile(r"step_(\d{8,})$")
MANIFEST = "manifest.json"
BEST = "best.json"
MOST = 100 << 20  # bytes of a header, as in safetensors: what says more is no such file
DTYPES = {  # by their names in safetensors
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Entry(NamedTuple):
    """What the manifest knows of a file: its size in bytes and the sha256 of its content."""

    size: int
    digest: str


class Best(NamedTuple):
    """The checkpoint that was measured best, of those under equal conditions."""

    step: int
    value: float
    metric: str
    conditions: dict[str, Any]  # as JSON holds them


class BestRecord(TypedDict):
    """The same as JSON."""

    step: Count
    value: float
    metric: str
    conditions: dict[str, Any]


class _Named(TypedDict):
    step: Count


class Listed(NamedTuple):
    """An `Entry` as the manifest has it."""

    size: Count
    digest: Digest


# ---- where checkpoints lie


def step_dir(run: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return run / "checkpoints" / f"step_{step:08d}"


def aside(final: Path) -> Path:
    """Where it is written until it is complete; on a remote storage that is its place."""
    return final if places.remote(final) else final.with_name(f".{final.name}")


def step_of(folder: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(folder.name.removeprefix("step_"))


def step_dirs(run: Path) -> list[Path]:
    """The folders of a run's checkpoints, oldest first."""
    folder = run / "checkpoints"
    return sorted((p for p in folder.glob("step_*") if STEP_DIR.search(p.name)), key=step_of) if folder.is_dir() else []


def best(run: Path) -> int | None:
    """The step that checkpoints/best.json names, where there is one."""
    try:
        return decode((run / "checkpoints" / BEST).read_bytes(), _Named, BEST)["step"]
    except places.Unreachable:  # no answer is not the same as none
        raise
    except (OSError, UserError):
        return None


def name_best(run: Path, best: Mapping[str, Any] | None) -> None:
    """Write a `Best` to checkpoints/best.json, or none."""
    path = run / "checkpoints" / BEST
    if best is None:
        path.unlink(missing_ok=True)
    else:
        places.write_file(path, json.dumps(best))


def mend_best(run: Path, known: Mapping[str, Any] | None, step: int) -> str | None:
    """Make best.json name the best `known` to the checkpoint of `step`, from which a run goes on, if that best is whole.

    Returns what is wrong with it else, and names none. A kill may have left the file behind the checkpoint, or the checkpoint
    was passed over that it names.
    """
    named, fault = best(run), None
    if named == step or (known is None and (named or 0) < step):  # measured after it was saved, or before any checkpoint knew
        return None
    if known and known["step"] != step and (fault := verify(step_dir(run, known["step"]), MANIFEST)):
        fault = f"the best checkpoint, of step {known['step']}, is lost: {fault}"
        known = None
    name_best(run, known)
    return fault


def prune(run: Path, keep: int, keep_every: int = 0, last: int | None = None) -> None:
    """Delete all but the newest `keep` checkpoints (0: none), those of every `keep_every`-th step (0: none) and the best.

    Those beyond the step `last` were passed over as damaged when the run went on: they neither count nor are deleted. What
    has no manifest does not count.
    """
    if not keep:
        return
    spared, left = best(run), keep
    for folder in reversed(step_dirs(run)):
        step = step_of(folder)
        if last is not None and step > last:
            continue
        if left:
            left -= (folder / MANIFEST).exists()
        elif step != spared and not (keep_every and step % keep_every == 0):
            discard(folder)


# ---- writing


def fresh(folder: Path) -> None:
    """An empty folder in the place of what a crash may have left there; OSError where its run is no longer there."""
    _delete(folder)
    if not places.remote(folder):
        folder.parent.mkdir(exist_ok=True)  # not its run: one that was renamed would begin anew under its old name
        folder.mkdir()


def sweep(run: Path) -> None:
    """Delete what saves that a crash cut short have left of themselves."""
    for left in (run / "checkpoints").glob(".step_*"):
        discard(left)


def discard(folder: Path) -> None:
    """Delete a folder, if it is there and can be deleted."""
    with contextlib.suppress(OSError, UserError):
        _delete(folder)


def _delete(folder: Path) -> None:
    """Its manifest goes first: a deletion cut short must not look like damage. Of a link, the link alone goes."""
    if not places.remote(folder) and folder.is_symlink():
        folder.unlink()
        return
    with contextlib.suppress(FileNotFoundError):
        (folder / MANIFEST).unlink()
    with contextlib.suppress(FileNotFoundError):
        folder.rmtree() if places.remote(folder) else shutil.rmtree(folder)


def write_tensors(path: Path, like: Mapping[str, Tensor], metadata: Mapping[str, str], get: Callable[[str], Tensor]) -> Entry:
    """Write a .safetensors file of the shapes and types of `like`, whose contents get(name) gives one at a time, on the CPU.

    It is hashed on the way, flushed, and read back; OSError where it cannot be written or reads back differently.
    """
    names = sorted(like, key=lambda name: (-like[name].element_size(), name))  # aligned, as the format wants it
    kinds = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        begin, end = end, end + like[name].numel() * like[name].element_size()
        header[name] = {"dtype": kinds[like[name].dtype], "shape": list(like[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def blocks() -> Iterator[memoryview | bytes]:
        yield len(text).to_bytes(8, "little")
        yield text
        for name in names:
            if like[name].numel():
                yield get(name).detach().contiguous().reshape(-1).view(torch.uint8).numpy().data

    return _write(path, blocks)


def write_text(path: Path, text: str) -> Entry:
    """Write a text, flushed and read back."""
    return _write(path, lambda: iter([text.encode()]))


def _write(path: Path, blocks: Callable[[], Iterator[memoryview | bytes]]) -> Entry:
    entry = Entry(0, "")

    def measured() -> Iterator[memoryview | bytes]:
        nonlocal entry
        digest, size = hashlib.sha256(), 0
        for block in blocks():
            digest.update(block)
            size += len(block)
            yield block
        entry = Entry(size, digest.hexdigest())

    if places.remote(path):
        path.stream(measured)
    else:
        path.parent.mkdir(exist_ok=True)
        with open(path, "wb", buffering=0) as file:
            for block in measured():
                rest = memoryview(block)
                while rest:
                    rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
    if places.size(path) != entry.size or (not places.remote(path) and sha256(path) != entry.digest):
        raise OSError(f"{path} reads back differently from what was written")
    return entry


def commit(folder: Path, final: Path, entries: Mapping[str, Entry]) -> None:
    """Vouch for the files of a folder written aside, and put it in its place; the log is there before it."""
    log.sync()
    write_text(folder / MANIFEST, json.dumps({name: list(entry) for name, entry in sorted(entries.items())}, indent=1))
    if places.remote(folder):
        return
    for below in {(folder / name).parent for name in entries} | {folder}:
        flush(below)
    discard(final)  # only ever one that did not verify, or the very same step again
    folder.rename(final)
    flush(final.parent)


# ---- reading


def verify(folder: Path, only: str = "") -> str | None:
    """What is wrong with a checkpoint, or None. Of a remote one, all sizes are compared, and the content of `only` this file.

    What was compared of a remote one has then been fetched, and is read from this machine until `places.forget`.
    """
    try:
        manifest = decode((folder / MANIFEST).read_bytes(), dict[str, Listed], MANIFEST)
        for name, entry in manifest.items():
            if not _inside(folder, name):
                return f"not to be trusted ({MANIFEST} names {name}, which is no file of it)"
            size = places.size(folder / name)
            if size is None:
                return f"incomplete ({name} is missing)"
            if places.remote(folder):
                whole = size == entry.size and (only not in ("", name) or places.fetch(folder / name, entry.digest))
            else:
                whole = entry == (size, sha256(folder / name) if size == entry.size else "")
            if not whole:
                return f"{name} is damaged"
    except FileNotFoundError:
        return f"incomplete (it has no {MANIFEST}: its saving was cut short)"
    except places.Unreachable:  # no answer says nothing about the checkpoint
        raise
    except (OSError, UserError) as e:
        return f"incomplete ({reason(e)})"
    return None


def _inside(folder: Path, name: str) -> bool:
    """Whether a name of a manifest is that of a regular file below the folder, or of none."""
    path = folder / name
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        return False
    return places.remote(path) or not path.exists() or (path.is_file() and path.resolve().is_relative_to(folder.resolve()))


def read_header(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """What a .safetensors file says of its content: metadata, and the tensors' shapes and types, as tensors without content.

    OSError or UserError where it has none.
    """
    if places.remote(path):
        length = int.from_bytes(path.read_bytes(0, 8), "little")
        header = path.read_bytes(8, 8 + length) if length < MOST else b""
    else:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(length) if length < MOST else b""
    with readable(path, "is damaged, or no .safetensors file", "bring it back from a copy, or delete it"):
        tensors = decode(header, dict[str, dict[str, Any]], path)
        metadata = fits(tensors.pop("__metadata__", {}), dict[str, str])
        known = {name: fits(about, Stored) for name, about in tensors.items()}
        return metadata, {k: torch.empty(v["shape"], dtype=DTYPES[v["dtype"]], device="meta") for k, v in known.items()}


class Stored(TypedDict):
    """A tensor in the header of a .safetensors file."""

    dtype: str
    shape: list[Count]


class Reader(contextlib.ExitStack):
    """Reads windows of tensors from .safetensors files, a copy of a remote one, that stay open while it lasts."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[Path, safetensors.safe_open] = {}

    def read(self, path: Path, name: str, offset: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        """The window of a tensor that begins at `offset` and has the shape `size`."""
        with readable(path, "is damaged", "bring it back from a copy, or delete it"):
            if path not in self.files:
                self.files[path] = self.enter_context(safetensors.safe_open(places.fetch(path), framework="pt"))
            if not size:
                return self.files[path].get_tensor(name)
            return self.files[path].get_slice(name)[tuple(slice(a, a + n) for a, n in zip(offset, size))]
