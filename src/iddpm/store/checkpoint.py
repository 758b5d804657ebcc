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
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol, TypedDict

import msgspec
import torch
from torch import Tensor

import iddpm
from iddpm.config import Config
from iddpm.errors import UserError, reason
from iddpm.parallel import processes, shard
from iddpm.records import Count, decode
from iddpm.store import files as storage
from iddpm.store import remote as places
from iddpm.store import shards
from iddpm.store.files import Best, Entry, Step, verify

WEIGHTS, AVERAGE, OPTIMIZER = "weights:", "weights-ema-{}:", "state/optimizer:"  # prefixes of a tensor's name, for `shards`


class Saved(NamedTuple):
    """What a checkpoint holds, all of it. Averages are keyed by their rate. Tensors of a disk are read when they are used."""

    step: int
    weights: dict[str, Tensor]
    averages: dict[float, dict[str, Tensor]]
    optimizer: dict[str, Tensor]  # or, in a run's folder, their `shards.Parts`, of which `load` makes whole ones
    state: dict[str, Any]

    @staticmethod
    def of(tensors: Mapping[str, Any], state: dict[str, Any]) -> "Saved":
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

    def fill(self, targets: Mapping[str, Tensor]) -> None:
        """Write tensors into others, which may be sharded: each process reads of them what it needs, by itself.

        UserError where one is not there or has another shape.
        """
        held = self.tensors()
        for name, target in targets.items():
            what = " in ".join(reversed(name.split(":", 1)))
            if name not in held:
                raise UserError(f"the checkpoint of step {self.step} holds no {what}")
            if held[name].shape != target.shape:
                shapes = f"{tuple(held[name].shape)}, not {tuple(target.shape)}"
                raise UserError(f"the checkpoint of step {self.step}: {what} has the shape {shapes}")
            shard.put(held[name], target)


# ---- writing


class Draft:
    """A checkpoint in the making."""

    future: futures.Future[Any]  # of what a thread does for it

    def __init__(self, run: Path, config: Config, state: Mapping[str, Any], in_parts: bool):
        self.final = storage.step_dir(run, state["step"])
        self.folder = storage.aside(self.final)
        self.config, self.state, self.in_parts = config.to_json(), dict(state), in_parts
        self.origin = dict(step=state["step"], images=state["images"], time=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                           iddpm=iddpm.__version__, torch=torch.__version__, python=platform.python_version())  # fmt: skip

    def about(self, group: str) -> dict[str, str]:
        """The metadata of a group's file."""
        rate = {"ema_rate": float(group.removeprefix("weights-ema-"))} if group.startswith("weights-ema-") else {}
        return {"format": "pt", "iddpm": json.dumps(self.origin | rate), "config": self.config}


def save(run: Path, config: Config, saved: Saved) -> Path:
    """Keep a state as a checkpoint of a run, which need not be there yet; UserError where it cannot be written."""
    run.mkdir(parents=True, exist_ok=True)
    with closing(Folder(run)) as folder:
        folder.begin(config, saved.tensors(), saved.state)
    return storage.step_dir(run, saved.step)


class Store(Protocol):
    """Where the checkpoints of a run are; what each call does is told in `Folder`. Every process makes each of them."""

    def newest(self) -> tuple[Saved | None, list[str]]: ...
    def begin(self, config: Config, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> Path | None: ...
    def settle(self, wait: bool = False) -> Path | None: ...
    def close(self) -> None: ...


class Folder:
    """The checkpoints of a run's folder, of which the newest `keep` stay (0: all), every `keep_every`-th step's and the best.

    With `background`, `begin` returns when the state is copied in memory, and a thread writes it. The threads of several
    processes never speak to each other: what they have done is agreed on in `settle`, between two steps.
    """

    def __init__(self, run: Path, keep: int = 0, keep_every: int = 0, background: bool = False):
        self.run, self.keep, self.keep_every, self.background = run, keep, keep_every, background
        self._draft: Draft | None = None  # what is under way
        self._buffers: dict[str, Tensor] = {}
        self._pool = futures.ThreadPoolExecutor(1, "checkpoint")

    def newest(self) -> tuple[Saved | None, list[str]]:
        """The newest state that verifies, and one line for each newer one that was passed over; the first process looks.

        It also clears away what saves cut short have left, and sets best.json right: the folder is this trainer's alone.
        UserError where there were whole checkpoints and none can be read: beginning anew would overwrite what may be mended.
        """
        state, passed_over = processes.of_first(self._newest)
        if state is None:
            return None, passed_over
        return Saved.of(shards.tensors(storage.step_dir(self.run, state["step"])), state), passed_over

    def _newest(self) -> tuple[dict[str, Any] | None, list[str]]:
        for left in (self.run / "checkpoints").glob(".step_*"):  # of saves that a crash cut short
            storage.discard(left)
        folder, passed_over = newest(self.run)
        if folder is None:
            if any((old / storage.MANIFEST).exists() for old in storage.step_dirs(self.run)):
                raise UserError(
                    f"{passed_over[0]}, and {self.run} has no other checkpoint that is whole: bring one back from a copy, or "
                    f"delete {self.run / 'checkpoints'} to begin anew"
                )
            return None, passed_over
        state = state_of(folder)
        if fault := storage.mend_best(self.run, state.setdefault("best", None), storage.step_of(folder)):
            state["best"], passed_over = None, [*passed_over, fault]
        return state, passed_over

    def begin(self, config: Config, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path | None:
        """Copy a state, whose tensors may be sharded, and have it written, complete or absent whatever happens.

        Waits for a save that is under way, and returns its path if it is new; every process calls this.
        """
        before = self.settle(wait=True)
        draft = Draft(self.run, config, state, in_parts=any(map(shard.is_sharded, tensors.values())))
        groups = shards.stage(tensors, self._buffers if self.background else None)

        def work() -> dict[str, Entry]:  # in which no process waits for another
            if groups:
                draft.folder.parent.mkdir(exist_ok=True)  # not its run: one that was renamed would begin anew under its old name
                draft.folder.mkdir(exist_ok=True)
            entries = shards.write(draft.folder, groups, processes.rank() if draft.in_parts else None, draft.about)
            groups.clear()
            if not draft.in_parts:  # the first process has written all
                self._commit(draft, entries)
            return entries

        self._draft, draft.future = draft, self._pool.submit(work)
        return before if self.background else self.settle(wait=True)

    def settle(self, wait: bool = False) -> Path | None:
        """Take a save that is under way further, where all processes have done their part; every process calls this.

        Returns the checkpoint when it has its place; with `wait`, not before. UserError on every process where one could not
        write, with nothing of it left behind.
        """
        while draft := self._draft:
            if wait:
                futures.wait([draft.future])
            over = draft.future.done()
            error = draft.future.exception() if over else None
            done, failed = processes.count(over, error is not None)
            if done < processes.world():
                return None
            if failed:
                raise self._fault(draft, error)
            if not draft.in_parts:
                self._draft = None
                return draft.final
            entries = {name: entry for mine in processes.every(draft.future.result()) for name, entry in mine.items()}
            draft.in_parts, draft.future = False, self._pool.submit(self._commit, draft, entries)
        return None

    def close(self) -> None:
        """Wait for this process's thread, whatever became of the others."""
        self._pool.shutdown()
        if self._draft and self._draft.in_parts and processes.rank() == 0:
            storage.discard(self._draft.folder)

    def _commit(self, draft: Draft, entries: dict[str, Entry]) -> None:
        """Of the first process: make a checkpoint of what all have written, name the best, and delete what is not to be kept."""
        if processes.rank() != 0:
            return
        for group in sorted({name.split(".rank")[0] for name in entries if name.startswith("weights") and ".rank" in name}):
            entries = shards.assemble(draft.folder, entries, group, draft.about(group))
        state = storage.write_text(draft.folder / "state" / "state.json", json.dumps(draft.state))
        storage.commit(draft.folder, draft.final, entries | {"state/state.json": state})
        if draft.state.get("best"):
            storage.name_best(self.run, draft.state["best"])
        decay = draft.state.get("decay")
        storage.prune(self.run, self.keep, self.keep_every, draft.state["step"], decay["start"] if decay else None)

    def _fault(self, draft: Draft, error: BaseException | None) -> BaseException:
        """What went wrong on any process, for all of them: UserError where a storage failed. Nothing of the draft is left."""
        self._draft, told = None, reason(error) if error else ""
        if isinstance(error, FileNotFoundError) and not places.remote(self.run) and not self.run.exists():
            told = f"{self.run} is no longer there; if it was renamed, go on with --run and its new name"
        reasons = processes.every(told)
        if processes.rank() == 0 and not isinstance(error, places.Unreachable):  # what is left there has no manifest
            storage.discard(draft.folder)
        if error and not isinstance(error, (OSError, UserError)):
            return error
        why = next(f"{text} (rank {k})" if len(reasons) > 1 else text for k, text in enumerate(reasons) if text)
        before = "; the checkpoint before it is whole" if storage.step_dirs(self.run) else ""
        return UserError(f"{draft.final} could not be written: {why}{before}")


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
    """All of a verified checkpoint, in memory."""
    return Saved.of({name: tensor[()].clone() for name, tensor in shards.tensors(folder).items()}, state_of(folder))


Number = Annotated[str, msgspec.Meta(pattern=r"^(-?[0-9.]+(e[+-]?[0-9]+)?|-?inf|nan)$")]  # of Python's repr


class Counted(Step):
    """What each state.json tells."""

    images: Count


class Decay(TypedDict):
    """How a run ends: from one step to another its rate falls linearly to 0. Fixed when it begins, and the same ever after."""

    start: Count
    end: Count
    factor: Annotated[float, msgspec.Meta(ge=0)]  # the rate at its start, as a multiple of --lr
    done: Annotated[float, msgspec.Meta(ge=0, le=1)]  # the share of the run that was done at its start
    by: Literal["steps", "images", "time", "finish"]  # which setting asked for this end ...
    until: Annotated[float, msgspec.Meta(ge=0)]  # ... and its value, in seconds where it is a time


class RunState(Counted, total=False):
    """state.json: the numbers of a `TrainState`; of an imported run, `weights_only`."""

    skipped: Count
    skipped_in_a_row: Count
    ema_updates: Count
    lg_loss_scale: float
    law: list[str]
    weighting: list[str]
    paths: list[str]
    meter: dict[str, list[tuple[Number, Number]]]
    first_loss: float
    measured: Count
    best: Best | None
    seconds: Annotated[float, msgspec.Meta(ge=0)]  # trained, all parts of the run together
    decay: Decay | None
    weights_only: bool


RESUMED = ("skipped", "skipped_in_a_row", "ema_updates", "lg_loss_scale", "law")  # which a run that goes on must have


def state_of(folder: Path) -> dict[str, Any]:
    """The numbers of a checkpoint; UserError where they are damaged."""
    path = folder / "state" / "state.json"
    state = decode(path.read_bytes(), RunState, path)
    if not state.get("weights_only") and (absent := [name for name in RESUMED if name not in state]):
        raise UserError(f"{path} is damaged (it has no {absent[0]}): bring it back from a copy, or delete {folder}")
    return dict(state)
