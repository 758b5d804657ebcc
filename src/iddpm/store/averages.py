"""Snapshots of averages, RUN/averages/step_XXXXXXXX-WIDTH.safetensors, from which `iddpm ema` makes any other (EDM2).

They are kept by a rule of their own: at most so many of each width, evenly over the run. `--keep` does not count them.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import safetensors
from torch import Tensor

from iddpm.config import Config
from iddpm.errors import UserError, reason
from iddpm.records import Count, decode
from iddpm.store import files
from iddpm.store.remote import remote
from iddpm.store.weights import require_finite

NAME = re.compile(r"step_(\d{8,})-([0-9.]+)\.safetensors$")
FINEST = 32  # steps between snapshots at the beginning of a run


class Snapshot(NamedTuple):
    """A file that holds the average of a relative width after so many updates."""

    path: Path
    step: int
    width: float


class _About(TypedDict):
    step: Count
    updates: Count
    width: float


def interval(step: int, most: int) -> int:
    """The steps between the snapshots that are kept at a step: 32, or twice that as often as `most` of them ask for."""
    found = FINEST
    while step // found > most:
        found *= 2
    return found


def snapshots(run: Path) -> list[Snapshot]:
    """Those of a run, oldest first."""
    folder = run / "averages"
    found = ((path, NAME.search(path.name)) for path in (folder.glob("step_*.safetensors") if folder.is_dir() else ()))
    return sorted((Snapshot(path, int(m[1]), float(m[2])) for path, m in found if m), key=lambda s: (s.step, s.width))


def write(run: Path, config: Config, step: int, updates: int, widths: Mapping[float, Mapping[str, Tensor]], most: int) -> None:
    """Keep the averages of a step, each written aside and renamed, and delete those of steps that are not due any more."""
    for width, tensors in widths.items():
        write_weights(run / "averages" / f"step_{step:08d}-{width:g}.safetensors", tensors, config,
                      dict(step=step, updates=updates, width=width))  # fmt: skip
    due = interval(step, most)
    for old in snapshots(run):
        if old.step != step and old.step % due:
            old.path.unlink(missing_ok=True)


def write_weights(path: Path, tensors: Mapping[str, Tensor], config: Config, about: Mapping[str, Any]) -> None:
    """Write tensors as one .safetensors file with the config, aside and renamed; UserError where it cannot be written."""
    beside = path if remote(path) else path.with_name(f".{path.name}")
    try:
        files.write_tensors(beside, tensors, {"format": "pt", "iddpm": json.dumps(dict(about)), "config": config.to_json()})
        if beside != path:
            beside.rename(path)
    except OSError as e:
        beside.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({reason(e)})") from None


def forget(run: Path, step: int) -> None:
    """Delete those of later steps than the one that a run goes on from: they are made again."""
    for late in snapshots(run):
        if late.step > step:
            late.path.unlink(missing_ok=True)


class Kept(NamedTuple):
    """A snapshot that was read: after how many updates, and its tensors by name, each read when it is used."""

    updates: int
    config: Config
    tensors: safetensors.safe_open


def read(snapshot: Snapshot) -> Kept:
    """A snapshot; UserError where it is damaged."""
    try:
        file = files.open_tensors(snapshot.path)
        meta = file.metadata() or {}
        about = decode(meta["iddpm"], _About, f"the record in {snapshot.path}")
        config = Config.from_json(meta["config"], str(snapshot.path))
    except (safetensors.SafetensorError, OSError, KeyError) as e:
        raise UserError(f"{snapshot.path} is damaged ({e}): delete it, and the others stand for it") from None
    return Kept(about["updates"], config, file)


def combined(kept: Mapping[Snapshot, tuple[Kept, float]]) -> dict[str, Tensor]:
    """The sum of snapshots, each times its share; UserError where they do not hold the same finite tensors."""
    total: dict[str, Tensor] = {}
    for snapshot, (found, share) in kept.items():
        names = set(found.tensors.keys())
        if total and names != set(total):
            raise UserError(f"{snapshot.path} holds other tensors than the snapshots before it: delete it")
        for name in names:
            part = share * require_finite({name: found.tensors.get_tensor(name)}, snapshot.path)[name].double()
            total[name] = total[name] + part if name in total else part
    return {name: tensor.float() for name, tensor in total.items()}
