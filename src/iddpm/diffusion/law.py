"""Laws of t: which levels a batch trains on, and the importance weight that keeps the loss unbiased.

A law maps uniform numbers, one for each image of the global batch in its order, to u: it draws nothing itself, so the
levels do not depend on how the batch is split.
"""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from iddpm.diffusion.schedule import Schedule, below_one


class Draw(NamedTuple):
    """u (B,) float64 in [0, 1), which the schedule turns into levels, and the weights (B,) float32 of their losses."""

    u: Tensor
    weight: Tensor


class Uniform:
    """Every level alike"""

    looks = False  # whether `update` reads the losses: of several processes they are gathered only then

    def __init__(self, schedule: Schedule):
        self.schedule = schedule

    def __call__(self, v: Tensor) -> Draw:
        """u for v (B,) float64 in [0, 1)."""
        return Draw(below_one(self.place(v)), torch.ones(len(v)))

    def place(self, v: Tensor) -> Tensor:
        """u of uniform numbers v, both (B,) float64."""
        return v.double()

    def update(self, u: Tensor, losses: Tensor) -> None:
        """Take note of the whole step's (u, loss), in global order; most laws do not look."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Stratified(Uniform):
    """One level from each of B equal strata of [0, 1): the same law, less noise (Kingma et al. 2021, appendix I.1)"""

    def place(self, v: Tensor) -> Tensor:
        return (torch.arange(len(v)) + v.double()) / len(v)


class Lognormal(Uniform):
    """log(sigma/alpha) normal: where EDM found that there is most to learn (Karras et al. 2022, table 1)"""

    P_mean: Annotated[float, "mean of log(sigma/alpha)", -20.0, 20.0] = -1.2
    P_std: Annotated[float, "deviation of log(sigma/alpha)", 0.01, 20.0] = 1.2

    def __init__(self, schedule: Schedule, P_mean: float = -1.2, P_std: float = 1.2):
        super().__init__(schedule)
        self.P_mean, self.P_std = P_mean, P_std

    def place(self, v: Tensor) -> Tensor:
        return self.schedule.u_of(torch.exp(self.P_mean + self.P_std * normal(v)))


class LogitNormal(Uniform):
    """logit(u) normal: the middle of the schedule more often than its ends (Esser et al. 2024, section 3.1)"""

    logit_mean: Annotated[float, "mean of logit(u): above 0, noisier levels are trained on more", -20.0, 20.0] = 0.0
    logit_std: Annotated[float, "deviation of logit(u)", 0.01, 20.0] = 1.0

    def __init__(self, schedule: Schedule, logit_mean: float = 0.0, logit_std: float = 1.0):
        super().__init__(schedule)
        self.logit_mean, self.logit_std = logit_mean, logit_std

    def place(self, v: Tensor) -> Tensor:
        return torch.sigmoid(self.logit_mean + self.logit_std * normal(v))


def normal(v: Tensor) -> Tensor:
    """Standard normal numbers for uniform ones, float64; those of 0 and 1 stay finite."""
    return torch.special.ndtri(v.double().clamp(2**-53, 1 - 2**-53))


class LossSecondMoment(Uniform):
    """p(i) proportional to sqrt(E[loss_i^2]) over each step's last `history` losses (Nichol & Dhariwal 2021, eq. 18)

    Uniform until every step has a full history; a share `uniform` of the law stays uniform for ever. A loss that is not finite
    is left out, so it cannot poison the law.
    """

    looks = True

    def __init__(self, schedule: Schedule, history: int = 10, uniform: float = 0.001):
        super().__init__(schedule)
        self.steps, self.uniform = schedule.steps, uniform
        steps = self.steps
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

    def __call__(self, v: Tensor) -> Draw:
        p, v = self.probabilities(), v.double()
        upto = p.cumsum(0)
        i = torch.searchsorted(upto, v, right=True).clamp(max=self.steps - 1)
        # On a continuous schedule, a step stands for all u of its share, evenly; rounding must not lead over its edges.
        within = ((v - upto[i]) / p[i] + 1).clamp(1e-6, 1 - 1e-6)
        return Draw((i + within) / self.steps, (1 / (self.steps * p[i])).float())

    def update(self, u: Tensor, losses: Tensor) -> None:
        for step, loss in zip((u * self.steps).long().tolist(), losses.double().tolist()):
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


LAWS: dict[str, Callable[..., Uniform]] = {
    "uniform": Uniform,
    "stratified": Stratified,
    "loss-second-moment": LossSecondMoment,
    "lognormal": Lognormal,
    "logit-normal": LogitNormal,
}
