"""The rows of the tables, made for tests: chains, continuous schedules, and each parametrization with the levels it is for."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from iddpm.diffusion.denoiser import Denoiser
from iddpm.diffusion.grid import Chain, Grid, Step, respace, uniform, walk
from iddpm.diffusion.parametrization import PARAMETRIZATIONS
from iddpm.diffusion.schedule import SCHEDULES

DISCRETE = [name for name, row in SCHEDULES.items() if hasattr(row, "betas")]
CONTINUOUS = [name for name in SCHEDULES if name not in DISCRETE]


def chain(name: str, steps: int = 40, spec: str = "", rescale_time: bool = True) -> Chain:
    """The chain of a discrete schedule."""
    return Chain(SCHEDULES[name](steps), respace(steps, spec), rescale_time=rescale_time)


def made(row: Any) -> Callable[..., Any]:
    """A row ready to call: of a dataclass, with its default numbers."""
    return row() if isinstance(row, type) else row


def meaning(name: str) -> Callable[[Any], Any]:
    """A parametrization by name."""
    return made(PARAMETRIZATIONS[name])


def grid(schedule: str, steps: int = 10) -> Grid:
    """A grid of so many steps of any schedule."""
    return chain(schedule, 40, str(steps)) if schedule in DISCRETE else evenly(SCHEDULES[schedule](), steps)


def evenly(schedule: Any, steps: int) -> Grid:
    """A continuous schedule's grid of so many steps, even in time."""
    return walk(schedule, uniform(schedule, steps))


def as_column(c: Tensor, like: Tensor) -> Tensor:
    """(B,) float64 as (B, 1, 1, 1) float32."""
    return c.float().reshape(-1, *(1,) * (like.ndim - 1))


def columns(step: Step, like: Tensor) -> Step:
    """A step of (B,) as what broadcasts over images."""
    return Step(*(as_column(c, like) for c in step))


def middle(i: Tensor, steps: int) -> Tensor:
    """The u of the middle of step i's share of [0, 1)."""
    return (i.double() + 0.5) / steps


def bind(denoiser: Denoiser, **cond: Tensor) -> Callable[[Tensor, Any], Any]:
    """What a solver calls."""
    return lambda x, level: denoiser(x, level, cond)
