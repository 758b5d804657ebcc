"""The tensors of a checkpoint in .safetensors files: which process saves which part, and who reads what of which file.

A tensor is named GROUP:KEY. A group is one file, GROUP.safetensors, where its tensors are whole; else each process has its
parts in GROUP.rankNNNNN.safetensors, whose metadata holds, under "parts", [offset, shape of the whole] of each. Every process
knows by itself what it saves and what it needs: nothing is planned together, and nothing executable is written or read.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from iddpm.errors import UserError
from iddpm.parallel import shard
from iddpm.records import Count, decode
from iddpm.store import files as storage

FILE = re.compile(r"(.+?)(?:\.rank(\d+))?\.safetensors")


class Part(NamedTuple):
    """A part of a tensor, on the CPU, with its place in the whole."""

    name: str
    tensor: Tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]


class Layout(NamedTuple):
    """Where a tensor lies in the files of a folder: each chunk is a file, an offset in the whole, and a size."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: list[tuple[Path, tuple[int, ...], tuple[int, ...]]]


# ---- saving


def stage(tensors: Mapping[str, Tensor], buffers: dict[str, Tensor] | None) -> list[Part]:
    """Those parts of the tensors, plain or sharded, that this process is to save: of what several hold, the first's.

    With `buffers` they are copies, and training may go on; the buffers keep pinned memory from one call to the next. Without,
    what is on the CPU is not copied.
    """
    parts = []
    for name, tensor in tensors.items():
        own, offset, leads = shard.placed(tensor.detach())
        if leads and (own.numel() or not tensor.numel()):
            copy = own.cpu() if buffers is None else _copied(own, name, buffers)
            parts.append(Part(name, copy, offset, tuple(tensor.shape)))
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # the copies are made meanwhile, all at once
    return parts


def _copied(tensor: Tensor, name: str, buffers: dict[str, Tensor]) -> Tensor:
    if tensor.device.type != "cuda":
        return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
    if name not in buffers:
        buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return buffers[name].copy_(tensor, non_blocking=True)


def write(
    folder: Path, parts: Iterable[Part], rank: int | None, about: Callable[[str], Mapping[str, str]]
) -> dict[str, storage.Entry]:
    """Write a process's parts, a file for each group with the metadata about(group); without a rank, they are whole tensors.

    Returns an entry for each file; OSError on a full disk.
    """
    groups: dict[str, dict[str, Part]] = {}
    for part in parts:
        group, _, key = part.name.partition(":")
        groups.setdefault(group, {})[key] = part
    entries = {}
    for group, members in groups.items():
        file = f"{group}.safetensors" if rank is None else f"{group}.rank{rank:05d}.safetensors"
        places = {key: [part.offset, part.shape] for key, part in members.items()}
        metadata = {**about(group), **({} if rank is None else {"parts": json.dumps(places)})}
        tensors = {key: part.tensor for key, part in members.items()}
        entries[file] = storage.write_tensors(folder / file, tensors, metadata, tensors.__getitem__)
    return entries


def assemble(folder: Path, group: str, about: Mapping[str, str]) -> tuple[dict[str, storage.Entry], list[str]]:
    """Put the parts of a group together, a tensor at a time: what was written, and the names of the files now deleted."""
    held = {name.partition(":")[2]: layout for name, layout in layouts(folder, group).items()}
    used = sorted((folder / group).parent.glob(f"{Path(group).name}.rank*.safetensors"))
    like = {key: torch.empty(layout.shape, dtype=layout.dtype, device="meta") for key, layout in held.items()}
    file = f"{group}.safetensors"
    with storage.Reader() as reader:
        entry = storage.write_tensors(folder / file, like, about, lambda key: _whole(reader, key, held[key]))
    for path in used:
        path.unlink()
    return {file: entry}, [path.relative_to(folder).as_posix() for path in used]


# ---- loading


def layouts(folder: Path, only: str = "") -> dict[str, Layout]:
    """The tensors of a folder, or of one of its groups, by name."""
    found: dict[str, Layout] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        match = FILE.fullmatch(path.relative_to(folder).as_posix())
        assert match
        if only not in ("", match[1]):
            continue
        metadata, tensors = storage.read_header(path)
        places = decode(metadata.get("parts", "{}"), dict[str, tuple[list[Count], list[Count]]], path)
        for key, tensor in tensors.items():
            offset, shape = places.get(key, ([0] * tensor.dim(), list(tensor.shape)))
            layout = found.setdefault(f"{match[1]}:{key}", Layout(tensor.dtype, tuple(shape), []))
            if tensor.numel():
                layout.chunks.append((path, tuple(offset), tuple(tensor.shape)))
    return found


def fill(folder: Path, targets: Mapping[str, Tensor]) -> None:
    """Read tensors, plain or sharded in any way, in place; each process reads what it needs, by itself.

    UserError where one is not there or has another shape.
    """
    held = layouts(folder)
    for name, target in targets.items():
        group, _, key = name.partition(":")
        if name not in held:
            raise UserError(f"{folder} holds no {key} in {group}")
        if held[name].shape != target.shape:
            shapes = f"{held[name].shape}, not {tuple(target.shape)}"
            raise UserError(f"{folder}: {key} in {group} has the shape {shapes}")
    with storage.Reader() as reader:
        for name, target in targets.items():
            own, offset, _ = shard.placed(target.detach())
            _read(reader, name.partition(":")[2], held[name], own, offset)


def load(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, whole."""
    with storage.Reader() as reader:
        return {name: _whole(reader, name.partition(":")[2], layout) for name, layout in layouts(folder).items()}


def _whole(reader: storage.Reader, key: str, layout: Layout) -> Tensor:
    whole = torch.empty(layout.shape, dtype=layout.dtype)
    _read(reader, key, layout, whole, (0,) * whole.dim())
    return whole


def _read(reader: storage.Reader, key: str, layout: Layout, target: Tensor, offset: tuple[int, ...]) -> None:
    """Fill a target that begins at an offset in the whole from the chunks that it overlaps; they must cover it."""
    missing = target.numel()
    for path, begin, size in layout.chunks:
        low = [max(a, b) for a, b in zip(offset, begin)]
        high = [min(a + n, b + m) for a, n, b, m in zip(offset, target.shape, begin, size)]
        shape = tuple(b - a for a, b in zip(low, high))
        if all(n > 0 for n in shape) and target.numel():
            window = reader.read(path, key, tuple(a - b for a, b in zip(low, begin)), shape)
            target[tuple(slice(a - b, a - b + n) for a, b, n in zip(low, offset, shape))].copy_(window)
            missing -= math.prod(shape)
    if missing > 0:
        raise UserError(f"the files beside {layout.chunks[0][0] if layout.chunks else key} hold but a part of {key}")
