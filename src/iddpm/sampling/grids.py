"""Grids found for a run, kept beside it: `iddpm sample RUN --find_grid K`, then `--grid found_path --sampling_steps K`."""

import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from iddpm import build, fit, rng
from iddpm.config import FOUND, Config, image_size, whole
from iddpm.data import Order
from iddpm.data.batches import open_data
from iddpm.diffusion.found import bounds, cheapest, deviations
from iddpm.diffusion.grid import Chain, Grid, uniform
from iddpm.errors import UserError
from iddpm.parallel import processes
from iddpm.records import decode
from iddpm.sampling.images import as_float
from iddpm.sampling.job import job
from iddpm.saying import Progress
from iddpm.store.remote import place, write_file

FILE = "grids.json"
FINE = 60  # levels that are looked at (Chen et al. 2024)
IMAGES = 256  # drawn, or taken from the training images


def find(
    config: Config, net: Any, device: torch.device, counts: Sequence[int], by: str, batch_size: int
) -> list[tuple[float, ...]]:
    """Of each count of steps the u, ascending, of the grid that is best for a model; UserError where it cannot be found.

    `found_path`: along which DDIM deviates least from a fine path. `found_bound`: of the least bound, on training images.
    """
    if not config.task.draws:
        raise UserError("--find_grid is for models of images")
    fit.require_density(config, "--find_grid")
    count = min(FINE, config.diffusion.diffusion_steps) if build.is_chain(config.diffusion) else FINE
    fine = build.grid(config.updated(dict(sampling_steps=str(count), grid="respaced")))
    task, shape = job(config, range(IMAGES)), (config.model.image_channels, *image_size(config.model))
    images, total = None, torch.zeros(())
    if by == "found_bound":
        if not config.data.path or not place(config.data.path).exists():
            raise UserError(f"--grid found_bound is found on the run's images, and {config.data.path or 'they'} are not there")
        data = open_data(config.updated(dict(random_crop=False)))[0]
        chosen = Order(len(data), 0).indices(0, min(IMAGES, len(data)))
        images = data.batch(chosen).transpose(0, 2, 3, 1)
        task = task._replace(labels=task.labels if data.labels is None else data.labels[chosen].tolist())
    with torch.inference_mode(), Progress(fine.steps * IMAGES, "call", shown=not processes.rank()) as bar:
        for a in range(0, IMAGES if images is None else len(images), batch_size):
            part = task.part(a, a + batch_size)
            seeds = part.seeds if images is None else range(a, min(a + batch_size, len(images)))
            cond = {"y": torch.tensor(part.labels, device=device)[: len(seeds)]} if config.model.class_cond else {}

            def noise(k: int, seeds: Any = seeds) -> torch.Tensor:
                return rng.normal(0, rng.EDIT, k, seeds, shape).to(device)

            tick = partial(bar.update, len(seeds))
            denoise = build.drawing(config, net, cond)
            if images is None:
                cost = deviations(denoise, noise(0) * fine.start, fine, tick)
            else:
                cost = bounds(denoise, as_float(np.ascontiguousarray(images[a : a + batch_size])).to(device), fine, noise, tick)
            total = total + cost * len(seeds)
    return [_levels(config, fine, total, steps, images is None) for steps in counts]


def _levels(config: Config, fine: Grid, cost: torch.Tensor, steps: int, path: bool) -> tuple[float, ...]:
    """The u, ascending, of the cheapest grid of so many of the fine one's levels; UserError where there are too few."""
    try:
        # of the path's nodes the last is the image; of the bound's, the least noisy level is always kept
        nodes = cheapest(cost, steps)[:-1] if path else cheapest(cost, steps - 1) if steps > 1 else [0]
    except ValueError as e:
        raise UserError(f"--find_grid {steps}: {e}") from None
    if isinstance(fine, Chain):
        u = [(fine.kept[fine.steps - 1 - k] + 0.5) / fine.schedule_steps for k in nodes]
    else:
        u = [float(uniform(build.schedule(config), fine.steps)[fine.steps - 1 - k]) for k in nodes]
    return tuple(sorted([1.0, *u[1:]]))


def keep(home: Path, by: str, u: tuple[float, ...]) -> Path:
    """Write a grid beside the others of a run; returns the file."""
    known = _read(home)
    known.setdefault(by, {})[str(len(u))] = list(u)
    write_file(home / FILE, json.dumps(known, indent=1))
    return home / FILE


def with_found(config: Config, home: Path) -> Config:
    """The config with the levels of a grid that was found; UserError where there is none of so many steps."""
    name, steps = config.sample.grid, config.sample.sampling_steps
    if name not in FOUND:
        return config
    known = _read(home).get(name, {})
    if steps not in known:
        of = f"those of {', '.join(known)} are" if known else "none is"
        first = f"iddpm sample {home} --find_grid {steps if whole(steps) else 10} --grid {name}"
        raise UserError(f"--grid {name} of {steps} steps was not found yet ({of}): {first}")
    return dataclasses.replace(config, sample=dataclasses.replace(config.sample, found=tuple(known[steps])))


def _read(home: Path) -> dict[str, dict[str, list[float]]]:
    path = home / FILE
    if not path.exists():
        return {}
    return decode(path.read_text(), dict[str, dict[str, list[float]]], f"{path}: it")
