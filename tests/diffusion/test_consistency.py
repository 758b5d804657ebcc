"""Consistency tuning, against the exact map of data that is N(m, s^2): its path from noise to images is a formula."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion.rows import CONTINUOUS, chain, grid
from iddpm.diffusion.denoiser import Denoiser, wide
from iddpm.diffusion.grid import Chain
from iddpm.diffusion.objective import Consistency
from iddpm.diffusion.parametrization import PARAMETRIZATIONS
from iddpm.diffusion.schedule import SCHEDULES, VE, Flow
from iddpm.diffusion.solvers import Leaps, run

M, S, PIXELS = 0.3, 0.4, 16
EVERY = [*CONTINUOUS, "cosine"]


def schedule_of(name: str) -> Any:
    return SCHEDULES[name]() if name in CONTINUOUS else chain(name, 4000)


def exact(x: Tensor, s: Any, off: Any = 0.0) -> Tensor:
    """The x0 at the end of the path through x_t, as far from m as x_t is on its own scale; `off` is missed, but at no noise."""
    alpha, sigma, noisy = wide((s.alpha, s.sigma, (s.sigma / s.alpha).clamp(max=1.0)), x)
    return M + off * noisy + S * (x - alpha * M) / (alpha**2 * S**2 + sigma**2).sqrt()


def denoiser_of(f: Any) -> Any:
    """A denoiser whose x0 is f(x, level)."""
    return lambda x, s, cond={}: Denoiser(lambda y, t: f(x, s), PARAMETRIZATIONS["x0"])(x, s)


def pull(schedule: Any, stage: int, off: float) -> float:
    """d loss / d off, a mean over 100,000 images."""
    generator = torch.Generator().manual_seed(stage)
    x0, eps = (torch.randn(100_000, PIXELS, generator=generator) for _ in range(2))
    u = torch.rand(len(x0), generator=generator, dtype=torch.float64) * 0.8 + 0.1
    by = torch.tensor(off, requires_grad=True)
    f = denoiser_of(lambda x, s: exact(x, s, by))
    loss = Consistency(8)(f, schedule, M + S * x0, eps, u, progress=lambda: (stage - 1) / 8)["loss"].mean()
    return torch.autograd.grad(loss, by)[0].item()


@pytest.mark.parametrize("name", EVERY)
def test_tuning_comes_to_rest_at_the_exact_map_as_the_gap_closes(name: str) -> None:
    """Beside the pull on a map that misses it by 0.1 to either side, the pull on the exact one vanishes."""
    schedule = schedule_of(name)
    for stage, share in ((3, 0.2), (7, 0.03)):
        more, less = pull(schedule, stage, 0.1), pull(schedule, stage, -0.1)
        assert more > 0 > less, "it pulls back"
        assert abs(pull(schedule, stage, 0.0)) < share * (more - less) / 2


def test_the_nearer_level_is_the_papers_and_closes_in_from_stage_to_stage() -> None:
    """Geng et al. 2024, eq. 13: r = t - t n(t) / q^a, n(t) = 1 + k sigmoid(-b t), with q 2, k 8, b 1, and r >= 0."""
    u = torch.linspace(0.05, 0.99, 40, dtype=torch.float64)
    t = VE()(u).sigma
    for progress, a in ((0.0, 1), (0.124, 1), (0.126, 2), (0.5, 5), (1.0, 8)):
        nearer, clean = Consistency(8).nearer(VE(), u, progress)
        r = t - t * (1 + 8 / (1 + t.exp())) / 2**a
        assert torch.equal(clean, r <= 0.002)
        torch.testing.assert_close(nearer.sigma[~clean], r[~clean], rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_on_a_chain_it_is_another_step_or_the_image(name: str) -> None:
    steps = chain(name, 40)
    u = (torch.arange(40, dtype=torch.float64) + 0.5) / 40
    for progress in (0.0, 0.5, 1.0):
        nearer, clean = Consistency(8).nearer(steps, u, progress)
        assert (nearer.time[~clean] < steps(u).time[~clean]).all() and clean[0]
    assert torch.equal(nearer.time[1:][~clean[1:]], steps(u).time[:-1][~clean[1:]])  # in the end, the step beside it


def test_both_calls_drop_the_same_features_and_randomness_goes_on_as_after_one() -> None:
    dropped: list[Tensor] = []

    def dropping(x: Tensor, s: Any) -> Tensor:
        dropped.append(torch.rand(4))
        return x

    x0, u = torch.zeros(3, PIXELS), torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    torch.manual_seed(3)
    Consistency()(denoiser_of(dropping), Flow(), x0, x0, u)
    after = torch.rand(1)
    assert len(dropped) == 2 and torch.equal(*dropped)
    torch.manual_seed(3)
    torch.rand(4)
    assert torch.equal(after, torch.rand(1))


def test_the_target_has_no_gradient_and_nothing_is_lost_where_both_agree() -> None:
    w = torch.ones((), requires_grad=True)
    x0, eps = torch.zeros(2, PIXELS), torch.randn(2, PIXELS, generator=torch.Generator().manual_seed(2))
    u = torch.tensor([0.3, 0.7], dtype=torch.float64)
    terms = Consistency()(denoiser_of(lambda x, s: 0 * x + w), Flow(), x0, eps, u, progress=lambda: 1.0)
    assert torch.equal(terms["loss"], torch.zeros(2))  # a map to one image is consistent
    x0 = x0 + 1
    terms = Consistency(gap_halvings=1)(denoiser_of(lambda x, s: 0 * x + w), Flow(), x0, eps, u, progress=lambda: 0.0)
    assert torch.equal(terms["loss"], torch.zeros(2)) and w.grad is None


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("name", EVERY)
def test_leaps_of_the_exact_map_give_the_data_in_any_number(name: str, steps: int) -> None:
    walked = grid(name, steps) if steps > 1 or name in CONTINUOUS else Chain(SCHEDULES[name](40), [39])
    generator = torch.Generator().manual_seed(4)

    def draw(k: int) -> Tensor:
        return torch.randn(1, 1, 128, 128, generator=generator)

    x = run(Leaps()(denoiser_of(exact), walked.start * draw(0), walked, draw))
    assert x.mean().item() == pytest.approx(M, abs=5 * S / 128)
    assert x.std().item() == pytest.approx(S, rel=5 / (128 * math.sqrt(2)))
