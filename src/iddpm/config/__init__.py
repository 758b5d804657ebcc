"""What a run is made of: groups of settings, their fields, presets. Imports no torch, so that help answers at once."""

from iddpm.config.groups import *  # noqa: F403
