"""Which t a batch trains on, by the original's samplers: drawn from numpy's global generator."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iddpm.diffusion.grid import Chain
from iddpm.diffusion.law import LossSecondMoment
from iddpm.diffusion.schedule import Linear
from iddpm.parallel.processes import gather


class ScheduleSampler(ABC):
    """A law of t; subclasses give `weights`, or override `sample` to weigh the losses otherwise."""

    @abstractmethod
    def weights(self) -> np.ndarray:
        """A positive weight for each step, (T,), not necessarily of sum 1."""

    def sample(self, batch_size: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Steps (B,) int64 and the float32 weights (B,) that keep the loss unbiased."""
        w = self.weights()
        p = w / np.sum(w)  # numpy's global generator, as there: a seeded script draws the same steps
        t = np.random.choice(len(p), size=(batch_size,), p=p)
        return torch.from_numpy(t).long().to(device), torch.from_numpy(1 / (len(p) * p[t])).float().to(device)


class UniformSampler(ScheduleSampler):
    """Every step alike."""

    def __init__(self, diffusion: Any):
        self.diffusion = diffusion
        self._weights = np.ones([diffusion.num_timesteps])

    def weights(self) -> np.ndarray:
        return self._weights


class LossAwareSampler(ScheduleSampler):
    """A law of t that learns from the losses."""

    def update_with_local_losses(self, local_ts: Tensor, local_losses: Tensor) -> None:
        """Pass on this process's (t, loss), together with every other's; their numbers may differ."""
        self.update_with_all_losses(gather(local_ts).tolist(), gather(local_losses).tolist())

    @abstractmethod
    def update_with_all_losses(self, ts: Sequence[int], losses: Sequence[float]) -> None:
        """Learn from the (t, loss) of all processes; called alike on each, so it must be deterministic."""


class LossSecondMomentResampler(LossAwareSampler):
    """p(t) proportional to sqrt(E[loss_t^2]), by `iddpm.diffusion.law.LossSecondMoment`."""

    def __init__(self, diffusion: Any, history_per_term: int = 10, uniform_prob: float = 0.001):
        self.diffusion, self.history_per_term, self.uniform_prob = diffusion, history_per_term, uniform_prob
        counted = Chain(Linear(diffusion.num_timesteps))  # any chain of as many steps: the law only counts them
        self.law = LossSecondMoment(counted, history_per_term, uniform_prob)

    def weights(self) -> np.ndarray:
        return self.law.probabilities().numpy() if self._warmed_up() else np.ones([self.diffusion.num_timesteps])

    def update_with_all_losses(self, ts: Sequence[int], losses: Sequence[float]) -> None:
        u = (torch.as_tensor(ts).double() + 0.5) / self.law.steps  # the middle of each step's share
        self.law.update(u, torch.as_tensor(losses, dtype=torch.float64))

    def _warmed_up(self) -> bool:
        return self.law.warm()

    def state_dict(self) -> dict[str, Any]:
        """The losses seen, for a checkpoint."""
        return self.law.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's."""
        self.law.load_state_dict(state)


SAMPLERS: dict[str, Callable[[Any], ScheduleSampler]] = {
    "uniform": UniformSampler,
    "loss-second-moment": LossSecondMomentResampler,
}


def create_named_schedule_sampler(name: str, diffusion: Any) -> ScheduleSampler:
    """The sampler of a --schedule_sampler name; NotImplementedError for an unknown one."""
    if name not in SAMPLERS:
        raise NotImplementedError(f"unknown schedule sampler: {name}; there are {', '.join(SAMPLERS)}")
    return SAMPLERS[name](diffusion)
