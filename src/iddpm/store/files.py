"""Files of checkpoints: the one place that knows where they lie and how they get there.

A folder is written aside, each file flushed to disk and read back. manifest.json, with size and digest of the others, comes
last; then one rename puts the folder in its place. A remote storage cannot rename: there files are written in their place, and
the manifest alone commits. They are not read back (their sizes are asked for, and the driver guards what it sends); every
reader compares the digests of what it fetches.
"""

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypedDict

import safetensors
import torch

from iddpm.errors import UserError, reason
from iddpm.records import Count, Digest, decode, fits
from iddpm.store import log
from iddpm.store import remote as places
from iddpm.store.remote import flush, sha256

STEP_DIR = re.compile(r"step_(\d{8,})$")
MANIFEST = "manifest.json"
BEST = "best.json"
MOST = 100 << 20  # bytes of a header, as in safetensors: what says more is no such file
NAMES = {  # of types, in safetensors
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class Entry(NamedTuple):
    """What the manifest knows of a file: its size in bytes and the sha256 of its content."""

    size: Count
    digest: Digest


class Step(TypedDict):
    """What each record of a step tells at least."""

    step: Count


class Best(Step):
    """The checkpoint that was measured best, of those under equal conditions."""

    value: float
    metric: str
    conditions: dict[str, Any]  # as JSON holds them


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
        return decode((run / "checkpoints" / BEST).read_bytes(), Step, BEST)["step"]
    except places.Unreachable:  # no answer is not the same as none
        raise
    except (OSError, UserError):
        return None


def name_best(run: Path, best: Best | None) -> None:
    """Write a `Best` to checkpoints/best.json, or none."""
    path = run / "checkpoints" / BEST
    if best is None:
        path.unlink(missing_ok=True)
    else:
        places.write_file(path, json.dumps(best))


def mend_best(run: Path, known: Best | None, step: int) -> str | None:
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


def prune(run: Path, keep: int, keep_every: int, last: int, also: int | None = None) -> None:
    """Delete all but the newest `keep` checkpoints (0: none), those of every `keep_every`-th step (0: none), the best and `also`.

    Those beyond the step `last` were passed over as damaged when the run went on: they neither count nor are deleted. What
    has no manifest does not count.
    """
    if not keep:
        return
    spared, left = (best(run), also), keep
    for folder in reversed(step_dirs(run)):
        step = step_of(folder)
        if step > last:
            continue
        if left:
            left -= (folder / MANIFEST).exists()
        elif step not in spared and not (keep_every and step % keep_every == 0):
            discard(folder)


# ---- writing


def discard(folder: Path) -> None:
    """Delete a folder, if it is there and can be deleted; of a link, the link alone.

    Its manifest goes first: a deletion cut short must not look like damage.
    """
    with contextlib.suppress(OSError, UserError):
        if not places.remote(folder) and folder.is_symlink():
            folder.unlink()
        else:
            (folder / MANIFEST).unlink(missing_ok=True)
            folder.rmtree() if places.remote(folder) else shutil.rmtree(folder)


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> Entry:
    """Write tensors as a .safetensors file; those that are read when they are used, as tensor[()] on the CPU, one at a time.

    OSError where it cannot be written or reads back differently.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # aligned, as the format wants it
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.shape.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def blocks() -> Iterator[memoryview | bytes]:
        yield len(text).to_bytes(8, "little") + text
        for name in names:
            if tensors[name].shape.numel():
                yield tensors[name][()].detach().contiguous().reshape(-1).view(torch.uint8).numpy().data

    return _write(path, blocks)


def write_text(path: Path, text: str) -> Entry:
    """Write a text, flushed and read back."""
    return _write(path, lambda: iter([text.encode()]))


def _write(path: Path, blocks: Callable[[], Iterator[memoryview | bytes]]) -> Entry:
    """Write a file in blocks, which each try asks for anew, hashed on the way."""
    digest, size = hashlib.sha256(), 0

    def measured() -> Iterator[memoryview | bytes]:
        nonlocal digest, size
        digest, size = hashlib.sha256(), 0
        for block in blocks():
            digest.update(block)
            size += len(block)
            yield block

    if places.remote(path):
        path.stream(measured)
    else:
        path.parent.mkdir(exist_ok=True)
        with open(path, "wb") as file:
            file.writelines(measured())
        flush(path)
    entry = Entry(size, digest.hexdigest())
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


def manifest(folder: Path) -> dict[str, Entry]:
    """The files of a checkpoint; UserError where it names others, FileNotFoundError where there is none."""
    entries = decode((folder / MANIFEST).read_bytes(), dict[str, Entry], MANIFEST)
    for name in entries:
        path = folder / name
        own = not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
        if own and not places.remote(path) and path.exists():
            own = path.is_file() and path.resolve().is_relative_to(folder.resolve())
        if not own:
            raise UserError(f"not to be trusted ({MANIFEST} names {name}, which is no file of it)")
    return entries


def verify(folder: Path, only: str = "") -> str | None:
    """What is wrong with a checkpoint, or None. Of a remote one, all sizes are compared, and the content of `only` this file.

    What was compared of a remote one has then been fetched.
    """
    try:
        for name, entry in manifest(folder).items():
            path = folder / name
            size = places.size(path)
            if size is None:
                return f"incomplete ({name} is missing)"
            compared = not places.remote(folder) or only in ("", name)
            if size != entry.size or (compared and sha256(places.fetch(path, entry.digest)) != entry.digest):
                return f"{name} is damaged"
    except FileNotFoundError:
        return f"incomplete (it has no {MANIFEST}: its saving was cut short)"
    except places.Damaged:
        return f"{name} is damaged"
    except places.Unreachable:  # no answer says nothing about the checkpoint
        raise
    except UserError as e:
        return str(e)
    except OSError as e:
        return f"incomplete ({reason(e)})"
    return None


def open_tensors(path: Path, digest: str = "") -> safetensors.safe_open:
    """A .safetensors file, whose tensors are read when they are used; a remote one's copy takes room until the last is gone.

    `Damaged` where a remote one's sha256 is not `digest`; what safetensors raises for what is no such file.
    """
    file = places.fetch(path, digest)
    try:
        return safetensors.safe_open(file, framework="pt")
    finally:
        if places.remote(path):
            file.unlink()


def metadata(path: Path) -> dict[str, str]:
    """What a .safetensors file says of itself; of a remote one, no more is fetched. What is raised, as in `open_tensors`."""
    if not places.remote(path):
        return open_tensors(path).metadata() or {}
    length = int.from_bytes(path.read_bytes(0, 8), "little")
    header = decode(path.read_bytes(8, 8 + length) if length < MOST else b"", dict[str, Any], path)
    found: dict[str, str] = fits(header.get("__metadata__", {}), dict[str, str])
    return found
