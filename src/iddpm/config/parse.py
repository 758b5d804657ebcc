"""What flags say in words: numbers, sizes, seeds, ends."""

import csv
import math
import re
from typing import Any

from iddpm.config.choices import choices
from iddpm.config.groups import ENDLESS, Diffusion, Model, Train
from iddpm.config.tasks import TASKS
from iddpm.errors import UserError

MOST_SEEDS = 10**7
SEED = 2**64 - 1  # the largest
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}  # in seconds


def whole(text: str, most: int = 2**63 - 1) -> int | None:
    """The whole number from 0 to `most` that a text is, in plain digits; None for another text."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 20 and int(text) <= most else None


def numbers(text: str, name: str, kind: type = int) -> tuple[Any, ...]:
    """The comma-separated numbers of a flag."""
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UserError(f"--{name} {text!r}: give numbers separated by commas") from None


def names(text: str) -> tuple[str, ...]:
    """The comma-separated names of a flag; one that holds a comma stands in quotation marks."""
    try:
        parts = next(csv.reader([text], skipinitialspace=True), [])
    except csv.Error:  # of several lines, or endless
        raise UserError(f"{text[:80]!r}: give names in one line, separated by commas") from None
    return tuple(part.strip() for part in parts if part.strip())


def share(validation: str) -> float:
    """What --validation 5% holds out, from 0 to 1; 0 where it names a place."""
    if not re.fullmatch(r"\d+(\.\d+)?%", validation):
        return 0.0
    found = float(validation[:-1]) / 100
    if not 0 < found < 1:
        raise UserError(f"--validation {validation}: give more than 0 % and less than 100 %")
    return found


def image_size(model: Model) -> tuple[int, int]:
    """(height, width) in pixels, each from 8 to 1024."""
    return _size(model.image_size, "image_size", 8)


def small_size(model: Model) -> tuple[int, int]:
    """(height, width) of what a model of --task enlarge enlarges, each a whole fraction of the image's."""
    if not model.small_size:
        raise UserError("--task enlarge enlarges images: from which --small_size?")
    small, large = _size(model.small_size, "small_size", 1), image_size(model)
    if any(big % little or big == little for big, little in zip(large, small)):
        raise UserError(f"--small_size {model.small_size}: {model.image_size} must be a whole multiple of it, twice or more")
    return small


def given_shape(model: Model) -> tuple[int, int, int] | None:
    """(channels, height, width) of the image that a model is given beside noise; None for a task without one."""
    task = TASKS[model.task]
    if task.enlarges:
        return model.image_channels, *small_size(model)
    return (model.given_channels or model.image_channels, *image_size(model)) if task.translates else None


def _size(text: str, name: str, low: int) -> tuple[int, int]:
    parts = text.lower().split("x")
    sides = [side for part in parts if (side := whole(part)) is not None and low <= side <= 1024]
    if not len(sides) == len(parts) <= 2:
        raise UserError(f"--{name} {text!r}: give pixels from {low} to 1024, as 64 or (height x width) 64x96")
    return sides[0], sides[-1]


def half_bin(model: Model) -> float:
    """Half the width of a pixel's bin, in units of [-1, 1]: what a likelihood is of depends on it."""
    return 1 / 255 if model.bit_depth == "8" else 1 / 65535


def is_chain(d: Diffusion) -> bool:
    """Whether the schedule is a discrete chain: its row has betas."""
    return "betas" in choices("noise_schedule")[d.noise_schedule].knows


def ema_rates(train: Train) -> tuple[float, ...]:
    """The rates of the averages, in the order given."""
    return numbers(train.ema_rate, "ema_rate", float)


def ema_widths(train: Train) -> tuple[float, ...]:
    """The relative widths of the averages by powers of time, in the order given."""
    return numbers(train.ema_power, "ema_power", float)


def seed_list(text: str) -> list[int]:
    """The seeds of 0-63 or 7,9,20-29, in the order given."""
    seeds: list[int] = []
    for part in text.split(","):
        first, _, last = (whole(end, SEED) for end in part.strip().partition("-"))
        end = last if "-" in part else first
        if first is None or end is None or end < first:
            raise UserError(f"--seeds {text!r}: give them as 0-63 or 7,9,20-29, from 0 to {SEED}")
        if len(seeds) + end - first >= MOST_SEEDS:
            raise UserError(f"--seeds {text!r} are more than {MOST_SEEDS} images: draw them in parts")
        seeds += range(first, end + 1)
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {text!r} names a seed twice")
    return seeds


def seconds_of(text: str, name: str) -> float:
    """The seconds of 90s, 45m, 8h, 3d or 2h30m; 0 of an empty text."""
    if not text:
        return 0.0
    written = text.replace(" ", "").lower()
    parts = re.findall(r"([0-9]+(?:\.[0-9]+)?)([smhd])", written)
    found = sum(float(number) * UNITS[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != written or not 0 < found < math.inf:
        raise UserError(f"--{name} {text!r}: give a time as 90s, 45m, 8h, 3d or 2h30m")
    return found


def total_steps(train: Train) -> int:
    """Optimizer steps of the whole run, ENDLESS of one that ends by --time; UserError where nothing says when it ends."""
    if train.time:
        return ENDLESS
    if not train.steps and not train.images:
        raise UserError("say when to stop: --time 8h, --steps N or --images N (or take a --preset)")
    return train.steps or math.ceil(train.images / train.batch_size)
