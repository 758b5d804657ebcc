"""The bound of runs: on which chains, on which images, with which classes."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from iddpm import build
from iddpm.config import Config, Measure, check, given_shape, image_size
from iddpm.data import Images, Own
from iddpm.data.preparation import preparation
from iddpm.diffusion.grid import Grid
from iddpm.errors import UserError
from iddpm.measure.bound import Bound, bits_per_dim
from iddpm.parallel import processes
from iddpm.records import decode
from iddpm.sampling.open import Opened
from iddpm.saying import Progress
from iddpm.store.remote import place, remote

CACHE = 2 << 30  # bytes of decoded images that are kept in memory


def open_held_out(config: Config, path: Path, given: str = "", *, name_classes: bool = False, keep: bool = True) -> Images:
    """The images, with the classes of the run; for a run without classes, with the data's own where `name_classes`.

    `given` is where the images lie that a model of pairs is given with these.

    Broken files are left out, and told: nobody knows their likelihood. `keep`: decode them all at once, as far as memory goes.
    """
    m, known = config.model, config.data.classes

    def open_with(labels: str, classes: tuple[str, ...] | None = None, cache: int = CACHE * keep) -> Images:
        size, channels, others = image_size(m), m.image_channels, given_shape(m) if given else None
        return Images.open(
            path, size, channels, on_broken="leave", cache_bytes=cache, labels=labels, classes=classes,
            given=given, given_channels=others[0] if others else 0, how=preparation(config),
        )  # fmt: skip

    if m.class_cond:
        if not known:  # a model whose classes have numbers alone, as the original's
            known = _by_number(open_with(config.data.labels.replace("auto", "any"), cache=0).classes, m.num_classes, path)
        images = open_with(config.data.labels.replace("auto", "any"), known or None)
        if images.labels is None:
            raise UserError(f"{path} has no classes, and this model was trained with them")
        return images
    if name_classes:
        try:
            return open_with("auto")
        except UserError:  # labels that make no sense do not matter here; whatever else is wrong comes again
            pass
    return open_with(config.data.labels if config.data.only_classes else "none")


def in_memory(config: Config, images: np.ndarray, labels: Sequence[int] | None) -> Own:
    """Images (N, H, W, C) of the model's size and depth, at least one, and their classes by number, as a data set."""
    m = config.model
    held = images if labels is None else list(zip(images, labels))
    return Own(held, image_size(m), m.image_channels, [str(k) for k in range(m.num_classes)], how=preparation(config))


def _by_number(names: tuple[str, ...], known: int, path: Path) -> tuple[str, ...]:
    """The data's names by the model's numbers: names that are numbers are meant; others are all the classes, in their order."""
    if names and all(name.isdecimal() for name in names):
        if beyond := [name for name in names if int(name) >= known]:
            raise UserError(f"{path} has the label {beyond[0]}, and this model knows 0 to {known - 1}")
        named = {int(name): name for name in names}
        return tuple(named.get(k, str(k)) for k in range(known))
    if names and len(names) != known:
        raise UserError(
            f"{path} has {len(names)} classes ({names[0]} ...), and this model knows {known} by number: "
            f"label the images 0 to {known - 1}"
        )
    return names


def describe(images: Images) -> str:
    """What they are; and a remark where the first has not the model's size, so that the bits/dim are of what was made of it."""
    (height, width), (h, w) = images.size(0), images.image_size
    if (height, width) == (h, w):
        return images.describe()
    scaled = f"the first has {height}x{width} pixels, scaled to {h}x{w}: the bits/dim are those of the scaled images"
    return f"{images.describe()}\n{scaled}"


def was_trained_on(config: Config, images: Images) -> bool:
    """Whether a model was trained on images, or on a folder that they lie in, as far as its config tells."""
    known = decode(config.data.identity or "{}", dict[str, str], "the run's record of its images").get("contents", "")
    ours, theirs = images.source.path, place(config.data.path) if config.data.path else None
    if theirs and not remote(ours) and not remote(theirs) and theirs.exists():
        return ours.resolve().is_relative_to(theirs.resolve())
    return known == images.identity()["contents"]


def chains_of(curve: str, runs: Sequence[Opened]) -> dict[str, list[tuple[Opened, Grid]]]:
    """The runs and their grids on each chain of --curve, by what is added to the name of its state; without --curve, their own.

    UserError where an entry is none of --sampling_steps, does not fit a run's chain, or repeats another.
    """
    if not curve:
        return {"": [(o, build.grid(o.config)) for o in runs]}
    chains = {}
    seen: dict[tuple[int, int], str] = {}  # the run and how many steps, and the entry that asked for them
    for spec in map(str.strip, curve.split(",")):
        if not spec:
            raise UserError(f"--curve {curve!r} has an empty entry: give it as 10,50,ddim100,all")
        respaced = [o._replace(config=o.config.updated({"sampling_steps": spec})) for o in runs]
        try:
            grids = [build.grid(check(o.config)) for o in respaced]
        except UserError as e:
            raise UserError(f"--curve {curve}: {e}") from None
        for k, grid in enumerate(grids):
            if first := seen.get((k, grid.steps)):
                raise UserError(f"--curve {curve}: {first} and {spec} are both {grid.steps} steps: leave one out")
            seen[k, grid.steps] = spec
        chains[f".{spec}"] = list(zip(respaced, grids))
    return chains


def identity_of(opened: Opened, images: Images, measure: Measure) -> dict[str, Any]:
    """Whose likelihood of which files: what a measurement that goes on must have in common with the one before."""
    weights = opened.weights
    names = hashlib.sha256("\n".join(map(str, images.files)).encode("utf-8", "surrogateescape")).hexdigest()
    identity = dict(weights=str(weights.path), about=weights.about, files=names, precision=opened.which.precision)
    return identity | (dict(given=measure.given) if measure.given else {})


def bound_of(opened: Opened, grid: Grid, images: Images, measure: Measure, state: Path) -> Bound:
    """The bound of a run on the images, with a bar of its progress; goes on from `state`, where that is of the same job."""
    which, n = opened.which, min(measure.num_samples or len(images), len(images))
    with Progress(grid.steps * n, "term", shown=not processes.rank(), scale=True) as bar:
        return bits_per_dim(
            opened.config, opened.net, images, opened.device,
            grid=grid, num_samples=n, batch_size=which.batch_size, seed=measure.seed,
            state=state, identity=identity_of(opened, images, measure), say=bar.write, tick=bar.update,
        )  # fmt: skip
