"""Laws of t: which steps of the chain a batch trains on, and the importance weight that keeps the loss unbiased.

A law maps uniform numbers, one for each image of the global batch in its order, to steps: it draws nothing itself, so the
steps do not depend on how the batch is split.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Draw(NamedTuple):
    """Steps i (B,) int64 and the weights (B,) float32 of their losses; the weights average to 1."""

    i: Tensor
    weight: Tensor


class Uniform:
    """Every step alike."""

    def __init__(self, steps: int):
        self.steps = steps

    def __call__(self, u: Tensor) -> Draw:
        """Steps for u (B,) float64 in [0, 1)."""
        return Draw((u * self.steps).long().clamp(max=self.steps - 1), torch.ones(len(u)))

    def update(self, i: Tensor, losses: Tensor) -> None:
        """Take note of the whole step's (i, loss), in global order; this law does not look."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Stratified(Uniform):
    """One step from each of B equal strata of the chain: the same law, less noise (Kingma et al. 2021, appendix I.1)."""

    def __call__(self, u: Tensor) -> Draw:
        return super().__call__((torch.arange(len(u)) + u) / len(u))


class LossSecondMoment(Uniform):
    """p(i) proportional to sqrt(E[loss_i^2]) over each step's last `history` losses (Nichol & Dhariwal 2021, eq. 18).

    Uniform until every step has a full history; a share `uniform` of the law stays uniform for ever. A loss that is not finite
    is left out, so it cannot poison the law.
    """

    def __init__(self, steps: int, history: int = 10, uniform: float = 0.001):
        super().__init__(steps)
        self.uniform = uniform
        self._losses = torch.zeros(steps, history, dtype=torch.float64)  # oldest first
        self._counts = torch.zeros(steps, dtype=torch.int64)

    def warm(self) -> bool:
        """Whether every step has a full history."""
        return bool((self._counts == self._losses.shape[1]).all())

    def probabilities(self) -> Tensor:
        """The law (T,) float64, which sums to 1."""
        if not self.warm():
            return torch.full((self.steps,), 1 / self.steps, dtype=torch.float64)
        moment = (self._losses**2).mean(1).sqrt().clamp(min=1e-300)  # all losses 0 is the uniform law
        return (1 - self.uniform) * moment / moment.sum() + self.uniform / self.steps

    def __call__(self, u: Tensor) -> Draw:
        p = self.probabilities()
        i = torch.searchsorted(p.cumsum(0), u.double(), right=True).clamp(max=self.steps - 1)
        return Draw(i, (1 / (self.steps * p[i])).float())

    def update(self, i: Tensor, losses: Tensor) -> None:
        for step, loss in zip(i.tolist(), losses.double().tolist()):
            if not abs(loss) < float("inf"):
                continue
            count = int(self._counts[step])
            if count == self._losses.shape[1]:
                self._losses[step] = self._losses[step].roll(-1)
                count -= 1
            self._losses[step, count] = loss
            self._counts[step] = count + 1

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self._losses, "counts": self._counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._losses, self._counts = state["losses"].clone(), state["counts"].clone()


LAWS: dict[str, Callable[[int], Uniform]] = {
    "uniform": Uniform,
    "stratified": Stratified,
    "loss-second-moment": LossSecondMoment,
}
