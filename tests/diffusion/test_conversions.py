"""The textbook's conversions between what networks predict, at the levels of every schedule, in float64."""

import pytest
import torch
from torch import Tensor

from diffusion.rows import DISCRETE, chain, meaning
from iddpm.diffusion.parametrization import PARAMETRIZATIONS
from iddpm.diffusion.schedule import SCHEDULES, Level

GENERATOR = torch.Generator().manual_seed(0)
X0, EPS = torch.randn(2, 50, 1, dtype=torch.float64, generator=GENERATOR)  # beside levels (T,)

KEPT = ["linear", "cosine", "cosine_vp", "sigmoid"]  # alpha^2 + sigma^2 = 1


def levels(schedule: str) -> Level:
    """All of a chain's, or a thousand."""
    if schedule in DISCRETE:
        return chain(schedule, 1000).table
    return SCHEDULES[schedule]()((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)


def predicted(name: str, s: Level) -> Tensor:
    """What a network that knows x0 and eps gives: (50, T)."""
    c = meaning(name)(s)
    return c.of_x0 * X0 + c.of_eps * EPS


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b.expand_as(a), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_prediction_is_made_of_another(schedule: str) -> None:
    s = levels(schedule)
    alpha, sigma = s.alpha, s.sigma
    xt = alpha * X0 + sigma * EPS
    x0, eps, flow, edm = (predicted(name, s) for name in ("x0", "eps", "flow", "edm"))
    close(x0, (xt - sigma * eps) / alpha)
    close(eps, (xt - alpha * x0) / sigma)
    close(flow, eps - x0)
    close(x0, (xt - sigma * flow) / (alpha + sigma))
    close(eps, (xt + alpha * flow) / (alpha + sigma))
    y, h, d = xt / alpha, sigma / alpha, 0.5  # Karras et al. 2022, table 1: D = c_skip y + c_out F
    close(x0, d**2 / (h**2 + d**2) * y + h * d / (h**2 + d**2).sqrt() * edm)


@pytest.mark.parametrize("schedule", KEPT)
def test_v_is_a_rotation_where_the_variance_is_kept(schedule: str) -> None:
    """Salimans & Ho 2022, appendix D: alpha = cos phi, sigma = sin phi, and v = d x_t / d phi."""
    s = levels(schedule)
    close(s.alpha**2 + s.sigma**2, torch.ones((), dtype=torch.float64))
    xt, v = s.alpha * X0 + s.sigma * EPS, predicted("v", s)
    close(v, s.alpha * EPS - s.sigma * X0)
    close(X0.expand_as(xt), s.alpha * xt - s.sigma * v)
    close(EPS.expand_as(xt), s.sigma * xt + s.alpha * v)
    close(predicted("flow", s), (s.sigma - s.alpha) * xt + (s.alpha + s.sigma) * v)


ROWS = [  # previous is of chains, v of those whose variance is kept
    (schedule, name)
    for schedule in SCHEDULES
    for name in PARAMETRIZATIONS
    if (name != "previous" or schedule in DISCRETE) and (name != "v" or schedule in KEPT)
]


@pytest.mark.parametrize(("schedule", "name"), ROWS)
def test_a_prediction_is_read_as_the_x0_it_was_made_of(schedule: str, name: str) -> None:
    s = levels(schedule)
    c = meaning(name)(s)
    xt = s.alpha * X0 + s.sigma * EPS
    close(c.skip * xt + c.out * predicted(name, s), X0)
