"""Grids found by dynamic programming: against trying all paths, and against even ones on a Gaussian."""

from itertools import combinations

import pytest
import torch

from diffusion.rows import evenly
from diffusion.test_solvers import best, noise_is_not_drawn
from golden_rules import noise
from iddpm.diffusion.found import bounds, cheapest, deviations
from iddpm.diffusion.grid import Grid, walk
from iddpm.diffusion.schedule import VE, Flow
from iddpm.diffusion.solvers import Ddim, run


@pytest.mark.parametrize("steps", [1, 2, 4, 6])
def test_the_path_is_the_cheapest_of_all(steps: int) -> None:
    cost = torch.rand(7, 7, generator=torch.Generator().manual_seed(steps))
    paths = [(0, *middle, 6) for middle in combinations(range(1, 6), steps - 1)]
    sums = [sum(float(cost[a, b]) for a, b in zip(path, path[1:])) for path in paths]
    assert tuple(cheapest(cost, steps)) == paths[sums.index(min(sums))]


def test_more_steps_than_levels_are_refused() -> None:
    with pytest.raises(ValueError, match="1 to 6"):
        cheapest(torch.zeros(7, 7), 7)


def kept(fine: Grid, nodes: list[int], schedule: VE | Flow) -> Grid:
    levels = sorted(fine.steps - 1 - k for k in nodes)
    u = schedule.u_of(fine.table.sigma[levels] / fine.table.alpha[levels])
    u[-1] = 1.0
    return walk(schedule, u)


@pytest.mark.parametrize("schedule", [VE(rho=1.5), Flow()])
def test_a_found_path_ends_nearer_to_the_fine_one_than_an_even_one(schedule) -> None:
    fine, x = evenly(schedule, 60), noise(0, (16, 1, 8, 8))
    cost = deviations(best, x * fine.start, fine)
    assert (cost.diagonal(1).abs() < 1e-5 * cost.max()).all()  # a step of the fine path's own ends where that does
    found = kept(fine, cheapest(cost, 6)[:-1], schedule)
    other = noise(1, (64, 1, 8, 8))
    ends = [
        run(Ddim()(best, other * g.start, g, noise_is_not_drawn)) for g in (evenly(schedule, 600), found, evenly(schedule, 6))
    ]
    found_off, even_off = ((end - ends[0]).square().mean().sqrt().item() for end in ends[1:])
    assert found_off < 0.9 * even_off


def test_a_found_bound_is_the_lowest_of_all_grids_through_the_same_levels() -> None:
    schedule, x0 = VE(rho=3.0), 0.3 + 0.4 * noise(2, (64, 1, 8, 8))
    fine = evenly(schedule, 12)
    cost = bounds(best, x0, fine, lambda k: noise(10 + k, x0.shape))
    whole = [
        sum(float(cost[a, b]) for a, b in zip(path, path[1:])) for path in ((0, *m, 11) for m in combinations(range(1, 11), 3))
    ]
    nodes = cheapest(cost, 4)
    assert sum(float(cost[a, b]) for a, b in zip(nodes, nodes[1:])) == pytest.approx(min(whole))
    assert float(cost.diagonal(1).sum()) < min(whole)  # a finer chain bounds better
