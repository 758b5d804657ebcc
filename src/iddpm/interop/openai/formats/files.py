"""The original's checkpoint files, read without executing anything, and written whole.

model%06d.pt  ema_RATE_%06d.pt            state dicts
opt%06d.pt                                AdamW's state; of a run in fp16, that of one flat parameter (guided-diffusion: of two)
iddpm%06d.json  iddpm%06d.safetensors     ours, beside them: what an exact resume needs besides, and a digest of each file

The number is the optimizer steps tried. In files that the original wrote, it is one less but for the run's last, or what a
user renamed them to: there the count comes from the optimizer's state.
"""

import json
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path, PurePath
from typing import Any, NamedTuple, TypedDict

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

import iddpm
from iddpm.config import Config, ema_rates
from iddpm.errors import UserError, reason
from iddpm.interop.openai.formats.optimizer import optimizer_file, slots_of
from iddpm.interop.openai.formats.weights import Shapes, check_fit, network_shapes, shapes_of
from iddpm.parallel import processes
from iddpm.records import decode
from iddpm.store.checkpoint import RunState, Saved
from iddpm.store.files import Entry
from iddpm.store.remote import flush, sha256
from iddpm.store.weights import Weights, require_finite

# ---- reading a file

ZIP, OLD = b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # how what torch.save writes begins: since 1.6, and before


def load(path: Path) -> Any:
    """What torch.save wrote: tensors, mapped from the file rather than read, and plain values.

    UserError where there is no such file, it is cut short, no file of torch.save, or holds objects of other kinds.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(len(OLD))
    except (FileNotFoundError, IsADirectoryError) as e:
        raise UserError(f"{path}: {'that is a folder' if path.is_dir() else 'there is no such file'}") from e
    if not start:
        raise UserError(f"{path} is empty")
    if not start.startswith(ZIP) and start != OLD[: len(start)]:
        raise UserError(f"{path} is no file of torch.save")
    if start.startswith(ZIP) and not zipfile.is_zipfile(path):  # its table of contents is at the end
        raise UserError(f"{path} is cut short")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=start.startswith(ZIP))
    except Exception as e:  # torch raises a handful of kinds
        if found := re.search(r"GLOBAL (\S+)", str(e)):
            raise UserError(
                f"{path} holds a Python object, {found[1]}, which could execute anything and is not read: "
                f"save the weights alone, torch.save(model.state_dict(), ...)"
            ) from None
        if isinstance(e, OSError):
            raise
        raise UserError(f"{path} is cut short or damaged ({str(e).splitlines()[0] if str(e) else 'it ends early'})") from None


def read(path: Path) -> dict[str, Tensor]:
    """The weights of a file, float32, by name in their order; UserError where it holds something else."""
    found = load(path)
    if isinstance(found, dict) and {"state", "param_groups"} <= set(found):
        match = OPTIMIZER.match(path.name)
        model = f"model{match[1]}.pt" if match else "a model's file"
        raise UserError(f"{path} is an optimizer's state and holds no weights: give {model}, or an average (ema_...)")
    if not isinstance(found, dict) or not found:
        raise UserError(f"{path} holds no weights but a {type(found).__name__}")
    if odd := next((k for k, v in found.items() if not isinstance(v, Tensor)), None):
        inner = isinstance(found[odd], dict)
        raise UserError(
            f"{path} holds no weights alone: {odd!r} in it is a {type(found[odd]).__name__}"
            + (f"; if that is the weights, save it by itself: torch.save(torch.load(FILE)[{odd!r}], NEW)" if inner else "")
        )
    if odd := next((k for k, t in found.items() if t.layout != torch.strided or t.is_quantized or t.is_complex()), None):
        raise UserError(f"{path}: {odd!r} is sparse, quantised or complex, as no network of the original has it")
    wrapped = all(str(name).startswith("module.") for name in found)  # by DistributedDataParallel
    named = {str(name).removeprefix("module." if wrapped else ""): t for name, t in found.items()}
    return {name: t.float() if t.is_floating_point() else t for name, t in named.items()}


def read_optimizer(path: Path, shapes: Shapes) -> tuple[dict[str, Tensor], int]:
    """AdamW's state for parameters of these shapes, as NAME.SLOT, and how many updates it made; UserError where it is not."""
    return slots_of(load(path), shapes, str(path))


# ---- which files belong together

MODEL, AVERAGE, OPTIMIZER = re.compile(r".*model(\d+)\.pt$"), re.compile(r"ema_(.+)_(\d+)\.pt$"), re.compile(r"opt(\d+)\.pt$")


class Family(NamedTuple):
    """The files of one moment of a run, as far as they are there."""

    model: Path
    digits: str  # of their names; "" where nothing says
    averages: dict[float, Path]
    optimizer: Path | None
    record: Path | None  # our own file


def family(path: Path) -> Family:
    """The files beside a model's, or beside an average's, whose model's file must be there.

    Where the name has no number, the folder's only optimizer says it. UserError where a file is missing, or a choice is open.
    """
    folder = path.parent
    if not path.exists():
        raise UserError(f"{path}: there is no such file")
    if average := AVERAGE.match(path.name):
        model = folder / f"model{average[2]}.pt"
        if not model.exists():
            raise UserError(f"{model.name} is missing beside {path}: without it, these averages cannot be trained on")
        return family(model)
    if OPTIMIZER.match(path.name):
        read(path)  # raises: it is no model
    digits = _digits(path)
    if not digits:
        found = sorted(folder.glob("opt*.pt"))
        if len(found) > 1:
            names = ", ".join(p.name for p in found[:3])
            raise UserError(f"{path}: which optimizer belongs to it, {names}? rename it as theirs, model%06d.pt")
        match = OPTIMIZER.match(found[0].name) if found else None
        digits = match[1] if match else ""
    if not digits:
        return Family(path, "", {}, None, None)
    averages = {}
    for other in sorted(folder.glob(f"ema_*_{digits}.pt")):
        if match := AVERAGE.match(other.name):
            averages[float(match[1])] = other
    optimizer = folder / f"opt{digits}.pt"
    return Family(path, digits, averages, optimizer if optimizer.exists() else None, record_of(path))


def number_of(path: Path) -> int:
    """The number in the name of a model's or an average's file, or 0."""
    return int(_digits(path) or 0)


def _digits(path: Path) -> str:
    match = AVERAGE.match(path.name) or MODEL.match(path.name)
    return match[match.re.groups] if match else ""


def read_averages(kin: Family, rates: Iterable[float]) -> dict[float, dict[str, Tensor]]:
    """The averages of these rates; UserError where one is missing."""
    for rate in rates:
        if rate not in kin.averages:
            name = f"ema_{rate}_{kin.digits}.pt"
            raise UserError(f"{name} is missing beside {kin.model}: the average of --ema_rate {rate} cannot go on")
    return {rate: read(kin.averages[rate]) for rate in rates}


def record_of(path: Path) -> Path | None:
    """Our own file that holds the digest of a model's or an average's file, if there is one."""
    record = path.with_name(f"iddpm{_digits(path)}.json")
    return record if record.exists() and path.name in _record(record)["files"] else None


def recorded(record: Path) -> Config:
    """The config in our own file."""
    return Config.from_json(json.dumps(_record(record)["config"]), str(record))


class Record(TypedDict):
    """Our own file beside the original's."""

    files: dict[str, Entry]
    state: RunState
    config: dict[str, Any]


def _record(path: Path) -> dict[str, Any]:
    try:
        return dict(decode(path.read_bytes(), Record, path))
    except OSError as e:
        raise UserError(f"{path}: {reason(e)}") from None
    except UserError:
        raise UserError(f"{path} is damaged: delete it to read the files beside it as the original's") from None


# ---- a run's checkpoints


def load_run(path: Path, config: Config | None = None) -> tuple[Saved, Config | None]:
    """All of a run at the moment of a model's (or an average's) file, to go on from; and its config, if it is one of ours.

    Averages of the rates of `config`, or else all that are there. Of the original's files, the position in the data is the
    updates times the config's batch. UserError naming what is missing or damaged: nothing is left out or begun anew.
    """
    kin = family(path)
    stored, law, state = None, dict[str, Tensor](), None
    if kin.record:
        found = _record(kin.record)
        for name, known in found["files"].items():
            file = kin.record.with_name(name)
            if not file.exists():
                raise UserError(f"{file} is missing")
            if PurePath(name).name != name or known != (file.stat().st_size, sha256(file)):
                raise UserError(f"{file} is damaged")
        stored, state = recorded(kin.record), found["state"]
        law = load_file(kin.record.with_suffix(".safetensors")) if state.get("law") else {}
    weights, slots, updates = read(kin.model), dict[str, Tensor](), 0
    if kin.optimizer:
        slots, updates = read_optimizer(kin.optimizer, shapes_of(weights))
    elif not (state and state.get("weights_only")):
        name = f"opt{kin.digits or '*'}.pt"
        raise UserError(f"{name} is missing beside {path}: without it, training cannot go on from there")
    settled = config or stored
    averages = read_averages(kin, ema_rates(settled.train) if settled else kin.averages)
    if state is None:  # the original's files: what they do not tell is as if the run had been at these settings all along
        images = updates * config.train.batch_size if config else 0
        state = dict(step=updates, images=images, skipped=0, skipped_in_a_row=0, ema_updates=updates, lg_loss_scale=0.0, law=[])
    return Saved(state["step"], weights, averages, slots | {f"law.{k}": v for k, v in law.items()}, state), stored


def models(folder: Path) -> list[Path]:
    """The model%06d.pt of a folder, by name."""
    return [p for p in sorted(folder.glob("model*.pt")) if re.fullmatch(r"model\d+\.pt", p.name)]


class Store:
    """The checkpoints of a run in the original's files. It goes on from the file `resume`, or else begins.

    `config` says which averages the run needs, and the batch by which the original's count of updates becomes one of images.
    """

    def __init__(self, folder: Path, resume: Path | None, config: Config):
        self.folder, self.resume, self.config = folder, resume, config

    def newest(self) -> tuple[Saved | None, list[str]]:
        """The state to go on from; nothing is ever passed over, since the file is named."""
        return (load_run(self.resume, self.config)[0] if self.resume else None), []

    def begin(self, config: Config, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> Path | None:
        """Keep a state, at once; the first process returns the model's file."""
        saved = Saved.of(tensors, state)
        path = save_run(self.folder, config, saved) if processes.rank() == 0 else None
        processes.barrier()
        return path

    def settle(self, wait: bool = False) -> None:
        """Nothing is ever under way."""

    def close(self) -> None: ...


def read_model(path: Path, config: Config) -> Weights:
    """The weights of a file for a config, with the names of the classes that a file of ours beside it holds.

    UserError where they do not fit, with the flags that would.
    """
    tensors = read(path)
    check_fit(shapes_of(tensors), config, str(path))
    average = AVERAGE.match(path.name)
    about = dict(step=number_of(path), ema_rate=float(average[1]) if average else 0)
    if record := record_of(path):
        stored = recorded(record)
        config = config.updated({"classes": stored.data.classes, "rule": stored.data.rule})
    return Weights(path, require_finite(tensors, path), config, about)


def save_run(folder: Path, config: Config, saved: Saved) -> Path:
    """Write a state's files, each aside, flushed and renamed, the record with the digests of all of them last.

    Returns the model's file; OSError on a full disk. Weights without an optimizer (`state["weights_only"]`) get no opt file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shapes = network_shapes(config)
    digits = f"{saved.step:06d}"
    contents: dict[str, Any] = {f"model{digits}.pt": _ordered(saved.weights, shapes)}
    for rate, average in saved.averages.items():
        contents[f"ema_{rate}_{digits}.pt"] = _ordered(average, shapes)
    if not saved.state.get("weights_only"):
        contents[f"opt{digits}.pt"] = optimizer_file(saved, config, shapes)
    record = folder / f"iddpm{digits}.json"
    # A kill between two files leaves no record, so that a half-written checkpoint is never taken for ours.
    record.unlink(missing_ok=True)  # of a run that was here before: its digests are of other files
    for name, content in contents.items():
        _write(folder / name, partial(torch.save, content))
    if law := {name: saved.optimizer[f"law.{name}"] for name in saved.state.get("law", [])}:
        name = f"iddpm{digits}.safetensors"
        _write(folder / name, lambda file: file.write(safetensors.torch.save(law)))
        contents[name] = law
    digests = {name: [(folder / name).stat().st_size, sha256(folder / name)] for name in contents}
    about = dict(iddpm=iddpm.__version__, config=json.loads(config.to_json()), state=saved.state, files=digests)
    _write(record, lambda file: file.write(json.dumps(about, indent=1).encode()))
    return folder / f"model{digits}.pt"


def _ordered(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors in the original's order, each with its own memory: a view would take along all that it is a view of."""
    own = {}
    for name in names:
        t = tensors[name].detach().cpu().contiguous()
        own[name] = t if t.untyped_storage().nbytes() == t.nbytes else t.clone()
    return own


def write_weights(path: Path, tensors: Mapping[str, Tensor], config: Config) -> None:
    """One file of weights, in the original's order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = _ordered(tensors, network_shapes(config))
    _write(path, partial(torch.save, content))


def _write(path: Path, write: Callable[[Any], Any]) -> None:
    """Write a file aside, flush it, rename it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except RuntimeError as e:  # how torch tells of a full disk
        raise OSError(f"cannot write {path}: {str(e).splitlines()[0]}") from None
    finally:
        aside.unlink(missing_ok=True)
    flush(path.parent)
