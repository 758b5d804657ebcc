"""What a run shows of itself between its steps: the loss of held-out images, sheets of samples, the quality of samples.

None of it touches the run's randomness: a run that is looked at is, to the bit, the run that is not.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from iddpm import build, rng
from iddpm.config import Config
from iddpm.data import DataSet, Order
from iddpm.data.batches import make_batch, whole
from iddpm.data.given import shown
from iddpm.data.preparation import signed
from iddpm.diffusion.denoiser import Network
from iddpm.errors import UserError
from iddpm.measure.quality import Quality
from iddpm.parallel import processes, shard
from iddpm.sampling import sheets
from iddpm.sampling.draw import BATCH, images, painter
from iddpm.sampling.images import as_pixels
from iddpm.sampling.job import Job
from iddpm.store.log import Meter
from iddpm.training.state import TrainState, copy_weights
from iddpm.training.step import method_of


class Interrupted(Exception):
    """The run was asked to stop while samples were drawn."""


Tick = Callable[[str], None]  # (what is being done), before each call of the network, on all processes; may raise Interrupted


@torch.no_grad()
def validate(config: Config, held_out: DataSet, state: TrainState, meter: Meter) -> None:
    """Add val_loss and its terms to the meter: the present weights' on one batch, whose images and noise follow from the step."""
    settings, mine = config.train, processes.share(config.train.batch_size)
    still = config.updated(dict(random_crop=False, random_flip=False))  # so that two runs can be compared
    batch = make_batch(still, held_out, Order(len(held_out), settings.seed), state.step, state.images, train=False)
    with shard.gathered(state.net):  # so no process waits for another, and their microbatches may differ in number
        _, denoiser, schedule, objective = method_of(config, state.net.eval(), state)
        device = state.device
        u = rng.uniform(settings.seed, rng.TIME, state.step, settings.batch_size)[mine.start : mine.stop]
        for a in range(0, len(mine), micro := settings.microbatch if settings.microbatch > 0 else len(mine)):
            part = slice(a, a + micro)
            cond = {name: value[part].to(device) for name, value in batch.cond.items()}
            terms = objective(denoiser, schedule, batch.x0[part].to(device), batch.eps[part].to(device), u[part], cond)
            meter.add({f"val_{name}": term for name, term in terms.items()}, (u[part] * 4).long().to(device))


@contextmanager
def averaged(config: Config, state: TrainState, doing: str, tick: Tick) -> Iterator[Network]:
    """The network with its averaged weights (the first rate's), ready to draw; afterwards the run's own are back.

    Costs a second copy of the weights while it lasts; of a sharded network each process then holds all of them.
    """
    # Copies, rather than a second network: nothing has to be built, compiled or sharded again.
    live = {name: p.detach().clone() for name, p in state.params.items()}
    average = next(iter(state.ema.averages.values()), live)
    net = build.in_precision(state.net.eval(), state.device, config.train.precision)

    def ticking(*x: Tensor, **cond: Tensor) -> Tensor:
        tick(doing)
        return net(*x, **cond)

    try:
        copy_weights(average, state.params)
        with shard.gathered(state.net):
            yield ticking
    finally:  # also where drawing was interrupted: what is saved then must be the run's own weights
        copy_weights(live, state.params)


def measure(config: Config, state: TrainState, quality: Quality, tick: Tick) -> tuple[dict[str, float] | None, str]:
    """What the averaged weights draw, measured, or why it cannot be; neither where the run is to stop: it is done later."""
    try:
        with averaged(config, state, "measuring samples", tick) as net:
            return quality(net), ""
    except Interrupted:
        return None, ""
    except UserError as e:
        return None, str(e)


def sheet(config: Config, state: TrainState, data: DataSet, run: Path, tick: Tick) -> str:
    """A sheet of averaged-weights samples from fixed seeds, samples/step_N.png. Returns the path, or why there is none."""
    path = run / "samples" / f"step_{state.step:08d}.png"
    path.parent.mkdir(exist_ok=True)  # without parents: a run whose folder was taken away must not come back half
    try:
        with averaged(config, state, "drawing samples", tick) as net:
            draw_sheet(config, net, state.device, data, path, state.step)
    except Interrupted:
        return "none of this step: the run is to stop"
    except UserError as e:  # images that are not finite are no reason to end a run: its gradients will tell
        return f"none of this step: {e}"
    return str(path)


def sheet_seconds(config: Config, state: TrainState, data: DataSet, tick: Tick) -> float:
    """How long such a sheet takes, by two steps of the solver; 0 where the run is to stop. The first process's, on all."""
    steps, times = build.grid(config).steps, [time.monotonic()]

    def stop() -> None:
        if state.device.type != "cpu":
            torch.accelerator.synchronize(state.device)
        times.append(time.monotonic())
        if len(times) > min(steps, 2):
            raise Interrupted

    with suppress(Interrupted), averaged(config, state, "timing samples", tick) as net:
        draw_sheet(config, net, state.device, data, Path(), state.step, stop)
    calls = 1 if config.task.inputs else len(list(processes.rounds(len(sheets.preview(config).seeds), BATCH)))
    return float(processes.same((times[-1] - times[-2]) * steps * calls if len(times) > 1 else 0.0))


def draw_sheet(
    config: Config, net: Network, device: torch.device, data: DataSet, path: Path, step: int,
    tick: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """The run's usual samples; of a model that is given images, what it makes of the first ones of the data, beside them.

    `tick` is called after each step of the solver.
    """
    paint = painter(config, net, device, tick)
    if not config.task.inputs:
        job = sheets.preview(config)
        drawn = np.concatenate(list(images([paint], job)))
        sheets.save_picture(sheets.grid(drawn, job.labels, config.data.classes, sheets.caption(config, job, step)), path)
        return
    first = np.arange(min(8, len(data)))  # by number, not by the data order: every sheet shows the same images
    labels = [-1] * len(first) if data.labels is None else data.labels[first].tolist()
    pixels = whole(config, signed(data.batch(first)))
    x0, other = shown(config, pixels)
    assert other is not None
    originals, given = (as_pixels(part, int(config.model.bit_depth)).numpy() for part in (x0, other))
    drawn = np.concatenate(list(images([paint], Job(first.tolist(), labels, given))))
    sheets.comparison_file(config, path, drawn, given, originals.transpose(0, 3, 1, 2))
