"""When a run in training is saved, and which of its checkpoints is the best."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from iddpm.config import Config
from iddpm.errors import UserError
from iddpm.parallel import processes
from iddpm.store import files as storage
from iddpm.store.checkpoint import Store
from iddpm.store.files import Best
from iddpm.training.state import TrainState


class Diverged(UserError):
    """Training cannot go on: its weights are worth nothing, or give no finite gradient."""


class Saves(AbstractContextManager["Saves"]):
    """The saves of a run in training: says which are complete, and which is the best."""

    def __init__(self, store: Store, run: Path, config: Config, state: TrainState, say: Callable[..., None]):
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
        best, self.state.measured = self.state.best, found["step"]
        if best and best["conditions"] == found["conditions"] and best["value"] <= found["value"]:
            return
        self.state.best = found
        if found["step"] == self.first and processes.rank() == 0:
            storage.name_best(self.run, found)

    def due(self) -> bool:
        """Whether the present state is to be saved, whatever its step: as the best, where its decay begins, after a bad one."""
        if self.owed and not self.state.skipped_in_a_row:
            return True
        best, decay = self.state.best, self.state.decay
        return self.state.step > self.first and self.state.step in (best and best["step"], decay and decay["start"])

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

    def __exit__(self, *exception: object) -> None:
        self.store.close()

    def _done(self, path: Path | None) -> None:
        if path:
            self.path, best = path, self.state.best
            note = f", the best by {best['metric']}" if best and path == storage.step_dir(self.run, best["step"]) else ""
            self.say(f"saved {path}{note}", "saved", path=path)
