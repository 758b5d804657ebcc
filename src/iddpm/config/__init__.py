"""What a run is made of: groups of settings, their fields, presets. Imports no torch, so that help answers at once."""

from iddpm.config.check import check
from iddpm.config.fields import fields_of, make, own_numbers, settings_of
from iddpm.config.groups import (
    BOUND,
    ENDLESS,
    ENDS,
    FOUND,
    Data,
    Diffusion,
    Draw,
    Edit,
    Evaluate,
    Measure,
    Model,
    Sample,
    Train,
    Which,
)
from iddpm.config.parse import (
    SEED,
    ema_rates,
    ema_widths,
    given_shape,
    half_bin,
    image_size,
    is_chain,
    names,
    numbers,
    seconds_of,
    seed_list,
    share,
    small_size,
    total_steps,
    whole,
)
from iddpm.config.run import Config, every_field

__all__ = [
    "BOUND", "ENDLESS", "ENDS", "FOUND", "SEED", "Config", "Data", "Diffusion", "Draw", "Edit", "Evaluate", "Measure", "Model",
    "Sample", "Train", "Which", "check", "ema_rates", "ema_widths", "every_field", "fields_of", "given_shape", "half_bin",
    "image_size", "is_chain", "make", "names", "numbers", "own_numbers", "seconds_of", "seed_list", "settings_of", "share",
    "small_size", "total_steps", "whole",
]  # fmt: skip
