"""How a run ends: when the decay of its rate begins, and over how many steps. How it goes on from before that: decayed.py.

The time that a run has trained is the first process's, told to all at each step, so all decide alike. The clock decides until
the decay begins, and never after: its steps are fixed then, and saved.
"""

import math
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable

from iddpm.config import ENDLESS, Config
from iddpm.parallel import processes
from iddpm.store.checkpoint import Decay
from iddpm.training.decayed import aim
from iddpm.training.state import TrainState
from iddpm.words import duration, many

WARM = 2  # steps of a process that say nothing of its pace
PACED = 3  # steps of which the pace is the mean, at the least ...
SURE, ENOUGH = 0.03, 300.0  # ... and as a share of the time of the decay, of which they say how many steps it has, or seconds
LATELY = 300  # steps of which the pace is the mean at the most: it follows the machine, and has measurements among them
PAUSE = 0.05  # of the time: a step that takes more, and ten times as long as others, was stopped meanwhile, and says nothing
FEW = 10  # steps: a run of fewer is hardly one
SHEET = 64  # images of a sheet
COSTLY = 0.2  # of the time: sheets of samples that take more are left out


class Clock:
    """The time that a run has trained, what its steps and sheets take of it, and when its decay begins."""

    def __init__(self, config: Config, state: TrainState, began: float | None = None):
        """Of a state just restored, by a process that `began` then (time.monotonic)."""
        self.train, self.state, self.config = config.train, state, config
        self.first, self.began = state.step, (time.monotonic() if began is None else began) - state.seconds
        self.started = time.monotonic()
        self.by, self.until = aim(config.train)
        self.limit = self.until if self.by == "time" else 0.0  # of --finish, once the time of the first step is told
        self.share = 1.0 if self.by == "finish" else config.train.lr_decay
        self.lately: deque[float] = deque(maxlen=LATELY)  # seconds of this process's steps
        self.costs = {"sheet": 0.0, "measuring": 0.0}  # seconds of one
        self.beside: list[str] = []  # what was done beside the step under way

    def read(self) -> int:
        """Milliseconds that the run has trained, on the first process; 0 on the others: the sum is the same for all."""
        return 0 if processes.rank() else int(1000 * (time.monotonic() - self.began))

    def told(self, milliseconds: int) -> None:
        """Take note of the time at the beginning of a step, and of what the step before has taken."""
        passed, self.state.seconds = milliseconds / 1000 - self.state.seconds, milliseconds / 1000
        if self.by == "finish" and not self.limit:
            self.limit = self.state.seconds + self.until
        if self.state.step > self.first + WARM:
            if not self.beside and (not self.lately or passed <= max(PAUSE * self.until, 10 * self.pace)):
                self.lately.append(passed)
            if self.beside in (["sheet"], ["measuring"]):
                self.costs[self.beside[0]] = max(0.0, passed - self.pace)
        self.beside = []

    @property
    def pace(self) -> float:
        """Seconds of a step with what belongs to it (data, saves, validation); 0 where none was timed."""
        return sum(self.lately) / len(self.lately) if self.lately else 0.0

    @property
    def left(self) -> float:
        """Seconds until the end: of the steps, at the pace of this process, where their number is known, else of the time."""
        state = self.state
        if state.stop < ENDLESS:
            since = time.monotonic() - self.started
            return (state.stop - state.step) * since / max(1, state.step - self.first)
        return max(0.0, self.limit - state.seconds) if self.limit else math.inf

    def affords(self, seconds: float, say: Callable[[str], None]) -> bool:
        """Whether a run of this time can draw sheets of samples that take so long each; where not, says so."""
        self.beside.append("timing")
        self.costs["measuring"] = seconds * self.train.eval_samples / SHEET  # until one was measured
        if seconds <= COSTLY * self.until:
            self.costs["sheet"] = seconds
            return True
        say(f"no sheets of samples: one takes {duration(seconds)} of --{self.by} {getattr(self.train, self.by)}")
        return False

    @property
    def room(self) -> float:
        """Seconds that are left for steps: until the end, without the last sheet of samples."""
        return self.limit - self.state.seconds - self.costs["sheet"]

    def due(self) -> bool:
        """Whether the decay is to begin at this step, or a run without one, that ends by time, is to end."""
        state = self.state
        if state.decay:
            return False
        if not state.by_clock:
            start = state.end - round(self.share * state.end)
            return self.share > 0 and state.end < ENDLESS and start <= state.step < state.end
        whole = self.until - self.costs["sheet"]
        if self.room < self.pace:
            return True
        sure = len(self.lately) >= PACED and sum(self.lately) >= min(SURE * self.share * whole, ENOUGH)
        return sure and not state.skipped_in_a_row and self.room <= self.share * whole

    def begin(self, rate: float, warm: float) -> str:
        """Let the decay begin at this step, from a rate, of which so much is the warm-up's; returns a line on it."""
        state, lr = self.state, self.train.lr
        end = state.end if not state.by_clock else state.step + self._steps()
        state.decay = Decay(
            start=state.step, end=end, factor=rate / lr / warm if lr else 1.0, done=state.progress(), by=self.by, until=self.until
        )
        steps = end - state.step
        if not steps:
            return f"the time is over at step {state.step}: a larger --{self.by} goes on"
        told = f"the rate falls from {rate:.3g} at step {state.step} to 0 at step {end}"
        if not state.by_clock:
            return told
        few = f"; that is a short time for this network, of which a step takes {duration(self.pace)}" if end < FEW else ""
        return f"{told}: {many(steps, 'step')} in {duration(self.room)}{few}"

    def _steps(self) -> int:
        """How many steps fit until the end."""
        if not (self.share and self.pace) or self.room <= 0:
            return 0
        first, train = self.state.step, self.train

        def cost(n: int) -> float:
            """Seconds of n steps with the sheets and measurements among them; the sheet at their end has its own time."""

            def among(interval: int, last: int) -> int:
                return last // interval - (first - 1) // interval if interval else 0

            sheets, measurements = among(train.sample_interval, first + n - 1), among(train.eval_every, first + n)
            return n * self.pace + sheets * self.costs["sheet"] + measurements * self.costs["measuring"]

        fitting = bisect_right(range(1, int(self.room / self.pace) + 1), self.room, key=cost)
        return max(fitting, FEW) if self.by == "finish" else fitting
