"""Steps of training that are timed and thrown away."""

import resource
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from iddpm import build
from iddpm.config import Config, given_shape, image_size, is_chain, seconds_of, total_steps
from iddpm.data import DataSet
from iddpm.data.batches import Batch, make_batch, order_of
from iddpm.parallel import processes
from iddpm.store.log import Meter
from iddpm.training.state import TrainState
from iddpm.training.step import method_of, train_step
from iddpm.words import duration, rate, size

STEPS = 4  # of a trial: the first warms up, and the median of the others counts
PATIENCE = 8.0  # seconds for them, or they are of fewer images


def timed(config: Config, device: torch.device, batches: Iterator[Batch]) -> tuple[TrainState, float]:
    """Take steps on some batches; returns the state they end in, and the seconds of a step with its batch."""
    state, meter, seconds = TrainState(config, device), Meter(), []
    method = method_of(config, state.parallel, state)
    for batch in batches:
        began = time.perf_counter()
        train_step(state, config, method, batch, meter)
        if device.type != "cpu":  # a step returns while the device is still at work on the weights
            torch.accelerator.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return state, statistics.median(seconds[1:])


def example(config: Config, images: int, device: str | torch.device = "cpu") -> Batch:
    """A batch of zeros of the shapes that a config trains on."""
    m, (height, width) = config.model, image_size(config.model)
    x0 = torch.zeros(images, m.image_channels, height, width, device=device)
    cond = {}
    if m.class_cond:
        cond["y"] = torch.zeros(images, dtype=torch.int64, device=device)
    if m.trained_guidance:
        cond["scale"] = torch.ones(images, device=device)
    if m.augment:
        cond["augment"] = torch.zeros(images, 9, device=device)
    if shape := given_shape(m):
        cond["given"] = torch.zeros(images, *shape, device=device)
    if m.low_res_noise:
        cond["low_res_level"] = torch.zeros(images, device=device)
    return Batch(x0, torch.zeros_like(x0), cond)


class Speed(NamedTuple):
    """Seconds of a step on one device: so much each time, and so much for each image."""

    fixed: float
    each: float
    images: int  # of the largest step that was timed

    def step(self, images: int) -> float:
        return self.fixed + self.each * images


def speed(config: Config, device: torch.device, most: int) -> Speed:
    """The speed of real steps: of 1, 2, 4 ... images, until one takes a second or another doubling would pass `most`."""

    def seconds_of(images: int) -> float:
        batch = example(config, images)
        return timed(config.updated(dict(batch_size=images, microbatch=-1)), device, iter([batch] * STEPS))[1]

    # Each doubling takes twice as long as the one before: about 16 s in all, where a step of one image takes less than 1.
    images, before, seconds = 2, seconds_of(1), seconds_of(2)
    while seconds < 1 and 2 * images <= most:
        images, before, seconds = 2 * images, seconds, seconds_of(2 * images)
    half = images // 2
    each = (seconds - before) / half
    if not 0 < each * half < before:  # noise, or a device that is not full yet: then all time is the images'
        return Speed(0.0, seconds / images, images)
    return Speed(before - each * half, each, images)


def dry_run(config: Config, data: DataSet, say: Callable[[str], None] = print) -> None:
    """Say what the run would be: its config, shapes, and the time and memory of a step. Writes nothing."""
    device, end, n = build.device(config.train.device), total_steps(config.train), config.train.batch_size
    order = order_of(config, data)

    def steps_of(images: int, count: int = STEPS) -> tuple[TrainState, float]:
        part = config if images == n else config.updated(dict(batch_size=images, microbatch=-1))
        return timed(part, device, (make_batch(part, data, order, step, step * images) for step in range(count)))

    images = processes.world()  # one each at first, for a step of all may take minutes; then four times as many, and again
    state, seconds = steps_of(images, 2)
    while images < n and 4 * seconds * STEPS < PATIENCE:
        images = min(4 * images, n)
        state, seconds = steps_of(images)
    seconds *= n / images
    weights, averages = sum(p.numel() for p in state.params.values()), len(state.ema.averages) + len(state.ema.powers)
    say(config.to_json())
    shapes = example(config, len(processes.share(n)), "meta")
    seen = "".join(f", {name} {tuple(value.shape)}" for name, value in shapes.cond.items())
    chain = f"a chain of {config.diffusion.diffusion_steps}" if is_chain(config.diffusion) else config.diffusion.noise_schedule
    say(f"images {tuple(shapes.x0.shape)}{seen}, {chain}")
    moments = sum(t.numel() for of_one in state.optimizer.state.values() for t in of_one.values() if isinstance(t, torch.Tensor))
    held = 4 * (weights * (2 + averages) + moments) / 2**20  # float32: weights, gradients, averages, and the optimizer's
    more = ", and one from before the decay" if config.train.lr_decay and config.train.keep else ""
    disk = size(4 * (weights * (1 + averages) + moments))
    say(f"a checkpoint takes {disk} on the disk, of which --keep {config.train.keep} leaves {config.train.keep or 'all'}{more}")
    say(f"{weights:,} weights; with gradients, {config.train.optimizer} and {averages} averages {held:,.0f} MiB")
    if device.type == "cuda":
        memory = f"{torch.cuda.max_memory_allocated(device) / 2**20:,.0f} MiB of GPU memory at the most"
    else:
        memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:,.0f} MiB of process memory at the most"
    from_one = "" if images == n else f"; worked out from steps of {images}, so the memory is that of these"
    say(f"one step: {seconds:.3f} s ({rate(n / seconds)} images/s), {memory}{from_one}")
    length, share = f"{end} steps: about {duration(end * seconds)}", config.train.lr_decay
    if text := config.train.finish or config.train.time:
        share = 1.0 if config.train.finish else share
        length = f"about {seconds_of(text, 'time') / seconds:,.0f} steps in {text}"
    if share:
        length += f", in the last {share:.0%} of which the rate falls to 0"
    say(f"{length}, without checkpoints and samples. Nothing was written.")
