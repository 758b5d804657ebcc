"""Checkpoints: complete or absent, verified when read, and nothing executable in them.

checkpoints/step_00001000/
    weights.safetensors  weights-ema-0.9999.safetensors     float32; config and provenance in the file's metadata
    state/optimizer.safetensors                             with them, what a run remembers as tensors, by `shards`; of a
                                                            sharded run optimizer.rank00000.safetensors ..., a part each
    state/state.json                                        the numbers that a resumed run needs besides
    manifest.json                                           size and sha256 of each file, written last
"""

import json
import platform
import time
from collections.abc import Callable, Mapping
from concurrent import futures
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol, TypedDict

import msgspec
import torch
from torch import Tensor

import iddpm
from iddpm.config import Config
from iddpm.errors import UserError
from iddpm.parallel import processes, shard
from iddpm.records import Count, decode
from iddpm.store import files as storage
from iddpm.store import remote as places
from iddpm.store import shards
from iddpm.store.files import Best, BestRecord, Entry, verify

WEIGHTS, AVERAGE, OPTIMIZER = "weights:", "weights-ema-{}:", "state/optimizer:"  # prefixes of a tensor's name, for `shards`


class Saved(NamedTuple):
    """What a checkpoint holds, all of it. Averages are keyed by their rate."""

    step: int
    weights: dict[str, Tensor]
    averages: dict[float, dict[str, Tensor]]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]

    @staticmethod
    def of(tensors: Mapping[str, Tensor], state: dict[str, Any]) -> "Saved":
        """From tensors by their names in a checkpoint. Sharded ones are put together: every process must call this."""
        groups: dict[str, dict[str, Tensor]] = {"weights": {}, "state/optimizer": {}}
        for name, tensor in tensors.items():
            group, key = name.split(":", 1)
            groups.setdefault(group, {})[key] = shard.whole(tensor).cpu() if shard.is_sharded(tensor) else tensor
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
        return list(shards.layouts(self.folder))

    def fill(self, targets: Mapping[str, Tensor]) -> None:
        """Read tensors, which may be sharded, in place; UserError where one is missing. Of a remote one, no copy is left."""
        if places.remote(self.folder) and (fault := verify(self.folder)):  # each process has its own copy
            raise UserError(f"{self.folder}: {fault}")
        shards.fill(self.folder, targets)
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

    def commit(self, entries: Mapping[str, Entry]) -> Path:
        """Put the weights together where they are in parts, vouch for all files, and give the checkpoint its place."""
        entries = dict(entries)
        for group in sorted({name.split(".rank")[0] for name in entries if name.startswith("weights")} if self.sharded else ()):
            made, used = shards.assemble(self.folder, group, self.about(group))
            entries = {k: v for k, v in entries.items() if k not in used} | made
        entries["state/state.json"] = storage.write_text(self.folder / "state" / "state.json", json.dumps(self.state))
        storage.commit(self.folder, self.final, entries)
        return self.final


def save(run: Path, config: Config, saved: Saved) -> Path:
    """Keep a state as a checkpoint of a run, which need not be there yet; UserError where it cannot be written."""
    run.mkdir(parents=True, exist_ok=True)
    folder = Folder(run)
    try:
        folder.begin(config, saved.tensors(), saved.state)
        return storage.step_dir(run, saved.step)
    finally:
        folder.close()


class Store(Protocol):
    """Where the checkpoints of a run are. Every process calls each of these."""

    def newest(self) -> tuple[Saved | Held | None, list[str]]:
        """The newest state that can be read, and a line for each newer one that was passed over."""
        ...

    def begin(self, config: Config, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> Path | None:
        """Have a state saved, complete or absent whatever happens; returns a checkpoint that is complete now, and new."""
        ...

    def settle(self, wait: bool = False) -> Path | None:
        """Look after a save that is under way, to its end with `wait`; returns it when it is complete."""
        ...

    def close(self) -> None: ...


class _Job(NamedTuple):
    """A save under way: first all processes write, then one of several commits, which one that is alone does at once."""

    draft: Draft
    committing: bool
    future: "futures.Future[Any]"


class Folder:
    """The checkpoints of a run's folder, of which the newest `keep` stay (0: all), every `keep_every`-th step's and the best.

    With `background`, `begin` returns when the state is copied in memory, and a thread writes it. The threads of several
    processes never speak to each other: what they have done is agreed on in `settle`, between two steps.
    """

    def __init__(self, run: Path, keep: int = 0, keep_every: int = 0, background: bool = False):
        self.run, self.keep, self.keep_every, self.background = run, keep, keep_every, background
        self._job: _Job | None = None
        self._buffers: dict[str, Tensor] = {}
        self._pool = futures.ThreadPoolExecutor(1, "checkpoint")

    def newest(self) -> tuple[Held | None, list[str]]:
        """The newest state that verifies, and one line for each newer one that was passed over; the first process looks.

        It also clears away what saves cut short have left, and sets best.json right: the folder is this trainer's alone.
        UserError where there were whole checkpoints and none can be read: beginning anew would overwrite what may be mended.
        """
        found: tuple[str | None, list[str], Any, bool] = (None, [], None, False)
        if processes.rank() == 0:
            storage.sweep(self.run)
            folder, passed_over = newest(self.run)
            best = _state(folder).get("best") if folder else None
            if folder and (fault := storage.mend_best(self.run, best, storage.step_of(folder))):
                passed_over, best = [*passed_over, fault], None
            lost = folder is None and any((old / storage.MANIFEST).exists() for old in storage.step_dirs(self.run))
            found = (folder.name if folder else None, passed_over, best, lost)
        name, passed_over, best, lost = processes.same(found)
        if lost:
            raise UserError(
                f"{passed_over[0]}, and {self.run} has no other checkpoint that is whole: bring one back from a copy, or delete "
                f"{self.run / 'checkpoints'} to begin anew"
            )
        if name is None:
            return None, passed_over
        folder = self.run / "checkpoints" / name
        return Held(folder, _state(folder) | {"best": best}), passed_over

    def begin(self, config: Config, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path | None:
        """Copy a state, whose tensors may be sharded, and have it written; every process calls this.

        Waits for a save that is under way, and returns its path if it is new.
        """
        before = self.settle(wait=True)
        draft = Draft(self.run, config, state, any(map(shard.is_sharded, tensors.values())))
        error: BaseException | None = None
        if processes.rank() == 0:
            try:
                storage.fresh(draft.folder)
            except (OSError, UserError) as e:
                error = e
        self._raise(draft, error)  # and no process writes before the folder is there
        parts = shards.stage(tensors, self._buffers if self.background else None)

        def work() -> dict[str, Entry]:
            entries = shards.write(draft.folder, parts, processes.rank() if draft.sharded else None, draft.about)
            parts.clear()
            if processes.world() == 1:
                self._commit(draft, entries)
            return entries

        self._job = _Job(draft, False, self._pool.submit(work))
        return before if self.background else self.settle(wait=True)

    def settle(self, wait: bool = False) -> Path | None:
        """Take a save that is under way further, where all processes have done their part; every process calls this.

        Returns the checkpoint when it has its place; with `wait`, not before. UserError on every process where one could not
        write, with nothing of it left behind.
        """
        while self._job:
            draft, committing, future = self._job
            if wait:
                futures.wait([future])
            done, failed = processes.count(future.done(), future.done() and future.exception() is not None)
            if done < processes.world():
                return None
            self._job = None
            if failed:
                self._raise(draft, future.exception())
            if committing or processes.world() == 1:
                return draft.final
            entries = {k: Entry(*v) for mine in processes.every(future.result()) for k, v in mine.items()}
            self._job = _Job(draft, True, self._pool.submit(self._commit, draft, entries))
        return None

    def close(self) -> None:
        """Wait for this process's thread, whatever became of the others."""
        self._pool.shutdown()
        if self._job and processes.world() > 1 and processes.rank() == 0 and not self._job.committing:
            storage.discard(self._job.draft.folder)

    def _commit(self, draft: Draft, entries: Mapping[str, Entry]) -> None:
        """Of the first process: put a checkpoint in its place, name the best, and delete those that are not to be kept."""
        if processes.rank() == 0:
            draft.commit(entries)
            if draft.state.get("best"):
                storage.name_best(self.run, draft.state["best"])
            storage.prune(self.run, self.keep, self.keep_every, draft.state["step"])

    def _raise(self, draft: Draft, error: BaseException | None) -> None:
        """What went wrong on any process, on all of them: UserError where a storage failed. Nothing of the draft is left."""
        reasons = processes.every(self._reason(error))
        if not any(reasons):
            return
        if processes.rank() == 0 and not isinstance(error, places.Unreachable):  # what is left there has no manifest
            storage.discard(draft.folder)
        if error and not isinstance(error, (OSError, UserError)):
            raise error
        why = next(f"{reason} (rank {k})" if len(reasons) > 1 else reason for k, reason in enumerate(reasons) if reason)
        before = "; the checkpoint before it is whole" if storage.step_dirs(self.run) else ""
        raise UserError(f"{draft.final} could not be written: {why}{before}")

    def _reason(self, error: BaseException | None) -> str:
        if isinstance(error, FileNotFoundError) and not places.remote(self.run) and not self.run.exists():
            return f"{self.run} is no longer there; if it was renamed, go on with --run and its new name"
        return f"{getattr(error, 'strerror', None) or error or type(error).__name__}" if error else ""


class Diverged(UserError):
    """Training cannot go on: its weights are worth nothing, or give no finite gradient."""


class State(Protocol):
    """What is saved of a run in training."""

    step: int
    skipped_in_a_row: int
    measured: int
    best: Best | None

    def tensors(self) -> dict[str, Tensor]: ...

    def numbers(self) -> dict[str, Any]: ...

    def fault(self) -> str: ...


class Saves:
    """The saves of a run in training: says which are complete, and which is the best."""

    def __init__(self, store: Store, run: Path, config: Config, state: State, say: Callable[[str], None]):
        self.store, self.run, self.config, self.state, self.say = store, run, config, state, say
        self.path: Path | None = None
        self.first = state.step
        self.last = state.step  # of the newest checkpoint; 0: there is none
        self.owed = False  # a save that was put off, until a step is good again

    def whole(self) -> str:
        """What there is to go back to."""
        return f"the checkpoint of step {self.last} is whole" if self.last else "no checkpoint is saved yet"

    def rank(self, found: Best) -> None:
        """Take the present state for the best where its samples are, or where the best was measured under other conditions.

        The save that is then `due` names it; of the state that the run began with, which is saved already, that is done here.
        """
        best, self.state.measured = self.state.best, found.step
        if best and best.conditions == found.conditions and best.value <= found.value:
            return
        self.state.best = found
        if found.step == self.first and processes.rank() == 0:
            storage.name_best(self.run, found._asdict())

    def due(self) -> bool:
        """Whether the present state is to be saved, whatever its step: it is the best, or the first good one after a bad one."""
        if self.owed and not self.state.skipped_in_a_row:
            return True
        return self.state.best is not None and self.state.best.step == self.state.step > self.first

    def begin(self, last: bool = False) -> None:
        """Save the present state, but for one that is worth nothing, which must not take the place of one that is.

        `Diverged` for such a one, if it is the `last`, or no step of it was skipped, after which it may yet recover.
        """
        if fault := self.state.fault():
            if self.state.skipped_in_a_row and not last:
                self.say(f"not saved: {fault}; {self.whole()}")
                self.owed = True
                return
            raise Diverged(f"at step {self.state.step} {fault}: lower --lr, or set --grad_clip 1; {self.whole()}")
        self.last, self.owed = self.state.step, False
        self._done(self.store.begin(self.config, self.state.tensors(), self.state.numbers()))

    def settle(self, wait: bool) -> None:
        """Look after a save that is under way; with `wait`, see it complete."""
        self._done(self.store.settle(wait))

    def __enter__(self) -> "Saves":
        return self

    def __exit__(self, *exception: object) -> None:
        self.store.close()

    def _done(self, path: Path | None) -> None:
        if not path:
            return
        self.path, best = path, self.state.best
        is_best = best is not None and path == storage.step_dir(self.run, best.step)
        self.say(f"saved {path}" + (f", the best by {best.metric}" if best and is_best else ""))


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
    return Saved.of(shards.load(folder), _state(folder))


Number = Annotated[str, msgspec.Meta(pattern=r"^(-?[0-9.]+(e[+-]?[0-9]+)?|-?inf|nan)$")]  # of Python's repr


class _Step(TypedDict):
    step: Count
    images: Count


class RunState(_Step, total=False):
    """state.json: the numbers of a `TrainState`; of an imported run, `weights_only`."""

    skipped: Count
    skipped_in_a_row: Count
    ema_updates: Count
    lg_loss_scale: float
    law: list[str]
    meter: dict[str, list[tuple[Number, Number]]]
    first_loss: float
    measured: Count
    best: BestRecord | None
    weights_only: bool


RESUMED = ("skipped", "skipped_in_a_row", "ema_updates", "lg_loss_scale", "law")  # which a run that goes on must have


def _state(folder: Path) -> dict[str, Any]:
    path = folder / "state" / "state.json"
    state = decode(path.read_bytes(), RunState, path)
    if not state.get("weights_only") and (absent := [name for name in RESUMED if name not in state]):
        raise UserError(f"{path} is damaged (it has no {absent[0]}): bring it back from a copy, or delete {folder}")
    return dict(state)
