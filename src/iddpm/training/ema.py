"""Averages of weights: exponential ones at several rates, and by powers of time, of which any width can be made afterwards."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Averages = dict[float, dict[str, Tensor]]  # by rate, or by relative width


class EMA:
    """avg <- d avg + (1 - d) weights, with d = rate, or min(rate, (1 + n) / (10 + n)) at update n with `warmup`.

    The warm-up, as in TensorFlow's ExponentialMovingAverage, makes the average of a short run usable: it forgets the start.
    `powers` are averages in which the weights of update n count as n^gamma (Karras et al. 2024, EDM2, eq. 3-4): d is
    (1 - 1/n)^(gamma + 1), where gamma follows from the width.
    """

    def __init__(self, weights: Mapping[str, Tensor], rates: Sequence[float], warmup: bool = True, widths: Sequence[float] = ()):
        self.weights = weights  # the live ones, read at each update
        self.warmup = warmup
        self.updates = 0
        self.averages, self.powers = (
            {key: {name: w.detach().clone() for name, w in weights.items()} for key in keys} for keys in (rates, widths)
        )

    @torch.no_grad()
    def update(self) -> None:
        """Move every average towards the present weights."""
        self.updates += 1
        for rate, average in self.averages.items():
            self._move(average, min(rate, (1 + self.updates) / (10 + self.updates)) if self.warmup else rate)
        for width, average in self.powers.items():
            self._move(average, (1 - 1 / self.updates) ** (gamma_of(width) + 1))

    def _move(self, average: dict[str, Tensor], keep: float) -> None:
        torch._foreach_lerp_(list(average.values()), list(self.weights.values()), 1 - keep)


# ---- by powers of time


WIDEST = 12**-0.5  # relative width of the plain mean, gamma = 0


def width_of(gamma: float) -> float:
    """The relative width of an average: the deviation of the times it is made of, over its length (Karras et al. 2024, eq. 5)."""
    return float(((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5)


def gamma_of(width: float) -> float:
    """The gamma of a relative width, above 0 and below 0.2887 (that of a plain mean); ValueError beyond."""
    if not 0 < width < WIDEST:
        raise ValueError(f"a relative width lies above 0 and below {WIDEST:.4f}, as 0.05 or 0.1, not {width:g}")
    low, high = 0.0, 2 / width  # the width falls with gamma, and is below 1 / gamma
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if width_of(middle) > width else (low, middle)
    return low


Profile = tuple[float, float]  # an average's gamma and its number of updates


def combination(snapshots: Sequence[Profile], wanted: Profile) -> tuple[list[float], float]:
    """The share of each snapshot in the sum that comes nearest to another average, and how far off that is, by its profile.

    Least squares over time (Karras et al. 2024, appendix C.1), of shares that add up to 1, or all weights would shrink a little.
    0 is exact, 1 as far as nothing at all. ValueError for none.
    """
    if not snapshots:
        raise ValueError("there is no snapshot")
    a = torch.tensor([[_product(p, q) for q in snapshots] for p in snapshots], dtype=torch.float64)
    b = torch.tensor([_product(p, wanted) for p in snapshots], dtype=torch.float64)
    scale = a.diagonal().rsqrt()  # all profiles of length 1: shares of very different size are found as well
    bordered = torch.zeros(len(b) + 1, len(b) + 1, dtype=torch.float64)  # with a multiplier for the sum
    bordered[:-1, :-1], bordered[-1, :-1], bordered[:-1, -1] = a * scale[:, None] * scale, scale, scale
    right = torch.cat([b * scale, torch.ones(1, dtype=torch.float64)])
    found = scale * torch.linalg.lstsq(bordered, right[:, None], driver="gelsd").solution[:-1, 0]
    missed = (found @ a @ found - 2 * found @ b) / _product(wanted, wanted) + 1
    return found.tolist(), max(0.0, missed.item()) ** 0.5


def _product(p: Profile, q: Profile) -> float:
    """The integral over time of two profiles, each (gamma + 1) t^gamma / n^(gamma + 1) up to its n and 0 from there on."""
    (g, n), (h, m) = p, q
    least = min(n, m)
    return (g + 1) * (h + 1) / (g + h + 1) * (least / n) ** g * (least / m) ** h * least / (n * m)
