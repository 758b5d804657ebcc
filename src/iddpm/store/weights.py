"""One file of weights, enough to sample: found in a run, a checkpoint or alone, verified, and finite."""

from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor

from iddpm.config import Config, ema_rates
from iddpm.errors import UserError
from iddpm.records import Count, decode
from iddpm.store import files as storage
from iddpm.store import remote as places
from iddpm.store.checkpoint import newest
from iddpm.store.files import Step, verify


class About(Step, total=False):
    """Where weights come from."""

    images: Count
    ema_rate: float
    ema_std: float
    time: str
    iddpm: str
    torch: str
    python: str


PATIENCE = 10  # tries to read a run whose trainer deletes the checkpoint that is being read


class Weights(NamedTuple):
    """One file of weights, enough to sample: tensors, the run's config, and where they come from."""

    path: Path
    tensors: dict[str, Tensor]
    config: Config
    about: dict[str, Any]
    digest: str = ""  # sha256 of the file, where a manifest vouches for it


def read_weights(source: Path, step: int | None = None, ema_rate: float | None = None) -> Weights:
    """Weights of a run folder (its newest checkpoint, or `step`), a checkpoint folder, or a .safetensors file.

    From a folder, the averaged weights of the first rate unless `ema_rate` names another; 0 means the raw weights.
    UserError where there is nothing to read, the file is foreign or cut short, or the rate was not kept.
    """
    for _ in range(PATIENCE):
        there = set(storage.step_dirs(source)) if source.is_dir() else set()
        try:
            return _read_weights(source, step, ema_rate)
        except (OSError, UserError):  # a trainer may have pruned what was being read
            if step is not None or not there - set(storage.step_dirs(source)):
                raise
    return _read_weights(source, step, ema_rate)


def _read_weights(source: Path, step: int | None, ema_rate: float | None) -> Weights:
    path, digest = source, ""
    if source.is_dir():
        own = storage.STEP_DIR.search(source.name)
        path = _weights_file(source if own else _checkpoint_of(source, step, ema_rate), ema_rate)
        if own and places.remote(source) and (fault := verify(source, path.name)):
            raise UserError(f"{source}: {fault}")
        if (not own or places.remote(path)) and (entry := storage.manifest(path.parent).get(path.name)):
            digest = entry.digest  # which was compared just now
    elif not source.exists():
        raise UserError(f"{source}: there is no such run or file")
    try:
        file = storage.open_tensors(path, digest)
        meta, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as e:
        raise UserError(f"{path} is damaged or no .safetensors file ({e})") from None
    if not {"iddpm", "config"} <= set(meta):
        raise UserError(f"{path} holds no iddpm config: it was not written by iddpm")
    about = decode(meta["iddpm"], About, f"the record in {path}")
    return Weights(path, require_finite(tensors, path), Config.from_json(meta["config"], str(path)), dict(about), digest)


def require_finite(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors themselves; UserError where one is not finite, as those of a run that diverged."""
    for name, tensor in tensors.items():
        # A sum is finite where all are, and five times as fast as a look at each, which only a sum that is not asks for.
        if tensor.is_floating_point() and not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
            raise UserError(f"{path} is not finite in {name}: it is of a run that diverged; take an earlier checkpoint")
    return tensors


def _checkpoint_of(run: Path, step: int | None, rate: float | None) -> Path:
    def check(folder: Path) -> str | None:
        """As `verify`; of a remote checkpoint, no more is fetched than the weights asked for."""
        if not places.remote(folder):
            return verify(folder)
        return verify(folder, storage.MANIFEST) or verify(folder, _weights_file(folder, rate).name)

    if step is not None:
        folder = storage.step_dir(run, step)
        if not folder.is_dir():
            have = ", ".join(str(storage.step_of(p)) for p in storage.step_dirs(run)) or "none"
            raise UserError(f"{run} has no checkpoint of step {step}; it has: {have}")
        if fault := check(folder):
            raise UserError(f"{folder}: {fault}; take another with --checkpoint_step")
        return folder
    found, skipped = newest(run, check)
    if found is None:
        raise UserError(f"{run} holds no complete checkpoint{'; ' + skipped[0] if skipped else ''}")
    return found


def _weights_file(folder: Path, rate: float | None) -> Path:
    path = folder / "weights.safetensors"
    if rate == 0:
        return path
    try:
        rates = ema_rates(Config.from_json(storage.metadata(path)["config"], str(folder)).train)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as e:
        raise UserError(f"{path} is damaged or missing ({e})") from None
    if rate is not None and rate not in rates:
        raise UserError(f"--ema_rate {rate}: this run kept {', '.join(map(str, rates)) or 'none'}, and 0 for the raw weights")
    chosen = rate if rate is not None else next(iter(rates), 0)
    return folder / f"weights-ema-{chosen}.safetensors" if chosen else path
