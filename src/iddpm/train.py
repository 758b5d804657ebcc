"""The training loop: read `train` from top to bottom; `train_step` is the method."""

import math
import resource
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iddpm import build, checkpoint, rng, sample
from iddpm.config import Config, ema_rates, total_steps
from iddpm.data import Images, Order
from iddpm.diffusion.denoiser import Denoiser
from iddpm.ema import EMA
from iddpm.errors import UserError
from iddpm.log import Logger, Meter, duration

MAX_SKIPS = 50  # steps in a row without a finite gradient after which a run gives up


class Batch(NamedTuple):
    """What one optimizer step trains on, in global order."""

    x0: Tensor  # (B, C, H, W) in [-1, 1]
    eps: Tensor  # (B, C, H, W)
    labels: Tensor | None  # (B,) int64


class LossScale:
    """The factor that keeps fp16 gradients from vanishing: 2^lg, a little more after each good step, half after a bad one."""

    def __init__(self, enabled: bool, growth: float):
        self.enabled, self.growth = enabled, growth
        self.lg = 20.0 if enabled else 0.0

    @property
    def factor(self) -> float:
        return 2.0**self.lg

    def update(self, good: bool) -> None:
        """Take note of a step; never below 1."""
        if self.enabled:
            self.lg = self.lg + self.growth if good else max(self.lg - 1, 0.0)


class TrainState:
    """All that a run remembers; exactly this is checkpointed."""

    def __init__(self, config: Config, device: torch.device):
        t = config.train
        torch.manual_seed(t.seed)  # the initial weights
        self.net = build.network(config).to(device)
        self.law = build.law(config.diffusion)
        self.params = dict(self.net.named_parameters())
        self.optimizer = torch.optim.AdamW(self.params.values(), lr=t.lr, betas=(0.9, t.adam_beta2), weight_decay=t.weight_decay)
        self.ema = EMA(self.params, ema_rates(t), t.ema_warmup)
        self.scale = LossScale(t.precision == "fp16", t.fp16_scale_growth)
        self.step = 0  # optimizer steps tried
        self.images = 0  # images seen: the position in the data order
        self.skipped = 0  # steps skipped for a gradient that was not finite, in all
        self.skipped_in_a_row = 0

    def to_saved(self) -> checkpoint.Saved:
        """What a checkpoint keeps."""
        names = list(self.params)
        optimizer: dict[str, Tensor] = {}
        for k, slots in self.optimizer.state_dict()["state"].items():
            optimizer |= {f"{names[k]}.{slot}": value for slot, value in slots.items()}
        law = self.law.state_dict()
        optimizer |= {f"law.{name}": value for name, value in law.items()}
        counts = {n: getattr(self, n) for n in ("step", "images", "skipped", "skipped_in_a_row")}
        state = counts | dict(ema_updates=self.ema.updates, lg_loss_scale=self.scale.lg, law=list(law))
        return checkpoint.Saved(self.step, dict(self.params), self.ema.averages, optimizer, state)

    def restore(self, saved: checkpoint.Saved, config: Config) -> None:
        """Become what was saved. Rates and decays come from the config, not from the checkpoint."""
        self.net.load_state_dict(saved.weights)
        slots: dict[int, dict[str, Tensor]] = {}
        numbers = {name: k for k, name in enumerate(self.params)}
        law = {name: saved.optimizer[f"law.{name}"] for name in saved.state["law"]}
        for key, value in saved.optimizer.items():
            name, slot = key.rsplit(".", 1)
            if name in numbers:
                slots.setdefault(numbers[name], {})[slot] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        if law:
            self.law.load_state_dict(law)
        for rate, average in self.ema.averages.items():
            for name, tensor in average.items():
                tensor.copy_(saved.averages[rate][name])
        for name in ("step", "images", "skipped", "skipped_in_a_row"):
            setattr(self, name, saved.state[name])
        self.ema.updates = saved.state["ema_updates"]
        if config.train.precision == "fp16" and saved.state["lg_loss_scale"]:
            self.scale.lg = saved.state["lg_loss_scale"]


def learning_rate(config: Config, step: int) -> float:
    """The rate of optimizer step `step`, counted from 0: warmed up linearly, annealed linearly to 0."""
    t = config.train
    end = total_steps(t) if t.lr_anneal_steps == -1 else t.lr_anneal_steps
    warm = min(1.0, (step + 1) / t.lr_warmup_steps) if t.lr_warmup_steps else 1.0
    return t.lr * warm * (max(0.0, 1 - step / end) if end else 1.0)


def make_batch(config: Config, data: Images, order: Order, step: int, position: int) -> Batch:
    """The batch of a step, from the data order's position; a pure function of the seed and these two."""
    t, n = config.train, config.train.batch_size
    indices = order.indices(position, n)
    x0 = torch.from_numpy(data.batch(indices)).float() / 127.5 - 1
    if config.data.random_flip:
        flip = rng.uniform(t.seed, rng.FLIP, step, n) < 0.5
        x0[flip] = x0[flip].flip(-1)
    eps = rng.normal(t.seed, rng.NOISE, step, range(n), x0.shape[1:])
    labels = torch.from_numpy(data.labels[indices]) if config.model.class_cond and data.labels is not None else None
    return Batch(x0, eps, labels)


def train_step(state: TrainState, config: Config, denoiser: Denoiser, batch: Batch, meter: Meter) -> None:
    """One optimizer step on a batch, in microbatches that leave the gradient as it is."""
    t, device, n = config.train, next(iter(state.params.values())).device, len(batch.x0)
    objective, micro = build.objective(config.diffusion), t.microbatch if t.microbatch > 0 else n
    steps, weight = state.law(rng.uniform(t.seed, rng.TIME, state.step, n))
    state.net.train()
    torch.manual_seed(_dropout_seed(t.seed, state.step))
    state.optimizer.zero_grad(set_to_none=True)
    losses = []
    for a in range(0, n, micro):
        part = slice(a, a + micro)
        i, w = steps[part].to(device), weight[part].to(device)
        cond = {} if batch.labels is None else {"y": batch.labels[part].to(device)}
        terms = objective(denoiser, batch.x0[part].to(device), batch.eps[part].to(device), i, cond)
        (state.scale.factor * (terms["loss"] * w).sum() / n).backward()
        meter.add({name: term * w for name, term in terms.items()}, i * 4 // denoiser.chain.steps)
        losses.append(terms["loss"].detach())

    grads = [p.grad for p in state.params.values() if p.grad is not None]
    torch._foreach_div_(grads, state.scale.factor)
    norm = torch.nn.utils.get_total_norm(grads)
    good = bool(torch.isfinite(norm))  # waits for the device: the price of never applying a bad gradient
    if good:
        if t.grad_clip:
            torch._foreach_mul_(grads, (t.grad_clip / norm).clamp(max=1.0))
        for group in state.optimizer.param_groups:
            group["lr"], group["weight_decay"] = learning_rate(config, state.step), t.weight_decay
        state.optimizer.step()
        state.ema.update()
        state.law.update(steps, torch.cat(losses))
        meter.add({"grad_norm": norm[None]})
    state.scale.update(good)
    state.skipped += not good
    state.skipped_in_a_row = 0 if good else state.skipped_in_a_row + 1
    state.step += 1
    state.images += n


def _dropout_seed(seed: int, step: int) -> int:
    return int(rng.stream(seed, rng.DROPOUT, step, 0).integers(2**63))


def train(config: Config, data: Images, run: Path, notes: Sequence[str] = (), say: Callable[[str], None] = print) -> Path:
    """Train, or go on training, the run in a folder until its end; returns the last checkpoint.

    Raises UserError where the run cannot go on (50 bad steps in a row), Stopped after Ctrl-C or SIGTERM, once all is saved.
    """
    t = config.train
    device, end = build.device(t.device), total_steps(t)
    state = TrainState(config, device)
    folder, passed_over = checkpoint.newest(run)
    for line in passed_over:
        say(line)
    if folder:
        state.restore(checkpoint.load(folder), config)
        say(f"resuming {run} at step {state.step} of {end}")
    elif t.init_from:
        anew = initialise(state, checkpoint.read_weights(Path(t.init_from)), t.init_reset)
        say(f"starting from the weights of {t.init_from}" + (f"; anew: {', '.join(anew)}" if anew else ""))
    (run / "samples").mkdir(parents=True, exist_ok=True)
    logger = Logger(run, state.step, t.tensorboard)
    for line in (*notes, *passed_over):
        logger.event(state.step, line)
    net = build.in_precision(state.net, device, t.precision)
    denoiser = build.denoiser(config.diffusion, net)
    order, meter = Order(len(data), t.seed), Meter()

    def save() -> Path:
        path = checkpoint.save(run, config, state.to_saved(), t.keep)
        say(f"saved {path}")
        return path

    began = last = time.monotonic()
    first = logged = state.step
    if first >= end:
        say(f"{run} is at step {first} of {end} already: a larger --steps goes on")
    with _stop_signal() as stopping:
        for batch in _ahead(config, data, order, state, end):
            train_step(state, config, denoiser, batch, meter)
            done = state.step == end
            if state.skipped_in_a_row >= MAX_SKIPS:
                raise UserError(
                    f"{MAX_SKIPS} steps in a row had no finite gradient (at step {state.step}): lower --lr, set --grad_clip 1, "
                    f"or leave fp16; the last checkpoint is whole"
                )
            if state.step % t.log_interval == 0 or done or stopping():
                now = time.monotonic()
                rate = (state.step - logged) * t.batch_size / (now - last)
                left = (end - state.step) * (now - began) / (state.step - first)
                last, logged = now, state.step
                _log(logger, state, config, meter.read(), rate)
                say(_line(logger.latest, state.step, end, left))
            if done or stopping() or state.step % t.save_interval == 0:
                folder = save()
            if stopping():
                logger.close()
                raise Stopped(f"stopped at step {state.step} of {end}; all is saved: the same command goes on from here")
            if done or (t.sample_interval and state.step % t.sample_interval == 0):
                say(f"samples: {_sample_grid(config, state, net, device, run)}")
    logger.close()
    assert folder is not None
    return folder


class Stopped(UserError):
    """Training was asked to stop, and everything is saved."""


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


def _ahead(config: Config, data: Images, order: Order, state: TrainState, end: int) -> Iterator[Batch]:
    """The batches from the state's position to the end, prepared a few steps ahead in threads."""
    with ThreadPoolExecutor(config.data.num_workers, "batches") as pool:
        start, seen, n = state.step, state.images, config.train.batch_size

        def submit(step: int) -> Any:
            return pool.submit(make_batch, config, data, order, step, seen + (step - start) * n)

        queue = [submit(step) for step in range(start, min(start + config.data.num_workers + 1, end))]
        try:
            for step in range(start, end):
                batch = queue.pop(0).result()
                if (coming := step + config.data.num_workers + 1) < end:
                    queue.append(submit(coming))
                yield batch
        finally:
            for waiting in queue:
                waiting.cancel()


def _log(logger: Logger, state: TrainState, config: Config, means: Mapping[str, float], images_per_second: float) -> None:
    row = {"step": state.step, "images": state.images, "time": time.time(), **means}
    row |= {"lr": learning_rate(config, state.step - 1), "images_per_second": images_per_second, "skipped": state.skipped}
    if state.scale.enabled:
        row["lg_loss_scale"] = state.scale.lg
    logger.row(**row)


def _line(row: Mapping[str, Any], step: int, end: int, left: float) -> str:
    values = "  ".join(f"{k} {row.get(k, math.nan):.4g}" for k in ("loss", "grad_norm", "lr"))
    skipped = f"  {row['skipped']} skipped" if row["skipped"] else ""
    return f"step {step}/{end}  {values}{skipped}  {row['images_per_second']:.0f} images/s  {duration(left)} left"


def _sample_grid(config: Config, state: TrainState, net: Any, device: torch.device, run: Path) -> Path:
    """A grid of averaged-weights samples from fixed seeds, samples/step_N.png; leaves the run's randomness alone."""
    live = {name: p.detach().clone() for name, p in state.params.items()}
    average = next(iter(state.ema.averages.values()), live)
    path = run / "samples" / f"step_{state.step:08d}.png"
    state.net.eval()
    try:
        _copy(average, state.params)
        sample.grid_file(config, net, device, path)
    finally:
        _copy(live, state.params)
    return path


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, tensor in source.items():
        target[name].copy_(tensor)


def initialise(state: TrainState, weights: checkpoint.Weights, reset: bool) -> list[str]:
    """Start from other weights (--init_from); returns what was re-initialised instead.

    UserError naming the layers that do not fit, unless `reset` lets them start anew.
    """
    own = state.net.state_dict()
    fits = {k: v for k, v in weights.tensors.items() if k in own and own[k].shape == v.shape}
    misfits = sorted(k for k in own if k not in fits)
    if misfits and not reset:
        names = ", ".join(misfits[:3]) + (f" and {len(misfits) - 3} more" if len(misfits) > 3 else "")
        raise UserError(f"{weights.path} does not fit in {names}: --init_reset True starts these layers anew")
    state.net.load_state_dict(fits, strict=False)
    for average in state.ema.averages.values():
        _copy(state.params, average)
    return misfits


def dry_run(config: Config, data: Images, say: Callable[[str], None] = print) -> None:
    """Say what the run would be: its config, shapes, and the time and memory of a step (median of 3, after one to warm up)."""
    device, end = build.device(config.train.device), total_steps(config.train)
    state, order, meter = TrainState(config, device), Order(len(data), config.train.seed), Meter()
    denoiser = build.denoiser(config.diffusion, build.in_precision(state.net, device, config.train.precision))
    seconds = []
    for step in range(4):
        began = time.monotonic()
        batch = make_batch(config, data, order, step, state.images)
        train_step(state, config, denoiser, batch, meter)
        seconds.append(time.monotonic() - began)
    typical = statistics.median(seconds[1:])
    weights = sum(p.numel() for p in state.params.values())
    say(config.to_json())
    labels = "no labels" if batch.labels is None else f"labels {tuple(batch.labels.shape)}"
    say(f"images {tuple(batch.x0.shape)}, {labels}, chain of {denoiser.chain.steps}")
    held = weights * 4 * (4 + len(state.ema.averages)) / 2**20
    say(f"{weights:,} weights; with gradients, AdamW and {len(state.ema.averages)} averages {held:,.0f} MiB")
    if device.type == "cuda":
        memory = f"{torch.cuda.max_memory_allocated(device) / 2**20:,.0f} MiB of GPU memory at the most"
    else:
        memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:,.0f} MiB of process memory at the most"
    say(f"one step: {typical:.3f} s ({config.train.batch_size / typical:.0f} images/s), {memory}")
    say(f"{end} steps: about {duration(end * typical)}, without checkpoints and samples. Nothing was written.")
