"""Which images to draw: seeds, classes, and the images that the model is given."""

from collections.abc import Sequence
from typing import NamedTuple
from unicodedata import normalize

import numpy as np

from iddpm.config import Config, Draw, given_shape, image_size, names, seed_list, small_size, whole
from iddpm.data import Images, read_npz
from iddpm.data.preparation import levels, preparation, signed
from iddpm.data.super_res import bicubic, shrink
from iddpm.errors import UserError
from iddpm.sampling.images import as_float, as_pixels
from iddpm.store.remote import place

FIT = "scale them, or have it done as in training: --fit True"


class Job(NamedTuple):
    """Which images to draw: one for each seed, of the class beside it (none: -1), and of the image given beside it."""

    seeds: Sequence[int]
    labels: Sequence[int]
    given: np.ndarray | None = None  # (N, h, w, G) uint8 or uint16

    def part(self, a: int, b: int | None = None) -> "Job":
        """Images a .. b - 1 of the job."""
        return Job(self.seeds[a:b], self.labels[a:b], None if self.given is None else self.given[a:b])


def job(config: Config, seeds: Sequence[int], labels: str | Sequence[str] = "") -> Job:
    """The job of some seeds; seed s takes the (s modulo n)-th of the n labels asked for, by default of all classes.

    `labels` are names or numbers, in one text comma-separated; UserError where the model was not trained on one,
    or knows no classes.
    """
    if not config.model.class_cond:
        if labels:
            raise UserError("--labels: this model was trained without classes")
        return Job(seeds, [-1] * len(seeds))
    wanted = [_class(config, text) for text in _parts(config, labels)] or list(range(trained_classes(config)))
    return Job(seeds, [wanted[s % len(wanted)] for s in seeds])


def one_class(config: Config, label: str) -> int:
    """The number of the class that --labels names; UserError where it names none, or several."""
    if not config.model.class_cond:
        raise UserError("--labels: this model was trained without classes")
    if not (parts := _parts(config, label)):
        raise UserError("this model knows classes: which is it to draw? --labels NAME")
    if len(parts) > 1:
        raise UserError(f"--labels {label} names {len(parts)} classes, and one is drawn here: give one")
    return _class(config, parts[0])


def _parts(config: Config, labels: str | Sequence[str]) -> list[str]:
    """The classes of a flag, separated by commas; a name that holds one stands alone, or in quotation marks."""
    if not isinstance(labels, str):
        return list(labels)
    parts = list(names(labels))
    if labels not in config.data.classes:
        return parts
    if len(parts) > 1 and set(parts) <= set(config.data.classes):
        raise UserError(f"--labels {labels} is one class, and several: put it in quotation marks, or name one by one")
    return [labels]


def _class(config: Config, text: str) -> int:
    """The number of a class by its name, in either form of its accents; or by its number, where no name can be meant by that."""
    classes, known = config.data.classes, trained_classes(config)
    forms = {normalize("NFC", name): k for k, name in enumerate(classes)} | {name: k for k, name in enumerate(classes)}
    found = forms.get(text, forms.get(normalize("NFC", text)))
    numbered = not any(whole(name) is not None for name in classes)
    if found is None and numbered and (number := whole(text)) is not None and number < known:
        return number
    if found is not None:
        return found
    shown = f"{', '.join(classes[:10])}{', ...' if len(classes) > 10 else ''}{f' (or 0 to {known - 1})' if numbered else ''}"
    raise UserError(f"--labels {text}: the model knows {shown if classes else f'0 to {known - 1}'}")


def trained_classes(config: Config) -> int:
    """How many classes a model was trained on: as many as are named, of those that it has room for."""
    return len(config.data.classes) or config.model.num_classes


def class_name(config: Config, y: int) -> str:
    """The name of class y, or its number where it has none."""
    return config.data.classes[y] if y < len(config.data.classes) else str(y)


class Inputs(NamedTuple):
    """The images that a model is given, one for each that it draws; of small ones, what they were made from, if that is known."""

    given: np.ndarray  # (N, h, w, G) uint8 or uint16
    labels: list[int] | None
    originals: np.ndarray | None  # (N, C, H, W) uint8 or uint16


def inputs(draw: Draw, config: Config, classes_of: Config) -> Inputs:
    """The images of --given, --low_res or --high_res, and their labels; UserError where they do not fit the model.

    Labels are those of the classes that the model, or the classifier that guides it, knows.
    """
    shape, m, known = given_shape(config.model), classes_of.model, trained_classes(classes_of)
    assert shape is not None
    path, (channels, *side) = draw.given or draw.low_res or draw.high_res, shape
    size = image_size(config.model) if draw.high_res else (side[0], side[1])
    how = preparation(config)._replace(only=())
    if path.endswith(".npz"):
        images, labels, named = read_npz(place(path), size, channels)
        images = levels(images, how, lambda told: print(f"{path}: {told}"))
        if labels is not None and m.class_cond and named and classes_of.data.classes:
            labels = np.array([_class(classes_of, named[y]) for y in labels])
        if labels is not None and m.class_cond and labels.max() >= known:
            raise UserError(f"{path} has the label {labels.max()}; the model knows 0 to {known - 1}")
    else:
        classes, rule = (classes_of.data.classes, classes_of.data.labels) if m.class_cond else (None, "none")
        # A broken file is refused: the image of another would be taken for its own.
        data = Images.open(path, size, channels, on_broken="fail", labels=rule, classes=classes, how=how)
        if not draw.high_res and not draw.fit:
            data.require_size(size, FIT if draw.given else "larger ones are shrunk by --high_res")
        if told := data.told():
            print(f"{path}: {told}")
        images, labels = data.batch(np.arange(len(data))), data.labels
    given = None if labels is None else [int(y) for y in labels]
    return Inputs(shrunk(config, images), given, images) if draw.high_res else Inputs(images.transpose(0, 2, 3, 1), given, None)


def asked(draw: Draw, classes_of: Config, given: Inputs | None) -> Job:
    """The job of a command: of the model's classes, or of the classifier's that guides it; with inputs, seed k is of input k.

    UserError where seeds and images, or classes, do not fit together.
    """
    if given is None:
        count = len(_parts(classes_of, draw.labels)) or trained_classes(classes_of)
        count = draw.num_samples or (10 * count if classes_of.model.class_cond else 64)
        return _told(classes_of, draw, job(classes_of, seed_list(draw.seeds) if draw.seeds else range(count), draw.labels))
    n = len(given.given)
    seeds = seed_list(draw.seeds) if draw.seeds else list(range(draw.num_samples or n))
    if max(seeds) >= n:
        raise UserError(f"there are {n} images given, numbered from 0: ask for fewer than {max(seeds) + 1}")
    task = job(classes_of, seeds, draw.labels)
    if classes_of.model.class_cond and not draw.labels:
        if given.labels is None:
            raise UserError("this model knows classes, and the images given have none: give --labels")
        task = task._replace(labels=[given.labels[s] for s in seeds])
    return _told(classes_of, draw, task._replace(given=given.given[seeds]))


def _told(config: Config, draw: Draw, task: Job) -> Job:
    """The job itself; classes of --labels that none of its seeds takes are told."""
    wanted = dict.fromkeys(_class(config, text) for text in _parts(config, draw.labels))
    if idle := [class_name(config, y) for y in wanted if y not in set(task.labels)]:
        print(f"no image of {', '.join(idle)}: seed s takes the (s modulo {len(wanted)})-th of the {len(wanted)} --labels")
    return task


def shrunk(config: Config, originals: np.ndarray) -> np.ndarray:
    """The small images (N, h, w, C) uint8 that a super-resolution model makes of originals (N, C, H, W)."""
    return as_pixels(shrink(signed(originals), small_size(config.model))).numpy()


def enlarged(config: Config, small: np.ndarray) -> np.ndarray:
    """The bicubic enlargement (N, H, W, C) uint8 of small images (N, h, w, C) uint8: the baseline."""
    return as_pixels(bicubic(as_float(small), image_size(config.model))).numpy()
