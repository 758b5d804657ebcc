"""Checkpoints: complete or absent, verified when read, and nothing executable in them.

checkpoints/step_00001000/
    weights.safetensors  weights-ema-0.9999.safetensors     float32; config and provenance in the file's metadata
    state/optimizer.safetensors                             with them, what DCP keeps of a run, by `shards`; of a sharded
                                                            run optimizer.rank00000.safetensors ..., a part each
    state/state.json                                        the numbers that a resumed run needs besides
    manifest.json                                           size and sha256 of each file, written last
"""

import json
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import safetensors
import torch
from torch import Tensor

import iddpm
from iddpm.config import Config
from iddpm.errors import UserError
from iddpm.parallel import processes, shard
from iddpm.store import files as storage
from iddpm.store import remote as places
from iddpm.store.files import STEP_DIR, Entry, verify
from iddpm.store.files import flush as _flush
from iddpm.store.files import sha256 as _sha256

if TYPE_CHECKING:
    from iddpm.store.shards import Part

__all__ = ["Folder", "Held", "Saved", "Weights", "_flush", "_sha256", "load", "newest", "read_weights", "save", "verify"]

WEIGHTS, AVERAGE, OPTIMIZER = "weights:", "weights-ema-{}:", "state/optimizer:"  # prefixes of a tensor's name, for iddpm.dcp


class Saved(NamedTuple):
    """What a checkpoint holds, all of it. Averages are keyed by their rate."""

    step: int
    weights: dict[str, Tensor]
    averages: dict[float, dict[str, Tensor]]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]

    @staticmethod
    def of(tensors: Mapping[str, Tensor], state: dict[str, Any]) -> "Saved":
        """From tensors by their names in a checkpoint."""
        groups: dict[str, dict[str, Tensor]] = {"weights": {}, "state/optimizer": {}}
        for name, tensor in tensors.items():
            group, key = name.split(":", 1)
            groups.setdefault(group, {})[key] = tensor
        averages = {float(k.removeprefix("weights-ema-")): v for k, v in groups.items() if k.startswith("weights-ema-")}
        return Saved(state["step"], groups["weights"], averages, groups["state/optimizer"], state)

    def tensors(self) -> dict[str, Tensor]:
        """By their names in a checkpoint."""
        named = {WEIGHTS + k: t for k, t in self.weights.items()} | {OPTIMIZER + k: t for k, t in self.optimizer.items()}
        return named | {AVERAGE.format(rate) + k: t for rate, kept in self.averages.items() for k, t in kept.items()}

    def names(self) -> list[str]:
        """What `fill` can read."""
        return list(self.tensors())

    def fill(self, targets: Mapping[str, Tensor]) -> None:
        """Write tensors into others, which may be sharded; UserError where one is missing."""
        own = self.tensors()
        for name, target in targets.items():
            if name not in own or own[name].shape != target.shape:
                raise UserError(f"the checkpoint of step {self.step} holds no {name.replace(':', ': ')} of this run's shape")
            shard.put(own[name], target)


class Held(NamedTuple):
    """A verified checkpoint on the disk, of which each process reads only what it needs."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])

    def names(self) -> list[str]:
        """What `fill` can read."""
        from iddpm.store import shards as dcp

        return dcp.names(self.folder)

    def fill(self, targets: Mapping[str, Tensor]) -> None:
        """Read tensors, which may be sharded, in place; UserError where one is missing. Of a remote one, no copy is left."""
        from iddpm.store import shards as dcp

        if places.remote(self.folder) and (fault := verify(self.folder)):  # each process has its own copy
            raise UserError(f"{self.folder}: {fault}")
        dcp.fill(self.folder, targets)
        places.forget(self.folder)


# ---- writing


class Draft:
    """A checkpoint in the making: every process writes its parts, then one puts it in its place. No process waits in here."""

    def __init__(self, run: Path, config: Config, state: Mapping[str, Any], sharded: bool = False):
        self.final = storage.step_dir(run, state["step"])
        self.folder = storage.aside(self.final)
        self.state, self.sharded = dict(state), sharded
        about = dict(step=state["step"], images=state["images"], time=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                     iddpm=iddpm.__version__, torch=torch.__version__, python=platform.python_version())  # fmt: skip
        self._about, self._config = about, config.to_json()

    def about(self, group: str) -> dict[str, str]:
        """The metadata of a group's file."""
        rate = {"ema_rate": float(group.removeprefix("weights-ema-"))} if group.startswith("weights-ema-") else {}
        return {"format": "pt", "iddpm": json.dumps(self._about | rate), "config": self._config}

    def write(self, parts: "Iterable[Part]", rank: int) -> dict[str, Entry]:
        """Write a process's parts; returns an entry for each file. OSError on a full disk."""
        from iddpm.store import shards as dcp

        groups: dict[str, list[Part]] = {}
        for part in parts:
            groups.setdefault(dcp.group(part.name), []).append(part)
        entries: dict[str, Entry] = {}
        for group, members in groups.items():
            entries |= dcp.write(self.folder, members, rank if self.sharded else None, self.about(group))
        return entries

    def commit(self, entries: Mapping[str, Entry]) -> Path:
        """Put the weights together where they are in parts, vouch for all files, and give the checkpoint its place."""
        from iddpm.store import shards as dcp

        entries = dict(entries)
        for group in sorted({name.split(".rank")[0] for name in entries if name.startswith("weights")} if self.sharded else ()):
            made, used = dcp.assemble(self.folder, group, self.about(group))
            entries = {k: v for k, v in entries.items() if k not in used} | made
        entries["state/state.json"] = storage.write_text(self.folder / "state" / "state.json", json.dumps(self.state))
        storage.commit(self.folder, self.final, entries)
        return self.final

    def discard(self) -> None:
        """Leave nothing behind."""
        storage.discard(self.folder)


def save(run: Path, config: Config, saved: Saved, keep: int = 0) -> Path:
    """Write checkpoints/step_N aside, flush, rename; then delete all but the newest `keep` (0: none). OSError on a full disk."""
    from iddpm.store.shards import Part

    held = {name: t.detach().cpu() for name, t in saved.tensors().items()}
    draft = Draft(run, config, saved.state)
    storage.fresh(draft.folder)
    try:
        path = draft.commit(draft.write([Part(n, t, (0,) * t.dim(), tuple(t.shape)) for n, t in held.items()], 0))
    except BaseException:
        draft.discard()
        raise
    storage.prune(run, keep, last=saved.step)
    return path


class _Job(NamedTuple):
    """A save under way: `entries` of this process's files while they are written, then None while the first process commits."""

    draft: Draft
    writing: bool
    future: "Future[Any]"


class Folder:
    """The checkpoints of a run's folder, of which the newest `keep` stay (0: all), every `keep_every`-th step's and the best.

    With `background`, `begin` returns when the state is copied in memory, and a thread writes it. The threads of several
    processes never speak to each other: what they have done is agreed on in `settle`, between two steps.
    """

    def __init__(self, run: Path, keep: int = 0, keep_every: int = 0, background: bool = False):
        self.run, self.keep, self.keep_every, self.background = run, keep, keep_every, background
        self._job: _Job | None = None
        self._buffers: dict[str, Tensor] = {}
        self._pool = ThreadPoolExecutor(1, "checkpoint")

    def newest(self) -> tuple[Held | None, list[str]]:
        """The newest state that verifies, and one line for each newer one that was passed over; the first process looks.

        It also clears away what saves cut short have left, and sets best.json right: the folder is this trainer's alone.
        """
        found: tuple[str | None, list[str], Any] = (None, [], None)
        if processes.rank() == 0:
            storage.sweep(self.run)
            folder, passed_over = newest(self.run)
            best = _state(folder).get("best") if folder else None
            if folder and (fault := storage.mend_best(self.run, best, storage.step_of(folder))):
                passed_over, best = [*passed_over, fault], None
            found = (folder.name if folder else None, passed_over, best)
        name, passed_over, best = processes.same(found)
        if name is None:
            return None, passed_over
        folder = self.run / "checkpoints" / name
        return Held(folder, _state(folder) | {"best": best}), passed_over

    def save(self, config: Config, saved: Saved) -> Path:
        """Keep a state, at once."""
        path = save(self.run, config, saved)
        self._tidy(saved.state)
        return path

    def _tidy(self, state: Mapping[str, Any]) -> None:
        """Name the best that a state in its place knows of; then delete the checkpoints that are not to be kept."""
        if state.get("best"):
            storage.name_best(self.run, state["best"])
        storage.prune(self.run, self.keep, self.keep_every, state["step"])

    def begin(self, config: Config, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path | None:
        """Copy a state, whose tensors may be sharded, and have it written; every process calls this.

        Waits for a save that is under way, and returns its path if it is new.
        """
        from iddpm.store import shards as dcp

        before = self.settle(wait=True)
        draft = Draft(self.run, config, state, any(map(shard.is_sharded, tensors.values())))
        rank, alone = processes.rank(), processes.world() == 1
        if rank == 0:
            storage.fresh(draft.folder)
        parts = dcp.stage(tensors, alone, self._buffers)  # agrees on a plan: no process writes before the folder is there

        def work() -> dict[str, Entry]:
            entries = draft.write(parts, rank)
            parts.clear()
            if alone:
                self._commit(draft, entries)
            return entries

        self._job = _Job(draft, True, self._pool.submit(work))
        return before if self.background else self.settle(wait=True)

    def settle(self, wait: bool = False) -> Path | None:
        """Take a save that is under way further, where all processes have done their part; every process calls this.

        Returns the checkpoint when it has its place; with `wait`, not before. UserError on every process where one could not
        write, with nothing of it left behind.
        """
        while self._job:
            draft, writing, future = self._job
            if wait:
                _finished(future)
            done, failed = processes.count(future.done(), future.done() and future.exception() is not None)
            if done < processes.world():
                return None
            if failed:
                self._job = None
                self._fail(draft, future)
            if not writing or processes.world() == 1:
                self._job = None
                return draft.final
            entries = {k: Entry(*v) for mine in processes.every(future.result()) for k, v in mine.items()}
            leads = processes.rank() == 0
            self._job = _Job(draft, False, self._pool.submit(self._commit if leads else _nothing, draft, entries))
        return None

    def close(self) -> None:
        """Wait for this process's thread, whatever became of the others."""
        self._pool.shutdown()
        if self._job and processes.world() > 1 and processes.rank() == 0 and self._job.writing:
            self._job.draft.discard()

    def _commit(self, draft: Draft, entries: Mapping[str, Entry]) -> None:
        draft.commit(entries)
        self._tidy(draft.state)

    def _fail(self, draft: Draft, future: "Future[Any]") -> None:
        error = future.exception()
        if processes.rank() == 0 and not isinstance(error, places.Unreachable):  # what is left there has no manifest
            draft.discard()
        reasons = processes.every(f"{getattr(error, 'strerror', None) or error}" if error else None)
        if error and not isinstance(error, (OSError, places.Unreachable)):
            raise error
        why = next(f"{reason} (rank {k})" if len(reasons) > 1 else reason for k, reason in enumerate(reasons) if reason)
        raise UserError(f"{draft.final} could not be written: {why}; the checkpoint before it is whole")


def _finished(future: "Future[Any]") -> None:
    wait([future])


def _nothing(*ignored: Any) -> None: ...


# ---- reading


def newest(run: Path, verify: Callable[[Path], str | None] = verify) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and one line for each newer one that was passed over."""
    skipped: list[str] = []
    for folder in reversed(storage.step_dirs(run)):
        if (fault := verify(folder)) is None:
            return folder, skipped
        skipped.append(f"passed over {folder.name}: {fault}")
    return None, skipped


def load(folder: Path) -> Saved:
    """All of a verified checkpoint."""
    from iddpm.store import shards as dcp

    return Saved.of(dcp.load(folder), _state(folder))


def _state(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((folder / "state" / "state.json").read_text())
    return state


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
        own = STEP_DIR.search(source.name)
        path = _weights_file(source if own else _checkpoint_of(source, step, ema_rate), ema_rate)
        if own and places.remote(source) and (fault := verify(source, path.name)):
            raise UserError(f"{source}: {fault}")
    elif not source.exists():
        raise UserError(f"{source}: there is no such run or file")
    try:
        with safetensors.safe_open(places.fetch(path), framework="pt") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as e:
        raise UserError(f"{path} is damaged or no .safetensors file ({e})") from None
    if "iddpm" not in meta:
        raise UserError(f"{path} holds no iddpm config: it was not written by iddpm")
    about = json.loads(meta["iddpm"])
    return Weights(path, tensors, Config.from_json(meta["config"], str(path)), about)


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
    folder_, skipped = newest(run, check)
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
        if places.remote(path):
            return storage.read_header(path).metadata
        with safetensors.safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (safetensors.SafetensorError, OSError) as e:
        raise UserError(f"{path} is damaged or missing ({e})") from None
