"""What a request asks for, checked as the command line checks its flags."""

import difflib
from collections.abc import Mapping
from typing import Any

from iddpm import build, fit
from iddpm.config import Config, Sample, check, settings_of
from iddpm.errors import UserError
from iddpm.records import fits

HOW = {name: f.type for name, f in settings_of(Sample).items() if f.flag}  # how to draw, by the flags of `iddpm sample`


def checked(asked: object, known: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a request; UserError where one is not `known`, or of another type than it is known to have."""
    if not isinstance(asked, dict):
        raise UserError('send an object, as {"num_samples": 4}')
    found = {}
    for name, value in asked.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            raise UserError(f"unknown setting {name!r}" + (f": did you mean {near[0]}?" if near else ""))
        try:
            found[name] = fits(value, known[name])
        except ValueError as e:
            raise UserError(f"{name}: {e}") from None
    return found


def configured(config: Config, asked: Mapping[str, Any]) -> Config:
    """A model's config, drawing as a request says; UserError where that cannot be."""
    changes = {name: value for name, value in asked.items() if name in HOW}
    config = fit.require_steering(fit.require_fit(check(config.updated(changes))), changes) if changes else config
    build.solver(config)
    return config
