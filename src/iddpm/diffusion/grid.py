"""Grids of levels: what solvers and the bound walk, and the discrete chain x_0 -> x_1 ... -> x_T, which is one."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from iddpm.diffusion.schedule import Discrete, Level, Schedule

SEEN = 0.02  # the share alpha^2 of x_t's variance


class Step(NamedTuple):
    """A level, by its first three names, and the next one nearer to the data (`_to`); float64, (B,) or 0-dim.

    q(x_to | x_t, x_0) has the mean coef_x0 x_0 + coef_xt x_t and a log variance between log_min and log_max.
    """

    time: Tensor
    alpha: Tensor
    sigma: Tensor
    time_to: Tensor
    alpha_to: Tensor
    sigma_to: Tensor
    coef_x0: Tensor
    coef_xt: Tensor
    log_min: Tensor  # log of the posterior variance; at the last step, where that is 0, a stand-in
    log_max: Tensor  # log beta
    last: Tensor  # 1 at the step whose result is the image, else 0


def as_step(level: Level | Step, what: str) -> Step:
    """The level itself, for `what` needs a step; ValueError where it is a bare level."""
    if not isinstance(level, Step):
        raise ValueError(f"{what} needs the steps of a chain or of a grid: a bare level of a continuous schedule has no next one")
    return level


class Grid:
    """Steps between levels, least noisy first in `table`; `start` is what unit noise is multiplied with at the noisy end.

    `level` gives levels between them: of sigma/alpha (B,) or 0-dim, the noisiest that networks know with no more noise than that.
    """

    def __init__(self, table: Step, start: float = 1.0, level: Callable[[Tensor], Level] | None = None):
        self.table, self.start, self.steps = table, start, len(table.time)
        self.level = level or of_list(Level(*table[:3]))

    def __call__(self, u: Tensor) -> Step:
        """The steps (B,) of u (B,) float64 in [0, 1): the floor of u times their number."""
        return self.at((u * self.steps).long())

    def at(self, i: Tensor) -> Step:
        """The steps number i (B,) int64, counted from 0 at the least noisy."""
        return Step(*(column[i] for column in self.table))

    def only(self, which: slice | list[int]) -> "Grid":
        """Some of its steps, each as it is: for what walks a part of the path, or looks at the levels alone."""
        return Grid(Step(*(column[which] for column in self.table)), self.start, self.level)

    def __iter__(self) -> Iterator[Step]:
        """The steps, noisiest first, each entry 0-dim."""
        return (Step(*row) for row in zip(*(column.flip(0).unbind() for column in self.table)))

    def u_of(self, ratio: Tensor) -> Tensor:
        """The u (B,) of the step whose log(sigma/alpha) is nearest to that of `ratio` (B,): the middle of its share of [0, 1)."""
        log = (self.table.sigma / self.table.alpha).log()
        i = torch.searchsorted((log[:-1] + log[1:]) / 2, ratio.log(), right=True)  # right: pure noise has the ratio infinity
        return (i.double() + 0.5) / self.steps


def of_list(levels: Level) -> Callable[[Tensor], Level]:
    """A Grid's `level` where networks know only these levels (T,), least noisy first; below the first, the first."""
    ratios = levels.sigma / levels.alpha

    def level(ratio: Tensor) -> Level:
        i = (torch.searchsorted(ratios, ratio * (1 + 1e-9), right=True) - 1).clamp(min=0)  # a level's own ratio finds it
        return Level(*(column[i] for column in levels))

    return level


class Chain(Grid):
    """The Markov chain of a discrete schedule on the steps `kept` of it (all by default), with its float64 tables.

    Steps are counted 0 .. K-1, where K = len(kept), in the direction of more noise. A network trained on the whole schedule
    sees the step's number there, times 1000/T with `rescale_time` (Nichol & Dhariwal's code, `rescale_timesteps`).
    """

    def __init__(self, schedule: Discrete, kept: Sequence[int] | None = None, *, rescale_time: bool = True):
        whole = schedule.betas()
        self.kept = list(range(schedule.steps)) if kept is None else sorted(set(kept))
        self.schedule_steps = schedule.steps
        all_bars = (1 - whole).cumprod(0)
        bar = all_bars[self.kept]
        before = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
        self.betas = whole if len(self.kept) == schedule.steps else 1 - bar / before
        variance = self.betas * (1 - before) / (1 - bar)
        # at step 0 the posterior variance is 0: the published code takes its neighbour's for it
        variance = torch.cat([variance[1:2], variance[1:]]) if len(self.kept) > 1 else self.betas
        all_times = torch.arange(schedule.steps, dtype=torch.float32) * (1000.0 / schedule.steps if rescale_time else 1.0)
        time = all_times[self.kept]
        super().__init__(
            Step(
                time=time.double(),
                alpha=bar.sqrt(),
                sigma=(1 - bar).sqrt(),
                time_to=torch.cat([torch.zeros(1), time[:-1]]).double(),
                alpha_to=before.sqrt(),
                sigma_to=(1 - before).sqrt(),
                coef_x0=self.betas * before.sqrt() / (1 - bar),
                coef_xt=(1 - before) * (1 - self.betas).sqrt() / (1 - bar),
                log_min=variance.log(),
                log_max=self.betas.log(),
                last=_last(len(self.kept)),
            ),
            level=of_list(Level(all_times.double(), all_bars.sqrt(), (1 - all_bars).sqrt())),
        )


def walk(schedule: Schedule, u: Tensor) -> Grid:
    """The grid of a continuous schedule at u (K,) in (0, 1], ascending; its last step ends at the image: alpha 1, sigma 0."""
    level = schedule(u)
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    time = torch.cat([zero, level.time[:-1]])
    alpha, sigma = torch.cat([one, level.alpha[:-1]]), torch.cat([zero, level.sigma[:-1]])
    beta = level.sigma**2 - (level.alpha / alpha * sigma) ** 2
    variance = beta * sigma**2 / level.sigma**2
    variance[0] = beta[0]  # a neighbour's, as a chain has it, would be larger than beta here
    table = Step(
        time=level.time,
        alpha=level.alpha,
        sigma=level.sigma,
        time_to=time,
        alpha_to=alpha,
        sigma_to=sigma,
        coef_x0=alpha * beta / level.sigma**2,
        coef_xt=level.alpha / alpha * sigma**2 / level.sigma**2,
        log_min=variance.log(),
        log_max=beta.log(),
        last=_last(len(u)),
    )
    return Grid(table, level.sigma[-1].item(), lambda ratio: schedule(schedule.u_of(ratio)))


def _last(steps: int) -> Tensor:
    return (torch.arange(steps) == 0).double()


# ---- where a grid's levels lie: (schedule, steps) -> u (K,) ascending, the last one at the noisiest level


def uniform(schedule: Schedule, steps: int) -> Tensor:
    """Evenly in time"""
    # Where u = 0 is an image without noise, it is no level to step from. One step starts at the noisy end.
    first = 1 if steps == 1 or not schedule(torch.zeros(1, dtype=torch.float64)).sigma else 0
    return torch.arange(first, steps + first, dtype=torch.float64) / max(1, steps - 1 + first)


def respaced(schedule: Schedule, steps: int) -> Tensor:
    """As published: a chain's steps evenly, by sections or by a stride; on a continuous schedule evenly in time"""
    return uniform(schedule, steps)


@dataclass(frozen=True)
class Karras:
    """(sigma/alpha)^(1/rho) evenly: finer where there is little noise (Karras et al. 2022, eq. 5)"""

    grid_rho: Annotated[float, "how much finer the grid is where there is little noise", 1.0, 100.0] = 7.0

    def __call__(self, schedule: Schedule, steps: int) -> Tensor:
        low, high = (end ** (1 / self.grid_rho) for end in _ends(schedule))
        return _to_the_end(schedule, torch.linspace(low, high, steps, dtype=torch.float64) ** self.grid_rho)


def logsnr(schedule: Schedule, steps: int) -> Tensor:
    """log(sigma/alpha) evenly (Lu et al. 2022, DPM-Solver, section 3.3)"""
    low, high = (math.log(end) for end in _ends(schedule))
    return _to_the_end(schedule, torch.linspace(low, high, steps, dtype=torch.float64).exp())


LEAST, MOST = 0.002, 80.0  # sigma/alpha, where a schedule goes on beyond them: EDM's own ends (Karras et al. 2022, table 1)


def _ends(schedule: Schedule) -> tuple[float, float]:
    """The sigma/alpha between which levels are spread."""
    level = schedule(torch.tensor([0.0, 1 - 1e-9], dtype=torch.float64))
    low, high = (level.sigma / level.alpha).tolist()
    return max(low, LEAST), min(high, MOST)


def _to_the_end(schedule: Schedule, ratios: Tensor) -> Tensor:
    u = schedule.u_of(ratios)
    u[-1] = 1.0
    return u


def steps_at(u: Tensor, steps: int) -> list[int]:
    """The steps of a chain of `steps` at u (K,), ascending and distinct. ValueError for too many."""
    if len(u) > steps:
        raise ValueError(f"a chain of {steps} steps has no {len(u)}: ask for at most {steps}")
    kept = [min(int(x * steps), steps - 1) for x in u.tolist()]
    for k in range(1, len(kept)):
        kept[k] = max(kept[k], kept[k - 1] + 1)
    for k in range(len(kept) - 1, -1, -1):  # and down again, where they ran over the end
        kept[k] = min(kept[k], steps - len(kept) + k)
    return kept


GRIDS: dict[str, Callable[..., Any]] = {"respaced": respaced, "uniform": uniform, "karras": Karras, "logsnr": logsnr}


# ---- which steps of a chain are kept, as published


def respace(steps: int, spec: str | Sequence[int] = "") -> list[int]:
    """The steps, out of `steps`, that a sampling spec keeps, ascending.

    "250": that many, evenly; "10,15,20": so many in each equal section; "ddim50": every (steps/50)-th from 0; "": all.
    Raises ValueError where a section is shorter than its count, or no stride gives the count of a "ddim" spec.
    """
    if isinstance(spec, str):
        if spec.startswith("ddim"):
            return _strided(steps, _count(spec[len("ddim") :], spec))
        spec = [_count(part, spec) for part in spec.split(",")] if spec else [steps]
    kept: list[int] = []
    for k, count in enumerate(spec):
        size = steps // len(spec) + (k < steps % len(spec))
        start = k * (steps // len(spec)) + min(k, steps % len(spec))
        if count > size:
            raise ValueError(f"cannot take {count} steps from a section of {size} (of {steps} in all): ask for at most {size}")
        stride, position = ((size - 1) / (count - 1) if count > 1 else 1), 0.0
        for _ in range(count):  # summed, not multiplied: the published rounding depends on it
            kept.append(start + round(position))
            position += stride
    return kept


def from_noise(kept: list[int], alphas: Tensor) -> list[int]:
    """The steps kept, of a chain with these alphas, with the last moved to the chain's end where an image would still show in it.

    Solvers start from pure noise: at a step whose x_t is more than `SEEN` image, they would make something else of it.
    """
    return kept if alphas[kept[-1]] ** 2 <= SEEN else [*kept[:-1], len(alphas) - 1]


def _count(text: str, spec: str) -> int:
    if not (text.isascii() and text.strip().isdigit() and int(text.strip()[:9]) > 0 and len(text.strip()) < 10):
        raise ValueError(f"sampling steps {spec!r}: give a count (250), counts per section (10,15,20), or ddimN (ddim50)")
    return int(text)


def _strided(steps: int, count: int) -> list[int]:
    for stride in range(1, steps + 1):
        if len(kept := range(0, steps, stride)) == count:
            return list(kept)
    near = sorted({len(range(0, steps, s)) for s in range(1, steps + 1)}, key=lambda n: abs(n - count))[:3]
    raise ValueError(f"ddim{count}: no whole stride takes {count} of {steps} steps; possible near it: {sorted(near)}")
