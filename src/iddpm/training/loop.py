"""The training loop: read `train` from top to bottom; `train_step` is the method."""

import math
import resource
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from iddpm import build, rng
from iddpm.config import ENDLESS, Config, Train, total_steps
from iddpm.data import Images, Order
from iddpm.data.batches import Batch, ahead, make_batch
from iddpm.diffusion.denoiser import Denoiser, Network
from iddpm.errors import UserError
from iddpm.measure.quality import Quality
from iddpm.parallel import processes, shard
from iddpm.parallel.watch import Tell, watch
from iddpm.sampling import draw as sample
from iddpm.store import checkpoint
from iddpm.store.checkpoint import Saves, Store
from iddpm.store.log import Logger, Meter, duration
from iddpm.store.remote import place
from iddpm.training.state import TrainState, copy_weights, initialise

MAX_SKIPS = 50  # steps in a row without a finite gradient after which a run gives up


class Log(Protocol):
    """Where the numbers of a run go."""

    def row(self, **values: Any) -> None: ...

    def event(self, step: int, text: str) -> None: ...

    def close(self) -> None: ...


def learning_rate(config: Config, step: int) -> float:
    """The rate of optimizer step `step`, counted from 0: warmed up linearly, annealed linearly to 0."""
    t = config.train
    end = total_steps(t) if t.lr_anneal_steps == -1 else t.lr_anneal_steps
    warm = min(1.0, (step + 1) / t.lr_warmup_steps) if t.lr_warmup_steps else 1.0
    return t.lr * warm * (max(0.0, 1 - step / end) if end else 1.0)


def train_step(state: TrainState, config: Config, net: nn.Module, denoiser: Denoiser, batch: Batch, meter: Meter) -> None:
    """One optimizer step on this process's part of a batch, in microbatches that leave the gradient as it is.

    `net` is the network inside the denoiser: where there are several processes, it averages their gradients.
    """
    t, device = config.train, next(iter(state.params.values())).device
    n, mine = t.batch_size, processes.share(t.batch_size)
    objective, micro = build.objective(config), t.microbatch if t.microbatch > 0 else n
    everywhere = state.law(rng.uniform(t.seed, rng.TIME, state.step, n))
    steps, weight = (v[mine.start : mine.stop] for v in everywhere)
    state.net.train()
    torch.manual_seed(_dropout_seed(t.seed, state.step))
    state.optimizer.zero_grad(set_to_none=True)
    losses: list[Tensor] = []
    parts = processes.parts(n, micro)
    for part in parts:
        idle = part.start == part.stop  # another process has an image more: this one goes along with its first, at no weight
        part = slice(0, 1) if idle else part
        i, w = steps[part].to(device), weight[part].to(device) * (not idle)
        cond = {name: value[part].to(device) for name, value in batch.cond.items()}
        with nullcontext() if len(losses) + 1 == len(parts) else shard.unsynchronised(net):
            terms = objective(denoiser, batch.x0[part].to(device), batch.eps[part].to(device), i, cond)
            share = processes.world() / n  # the processes' gradients are averaged
            (state.scale.factor * share * (terms["loss"] * w).sum()).backward()
        if not idle:
            meter.add({name: term * w for name, term in terms.items()}, i * 4 // denoiser.chain.steps)
        losses.append(terms["loss"].detach()[: 0 if idle else None])

    grads = [p.grad for p in state.params.values() if p.grad is not None]
    torch._foreach_div_(shard.local(grads), state.scale.factor)
    norm = shard.whole(torch.nn.utils.get_total_norm(grads))
    good = bool(torch.isfinite(norm))  # waits for the device: the price of never applying a bad gradient
    if good:
        if t.grad_clip:
            torch._foreach_mul_(shard.local(grads), (t.grad_clip / norm).clamp(max=1.0))
        for group in state.optimizer.param_groups:
            group["lr"], group["weight_decay"] = learning_rate(config, state.step), t.weight_decay
        state.optimizer.step()
        state.ema.update()
        state.law.update(everywhere.i, processes.gather(torch.cat(losses)))
        meter.add({"grad_norm": norm[None]})
    state.scale.update(good)
    state.skipped += not good
    state.skipped_in_a_row = 0 if good else state.skipped_in_a_row + 1
    state.step += 1
    state.images += n


def _dropout_seed(seed: int, step: int) -> int:
    return int(rng.stream(seed, rng.DROPOUT, step, processes.rank()).integers(2**63))


def train(
    config: Config,
    data: Images,
    run: Path,
    notes: Sequence[str] = (),
    say: Callable[[str], None] = print,
    store: Store | None = None,
    log: Callable[[int], Log] | None = None,
    save_start: bool = False,
    held_out: Images | None = None,
    sheets: bool = True,
) -> Path | None:
    """Train, or go on training, the run in a folder until its end; returns the last checkpoint.

    `store` and `log` (a function of the step it begins at) take the place of the run's own checkpoints and log; `save_start`
    also saves step 0; `held_out` images are those of --validation; without `sheets` no samples are drawn. Raises UserError where
    the run cannot go on (50 bad steps in a row, data that cannot be read, a checkpoint that cannot be written), on every
    process alike; Stopped after Ctrl-C or SIGTERM, once all is saved.
    """
    t = config.train
    device, end = processes.own_device(build.device(t.device)), total_steps(t)
    _check_processes(t)
    leads = processes.rank() == 0
    say = say if leads else _silence
    quality = Quality(config, run, device, say) if t.eval_every else None
    store = store or checkpoint.Folder(run, t.keep, t.keep_every, t.async_save)
    state = TrainState(config, device)
    saved, passed_over = store.newest()
    for line in passed_over:
        say(line)
    if saved:
        state.restore(saved, config)
        say(f"resuming {run} at step {state.step}" + (f" of {end}" if end < ENDLESS else ""))
    elif t.init_from:
        anew = initialise(state, checkpoint.read_weights(place(t.init_from)), t.init_reset)
        say(f"starting from the weights of {t.init_from}" + (f"; anew: {', '.join(anew)}" if anew else ""))
    if leads:
        run.mkdir(parents=True, exist_ok=True)
    logger = (log or (lambda step: Logger(run, step, t.tensorboard)))(state.step) if leads else None
    if logger:
        for line in (*notes, *passed_over):
            logger.event(state.step, line)
    net = state.parallel
    denoiser = build.denoiser(config.diffusion, build.in_precision(net, device, t.precision))
    order, meter, draws = Order(len(data), t.seed), Meter(), sheets and config.model.network != "classifier"
    validation = Validation(config, held_out) if held_out else None
    first = logged = state.step
    if first >= end:
        say(f"{run} is at step {first} of {end} already: a larger --steps goes on")
    with Saves(store, run, config, state, say) as saves, _stop_signal() as stopping, watch(t.timeout) as tell:
        if save_start and not first:
            saves.begin()
        began = last = time.monotonic()
        batches = ahead(config, data, order, state.step, state.images, end)
        while True:
            tell(state.step, "reading data")
            batch, fault = _fetch(batches)
            tell(state.step, "waiting for the others' data")
            done = state.step >= end
            stop, broken = map(bool, processes.count(stopping(), fault is not None))
            diverged = state.skipped_in_a_row >= MAX_SKIPS
            unmeasured = quality and state.step % t.eval_every == 0 and state.measured < state.step
            if quality and unmeasured and not (stop or broken or diverged):
                if found := _measure(config, state, device, quality, tell, stopping):
                    saves.rank(quality.best(state.step, found))
                    if logger:
                        logger.row(step=state.step, images=state.images, time=time.time(), **found)
                        quality.record(state.step, found)
                    say(f"step {state.step}  " + "  ".join(f"{k} {v:.4g}" for k, v in found.items()))
                stop = found is None
            ending = done or stop or broken or diverged
            if state.step > first:
                if validation and state.step % t.validation_interval == 0:
                    validation(state, meter)
                if state.step % t.log_interval == 0 or ending:
                    now = time.monotonic()
                    rate = (state.step - logged) * t.batch_size / (now - last)
                    left = (end - state.step) * (now - began) / (state.step - first)
                    last, logged = now, state.step
                    row = _row(state, config, meter.read(processes.sum_), rate)
                    if logger:
                        logger.row(**row)
                    say(_line(row, state.step, end, left))
                tell(state.step, "saving")
                if (ending or saves.due() or state.step % t.save_interval == 0) and not diverged:
                    saves.begin()
                saves.settle(wait=ending)
            if broken:
                raise _first_fault(fault)
            if diverged:
                raise UserError(
                    f"{MAX_SKIPS} steps in a row had no finite gradient (at step {state.step}): lower --lr, set --grad_clip 1, "
                    f"or leave fp16; the last checkpoint is whole"
                )
            if stop:
                raise Stopped(f"stopped at step {state.step}; all is saved: the same command goes on from here")
            if draws and state.step > first and (done or (t.sample_interval and state.step % t.sample_interval == 0)):
                say(f"samples: {_sample_sheet(config, state, device, data, run, tell, stopping)}")
            if batch is None:
                break
            tell(state.step, "training")
            train_step(state, config, net, denoiser, batch, meter)
    if logger:
        logger.close()
    return saves.path


def _check_processes(t: Train) -> None:
    world = processes.world()
    if t.batch_size < world:
        raise UserError(f"--batch_size {t.batch_size}: at least one image for each of the {world} processes")
    if t.shard > 0 and world % t.shard:
        raise UserError(f"--shard {t.shard} does not divide the {world} processes: give 0 (none), -1 (all) or a divisor")


def _fetch(batches: Iterator[Batch]) -> tuple[Batch | None, UserError | None]:
    """The next batch, None at the end, or what is wrong with it on this process."""
    try:
        return next(batches, None), None
    except UserError as e:
        return None, e


def _first_fault(fault: UserError | None) -> UserError:
    """What was wrong with the data, the same on every process."""
    return UserError(next(text for text in processes.every(str(fault) if fault else None) if text))


class Validation:
    """Measures the loss of the present weights on a batch of held-out images, and leaves the run's randomness alone."""

    def __init__(self, config: Config, data: Images):
        self.config = config.updated(dict(random_crop=False, random_flip=False))
        self.data, self.order = data, Order(len(data), config.train.seed)
        self.objective = build.objective(config)

    @torch.no_grad()
    def __call__(self, state: TrainState, meter: Meter) -> None:
        """Add val_loss and its terms, by quartile of t, to the meter; the images and noise depend on the step alone."""
        with shard.gathered(state.net):
            self._measure(state, meter)

    def _measure(self, state: TrainState, meter: Meter) -> None:
        t, net = self.config.train, state.net.eval()
        device, mine = next(net.parameters()).device, processes.share(t.batch_size)
        batch = make_batch(self.config, self.data, self.order, state.step, state.images)
        denoiser = build.denoiser(self.config.diffusion, build.in_precision(net, device, t.precision))
        i = (rng.uniform(t.seed, rng.TIME, state.step, t.batch_size) * denoiser.chain.steps).long()[mine.start : mine.stop]
        for a in range(0, len(mine), micro := t.microbatch if t.microbatch > 0 else len(mine)):
            x0, eps, at = (v[a : a + micro].to(device) for v in (batch.x0, batch.eps, i))
            terms = self.objective(denoiser, x0, eps, at, {k: v[a : a + micro].to(device) for k, v in batch.cond.items()})
            meter.add({f"val_{name}": term for name, term in terms.items()}, at * 4 // denoiser.chain.steps)


def _silence(line: str) -> None:
    """What the processes other than the first say."""


class Stopped(UserError):
    """Training was asked to stop, and everything is saved: exit code 75, EX_TEMPFAIL, for "preempted, start me again"."""

    code = 75


@contextmanager
def _stop_signal() -> Iterator[Callable[[], bool]]:
    """Turns Ctrl-C and SIGTERM into a question that the loop asks between steps; a second Ctrl-C interrupts at once."""
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    before = {n: signal.signal(n, ask) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _row(state: TrainState, config: Config, means: Mapping[str, float], images_per_second: float) -> dict[str, Any]:
    row: dict[str, Any] = {"step": state.step, "images": state.images, "time": time.time(), **means}
    row |= {"lr": learning_rate(config, state.step - 1), "images_per_second": images_per_second, "skipped": state.skipped}
    if state.scale.enabled:
        row["lg_loss_scale"] = state.scale.lg
    return row


def _line(row: Mapping[str, Any], step: int, end: int, left: float) -> str:
    values = "  ".join(f"{k} {row.get(k, math.nan):.4g}" for k in ("loss", "grad_norm", "lr"))
    skipped = f"  {row['skipped']} skipped" if row["skipped"] else ""
    speed = f"{row['images_per_second']:.0f} images/s"
    if end == ENDLESS:
        return f"step {step}  {values}{skipped}  {speed}"
    return f"step {step}/{end}  {values}{skipped}  {speed}  {duration(left)} left"


@contextmanager
def _averaged(config: Config, state: TrainState, device: torch.device, tick: Callable[[], None]) -> Iterator[Network]:
    """The network with its averaged weights, ready to draw, and a `tick` before each call; afterwards the run's own are back."""
    live = {name: p.detach().clone() for name, p in state.params.items()}
    average = next(iter(state.ema.averages.values()), live)
    net = build.in_precision(state.net.eval(), device, config.train.precision)

    def ticking(*x: Tensor, **cond: Tensor) -> Tensor:
        tick()
        return net(*x, **cond)

    try:
        copy_weights(average, state.params)
        with shard.gathered(state.net):
            yield ticking
    finally:
        copy_weights(live, state.params)


class _Asked(Exception):
    """A process was asked to stop while all were at work."""


def _watchful(state: TrainState, doing: str, tell: Tell, stopping: Callable[[], bool]) -> Callable[[], None]:
    """A tick that gives a sign of life, and raises _Asked on all processes, which call it equally often, once one is to stop."""

    def tick() -> None:
        tell(state.step, doing)
        if any(processes.count(stopping())):
            raise _Asked

    return tick


def _measure(
    config: Config, state: TrainState, device: torch.device, quality: Quality, tell: Tell, stopping: Callable[[], bool]
) -> dict[str, float] | None:
    """What the averaged weights draw, measured; None where the run is asked to stop meanwhile: a resumed run does it then."""
    try:
        with _averaged(config, state, device, _watchful(state, "measuring samples", tell, stopping)) as net:
            return quality(net)
    except _Asked:
        return None


def _sample_sheet(
    config: Config, state: TrainState, device: torch.device, data: Images, run: Path, tell: Tell, stopping: Callable[[], bool]
) -> str:
    """A sheet of averaged-weights samples from fixed seeds, samples/step_N.png; leaves the run's randomness alone.

    A super-resolution model shows what it makes of the first images of the data. Returns the path, or why there is none.
    """
    path = run / "samples" / f"step_{state.step:08d}.png"
    path.parent.mkdir(exist_ok=True)
    try:
        with _averaged(config, state, device, _watchful(state, "drawing samples", tell, stopping)) as net:
            _draw_sheet(config, net, device, data, path)
    except _Asked:
        return "none of this step: the run is to stop"
    return str(path)


def _draw_sheet(config: Config, net: Network, device: torch.device, data: Images, path: Path) -> None:
    if config.model.network != "super_res":
        sample.grid_file(config, net, device, path)
        return
    first = np.arange(min(8, len(data)))
    originals, labels = data.batch(first), [-1] * len(first) if data.labels is None else data.labels[first].tolist()
    small = sample.shrunk(config, originals)
    drawn = np.concatenate(list(sample.images(config, net, sample.Job(first.tolist(), labels, small), device)))
    sample.comparison_file(config, path, drawn, small, originals)


def dry_run(config: Config, data: Images, say: Callable[[str], None] = print) -> None:
    """Say what the run would be: its config, shapes, and the time and memory of a step (median of 3, after one to warm up)."""
    device, end = build.device(config.train.device), total_steps(config.train)
    state, order, meter = TrainState(config, device), Order(len(data), config.train.seed), Meter()
    denoiser = build.denoiser(config.diffusion, build.in_precision(state.net, device, config.train.precision))
    seconds = []
    for step in range(4):
        began = time.monotonic()
        batch = make_batch(config, data, order, step, state.images)
        train_step(state, config, state.net, denoiser, batch, meter)
        seconds.append(time.monotonic() - began)
    typical = statistics.median(seconds[1:])
    weights = sum(p.numel() for p in state.params.values())
    say(config.to_json())
    seen = "".join(f", {name} {tuple(value.shape)}" for name, value in batch.cond.items())
    say(f"images {tuple(batch.x0.shape)}{seen}, chain of {denoiser.chain.steps}")
    held = weights * 4 * (4 + len(state.ema.averages)) / 2**20
    say(f"{weights:,} weights; with gradients, AdamW and {len(state.ema.averages)} averages {held:,.0f} MiB")
    if device.type == "cuda":
        memory = f"{torch.cuda.max_memory_allocated(device) / 2**20:,.0f} MiB of GPU memory at the most"
    else:
        memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:,.0f} MiB of process memory at the most"
    say(f"one step: {typical:.3f} s ({config.train.batch_size / typical:.0f} images/s), {memory}")
    say(f"{end} steps: about {duration(end * typical)}, without checkpoints and samples. Nothing was written.")
