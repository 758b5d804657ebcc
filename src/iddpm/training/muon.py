"""Muon: matrices move by the orthogonal part of their momentum (Jordan et al. 2024), everything else by AdamW."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Of Newton and Schulz's iteration: five steps bring singular values between 0.001 and 1 to between 0.7 and 1.2, near enough.
QUINTIC, ROUNDS = (3.4445, -4.7750, 2.0315), 5
RMS = 0.2  # of an update over the rate, as AdamW's usually is: both share one rate (Liu et al. 2025, section 2.2)


class Muon(torch.optim.AdamW):
    """The optimizer for named parameters. `matrices` move by Muon: a kernel (out, in, k, k) is a matrix (out, in k k).

    `momentum` is Nesterov's. Weight decay is AdamW's for both.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        matrices: set[str],
        lr: float,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
        **adam: Any,
    ):
        rest = [p for name, p in params.items() if name not in matrices]
        super().__init__(rest, lr=lr, **adam)
        self.matrices = [p for name, p in params.items() if name in matrices]
        self.momentum, self.dtype = momentum, dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of both, at the rate and decay of the AdamW."""
        group = self.param_groups[0]
        shapes: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        for p in self.matrices:
            if p.grad is not None:
                shapes[p.shape[0], p[0].numel()].append(p)
        for (rows, columns), same in shapes.items():  # together: many small products are slower than one of a batch
            grads = torch.stack([p.grad.reshape(rows, columns) for p in same if p.grad is not None])
            kept = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in same]
            momenta = torch.stack([m.reshape(rows, columns) for m in kept]).lerp_(grads, 1 - self.momentum)
            for m, new in zip(kept, momenta):
                m.copy_(new.view_as(m))
            updates = orthogonal(grads.lerp_(momenta, self.momentum), self.dtype) * (RMS * max(rows, columns) ** 0.5)
            for p, update in zip(same, updates):
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update.view_as(p), alpha=group["lr"])
        return super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, also those of the matrices, which are in no group of the AdamW."""
        super().zero_grad(set_to_none)
        for p in self.matrices:
            p.grad = None


def orthogonal(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """About U V^T of each of (n, rows, columns) = U S V^T: singular values between 0.7 and 1.2; worked out in `dtype`."""
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    a, b, c = QUINTIC
    x = (wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-30)).to(dtype)  # first the norm: fp16 has no small gradients
    for _ in range(ROUNDS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x if wide is matrices else x.mT).to(matrices.dtype)
