"""The original's checkpoint files, read without executing anything, and written whole.

model%06d.pt  ema_RATE_%06d.pt            state dicts
opt%06d.pt                                AdamW's state; of a run in fp16, that of one flat parameter (guided-diffusion: of two)
iddpm%06d.json  iddpm%06d.safetensors     ours, beside them: what an exact resume needs besides, and a digest of each file

The number is the optimizer steps tried. In files that the original wrote, it is one less but for the run's last, or what a
user renamed them to: there the count comes from the optimizer's state.
"""

import errno
import json
import re
import zipfile
from collections.abc import Iterable, Mapping
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
from iddpm.interop.openai.formats.weights import Shapes, check_fit, network_shapes, shapes_of, whose
from iddpm.parallel import processes
from iddpm.records import decode
from iddpm.store.checkpoint import RunState, Saved
from iddpm.store.files import Entry
from iddpm.store.remote import replace, sha256, write_file
from iddpm.store.weights import Weights, require_finite

# ---- reading a file

ZIP, OLD = b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # how what torch.save writes begins: since 1.6, and before


def load(path: Path) -> Any:
    """What torch.save wrote: tensors, mapped from the file rather than read, and plain values.

    UserError where there is no such file, it is cut short, no file of torch.save, or holds objects of other kinds.
    """
    if not path.is_file():
        raise UserError(f"{path}: {'that is a folder' if path.is_dir() else 'there is no such file'}")
    with open(path, "rb") as file:
        start = file.read(len(OLD))
    if not start:
        raise UserError(f"{path} is empty")
    if not start.startswith(ZIP) and start != OLD[: len(start)]:
        fix = ": it is a pickle; iddpm import reads those of EDM" if start[:1] == OLD[:1] else ""
        raise UserError(f"{path} is no file of torch.save{fix}")
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


WRAPPERS = ("module.", "_orig_mod.", "model.", "ema_model.")  # of DistributedDataParallel, torch.compile, Lightning, averages


def unwrapped(found: Any, path: Path) -> Any:
    """The weights in what others keep beside them, as {epoch, state_dict}; UserError where there are several sets of weights."""
    sets = [k for k, v in found.items() if isinstance(v, dict) and v and all(isinstance(t, Tensor) for t in v.values())]
    if len(sets) > 1:
        if kind := whose(str(name) for k in sets for name in found[k]):
            raise UserError(f"{path} is of {kind}")
        raise UserError(
            f"{path} holds several sets of weights, {', '.join(map(repr, sets))}: save the one to take by itself, "
            f"torch.save(torch.load(FILE)[{sets[-1]!r}], NEW)"
        )
    return found[sets[0]] if sets else found


def bare(names: Iterable[Any]) -> dict[Any, str]:
    """Names of weights, and these without what wrappers put in front of all; of a file with an average, the average's alone."""
    kept = {name: str(name) for name in names}
    kept = {name: short for name, short in kept.items() if short.startswith("ema_model.")} or kept
    while wrapper := next((w for w in WRAPPERS if all(short.startswith(w) for short in kept.values())), ""):
        kept = {name: short.removeprefix(wrapper) for name, short in kept.items()}
    return kept


def read(path: Path) -> dict[str, Tensor]:
    """The weights of a file, float32, by name in their order; UserError where it holds something else."""
    found = load(path)
    if isinstance(found, dict) and {"state", "param_groups"} <= set(found):
        model = f"model{digits}.pt" if (digits := name_of(path)["digits"]) else "a model's file"
        raise UserError(f"{path} is an optimizer's state and holds no weights: give {model}, or an average (ema_...)")
    if not isinstance(found, dict) or not found:
        raise UserError(f"{path} holds no weights but a {type(found).__name__}")
    found = unwrapped(found, path)
    if odd := next((k for k, v in found.items() if not isinstance(v, Tensor)), None):
        mend = f"; if that is the weights, save it by itself: torch.save(torch.load(FILE)[{odd!r}], NEW)"
        raise UserError(
            f"{path} holds no weights alone: {odd!r} in it is a {type(found[odd]).__name__}"
            + (mend if isinstance(found[odd], dict) else "")
        )
    return floats({short: found[name] for name, short in bare(found).items()}, path)


def floats(named: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Weights in float32; UserError where a name or a tensor is none of a network's."""
    if odd := next((name for name in named if len(name) > 200 or not name.isprintable()), None):
        raise UserError(f"{path} holds weights of a name that none has, {odd[:40]!a}: it is damaged, or no network's")
    if odd := next((name for name, t in named.items() if not _plain(t)), None):
        raise UserError(
            f"{path}: {odd!r} is sparse, quantised, complex, of whole numbers or empty, as no network of the original is"
        )
    return {name: t.float() for name, t in named.items()}


def _plain(t: Tensor) -> bool:
    """Whether a tensor holds its numbers, one by one, and no whole ones."""
    held = t.layout == torch.strided and not (t.is_nested or t.is_quantized or t.is_meta)
    return held and t.is_floating_point() and t.numel() > 0


def read_optimizer(path: Path, shapes: Shapes) -> tuple[dict[str, Tensor], int]:
    """AdamW's state for parameters of these shapes, as NAME.SLOT, and how many updates it made; UserError where it is not."""
    return slots_of(load(path), shapes, str(path))


# ---- which files belong together

NAME = re.compile(r"(?:.*model|ema_(?P<rate>.+)_|(?P<optimizer>opt))(?P<digits>\d+)\.pt$")


class Record(NamedTuple):
    """Our own file beside the original's: what it is of, and size and digest of each of them."""

    path: Path
    config: Config
    state: dict[str, Any]
    files: dict[str, Entry]


class RecordFile(TypedDict):
    """The same, as JSON."""

    config: dict[str, Any]
    state: RunState
    files: dict[str, Entry]


class Family(NamedTuple):
    """The files of one moment of a run, as far as they are there."""

    model: Path
    digits: str  # of their names; "" where nothing says
    averages: dict[float, Path]
    optimizer: Path | None
    record: Record | None


def name_of(path: PurePath) -> dict[str, str]:
    """What a file's name says, "" where it does not: `rate` of an average, `digits` of the number, whether an `optimizer`."""
    match = NAME.match(path.name)
    return match.groupdict("") if match else dict.fromkeys(NAME.groupindex, "")


def family(path: Path) -> Family:
    """The files beside a model's, or beside an average's, whose model's file must be there.

    Where the name has no number, the folder's only optimizer says it. UserError where a file is missing, or a choice is open.
    """
    if not path.exists():
        raise UserError(f"{path}: there is no such file")
    name = name_of(path)
    if name["rate"]:
        model = path.with_name(f"model{name['digits']}.pt")
        if not model.exists():
            raise UserError(f"{model.name} is missing beside {path}: without it, these averages cannot be trained on")
        return family(model)
    if name["optimizer"]:
        read(path)  # raises: it is no model
    optimizers = {name_of(p)["digits"]: p for p in sorted(path.parent.glob("opt*.pt"))}
    if not name["digits"] and len(optimizers) > 1:
        names = ", ".join(p.name for p in [*optimizers.values()][:3])
        raise UserError(f"{path}: which optimizer belongs to it, {names}? rename it as theirs, model%06d.pt")
    digits = name["digits"] or next(iter(optimizers), "")
    averages = {name_of(p)["rate"]: p for p in sorted(path.parent.glob(f"ema_*_{digits}.pt")) if digits}
    rates = {float(rate): p for rate, p in averages.items() if rate}
    return Family(path, digits, rates, optimizers.get(digits), record_of(path))


def read_averages(kin: Family, rates: Iterable[float]) -> dict[float, dict[str, Tensor]]:
    """The averages of these rates; UserError where one is missing."""
    for rate in rates:
        if rate not in kin.averages:
            name = f"ema_{rate}_{kin.digits}.pt"
            raise UserError(f"{name} is missing beside {kin.model}: the average of --ema_rate {rate} cannot go on")
    return {rate: read(kin.averages[rate]) for rate in rates}


def record_of(path: Path) -> Record | None:
    """Our own file that holds the digest of a model's or an average's file, if there is one; UserError where it is damaged."""
    record = path.with_name(f"iddpm{name_of(path)['digits']}.json")
    if not record.exists():
        return None
    try:
        found = decode(record.read_bytes(), RecordFile, record)
    except OSError as e:
        raise UserError(f"{record}: {reason(e)}") from None
    except UserError:
        raise UserError(f"{record} is damaged: delete it to read the files beside it as the original's") from None
    if path.name not in found["files"]:
        return None
    return Record(record, Config.from_json(json.dumps(found["config"]), str(record)), dict(found["state"]), found["files"])


# ---- a run's checkpoints


def load_run(path: Path, config: Config | None = None) -> tuple[Saved, Config | None]:
    """All of a run at the moment of a model's (or an average's) file, to go on from; and its config, if it is one of ours.

    Averages of the rates of `config`, or else all that are there. Of the original's files, the position in the data is the
    updates times the config's batch. UserError naming what is missing or damaged: nothing is left out or begun anew.
    """
    kin = family(path)
    record, law = kin.record, dict[str, Tensor]()
    if record:
        for name, known in record.files.items():
            file = record.path.with_name(name)
            if not file.exists():
                raise UserError(f"{file} is missing")
            if PurePath(name).name != name or known != (file.stat().st_size, sha256(file)):
                raise UserError(f"{file} is damaged")
        law = load_file(record.path.with_suffix(".safetensors")) if record.state.get("law") else {}
    weights, slots, updates = read(kin.model), dict[str, Tensor](), 0
    if kin.optimizer:
        slots, updates = read_optimizer(kin.optimizer, shapes_of(weights))
    elif not (record and record.state.get("weights_only")):
        name = f"opt{kin.digits or '*'}.pt"
        raise UserError(f"{name} is missing beside {path}: without it, training cannot go on from there")
    settled = config or (record.config if record else None)
    averages = read_averages(kin, ema_rates(settled.train) if settled else kin.averages)
    # What the original's files do not tell is as if the run had been at these settings all along.
    counts = dict(step=updates, images=updates * config.train.batch_size if config else 0, ema_updates=updates)
    rest = dict[str, Any](skipped=0, skipped_in_a_row=0, lg_loss_scale=0.0, law=[])
    state = record.state if record else rest | counts
    slots |= {f"law.{name}": value for name, value in law.items()}
    return Saved(state["step"], weights, averages, slots, state), record.config if record else None


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
    name = name_of(path)
    if record := record_of(path):
        config = config.updated({"classes": record.config.data.classes, "rule": record.config.data.rule})
    about = dict(step=int(name["digits"] or 0), ema_rate=float(name["rate"] or 0))
    return Weights(path, require_finite(tensors, path), config, about)


def save_run(folder: Path, config: Config, saved: Saved) -> Path:
    """Write a state's files, each aside, flushed and renamed, the record with the digests of all of them last.

    Returns the model's file; OSError on a full disk. Weights without an optimizer (`state["weights_only"]`) get no opt file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shapes = network_shapes(config)
    digits = f"{saved.step:06d}"
    contents: dict[str, Any] = {f"model{digits}.pt": ordered(saved.weights, shapes)}
    for rate, average in saved.averages.items():
        contents[f"ema_{rate}_{digits}.pt"] = ordered(average, shapes)
    if not saved.state.get("weights_only"):
        contents[f"opt{digits}.pt"] = optimizer_file(saved, config, shapes)
    record = folder / f"iddpm{digits}.json"
    # A kill between two files leaves no record, so that a half-written checkpoint is never taken for ours.
    record.unlink(missing_ok=True)  # of a run that was here before: its digests are of other files
    for name, content in contents.items():
        save(folder / name, content)
    if law := {name: saved.optimizer[f"law.{name}"] for name in saved.state.get("law", [])}:
        name = f"iddpm{digits}.safetensors"
        write_file(folder / name, safetensors.torch.save(law))
        contents[name] = law
    digests = {name: [(folder / name).stat().st_size, sha256(folder / name)] for name in contents}
    about = dict(iddpm=iddpm.__version__, config=json.loads(config.to_json()), state=saved.state, files=digests)
    write_file(record, json.dumps(about, indent=1))
    return folder / f"model{digits}.pt"


def ordered(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors in the original's order, each with its own memory: a view would take along all that it is a view of."""
    own = {}
    for name in names:
        t = tensors[name].detach().cpu().contiguous()
        own[name] = t if t.untyped_storage().nbytes() == t.nbytes else t.clone()
    return own


def numbered(folder: Path) -> list[Path]:
    """The models' files of a run's folder."""
    return [path for path in sorted(folder.glob("model*.pt")) if name_of(path)["digits"]]


def save(path: Path, content: Mapping[str, Any]) -> None:
    """torch.save in one step, in a folder that is made where it is missing; OSError on a full disk."""

    def write(file: Any) -> None:
        try:
            torch.save(dict(content), file)
        except RuntimeError as e:  # how torch tells of a full disk
            raise OSError(errno.EIO, f"cannot write: {str(e).splitlines()[0]}") from None

    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, write)
