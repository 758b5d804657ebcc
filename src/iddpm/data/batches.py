"""The batches of a run: pure functions of the seed, the step and the position in the data order, prepared ahead in threads."""

import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from iddpm import rng
from iddpm.config import Config, given_shape, image_size, share
from iddpm.data import DataSet, Dataset, Images, Order, Own
from iddpm.data.augment import augmented
from iddpm.data.given import shown
from iddpm.data.order import Balanced
from iddpm.data.preparation import preparation, signed
from iddpm.errors import UserError
from iddpm.parallel import processes


def open_data(
    config: Config, own: Dataset | None = None, own_given: Dataset | None = None, held_out: bool = False
) -> tuple[DataSet, Config]:
    """The images of a config, or a data set of the program's own, and the config with the classes found in them.

    `own_given` is the data set of the images that are given with those. Of a set that --validation divides these are the
    images of training, or those `held_out`. UserError where they do not fit.
    """
    m, size = config.model, source_size(config)
    classes, given = config.data.classes or None, config.data.given
    if config.task.translates and not given:
        raise UserError(
            f"--task {m.task}: which images is it given? --given FOLDER, with the names of {config.data.path or 'DATA'}"
        )
    divided = share(config.data.validation)
    how = preparation(config)
    if how.only and own is not None:
        raise UserError("--only_classes reads files: leave the others out of the program's data set")
    if divided and own is not None:
        raise UserError(f"--validation {config.data.validation} divides files: divide the program's data set, and give files")
    given_channels = (given_shape(m) or (0,))[0] if given else 0
    images: DataSet = (
        Own(own, size, m.image_channels, classes, own_given, given_channels, how)
        if own is not None
        else Images.open(
            config.data.path,
            image_size=size,
            channels=m.image_channels,
            on_broken=config.data.on_broken,
            cache_bytes=int(config.data.cache_gb * 2**30),
            labels=config.data.labels,
            classes=classes,
            given=given,
            given_channels=given_channels,
            part=(0, divided) if held_out else (divided, 1),
            how=how,
        )
    )
    if not m.class_cond:
        return images, config
    if images.labels is None:
        where = config.data.path or "the data set"
        why = images.rule.removeprefix("none")
        raise UserError(f"--class_cond: {where} has no classes{why}; put each class in a sub-folder, or add labels.csv")
    room = m.num_classes or len(images.classes)
    if len(images.classes) > room:
        raise UserError(f"{config.data.path} has {len(images.classes)} classes, the network has room for {room}")
    return images, config.updated(dict(classes=images.classes, rule=images.rule, num_classes=room))


def open_validation(config: Config) -> DataSet | None:
    """The held-out images of a config, of the same classes; None where it names none."""
    if not config.data.validation:
        return None
    if share(config.data.validation):
        return open_data(config.updated(dict(random_crop=False)), held_out=True)[0]
    held_out = dict(validation="", path=config.data.validation, given=config.data.validation_given, random_crop=False)
    return open_data(config.updated(held_out))[0]


class Batch(NamedTuple):
    """This process's part of what one optimizer step trains on, in global order."""

    x0: Tensor  # (b, C, H, W) in [-1, 1]
    eps: Tensor  # (b, C, H, W)
    cond: dict[str, Tensor]  # what else the network sees of each image: y (b,) int64, given (b, G, h, w) ...


def require_used(config: Config, images: DataSet) -> None:
    """UserError where a setting has no effect on a run's training images."""
    where = config.data.path or "the data set"
    if config.data.floats and not images.floats:
        raise UserError(f"--floats has no effect: {where} holds no floats whose span must be said")
    if config.data.balance and images.labels is None:
        raise UserError(f"--balance: {where} has no classes{images.rule.removeprefix('none')}")


def order_of(config: Config, data: DataSet) -> Order:
    """The order of a run's training images; with --balance every class comes equally often."""
    if config.data.balance and data.labels is not None:
        return Balanced(data.labels, config.train.seed)
    return Order(len(data), config.train.seed)


def make_batch(config: Config, data: DataSet, order: Order, step: int, position: int, train: bool = True) -> Batch:
    """The batch of a step, from the data order's position: of the global batch, this process's share.

    Every number depends on the seed, the step and the image's place in the global batch alone. Without `train` all keep
    their class and the image given.
    """
    t, n = config.train, config.train.batch_size
    mine = processes.share(n)
    indices = order.indices(position + mine.start, len(mine))
    if train and config.data.fit == "anywhere":
        held = data.batch(indices, rng.uniform(t.seed, rng.PLACE, step, n)[mine.start : mine.stop])
    else:
        held = data.batch(indices)
    pixels = signed(held)
    if config.data.random_crop:  # of pairs both images at once, as of one with more channels; so they are mirrored, too
        pixels = torch.stack([_cut(x, config, step, k) for x, k in zip(pixels, mine)])
    if config.data.random_flip:
        flip = rng.uniform(t.seed, rng.FLIP, step, n)[mine.start : mine.stop] < 0.5
        pixels[flip] = pixels[flip].flip(-1)
    told: tuple[Tensor, ...] = ()
    if train and config.model.augment:
        made = (augmented(x, config.model.augment, rng.stream(t.seed, rng.AUGMENT, step, k)) for x, k in zip(pixels, mine))
        changed, told = zip(*made)
        pixels = torch.stack(changed)
    x0, given = shown(config, pixels)
    eps = rng.normal(t.seed, rng.NOISE, step, mine, x0.shape[1:])
    for k in range(1, t.noise_candidates):  # candidate k of image i of n is stream k n + i
        other = rng.normal(t.seed, rng.NOISE, step, [k * n + i for i in mine], x0.shape[1:])
        nearer = (other - x0).square().flatten(1).sum(1) < (eps - x0).square().flatten(1).sum(1)
        eps[nearer] = other[nearer]
    cond = conditions(config, data, indices, given, step, mine)
    if told:
        cond["augment"] = torch.stack(told)
    m = config.model
    if train and (m.class_dropout or m.given_dropout):
        u = rng.uniform(t.seed, rng.DROP, step, n)[mine.start : mine.stop]  # one for both: guidance is away from neither
        if m.class_dropout:
            cond["y"] = torch.where(u < m.class_dropout, m.num_classes, cond["y"])
        if m.given_dropout:  # by zeros, a grey between 127 and 128 that no file has
            cond["given"] = torch.where((u < m.given_dropout).view(-1, 1, 1, 1), 0, cond["given"])
        if most := m.trained_guidance:
            v = rng.uniform(t.seed, rng.SCALE, step, n)[mine.start : mine.stop].float()
            scale = 1 + (most - 1) * ((v - PLAIN) / (1 - PLAIN)).clamp(min=0)
            cond["scale"] = torch.where(u < m.class_dropout, 1.0, scale)
    return Batch(x0, eps, cond)


PLAIN = 0.5  # the share of images that --trained_guidance learns without guidance, from which it learns the rest
CROP = 0.8  # the smallest share of an image's side that a random crop shows


def source_size(config: Config) -> tuple[int, int]:
    """The (height, width) that images are read at: larger than the network's where they are cut out at random."""
    height, width = image_size(config.model)
    return (math.ceil(height / CROP), math.ceil(width / CROP)) if config.data.random_crop else (height, width)


def _cut(x: Tensor, config: Config, step: int, place: int) -> Tensor:
    """A window of an image (C, H, W), of 80 to 100 % of its sides, scaled to the network's size."""
    size = image_size(config.model)
    share, down, right = rng.stream(config.train.seed, rng.CROP, step, place).random(3)
    height, width = (round(side * (CROP + (1 - CROP) * share)) for side in x.shape[1:])
    top, left = round(down * (x.shape[1] - height)), round(right * (x.shape[2] - width))
    window = x[None, :, top : top + height, left : left + width]
    return F.interpolate(window, size, mode="bilinear", antialias=True, align_corners=False)[0]


def whole(config: Config, pixels: Tensor) -> Tensor:
    """Images (B, C, H, W) as a data set holds them, at the network's size: smaller where they are cut out at random."""
    size = image_size(config.model)
    fits = pixels.shape[2:] == size
    return pixels if fits else F.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)


def conditions(
    config: Config, data: DataSet, indices: np.ndarray, given: Tensor | None, step: int, places: range
) -> dict[str, Tensor]:
    """What a network sees beside x_t: the classes of the images, and what it is `given` of each, (b, G, h, w)."""
    m, seed, cond = config.model, config.train.seed, {}
    if m.class_cond and data.labels is not None:
        cond["y"] = torch.from_numpy(data.labels[indices])
    if given is not None:
        cond["given"] = given
    if m.low_res_noise:
        levels = m.low_res_noise * rng.uniform(seed, rng.LOW_RES, step, config.train.batch_size).float()
        cond["low_res_level"] = levels[places.start : places.stop]
        streams = [1 + k for k in places]  # stream 0 gave the levels
        noise = rng.normal(seed, rng.LOW_RES, step, streams, cond["given"].shape[1:])
        cond["given"] = cond["given"] + cond["low_res_level"].view(-1, 1, 1, 1) * noise
    return cond


def ahead(config: Config, data: DataSet, order: Order, start: int, position: int, end: int) -> Iterator[Batch]:
    """The batches of steps start .. end - 1, the first from `position` of the order, prepared a few steps ahead in threads."""
    depth, n = config.data.num_workers + 1, config.train.batch_size
    with ThreadPoolExecutor(config.data.num_workers, "batches") as pool:

        def submit(step: int) -> "Future[Batch]":
            return pool.submit(make_batch, config, data, order, step, position + (step - start) * n)

        queue = [submit(step) for step in range(start, min(start + depth, end))]
        try:
            for step in range(start, end):
                batch = queue.pop(0).result()
                if (coming := step + depth) < end:
                    queue.append(submit(coming))
                yield batch
        finally:
            for waiting in queue:
                waiting.cancel()
