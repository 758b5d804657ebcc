"""Noise schedules, and the discrete chain x_0 -> x_1 ... -> x_T that one of them makes on a sub-grid of its steps."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

MAX_BETA = 0.999  # a larger one would lose x0 in a single step: alpha would vanish


class Schedule(Protocol):
    """What a chain is made of: `steps` variances, one per step, each in (0, 1)."""

    @property
    def steps(self) -> int: ...

    def betas(self) -> Tensor: ...


@dataclass(frozen=True)
class Linear:
    """beta_i rises linearly from 0.1/T to 20/T (Ho et al. 2020, section 4, rescaled to any T)."""

    steps: int = 1000

    def betas(self) -> Tensor:  # (T,) float64
        return torch.linspace(0.1 / self.steps, 20 / self.steps, self.steps, dtype=torch.float64).clamp(max=MAX_BETA)


@dataclass(frozen=True)
class Cosine:
    """alpha_bar(u) = cos^2((u + s) / (1 + s) pi / 2), u = i / T (Nichol & Dhariwal 2021, eq. 17)."""

    steps: int = 4000
    s: float = 0.008

    def betas(self) -> Tensor:  # (T,) float64
        bar = [math.cos((i / self.steps + self.s) / (1 + self.s) * math.pi / 2) ** 2 for i in range(self.steps + 1)]
        betas = [min(1 - after / before, MAX_BETA) for before, after in zip(bar, bar[1:])]
        return torch.tensor(betas, dtype=torch.float64)


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


def _count(text: str, spec: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise ValueError(f"sampling steps {spec!r}: give a count (250), counts per section (10,15,20), or ddimN (ddim50)")
    return int(text)


def _strided(steps: int, count: int) -> list[int]:
    for stride in range(1, steps + 1):
        if len(kept := range(0, steps, stride)) == count:
            return list(kept)
    near = sorted({len(range(0, steps, s)) for s in range(1, steps + 1)}, key=lambda n: abs(n - count))[:3]
    raise ValueError(f"ddim{count}: no whole stride takes {count} of {steps} steps; possible near it: {sorted(near)}")


class Step(NamedTuple):
    """What the formulas need of step i, each entry broadcastable over a batch (or a (K,) float64 table of all steps).

    x_t = alpha x_0 + sigma eps after the step, `_prev` one step nearer to the data, `_next` one further from it.
    q(x_{t-1} | x_t, x_0) has the mean coef_x0 x_0 + coef_xt x_t and a log variance between log_min and log_max.
    """

    time: Tensor  # as the network sees it
    alpha: Tensor
    sigma: Tensor
    alpha_prev: Tensor
    sigma_prev: Tensor
    alpha_next: Tensor
    sigma_next: Tensor
    coef_x0: Tensor
    coef_xt: Tensor
    log_min: Tensor  # log of the posterior variance; at step 0, where that is 0, its neighbour's
    log_max: Tensor  # log beta
    first: Tensor  # 1 at step 0, whose result is the image, else 0


class Table:
    """Columns over the steps of a chain, made in float64, looked up in float32 for a batch of steps; cached per device."""

    def __init__(self, columns: Sequence[Tensor]):
        self._rows = {torch.device("cpu"): torch.stack(list(columns), dim=1).float()}

    def __call__(self, i: Tensor, ndim: int) -> tuple[Tensor, ...]:
        """Column values at steps i (B,), each (B, 1, ...) float32 with `ndim` dimensions."""
        if i.device not in self._rows:
            self._rows[i.device] = self._rows[torch.device("cpu")].to(i.device)
        return self._rows[i.device][i].reshape(len(i), -1, *(1,) * (ndim - 1)).unbind(1)


class Chain:
    """The Markov chain of a schedule on the steps `kept` of it (all by default), with its float64 tables.

    Steps are counted 0 .. K-1, where K = len(kept), in the direction of more noise. A network trained on the whole schedule
    sees the step's number there, times 1000/T with `rescale_time` (Nichol & Dhariwal's code, `rescale_timesteps`).
    """

    def __init__(self, schedule: Schedule, kept: Sequence[int] | None = None, *, rescale_time: bool = True):
        whole = schedule.betas()
        self.kept = list(range(schedule.steps)) if kept is None else sorted(set(kept))
        self.steps, self.schedule_steps = len(self.kept), schedule.steps
        last = torch.ones(1, dtype=torch.float64)
        bar = (1 - whole).cumprod(0)[self.kept]
        before, after = torch.cat([last, bar[:-1]]), torch.cat([bar[1:], 0 * last])
        self.betas = whole if self.steps == schedule.steps else 1 - bar / before
        variance = self.betas * (1 - before) / (1 - bar)
        clipped = torch.cat([variance[1:2], variance[1:]]) if self.steps > 1 else self.betas
        time = torch.tensor(self.kept, dtype=torch.float32) * (1000.0 / schedule.steps if rescale_time else 1.0)
        self.table = Step(
            time=time.double(),
            alpha=bar.sqrt(),
            sigma=(1 - bar).sqrt(),
            alpha_prev=before.sqrt(),
            sigma_prev=(1 - before).sqrt(),
            alpha_next=after.sqrt(),
            sigma_next=(1 - after).sqrt(),
            coef_x0=self.betas * before.sqrt() / (1 - bar),
            coef_xt=(1 - before) * (1 - self.betas).sqrt() / (1 - bar),
            log_min=clipped.log(),
            log_max=self.betas.log(),
            first=(torch.arange(self.steps) == 0).double(),
        )
        self._look_up = Table(self.table)

    def at(self, i: Tensor, like: Tensor) -> Step:
        """The entries of steps i (B,) int64, shaped to broadcast over `like` (B, ...)."""
        return Step(*self._look_up(i, like.ndim))


SCHEDULES: dict[str, Callable[[int], Schedule]] = {"linear": Linear, "cosine": Cosine}
