"""The tensors of a checkpoint in .safetensors files: which process saves which part, and who reads what of which file.

A tensor is named GROUP:KEY. A group is one file, GROUP.safetensors, where its tensors are whole; else each process has its
parts in GROUP.rankNNNNN.safetensors, whose metadata holds, under "parts", [offset, shape of the whole] of each. Every process
knows by itself what it saves and what it needs: nothing is planned together, and nothing executable is written or read.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from iddpm.errors import UserError, readable
from iddpm.parallel import shard
from iddpm.records import Count, decode
from iddpm.store import files as storage
from iddpm.store.files import Entry

FILE = re.compile(r"(.+?)(?:\.rank\d+)?\.safetensors")


class Part(NamedTuple):
    """A part of a tensor, on the CPU, with its place in the whole."""

    tensor: Tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]


Groups = dict[str, dict[str, Part]]  # by group and key


# ---- saving


def stage(tensors: Mapping[str, Tensor], buffers: dict[str, Tensor] | None) -> Groups:
    """Those parts of the tensors, plain or sharded, that this process is to save: of what several hold, the first's.

    With `buffers` they are copies, and training may go on; the buffers keep pinned memory from one call to the next. Without,
    what is on the CPU is not copied.
    """
    groups: Groups = {}
    for name, tensor in tensors.items():
        own, offset, leads = shard.placed(tensor.detach())
        if leads and (own.numel() or not tensor.numel()):
            group, key = name.split(":", 1)
            copy = own.cpu() if buffers is None else _copied(own, name, buffers)
            groups.setdefault(group, {})[key] = Part(copy, offset, tuple(tensor.shape))
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # the copies are made meanwhile, all at once
    return groups


def _copied(tensor: Tensor, name: str, buffers: dict[str, Tensor]) -> Tensor:
    if tensor.device.type != "cuda":
        return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
    if name not in buffers:
        buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return buffers[name].copy_(tensor, non_blocking=True)


def write(folder: Path, groups: Groups, rank: int | None, about: Callable[[str], dict[str, str]]) -> dict[str, Entry]:
    """Write a process's parts, a file for each group with the metadata about(group); without a rank, they are whole tensors.

    Returns an entry for each file; OSError on a full disk.
    """
    entries = {}
    for group, parts in groups.items():
        file, metadata = f"{group}.safetensors", about(group)
        if rank is not None:
            file = f"{group}.rank{rank:05d}.safetensors"
            metadata |= {"parts": json.dumps({key: [part.offset, part.shape] for key, part in parts.items()})}
        entries[file] = storage.write_tensors(folder / file, {key: part.tensor for key, part in parts.items()}, metadata)
    return entries


def assemble(folder: Path, entries: Mapping[str, Entry], group: str, about: Mapping[str, str]) -> dict[str, Entry]:
    """Put the parts of a group together in one file, a tensor at a time, and delete theirs; returns what the folder then has."""
    used = [name for name in entries if name.startswith(f"{group}.rank")]
    held = {name.split(":", 1)[1]: tensor for name, tensor in tensors(folder, {k: entries[k] for k in used}).items()}
    made = storage.write_tensors(folder / f"{group}.safetensors", held, about)
    for name in used:
        (folder / name).unlink()
    return {k: v for k, v in entries.items() if k not in used} | {f"{group}.safetensors": made}


# ---- loading


class Parts:
    """A tensor that lies in files in parts: tensor[()], or tensor[a slice for each dimension], reads those that it needs."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype):
        self.shape, self.dtype = torch.Size(shape), dtype
        self.parts: list[tuple[tuple[int, ...], Tensor]] = []  # with where each begins in the whole

    def __getitem__(self, window: tuple[slice, ...]) -> Tensor:
        spans = [range(n)[cut] for n, cut in zip(self.shape, window or [slice(None)] * len(self.shape))]
        out = torch.empty([len(span) for span in spans], dtype=self.dtype)
        for offset, part in self.parts:
            shared = [range(max(w.start, a), min(w.stop, a + n)) for w, a, n in zip(spans, offset, part.shape)]
            if all(shared):
                there = tuple(slice(both.start - a, both.stop - a) for both, a in zip(shared, offset))
                out[tuple(slice(both.start - w.start, both.stop - w.start) for both, w in zip(shared, spans))] = part[there]
        return out


def tensors(folder: Path, entries: Mapping[str, Entry] | None = None) -> dict[str, Tensor | Parts]:
    """The tensors of a checkpoint, or of some of its files, by name: maps of the files, which are read when they are used.

    UserError where a file is damaged, or a part is missing.
    """
    whole: dict[str, Tensor] = {}
    parts: dict[str, Parts] = {}
    for name, entry in (storage.manifest(folder) if entries is None else entries).items():
        if not (match := FILE.fullmatch(name)):
            continue
        with readable(folder / name, "is damaged", "bring it back from a copy, or delete it"):
            file = storage.open_tensors(folder / name, entry.digest)
            places = decode((file.metadata() or {}).get("parts", "{}"), dict[str, tuple[list[Count], list[Count]]], name)
            for key in file.keys():  # noqa: SIM118
                tensor, full = file.get_tensor(key), f"{match[1]}:{key}"
                if key not in places:
                    whole[full] = tensor
                    continue
                offset, shape = map(tuple, places[key])
                if not all(a + n <= most for a, n, most in zip(offset, tensor.shape, shape, strict=True)):
                    raise ValueError(f"a part of {key} lies outside")
                parts.setdefault(full, Parts(shape, tensor.dtype)).parts.append((offset, tensor))
    for full, held in parts.items():
        if sum(part.numel() for _, part in held.parts) < held.shape.numel():
            raise UserError(f"{folder} holds but a part of {full}")
    return {**whole, **parts}
