"""The saves of a run under way."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from iddpm import checkpoint, distributed, storage
from iddpm.config import Config
from iddpm.evaluate.quality import Best, read_best, write_best
from iddpm.state import TrainState


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
        self.best = distributed.same(read_best(run))
        self._better: Best | None = None  # than the best, once it is saved

    def rank(self, measured: Mapping[str, float]) -> None:
        """Take the present state for the best, once it is saved, where its samples are so far."""
        self.settle(wait=True)
        metric, value = next(iter(measured.items()))
        if not self.best or self.best.metric != metric or value < self.best.value:
            self._better = Best(self.state.step, value, metric)

    def due(self) -> bool:
        """Whether the present state is better than the best, and yet to be saved."""
        return self._better is not None and self._better.step == self.state.step

    def begin(self) -> None:
        """Save the present state."""
        self.settle(wait=True)  # and so say what is best before a new save prunes
        if isinstance(self.store, checkpoint.Folder):
            self._done(self.store.begin(self.config, self.state.tensors(), self.state.numbers()))
            return
        saved = self.state.to_saved()
        path = self.store.save(self.config, saved) if distributed.rank() == 0 else None
        distributed.barrier()
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
        self.path = path
        best = self._better if self._better and path.name == storage.step_dir(self.run, self._better.step).name else None
        if best:
            self.best, self._better = best, None
            if distributed.rank() == 0:
                write_best(self.run, best)
                if isinstance(self.store, checkpoint.Folder):
                    self.store.prune(best.step)  # of the one that was the best before
        self.say(f"saved {path}" + (f", the best by {best.metric}" if best else ""))
