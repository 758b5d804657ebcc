"""Drawing images: image number i depends on its seed alone, on any number of processes and for any batch size."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from iddpm import build, rng
from iddpm.config import Config, image_size
from iddpm.data.super_res import consistent
from iddpm.diffusion.denoiser import Network
from iddpm.diffusion.guidance import classifier_gradient, guided
from iddpm.errors import UserError
from iddpm.parallel import processes
from iddpm.sampling.images import Watch, as_float, as_pixels, unwatched
from iddpm.sampling.job import Job
from iddpm.store.weights import Weights


class Guide(NamedTuple):
    """A classifier of noisy images that pulls samples towards their class, and how strongly."""

    config: Config
    net: Network
    scale: float
    weights: Weights


# Draws all images of a job at once, on this process alone: (n, H, W, C) on the device, uint8, of a model of 16 bits uint16.
Painter = Callable[[Job], Tensor]


BATCH = 64  # images that a process draws at a time


def images(painters: Sequence[Painter], job: Job, batch_size: int = BATCH) -> Iterator[np.ndarray]:
    """The images of a job in order, batch by batch, (n, H, W, C); each painter after the first enlarges what the last drew.

    Several processes draw `batch_size` images each at a time, call the networks equally often, and all get all images.
    """
    for share in processes.rounds(len(job.seeds), batch_size, evenly=True):
        drawn = processes.together(partial(_drawn, painters, job.part(share.call.start, share.call.stop)))
        yield processes.gather(drawn[: len(share.mine)]).cpu().numpy()


def _drawn(painters: Sequence[Painter], part: Job) -> Tensor:
    for paint in painters:
        drawn = paint(part)
        part = part._replace(given=drawn.cpu().numpy())
    return drawn


def painter(
    config: Config,
    net: Network,
    device: torch.device,
    tick: Callable[[], Any] = lambda: None,
    low_res_noise: float = 0.0,
    guide: Guide | None = None,
    weak: build.Weak | None = None,
    watch: Watch = unwatched,
) -> Painter:
    """What draws with a model. `tick` is called after each step of the solver, and `watch` with where it stands then.

    `low_res_noise` is the deviation of noise put on the small images, for a model trained with it.
    """
    grid, solver, shape = build.grid(config), build.solver(config), (config.model.image_channels, *image_size(config.model))
    purpose = rng.UPSAMPLE if config.task.enlarges else rng.SAMPLE  # an upsampler must not see its base's noise again

    @torch.inference_mode()
    def paint(job: Job) -> Tensor:
        labels = torch.tensor(job.labels, device=device)
        cond = {"y": labels} if config.model.class_cond else {}
        if config.task.inputs:
            cond |= _given(config, job, low_res_noise, device)
        known = (consistent(cond["given"]),) if config.sample.consistent else ()
        denoise = build.drawing(config, net, cond, *known, weak=weak)
        if guide:
            denoise = guided(denoise, classifier_gradient(guide.net, labels, guide.scale))

        def noise(k: int) -> Tensor:
            return rng.normal(0, purpose, k, job.seeds, shape).to(device)

        x = noise(0) * grid.start
        for x, x0 in solver(denoise, x, grid, noise):  # noqa: B020
            tick()
            watch(x, x0)
        if not torch.isfinite(x).all():
            raise UserError("what this network draws is not finite: its training diverged; take an earlier --checkpoint_step")
        return as_pixels(x, int(config.model.bit_depth))

    return paint


def _given(config: Config, job: Job, level: float, device: torch.device) -> dict[str, Tensor]:
    """The images that a model is given, small ones perhaps with noise on them, and how much."""
    assert job.given is not None
    given = as_float(job.given)
    if level:
        given = given + level * rng.normal(0, rng.LOW_RES, 0, job.seeds, given.shape[1:])
    cond = {"given": given.to(device)}
    if config.model.low_res_noise:
        cond["low_res_level"] = torch.full((len(given),), level, device=device)
    return cond
