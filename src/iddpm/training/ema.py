"""Exponential moving averages of weights, at several rates at once."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class EMA:
    """avg <- d avg + (1 - d) weights, with d = rate, or min(rate, (1 + n) / (10 + n)) at update n with `warmup`.

    The warm-up, as in TensorFlow's ExponentialMovingAverage, makes the average of a short run usable: it forgets the start.
    """

    def __init__(self, weights: Mapping[str, Tensor], rates: Sequence[float], warmup: bool = True):
        self.weights = weights  # the live ones, read at each update
        self.warmup = warmup
        self.updates = 0
        self.averages = {rate: {name: w.detach().clone() for name, w in weights.items()} for rate in rates}

    @torch.no_grad()
    def update(self) -> None:
        """Move every average towards the present weights."""
        self.updates += 1
        live = list(self.weights.values())
        for rate, average in self.averages.items():
            keep = min(rate, (1 + self.updates) / (10 + self.updates)) if self.warmup else rate
            torch._foreach_lerp_(list(average.values()), live, 1 - keep)
