"""Checkpoints: complete or absent, verified when read, and nothing executable in them.

checkpoints/step_00001000/
    weights.safetensors  weights-ema-0.9999.safetensors     float32; config and provenance in the file's metadata
    state/optimizer.safetensors  state/state.json           what else a resumed run needs
    manifest.json                                           size and sha256 of each file, written last
"""

import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import iddpm
from iddpm.config import Config
from iddpm.errors import UserError

STEP_DIR = re.compile(r"step_(\d{8,})$")


class Saved(NamedTuple):
    """What a checkpoint holds. Averages are keyed by their rate."""

    step: int
    weights: dict[str, Tensor]
    averages: dict[float, dict[str, Tensor]]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def save(run: Path, config: Config, saved: Saved, keep: int = 0) -> Path:
    """Write checkpoints/step_N aside, flush, rename; then delete all but the newest `keep` (0: none). OSError on a full disk."""
    final = run / "checkpoints" / f"step_{saved.step:08d}"
    aside = final.with_name(f".{final.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    about = dict(step=saved.step, images=saved.state["images"], time=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                 iddpm=iddpm.__version__, torch=torch.__version__, python=platform.python_version())  # fmt: skip
    try:
        (aside / "state").mkdir(parents=True)
        _write(aside / "weights.safetensors", saved.weights, config, about)
        for rate, average in saved.averages.items():
            _write(aside / f"weights-ema-{rate}.safetensors", average, config, about | {"ema_rate": rate})
        _write(aside / "state" / "optimizer.safetensors", saved.optimizer, config, about)
        (aside / "state" / "state.json").write_text(json.dumps(saved.state))
        files = sorted(p for p in aside.rglob("*") if p.is_file())
        manifest = {str(p.relative_to(aside)): [p.stat().st_size, _sha256(p)] for p in files}
        (aside / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for path in [*files, aside / "manifest.json", aside / "state", aside]:
            _flush(path)
        shutil.rmtree(final, ignore_errors=True)  # only ever one that did not verify, or the very same step again
        aside.rename(final)
        _flush(final.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    for old in _steps(run)[:-keep] if keep else []:
        shutil.rmtree(old, ignore_errors=True)
    return final


class Folder:
    """The checkpoints of a run's folder, of which the newest `keep` stay (0: all)."""

    def __init__(self, run: Path, keep: int = 0):
        self.run, self.keep = run, keep

    def newest(self) -> tuple[Saved | None, list[str]]:
        """The newest state that verifies, and one line for each newer one that was passed over."""
        folder, passed_over = newest(self.run)
        return (load(folder) if folder else None), passed_over

    def save(self, config: Config, saved: Saved) -> Path:
        """Keep a state."""
        return save(self.run, config, saved, self.keep)


def newest(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and one line for each newer one that was passed over."""
    skipped: list[str] = []
    for folder in reversed(_steps(run)):
        if (fault := verify(folder)) is None:
            return folder, skipped
        skipped.append(f"passed over {folder.name}: {fault}")
    return None, skipped


def verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, (size, digest) in manifest.items():
            if (folder / name).stat().st_size != size or _sha256(folder / name) != digest:
                return f"{name} is damaged"
    except (OSError, ValueError) as e:
        return f"incomplete ({e})"
    return None


def load(folder: Path) -> Saved:
    """All of a verified checkpoint."""
    state = json.loads((folder / "state" / "state.json").read_text())
    averages = {}
    for path in folder.glob("weights-ema-*.safetensors"):
        averages[float(path.stem.removeprefix("weights-ema-"))] = load_file(path)
    weights, optimizer = load_file(folder / "weights.safetensors"), load_file(folder / "state" / "optimizer.safetensors")
    return Saved(state["step"], weights, averages, optimizer, state)


class Weights(NamedTuple):
    """One file of weights, enough to sample: tensors, the run's config, and where they come from."""

    path: Path
    tensors: dict[str, Tensor]
    config: Config
    about: dict[str, Any]


def read_weights(source: Path, step: int | None = None, ema_rate: float | None = None) -> Weights:
    """Weights of a run folder (its newest checkpoint, or `step`), a checkpoint folder, or a .safetensors file.

    From a folder, the averaged weights of the first rate unless `ema_rate` names another; 0 means the raw weights.
    UserError where there is nothing to read, the file is foreign or cut short, or the rate was not kept.
    """
    path = source
    if source.is_dir():
        path = _weights_file(source if STEP_DIR.search(source.name) else _checkpoint_of(source, step), ema_rate)
    elif not source.exists():
        raise UserError(f"{source}: there is no such run or file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as e:
        raise UserError(f"{path} is damaged or no .safetensors file ({e})") from None
    if "iddpm" not in meta:
        raise UserError(f"{path} holds no iddpm config: it was not written by iddpm")
    about = json.loads(meta["iddpm"])
    return Weights(path, tensors, Config.from_json(meta["config"], str(path)), about)


def _checkpoint_of(run: Path, step: int | None) -> Path:
    if step is not None:
        folder = run / "checkpoints" / f"step_{step:08d}"
        if not folder.is_dir():
            have = ", ".join(str(_step(p)) for p in _steps(run)) or "none"
            raise UserError(f"{run} has no checkpoint of step {step}; it has: {have}")
        if fault := verify(folder):
            raise UserError(f"{folder}: {fault}; take another with --checkpoint_step")
        return folder
    folder_, skipped = newest(run)
    if folder_ is None:
        raise UserError(f"{run} holds no complete checkpoint{'; ' + skipped[0] if skipped else ''}")
    return folder_


def _weights_file(folder: Path, rate: float | None) -> Path:
    if rate == 0:
        return folder / "weights.safetensors"
    config = Config.from_json(_metadata(folder / "weights.safetensors")["config"], str(folder))
    rates = [float(r) for r in config.train.ema_rate.split(",") if r.strip()]
    if rate is not None and rate not in rates:
        raise UserError(f"--ema_rate {rate}: this run kept {', '.join(map(str, rates)) or 'none'}, and 0 for the raw weights")
    chosen = rate if rate is not None else rates[0] if rates else 0
    return folder / (f"weights-ema-{chosen}.safetensors" if chosen else "weights.safetensors")


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (safetensors.SafetensorError, OSError) as e:
        raise UserError(f"{path} is damaged or missing ({e})") from None


def _steps(run: Path) -> list[Path]:
    folder = run / "checkpoints"
    return sorted((p for p in folder.glob("step_*") if STEP_DIR.search(p.name)), key=_step) if folder.is_dir() else []


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _write(path: Path, tensors: Mapping[str, Tensor], config: Config, about: Mapping[str, Any]) -> None:
    held = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    try:
        save_file(held, path, {"format": "pt", "iddpm": json.dumps(about), "config": config.to_json()})
    except safetensors.SafetensorError as e:  # it hides the OSError of a full disk
        raise OSError(f"cannot write {path}: {e}") from None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
