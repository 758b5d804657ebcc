"""The training loop: read `train` from top to bottom. Its step is in step.py, what it shows on the way in preview.py."""

import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from iddpm import build, saying
from iddpm.config import ENDLESS, Config
from iddpm.data import DataSet
from iddpm.data.batches import Batch, ahead, order_of
from iddpm.errors import UserError
from iddpm.measure.quality import Quality
from iddpm.parallel import processes, shard
from iddpm.parallel.watch import watch
from iddpm.saying import Bar, by_text
from iddpm.store import averages, checkpoint
from iddpm.store.checkpoint import Store
from iddpm.store.log import Logger
from iddpm.store.remote import place
from iddpm.store.weights import read_weights
from iddpm.training import preview
from iddpm.training.decayed import aim
from iddpm.training.ending import WARM, Clock
from iddpm.training.saves import Diverged, Saves
from iddpm.training.state import TrainState, initialise
from iddpm.training.step import learning_rate, method_of, train_step, warmed
from iddpm.words import duration, rate

WAITS = 4
PATIENCE = 10.0  # seconds after which it is told how a run goes, where no line of the log is due
MAX_SKIPS = 50  # steps in a row without a finite gradient after which a run gives up; fp16 may need 20 to find its loss scale


class Log(Protocol):
    """Where the numbers of a run go."""

    def row(self, **values: Any) -> None: ...

    def event(self, step: int, text: str) -> None: ...

    def close(self) -> None: ...


class Stopped(UserError):
    """Training was asked to stop, and everything is saved: exit code 75, EX_TEMPFAIL, for "preempted, start me again"."""

    code = 75

    def __init__(self, step: int):
        super().__init__(f"stopped at step {step}; all is saved: the same command goes on from here")


def train(
    config: Config,
    data: DataSet,
    run: Path,
    notes: Sequence[str] = (),
    say: Callable[[str], None] | None = None,
    store: Store | None = None,
    log: Callable[[int], Log] | None = None,
    save_start: bool = False,
    held_out: DataSet | None = None,
    sheets: bool = True,
    began: float | None = None,
    look: Callable[[Path], None] = lambda run: None,
) -> Path | None:
    """Train, or go on training, the run in a folder until its end; returns the last checkpoint.

    `store` and `log` (a function of the step it begins at) take the place of the run's own checkpoints and log; `save_start`
    also saves step 0; `held_out` images are those of --validation; without `sheets` no samples are drawn. The time of the run
    counts from when the process `began` (time.monotonic), else from here. `look` is called with the run's folder when there is
    more to see, but at its end. Raises UserError where the run cannot go on (50 bad steps in a row, data that cannot be read, a
    checkpoint that cannot be written), on every process alike; Stopped after Ctrl-C, SIGTERM or SIGHUP, once all is saved.
    """
    settings = config.train
    device = processes.own_device(build.device(settings.device))
    shard.layout(settings.batch_size, settings.shard, processes.world())
    leads = processes.rank() == 0  # one process speaks and writes; all the others do the same work in silence
    say = _silence if not leads else by_text(say) if say else saying.say
    # First what may refuse the run, so that nothing is left behind: it reads up to 2,000 images, which can take a minute.
    quality = Quality(config, run, device, say) if settings.eval_every else None
    store = store or checkpoint.Folder(run, settings.keep, settings.keep_every, settings.async_save)
    state = TrainState(config, device)
    passed_over = _begin(state, config, store, run, say)
    first, clock = state.step, Clock(config, state, began)
    if leads:
        run.mkdir(parents=True, exist_ok=True)
    # The log forgets what it has of later steps than the checkpoint's: they are taken again.
    logger = (log or (lambda step: Logger(run, step, settings.log_to, config.flat())))(first) if leads else None
    if logger:
        for line in (*notes, *passed_over):
            logger.event(first, line)
    if first >= state.stop:
        say(_ended(state, run, config))
    draws = sheets and not config.task.classifies
    method, meter = method_of(config, state.parallel, state), state.meter

    def due(interval: int) -> bool:
        """Every so many steps, 0: never. What was due at the step that this process began with, was done by the one before."""
        return interval > 0 and state.step % interval == 0 and state.step > first

    # In here a signal waits for the end of a step, a process that hangs is named by the others, and threads that write have
    # ended when it is left.
    with (
        Saves(store, run, config, state, say) as saves, _stop_signal(leads) as asked, watch(settings.timeout) as tell,
        Bar(leads) as bar,
    ):  # fmt: skip

        def tick(doing: str) -> None:
            """While samples are drawn: a sign of life, and an end on all processes once one is asked to stop."""
            tell(state.step, doing)
            if any(processes.count(asked())):
                raise preview.Interrupted

        if save_start and not first:
            saves.begin()
        logged, then = first, time.monotonic()  # when step `logged` was
        told = 0.0  # when something was last said of the steps
        # Threads prepare batches a few steps ahead: what they hold in memory is not part of the state, and is prepared again.
        batches = ahead(config, data, order_of(config, data), first, state.images, state.stop)
        while True:
            # The next batch, None at the end. Reading may fail on one process alone, so all agree on whether to go on.
            tell(state.step, "reading data")
            batch, fault = _next(batches) if state.step < state.stop else (None, None)
            tell(state.step, "waiting for the others' data")
            over = _why_it_ends(state, asked(), fault, saves, clock)

            # The decay of the rate begins with a checkpoint, from which the run can go on if it is to end later after all.
            if not over and clock.due():
                line = clock.begin(learning_rate(config, state.step, state.end), warmed(config, state.step))
                say(line)
                if logger:
                    logger.event(state.step, line)
                batch = batch if state.step < state.stop else None

            # Every `eval_every` steps: what the averaged weights draw, measured. A run that was stopped meanwhile does it when
            # it goes on, so here the step that it begins with counts, too. A drawing takes minutes.
            if quality and not over and state.step % settings.eval_every == 0 and state.step > state.measured:
                clock.beside.append("measuring")
                found, why = preview.measure(config, state, quality, tick)
                if why:  # images that are not finite, say, are no reason to end a run: its gradients will tell
                    state.measured = state.step
                    say(f"step {state.step} is not measured: {why}")
                elif found is None:
                    over = Stopped(state.step)
                else:
                    saves.rank(quality.best(state.step, found))
                    if logger:
                        logger.row(step=state.step, images=state.images, time=time.time(), **found)
                        quality.record(state.step, found)
                    say(f"step {state.step}  " + "  ".join(f"{name} {value:.4g}" for name, value in found.items()))
                    if leads:
                        look(run)
            last = (over is not None or batch is None) and state.step > first

            # Every `validation_interval` steps: the loss of held-out images. It costs a forward pass of a batch.
            if held_out and due(settings.validation_interval):
                preview.validate(config, held_out, state, meter)

            # Every `log_interval` steps, and at the last: the means since the line before, which waits for the device.
            if due(settings.log_interval) or last:
                now = time.monotonic()
                pace = (state.step - logged) * settings.batch_size / (now - then)
                logged, then, told = state.step, now, now
                row = _row(state, config, meter.read(processes.sum_), pace)
                if logger:
                    logger.row(**row)
                say(_line(row, state.step, state.stop, clock.left), "step", **row)
            elif leads and state.step > first and time.monotonic() - told >= PATIENCE:
                told = time.monotonic()
                of_step = dict(step=state.step, images=state.images, loss=float(state.last_loss), seconds_left=clock.left)
                say(_line(of_step, state.step, state.stop, clock.left) + "  (of this step alone)", "progress", **of_step)
            if leads and state.step > first:
                pace = (state.step - first) * settings.batch_size / (time.monotonic() - clock.started)
                bar.show(state.progress(), _line({"images_per_second": pace}, state.step, state.stop, clock.left))

            # Every `save_interval` steps, where the best was measured, and at the last: a checkpoint, written in a thread while
            # training goes on. Weights that diverged are not saved: the checkpoint before them is the one to go back to.
            tell(state.step, "saving")
            if (due(settings.save_interval) or saves.due() or last) and not isinstance(over, Diverged):
                saves.begin(last)
            saves.settle(wait=last or bool(state.decay and state.decay["start"] == state.step))

            # Now and then, and at the last: a snapshot of the averages by powers of time. It costs the writing of them.
            interval = averages.interval(state.step, settings.ema_snapshots)
            if state.ema.powers and (last or due(interval)) and not isinstance(over, Diverged):
                _snapshot(state, config, run)

            # Only now, when all is saved and logged.
            if over:
                raise over

            # Every `sample_interval` steps, and at the end: a sheet of samples. It costs as many passes as a solver takes steps,
            # and comes after the save, so that a kill while it is drawn loses no training.
            if draws and clock.limit and state.step == first + WARM and not last:
                draws = clock.affords(preview.sheet_seconds(config, state, data, tick), say)
            if draws and (due(settings.sample_interval) or last):
                clock.beside.append("sheet")
                sheet = preview.sheet(config, state, data, run, tick)
                say(f"samples: {sheet}", "samples", step=state.step, path=sheet)
                if leads and not last:
                    look(run)

            if batch is None:
                break
            tell(state.step, "training")
            train_step(state, config, method, batch, meter)
    if logger:
        logger.close()
    return saves.path


# ---- where a run begins and why it ends


def _begin(state: TrainState, config: Config, store: Store, run: Path, say: Callable[[str], None]) -> list[str]:
    """Go on from the newest checkpoint, or from the weights of another run; returns a line for each checkpoint passed over."""
    saved, passed_over = store.newest()
    for line in passed_over:
        say(line)
    if saved:
        state.restore(saved, config)
        if state.ema.powers and not processes.rank():
            averages.forget(run, state.step)
        say(f"resuming {run} at step {state.step}" + (f" of {state.stop}" if state.stop < ENDLESS else ""))
    elif source := config.train.init_from:
        anew = initialise(state, read_weights(place(source)), config.train.init_reset, config.data.classes)
        say(f"starting from the weights of {source}" + (f"; anew: {', '.join(anew)}" if anew else ""))
    return passed_over


def _ended(state: TrainState, run: Path, config: Config) -> str:
    """What is said of a run that is at its end already."""
    by, decay = aim(config.train)[0], state.decay
    way = "--steps or --time" if by == "finish" else f"a larger --{by}"
    before = f" from step {decay['start']}, before its decay" if decay and decay["start"] < decay["end"] else ""
    return f"{run} is at step {state.step} of {state.stop} already: {way} goes on{before}"


def _snapshot(state: TrainState, config: Config, run: Path) -> None:
    """Keep the averages by powers of time; UserError, on all processes, where they cannot be written."""
    powers = {w: {name: shard.whole(t).cpu() for name, t in kept.items()} for w, kept in state.ema.powers.items()}

    def write() -> None:
        averages.write(run, config, state.step, state.ema.updates, powers, config.train.ema_snapshots)

    processes.of_first(write)


def _next(batches: Iterator[Batch]) -> tuple[Batch | None, UserError | None]:
    """The next batch, None at the end, or what is wrong with it on this process."""
    try:
        return next(batches, None), None
    except UserError as e:
        return None, e


def _why_it_ends(state: TrainState, asked: bool, fault: UserError | None, saves: Saves, clock: Clock) -> UserError | None:
    """What ends the run at this step, the same on every process; None where nothing does. Every process calls it."""
    if state.skipped_in_a_row >= MAX_SKIPS:
        return Diverged(
            f"{MAX_SKIPS} steps in a row had no finite gradient (at step {state.step}): lower --lr, set --grad_clip 1, "
            f"or leave fp16; {saves.whole()}"
        )
    # The one exchange that each step makes beside the gradients': three numbers, through the CPUs.
    stopped, broken, milliseconds = processes.count(asked, fault is not None, clock.read())
    clock.told(milliseconds)
    if broken:
        return UserError(next(text for text in processes.every(str(fault) if fault else None) if text))
    # A step that was skipped says nothing good of the weights: a stop waits for one that was not, a few steps long.
    return Stopped(state.step) if stopped and state.skipped_in_a_row not in range(1, WAITS) else None


@contextmanager
def _stop_signal(tells: bool) -> Iterator[Callable[[], bool]]:
    """Turns Ctrl-C, SIGTERM and SIGHUP (a closed terminal) into a question that the loop asks between steps.

    The process that `tells` answers at once. A second Ctrl-C interrupts at once.
    """
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if tells and not asked:
            with suppress(OSError):  # print may be at work in the very moment, and cannot be called twice
                os.write(2, b"\n" * os.isatty(2) + b"iddpm: finishing this step, then saving (Ctrl-C again: at once, without)\n")
        asked.append(number)

    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # by nohup
    before = {n: signal.signal(n, ask) for n in (signal.SIGINT, signal.SIGTERM, *([] if ignored else [signal.SIGHUP]))}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- what it tells


def _silence(line: str, event: str = "", **fields: Any) -> None:
    """What the processes other than the first say."""


def _row(state: TrainState, config: Config, means: Mapping[str, float], images_per_second: float) -> dict[str, Any]:
    row: dict[str, Any] = {"step": state.step, "images": state.images, "time": time.time(), **means}
    row |= {
        "lr": learning_rate(config, state.step - 1, state.end, state.decay),
        "images_per_second": images_per_second,
        "skipped": state.skipped,
    }
    if state.scale.enabled:
        row["lg_loss_scale"] = state.scale.lg
    return row


def _line(row: Mapping[str, Any], step: int, end: int, left: float) -> str:
    """What a person is told of a step: of these numbers those that are there."""
    values = [f"{k} {row[k] if row[k] is not None else math.nan:.4g}" for k in ("loss", "grad_norm", "lr") if k in row]
    if row.get("skipped"):
        values.append(f"{row['skipped']} skipped")
    if "images_per_second" in row:
        values.append(f"{rate(row['images_per_second'])} images/s")
    if left < math.inf:
        values.append(f"{duration(left)} left")
    of = f"/{end}" if end < ENDLESS else ""
    return "  ".join([f"step {step}{of}", *values])
