"""The saves of a run under way."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from iddpm.config import Config
from iddpm.parallel import processes
from iddpm.store import checkpoint
from iddpm.store import files as storage
from iddpm.store.files import Best
from iddpm.training.state import TrainState


class Store(Protocol):
    """Where the checkpoints of a run are."""

    def newest(self) -> tuple[Any, list[str]]:
        """The newest state that can be read (a Saved, or Held), and a line for each newer one that was passed over."""
        ...

    def save(self, config: Config, saved: checkpoint.Saved) -> Path:
        """Keep a state; complete or absent, whatever happens."""
        ...


class Saves:
    """The saves of a run: in the background where the store can, else at once; says which are complete, and which is the best."""

    def __init__(self, store: Store, run: Path, config: Config, state: TrainState, say: Callable[[str], None]):
        self.store, self.run, self.config, self.state, self.say = store, run, config, state, say
        self.path: Path | None = None
        self.first = state.step

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
        """Whether the present state is the best, and yet to be saved."""
        return self.state.best is not None and self.state.best.step == self.state.step > self.first

    def begin(self) -> None:
        """Save the present state."""
        if isinstance(self.store, checkpoint.Folder):
            self._done(self.store.begin(self.config, self.state.tensors(), self.state.numbers()))
            return
        saved = self.state.to_saved()
        path = self.store.save(self.config, saved) if processes.rank() == 0 else None
        processes.barrier()
        self._done(path)

    def settle(self, wait: bool) -> None:
        """Look after a save that is under way; with `wait`, see it complete."""
        if isinstance(self.store, checkpoint.Folder):
            self._done(self.store.settle(wait))

    def __enter__(self) -> "Saves":
        return self

    def __exit__(self, *exception: object) -> None:
        if isinstance(self.store, checkpoint.Folder):
            self.store.close()

    def _done(self, path: Path | None) -> None:
        if not path:
            return
        self.path, best = path, self.state.best
        is_best = best is not None and path == storage.step_dir(self.run, best.step)
        self.say(f"saved {path}" + (f", the best by {best.metric}" if best and is_best else ""))
