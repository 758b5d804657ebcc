"""What a run is asked to end by, and how one that has a decay of its rate behind it goes on from before that."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from iddpm.config import Train, seconds_of
from iddpm.errors import UserError
from iddpm.store import files as storage
from iddpm.store import remote as places
from iddpm.store.checkpoint import Decay, state_of


def aim(train: Train) -> tuple[Literal["steps", "images", "time", "finish"], float]:
    """Which setting says when a run ends, and its value, in seconds where it is a time."""
    if train.finish or train.time:
        return ("finish", seconds_of(train.finish, "finish")) if train.finish else ("time", seconds_of(train.time, "time"))
    return ("images", float(train.images)) if train.images else ("steps", float(train.steps))


def kept(state: Mapping[str, Any], train: Train, end: int) -> Decay | None:
    """The decay that a run goes on in, from the numbers of its checkpoint; None where it is asked to end later than that does."""
    decay: Decay | None = state.get("decay")
    if decay is None or outgrown(decay, state, train):
        return None
    return decay if train.time or train.finish else {**decay, "end": end}


def outgrown(decay: Decay, state: Mapping[str, Any], train: Train) -> bool:
    """Whether a run in its decay, or behind it, is now asked to end later."""
    by, until = aim(train)
    if by == "finish":
        return decay["by"] != by
    if by == decay["by"]:
        return until > decay["until"]
    if by == "time":
        return until > float(state.get("seconds", 0.0))
    steps = decay["end"] - int(state["step"])
    return until > (decay["end"] if by == "steps" else state["images"] + steps * train.batch_size)


def newest(run: Path) -> dict[str, Any] | None:
    """The numbers of the newest checkpoint that can be read, without a look at its weights."""
    for folder in reversed(storage.step_dirs(run)):
        if (folder / storage.MANIFEST).exists():
            try:
                return state_of(folder)
            except (UserError, OSError):
                continue
    return None


def goes_on(run: Path, train: Train) -> tuple[int, Decay | None]:
    """The step that a run will go on from, and the decay that it then is in."""
    state = newest(run)
    if state is None:
        return 0, None
    decay: Decay | None = state.get("decay")
    if decay and outgrown(decay, state, train):
        return decay["start"], None
    return state["step"], decay


def require_finishable(run: Path, asked: str, before: Train, rate: float) -> None:
    """UserError where a run cannot be finished, by --finish: it has no checkpoint, is in its decay, or its next `rate` is 0."""
    state = newest(run)
    if state is None:
        raise UserError(f"--finish ends a run that has begun, and {run} holds no checkpoint: train it first")
    decay: Decay | None = state.get("decay")
    if decay and (decay["by"], before.finish) == ("finish", asked):
        return
    if decay and state["step"] < decay["end"]:
        where = f"from step {decay['start']} to {decay['end']}, and at step {state['step']} of it"
        raise UserError(f"--finish: {run} is in its decay already, {where}: the same command without --finish goes on")
    if decay:
        way = f"a larger --steps or --time goes on from step {decay['start']}, before it"
        raise UserError(f"--finish: {run} has ended with its decay, at step {decay['end']}: {way}")
    if not rate:
        raise UserError(f"--finish: the learning rate of {run} has come to 0 already, at step {state['step']}")


def go_back(run: Path, train: Train) -> list[str]:
    """Let a run that is asked to end later than its decay did go on from before that; returns a line on what was done.

    The last checkpoint of the decay, the best, and those that --keep 0 and --keep_every are to keep are put away in RUN/ended,
    where `iddpm sample` finds them; a kill meanwhile costs nothing. On the first process alone, which holds the run's lock.
    """
    state = newest(run)
    decay: Decay | None = state.get("decay") if state else None
    if not state or not decay or not outgrown(decay, state, train):
        return []
    earlier = (f for f in reversed(storage.step_dirs(run)) if storage.step_of(f) <= decay["start"])
    back = next((folder for folder in earlier if storage.verify(folder) is None), None)
    if back is None:
        gone = f"no checkpoint from before the decay, which began at step {decay['start']}, is left"
        return [f"{gone}: training goes on from the decayed weights of step {state['step']}"]
    later = [folder for folder in storage.step_dirs(run) if storage.step_of(folder) > storage.step_of(back)]
    for folder in later:  # the newest last: until it is gone, it tells that there is something to do
        step, every = storage.step_of(folder), train.keep_every
        if folder == later[-1] or step == storage.best(run) or not train.keep or (every and step % every == 0):
            _move(folder, run / "ended" / folder.name)
        storage.discard(folder)
    kept = f"; the weights it led to are kept in {run / 'ended' / later[-1].name}" if later else ""
    return [f"back to step {storage.step_of(back)}, before the decay{kept}"]


def _move(folder: Path, target: Path) -> None:
    """Put a checkpoint's folder elsewhere; on a remote storage file by file, its manifest last."""
    storage.discard(target)
    if not places.remote(folder):
        target.parent.mkdir(exist_ok=True)
        folder.rename(target)
        return
    for name in (*storage.manifest(folder), storage.MANIFEST):
        (target / name).write_bytes((folder / name).read_bytes())
