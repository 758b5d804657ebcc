"""Solvers against diffusers' schedulers: from the same noise, over the same levels, with the same exact denoiser.

A scheduler is handed the raw output by which our parametrization stands for x0, so what it reads out of that is compared too. The
levels are put in the scheduler's place by hand, for diffusers spaces them by rules of its own.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion.mixture import best
from diffusion.rows import meaning
from iddpm.diffusion.denoiser import VARIANCES
from iddpm.diffusion.grid import GRIDS, Chain, Grid, respace, steps_at, walk
from iddpm.diffusion.schedule import VE, CosineVP, Flow, Level, Linear
from iddpm.diffusion.solvers import NEAR, Ddim, Dpmpp2M, Dpmpp3M, Edm, Ipndm, State, UniPC, ancestral, dpmpp_2m_sde, heun
from inception_oracles import ORACLES

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers, at numpy

X = torch.randn(64, 2, 1, 1, generator=torch.Generator().manual_seed(0))
LINEAR = Linear(1000)
BETAS = LINEAR.betas().numpy()

Make = Callable[..., Any]


def noise(k: int) -> Tensor:
    return torch.randn(X.shape, generator=torch.Generator().manual_seed(100 + k))


@pytest.fixture(scope="module")
def diffusers() -> Iterator[Make]:
    """Makes the scheduler of a name; diffusers lies where only tests look."""
    elsewhere = {"KarrasVe": "diffusers.schedulers.deprecated.scheduling_karras_ve"}
    sys.path.append(str(ORACLES))
    yield lambda name, **how: getattr(import_module(elsewhere.get(name, "diffusers")), f"{name}Scheduler")(**how)
    sys.path.remove(str(ORACLES))


def karras(schedule: Any, steps: int) -> Grid:
    """Without the noisiest level, where alpha may be 0: diffusers then takes the logarithm of 0."""
    u = GRIDS["karras"]()(schedule, steps + 1)[:-1]
    return walk(schedule, u)


def chain(steps: int) -> Chain:
    return Chain(LINEAR, steps_at(GRIDS["karras"]()(Chain(LINEAR), steps), 1000))


WORLDS = {  # a grid, how diffusers is told of its levels, and what it calls what networks predict
    "linear": (chain, lambda s: s.sigma / s.alpha, {}, {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}),
    "cosine_vp": (lambda n: karras(CosineVP(), n), lambda s: s.sigma / s.alpha, {}, {"v": "v_prediction"}),
    "flow": (lambda n: karras(Flow(), n), lambda s: s.sigma, {"use_flow_sigmas": True}, {"flow": "flow_prediction"}),
}
SAME = {
    "dpmpp_2m": ("DPMSolverMultistep", dict(solver_order=2), Dpmpp2M()),
    "dpmpp_2m_sde": ("DPMSolverMultistep", dict(solver_order=2, algorithm_type="sde-dpmsolver++"), dpmpp_2m_sde),
    "dpmpp_3m": ("UniPCMultistep", dict(solver_order=3, disable_corrector=list(range(99))), Dpmpp3M()),
    **{f"unipc {order}": ("UniPCMultistep", dict(solver_order=order), UniPC(order)) for order in (1, 2, 3, 4)},
}


def output(parametrization: str, x: Tensor, s: Any) -> Tensor:
    """What a network that knows the data gives for x."""
    c = meaning(parametrization)(s)
    return (best(x, s).x0 - c.skip.float() * x) / c.out.float()


def ready(scheduler: Any, levels: list[float]) -> Any:
    """With these levels, from the noisiest on, instead of its own."""
    scheduler.set_timesteps(len(levels))
    scheduler.sigmas = torch.tensor([*levels, 0.0])
    scheduler.set_begin_index(0)
    return scheduler


def walked(scheduler: Any, grid: Any, parametrization: str, x: Tensor, **more: Any) -> list[Tensor]:
    """x after each step of the scheduler; what is given to `step` besides may depend on the step's number."""
    states = []
    for k, (s, t) in enumerate(zip(grid, scheduler.timesteps)):
        given = {name: value(k + 1) if callable(value) else value for name, value in more.items()}
        x = scheduler.step(output(parametrization, x, s), t, x, **given).prev_sample
        states.append(x)
    return states


def same(ours: Iterable[State], theirs: list[Tensor]) -> None:
    found = [state.x for state in ours][: len(theirs)]
    assert len(found) == len(theirs) > 3 and found[-1].std() > 0.1
    torch.testing.assert_close(torch.stack(found), torch.stack(theirs), rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [6, 20])
@pytest.mark.parametrize(("world", "parametrization"), [(w, p) for w, row in WORLDS.items() for p in row[3]])
@pytest.mark.parametrize("solver", SAME)
def test_a_multistep_solver_takes_the_steps_of_diffusers(
    diffusers: Make, solver: str, world: str, parametrization: str, steps: int
) -> None:
    """To the end: both lower the order over the last steps, `DPMSolverMultistep` of order 2 only at the last."""
    name, how, ours = SAME[solver]
    make, level, more, called = WORLDS[world]
    grid = make(steps)
    theirs = diffusers(name, trained_betas=BETAS, prediction_type=called[parametrization], **how, **more)
    draws = {"variance_noise": noise} if "sde" in solver else {}
    x = grid.start * X
    found = walked(ready(theirs, [float(level(s)) for s in grid]), grid, parametrization, x, **draws)
    same(ours(best, x, grid, noise), found)


def test_where_a_step_is_much_longer_than_the_last_ours_alone_lowers_its_order(diffusers: Make) -> None:
    """On a chain's even steps that is one near the image; up to it both are the same."""
    grid = Chain(LINEAR, respace(1000, "20"))
    at = [float((s.alpha / s.sigma).log()) for s in grid]
    first = next(k for k, (a, b, c) in enumerate(zip(at, at[1:], at[2:]), 1) if b - a < NEAR * (c - b))
    theirs = ready(diffusers("DPMSolverMultistep", trained_betas=BETAS), [float(s.sigma / s.alpha) for s in grid])
    ours, found = list(Dpmpp2M()(best, X, grid, noise)), walked(theirs, grid, "eps", X)
    assert 3 < first < 19
    same(ours, found[:first])
    assert (ours[first].x - found[first]).abs().max() > 0.01


def test_diffusers_third_order_takes_half_of_the_parabolas_curvature(diffusers: Make) -> None:
    """`DPMSolverMultistep` of order 3 weighs the second divided difference of x0 with half of its integral; ours takes all of it.

    So does `UniPCMultistep` without its corrector, above. With the other half put back, the steps agree.
    """
    grid = chain(5)
    theirs = diffusers("DPMSolverMultistep", trained_betas=BETAS, solver_order=3)
    found = walked(ready(theirs, [float(s.sigma / s.alpha) for s in grid]), grid, "eps", X)
    ours = list(Dpmpp3M()(best, X, grid, noise))
    a, b, c, to = (float((s.alpha / s.sigma).log()) for s in list(grid)[:4])
    first, second, third = (state.x0 for state in ours[:3])
    curved = ((third - second) / (c - b) - (second - first) / (b - a)) / (c - a) * (to - c) ** 2
    h = to - c
    integral = 1 - 2 / h + 2 / h**2 * (1 - math.exp(-h))
    missing = list(grid)[2].alpha_to * integral / 2 * curved
    assert missing.abs().max() > 1e-3
    torch.testing.assert_close(ours[1].x, found[1], rtol=0, atol=1e-4)
    torch.testing.assert_close(ours[2].x, (found[2] + missing).float(), rtol=0, atol=1e-4)


def heuns(scheduler: Any, grid: Grid, parametrization: str, x: Tensor, scale: Callable[[Any], Any]) -> list[Tensor]:
    """As `walked`, of two calls a step, but one at the last; the scheduler's sample is x_t over `scale` of its level."""
    steps, states = list(grid), []
    ratios = [float(s.sigma / scale(s)) for s in steps]
    scheduler.set_timesteps(len(steps))
    scheduler.sigmas = torch.tensor([ratios[0], *(r for one in ratios[1:] for r in (one, one)), 0.0])
    scheduler.set_begin_index(0)
    y = x / scale(steps[0])
    for s, to in zip(steps, [*steps[1:], None]):
        for level in (s,) if to is None else (s, to):
            y = scheduler.step(output(parametrization, y * scale(level), level), torch.tensor(0.0), y).prev_sample
        states.append(y * scale(to or Level(s.time_to, s.alpha_to, s.sigma_to)))
    return states


def test_heun_takes_the_steps_of_diffusers_on_rectified_flow(diffusers: Make) -> None:
    """But for the step to the least noisy level, where ours is Euler's, and so the one behind it."""
    grid = walk(Flow(), GRIDS["karras"]()(Flow(), 8))
    same(heun(best, X, grid, noise), heuns(diffusers("FlowMatchHeunDiscrete"), grid, "flow", X, lambda s: torch.ones(()))[:-2])


@pytest.mark.parametrize(("parametrization", "called"), [("eps", "epsilon"), ("v", "v_prediction")])
def test_edm_without_churn_takes_the_steps_of_diffusers_heun(diffusers: Make, parametrization: str, called: str) -> None:
    """Without the noisiest level: from beyond sigma/alpha = 100 ours takes Euler's step."""
    grid = chain(9).only(slice(0, 8))
    theirs = diffusers("HeunDiscrete", trained_betas=BETAS, prediction_type=called)
    same(Edm(S_churn=0.0)(best, X, grid, noise), heuns(theirs, grid, parametrization, X, lambda s: s.alpha))


def test_edm_with_churn_takes_the_steps_of_diffusers(diffusers: Make) -> None:
    theirs = diffusers("KarrasVe", s_churn=5.0)
    grid = walk(VE(), GRIDS["karras"]()(VE(), 12))
    theirs.set_timesteps(12)
    x, states = 80.0 * X, []

    def drift(x: Tensor, sigma: float) -> Tensor:
        """Minus the noise, which is what this scheduler calls an output."""
        return (best(x, Level(*torch.tensor([0.0, 1.0, sigma], dtype=torch.float64))).x0 - x) / sigma

    for k, s in enumerate(grid):
        hat, sigma = theirs.add_noise_to_input(x, float(s.sigma), generator=torch.Generator().manual_seed(101 + k))
        step = theirs.step(drift(hat, sigma), sigma, float(s.sigma_to), hat)
        x = step.prev_sample
        if not s.last:
            x = theirs.step_correct(drift(x, s.sigma_to), sigma, float(s.sigma_to), hat, x, step.derivative).prev_sample
        states.append(x)
    same(Edm(S_churn=5.0, S_noise=1.007)(best, 80.0 * X, grid, noise), states)


@pytest.mark.parametrize(
    ("name", "how", "ours"),
    [
        ("EDMEuler", {}, Ddim()),
        ("EDMDPMSolverMultistep", {}, Dpmpp2M()),
        ("EDMDPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}, dpmpp_2m_sde),
    ],
)
def test_on_edms_schedule_levels_times_and_steps_are_those_of_diffusers(diffusers: Make, name: str, how: Any, ours: Any) -> None:
    """Here nothing is put in by hand: the Karras levels, the network's time and its preconditioning are theirs."""
    grid, theirs = walk(VE(), GRIDS["karras"]()(VE(), 12)), diffusers(name, **how)
    theirs.set_timesteps(12)
    torch.testing.assert_close(theirs.sigmas[:-1], grid.table.sigma.flip(0).float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(theirs.timesteps, meaning("edm")(grid.table).time.flip(0).float(), rtol=1e-5, atol=1e-6)
    for s, t in list(zip(grid, theirs.timesteps))[:1]:
        seen = theirs.scale_model_input(X, t)
        torch.testing.assert_close(seen, meaning("edm")(s).inp.float() * X)
    draws = {"generator": lambda k: torch.Generator().manual_seed(100 + k)} if how else {}
    same(ours(best, 80.0 * X, grid, noise), walked(theirs, grid, "edm", 80.0 * X, **draws))


@pytest.mark.parametrize("steps", [8, 20])
def test_ipndm_takes_the_steps_of_diffusers(diffusers: Make, steps: int) -> None:
    """But for the last, where ours jumps to its guess and theirs goes along the four last slopes."""
    grid, theirs = karras(CosineVP(), steps), diffusers("IPNDM")
    ready(theirs, [float(s.sigma) for s in grid])
    theirs.betas, theirs.alphas = theirs.sigmas, (1 - theirs.sigmas.double() ** 2).sqrt().float()
    same(Ipndm(4)(best, X, grid, noise), walked(theirs, grid, "v", X)[:-1])


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("parametrization", "called"), WORLDS["linear"][3].items())
def test_ddim_takes_the_steps_of_diffusers(diffusers: Make, parametrization: str, called: str, eta: float) -> None:
    grid = Chain(LINEAR, respace(1000, "ddim20"))
    theirs = diffusers("DDIM", trained_betas=BETAS, prediction_type=called, clip_sample=False)
    theirs.set_timesteps(20)
    assert theirs.timesteps.tolist() == grid.kept[::-1]
    same(Ddim(eta)(best, X, grid, noise), walked(theirs, grid, parametrization, X, eta=eta, variance_noise=noise))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize(("parametrization", "called"), WORLDS["linear"][3].items())
def test_ancestral_takes_the_steps_of_diffusers(diffusers: Make, parametrization: str, called: str, variance: str) -> None:
    grid = Chain(LINEAR, respace(1000, "20"))
    theirs = diffusers("DDPM", trained_betas=BETAS, prediction_type=called, variance_type=variance, clip_sample=False)
    theirs.set_timesteps(timesteps=grid.kept[::-1])
    found = walked(theirs, grid, parametrization, X, generator=lambda k: torch.Generator().manual_seed(100 + k))

    def denoise(x: Tensor, s: Any) -> Any:
        return best(x, s)._replace(log_var=VARIANCES[variance](s, None).float())

    same(ancestral(denoise, X, grid, noise), found)
