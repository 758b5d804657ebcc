"""torch's distributed checkpoint (DCP) over safetensors: who saves which part of a tensor, and who needs which part of a file.

A tensor is named GROUP:KEY. A group is one file, GROUP.safetensors, where its tensors are whole; else each process has its
parts in GROUP.rankNNNNN.safetensors, whose metadata holds, under "parts", [offset, shape of the whole] of each. DCP plans; its
pickles stay on the wire between the processes: nothing executable is written or read.
"""

import json
import re
import warnings
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from iddpm.errors import UserError
from iddpm.store import files as storage

FILE = re.compile(r"(.+?)(?:\.rank(\d+))?\.safetensors")


class Part(NamedTuple):
    """A part of a tensor, on the CPU, with its place in the whole."""

    name: str
    tensor: Tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]


def group(name: str) -> str:
    return name.split(":", 1)[0]


def key(name: str) -> str:
    return name.split(":", 1)[1]


# ---- saving: a copy in memory


class _Memory(dcp.StorageWriter):
    """A storage that keeps copies in memory, pinned and used again and again where the tensors are on a GPU."""

    def __init__(self, buffers: dict[str, Tensor]):
        self.parts: list[Part] = []
        self._buffers = buffers

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> "Future[list[WriteResult]]":
        for item in plan.items:
            assert item.type != WriteItemType.BYTE_IO and item.tensor_data, item.index
            data, name = item.tensor_data, item.index.fqn
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor)
            copy = self._copy(name, tensor.detach())
            self.parts.append(Part(name, copy, tuple(data.chunk.offsets), tuple(data.size)))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        return done

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.device.type != "cuda":
            return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
        if name not in self._buffers:
            self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return self._buffers[name].copy_(tensor, non_blocking=True)

    def finish(self, metadata: Metadata, results: Any) -> None: ...

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def stage(tensors: Mapping[str, Tensor], alone: bool, buffers: dict[str, Tensor]) -> list[Part]:
    """Copies of those parts of the tensors, plain or sharded, that this process is to save; all processes call it together.

    What several hold, the first of them saves. `buffers` keeps pinned memory from one call to the next.
    """
    memory = _Memory(buffers)
    with _quiet():
        planner = dcp.DefaultSavePlanner(flatten_state_dict=False, dedup_save_to_lowest_rank=True)
        dcp.save(dict(tensors), storage_writer=memory, planner=planner, no_dist=alone)
    return memory.parts


# ---- writing and putting together


def write(folder: Path, parts: Iterable[Part], rank: int | None, about: Mapping[str, str]) -> dict[str, storage.Entry]:
    """Write a process's parts, a file for each group; whole tensors where there is no rank. Returns what was written."""
    groups: dict[str, list[Part]] = {}
    for part in parts:
        groups.setdefault(group(part.name), []).append(part)
    entries = {}
    for name, members in groups.items():
        file = f"{name}.safetensors" if rank is None else f"{name}.rank{rank:05d}.safetensors"
        places = {key(part.name): [part.offset, part.shape] for part in members}
        metadata = dict(about) if rank is None else {**about, "parts": json.dumps(places)}
        tensors = {key(part.name): part.tensor for part in members}
        entries[file] = storage.write_tensors(folder / file, tensors, metadata, tensors.__getitem__)
    return entries


def assemble(folder: Path, name: str, about: Mapping[str, str]) -> tuple[dict[str, storage.Entry], list[str]]:
    """Put the parts of a group together, a tensor at a time: what was written, and the names of the files now deleted."""
    held = _Held(folder, name)
    like = {key(n): torch.empty(m.size, dtype=m.properties.dtype, device="meta") for n, m in held.tensors.items()}
    with storage.Reader() as reader:

        def get(k: str) -> Tensor:
            whole = torch.empty(like[k].shape, dtype=like[k].dtype)
            for chunk in held.tensors[f"{name}:{k}"].chunks:
                window = tuple(slice(a, a + n) for a, n in zip(chunk.offsets, chunk.sizes))
                whole[window] = reader.read(held.files[MetadataIndex(f"{name}:{k}", chunk.offsets)], k)
            return whole

        entries = {f"{name}.safetensors": storage.write_tensors(folder / f"{name}.safetensors", like, about, get)}
    for path in held.paths:
        path.unlink()
    return entries, [path.relative_to(folder).as_posix() for path in held.paths]


# ---- loading


class _Held:
    """What the files of a folder hold: of each tensor its type, shape and parts, and which file has which part."""

    def __init__(self, folder: Path, only: str = ""):
        self.tensors: dict[str, TensorStorageMetadata] = {}
        self.files: dict[MetadataIndex, Path] = {}
        self.paths: list[Path] = []
        for path in sorted(folder.rglob("*.safetensors")):
            match = FILE.fullmatch(path.relative_to(folder).as_posix())
            assert match
            if only in ("", match[1]):
                self._take(path, match[1])

    def _take(self, path: Path, name: str) -> None:
        self.paths.append(path)
        header = storage.read_header(path)
        places = json.loads(header.metadata.get("parts", "{}"))
        for k, tensor in header.tensors.items():
            offset, shape = places.get(k, [[0] * tensor.dim(), tensor.shape])
            whole = f"{name}:{k}"
            if whole not in self.tensors:
                properties = TensorProperties(dtype=tensor.dtype)
                self.tensors[whole] = TensorStorageMetadata(properties, torch.Size(shape), [])
            if tensor.numel():  # an empty part has the offset of a neighbour
                self.tensors[whole].chunks.append(ChunkStorageMetadata(torch.Size(offset), tensor.shape))
                self.files[MetadataIndex(whole, offset)] = path


class _Files(dcp.StorageReader):
    """A folder of .safetensors files as a storage of DCP: reads of each file only what a plan asks for."""

    def __init__(self, held: _Held):
        self.held = held

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(dict(self.held.tensors))

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> "Future[None]":
        with storage.Reader() as reader:
            for item in plan.items:
                name = item.storage_index.fqn
                path = self.held.files[MetadataIndex(name, item.storage_index.offset)]
                window = reader.read(path, key(name), tuple(item.storage_offsets), tuple(item.lengths))
                planner.resolve_tensor(item).detach().copy_(window)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def names(folder: Path) -> list[str]:
    """The tensors of a folder."""
    return list(_Held(folder).tensors)


def fill(folder: Path, targets: Mapping[str, Tensor]) -> None:
    """Read tensors, plain or sharded in any way, in place; each process reads what it needs, by itself.

    UserError where one is not there or has another shape.
    """
    held = _Held(folder)
    for name, target in targets.items():
        if name not in held.tensors:
            raise UserError(f"{folder} holds no {key(name)} in {group(name)}")
        if held.tensors[name].size != target.shape:
            shapes = f"{tuple(held.tensors[name].size)}, not {tuple(target.shape)}"
            raise UserError(f"{folder}: {key(name)} in {group(name)} has the shape {shapes}")
    with _quiet():
        dcp.load(dict(targets), storage_reader=_Files(held), planner=dcp.DefaultLoadPlanner(False, False), no_dist=True)


def load(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, whole."""
    held = _Held(folder).tensors
    whole = {name: torch.empty(m.size, dtype=m.properties.dtype) for name, m in held.items()}
    fill(folder, whole)
    return whole


@contextmanager
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # that is what no_dist means
        yield
