"""Schedules, respacing and the chain's tables: against golden tables, Bayes' rule and closed forms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.rows import CONTINUOUS, DISCRETE, evenly
from golden_rules import load
from iddpm.diffusion.grid import GRIDS, Chain, Grid, respace, steps_at, walk
from iddpm.diffusion.schedule import SCHEDULES, VE, Adjusted, Cosine, CosineVP, Flow, Linear, Shifted, Sigmoid, SigmoidChain

SIZES = (50, 1000, 4000)
PUBLISHED = ("linear", "cosine")  # of improved-diffusion
GIVEN = {  # the golden quantity of a chain
    "betas": lambda c: c.betas,
    "alphas_cumprod": lambda c: c.table.alpha**2,
    "posterior_variance": lambda c: c.betas * (c.table.sigma_to / c.table.sigma) ** 2,
    "posterior_log_variance_clipped": lambda c: c.table.log_min,
    "posterior_mean_coef1": lambda c: c.table.coef_x0,
    "posterior_mean_coef2": lambda c: c.table.coef_xt,
}


@pytest.mark.parametrize("steps", SIZES)
@pytest.mark.parametrize("name", PUBLISHED)
def test_tables_are_the_published_ones(name: str, steps: int) -> None:
    chain, golden = Chain(SCHEDULES[name](steps)), load("schedules.npz")
    for quantity, ours in GIVEN.items():
        published = golden[f"{name}_{steps}_{quantity}"]
        np.testing.assert_allclose(ours(chain).numpy(), published, rtol=1e-12, err_msg=quantity)


def test_every_golden_table_is_covered() -> None:
    assert set(load("schedules.npz")) == {f"{n}_{t}_{q}" for n in PUBLISHED for t in SIZES for q in GIVEN}


@pytest.mark.parametrize("steps", range(1, 26))
@pytest.mark.parametrize("name", DISCRETE)
def test_betas_lie_between_0_and_1_for_any_number_of_steps(name: str, steps: int) -> None:
    schedule = SCHEDULES[name](steps)
    betas = schedule.betas()
    assert betas.dtype == torch.float64 and betas.shape == (steps,) == (schedule.steps,)
    assert ((betas > 0) & (betas < 1)).all()


@pytest.mark.parametrize("steps", range(1, 26))
@pytest.mark.parametrize("name", DISCRETE)
def test_a_chain_of_any_length_has_finite_tables(name: str, steps: int) -> None:
    assert all(column.isfinite().all() for column in Chain(SCHEDULES[name](steps)).table)


@pytest.mark.parametrize("numbers", [{}, dict(sigmoid_start=-1.0, sigmoid_end=2.0, tau=0.7)])
def test_steps_of_the_sigmoid_chain_end_where_the_continuous_schedule_is(numbers: dict[str, float]) -> None:
    chain, levels = Chain(SigmoidChain(100, **numbers)), Sigmoid(**numbers)(torch.arange(1, 101).double() / 100)
    torch.testing.assert_close(chain.table.alpha[:-1], levels.alpha[:-1], rtol=1e-12, atol=0)
    assert 0 < chain.table.alpha[-1] < 0.05  # where that one is pure noise


def test_linear_betas_rise_evenly_between_ho_et_als_ends() -> None:
    betas = Linear(1000).betas()
    assert betas[0] == pytest.approx(1e-4) and betas[-1] == pytest.approx(0.02)
    assert torch.allclose(betas.diff(), betas.diff()[0], rtol=1e-9)


@pytest.mark.parametrize("steps", [40, 1000])
def test_cosine_alpha_bar_is_a_squared_cosine_until_beta_is_capped(steps: int) -> None:
    def curve(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    bar = Chain(Cosine(steps)).table.alpha ** 2
    for i in (0, steps // 3, steps - 2):
        assert bar[i].item() == pytest.approx(curve((i + 1) / steps) / curve(0), rel=1e-9)
    assert bar[-1].item() == pytest.approx(bar[-2].item() * 0.001, rel=1e-9)


@pytest.mark.parametrize("entry", load("respacing.json"), ids=lambda e: f"{e['num_timesteps']}:{e['spec']}")
def test_respacing_keeps_the_published_steps(entry: dict) -> None:
    if "error" in entry:
        with pytest.raises(ValueError, match=r"cannot take|no whole stride"):
            respace(entry["num_timesteps"], entry["spec"])
    else:
        assert respace(entry["num_timesteps"], entry["spec"]) == entry["steps"]


@pytest.mark.parametrize("spec", ["0", "-3", "1.5", "ddim", "ddim0", "ten", "10,,5", "ddim10,5", ","])
def test_a_spec_that_is_not_a_count_is_refused_by_name(spec: str) -> None:
    with pytest.raises(ValueError, match=spec):
        respace(100, spec)


def test_a_stride_that_does_not_exist_is_refused_with_what_is_near() -> None:
    with pytest.raises(ValueError, match="34"):  # every third of 100
        respace(100, "ddim33")


def test_no_spec_keeps_every_step_and_a_list_is_read_as_sections() -> None:
    assert respace(7) == list(range(7)) == respace(7, "7")
    assert respace(300, [10, 15, 20]) == respace(300, "10,15,20")


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.data())
def test_respacing_keeps_the_asked_count_within_each_section(steps: int, data: st.DataObject) -> None:
    sections = data.draw(st.integers(1, min(4, steps)))
    sizes = [steps // sections + (k < steps % sections) for k in range(sections)]
    counts = [data.draw(st.integers(1, size)) for size in sizes]
    kept = respace(steps, ",".join(map(str, counts)))
    edges = np.cumsum([0, *sizes])
    assert kept == sorted(set(kept))
    assert np.histogram(kept, edges)[0].tolist() == counts
    assert set(edges[:-1]) <= set(kept)  # a section's first step is kept, and its last where there are two
    assert all(end - 1 in kept for end, count in zip(edges[1:], counts) if count > 1)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400))
def test_ddim_respacing_is_an_even_stride_from_0_or_an_error(steps: int, count: int) -> None:
    possible = {len(range(0, steps, stride)) for stride in range(1, steps + 1)}
    if count not in possible:
        with pytest.raises(ValueError, match="no whole stride"):
            respace(steps, f"ddim{count}")
    else:
        kept = respace(steps, f"ddim{count}")
        assert len(kept) == count and kept[0] == 0 and len(set(np.diff(kept))) <= 1


@pytest.mark.parametrize("name", DISCRETE)
def test_keeping_every_step_changes_nothing(name: str) -> None:
    whole, kept = Chain(SCHEDULES[name](100)), Chain(SCHEDULES[name](100), respace(100, "100"))
    assert all(torch.equal(a, b) for a, b in zip(whole.table, kept.table))


@pytest.mark.parametrize("spec", ["", "10", "ddim8", "3,7"])
@pytest.mark.parametrize("name", DISCRETE)
def test_a_respaced_chain_passes_through_the_same_noise_levels(name: str, spec: str) -> None:
    whole, chain = Chain(SCHEDULES[name](40)), Chain(SCHEDULES[name](40), respace(40, spec))
    bar = (1 - chain.betas).cumprod(0)
    torch.testing.assert_close(bar, whole.table.alpha[chain.kept] ** 2, rtol=1e-9, atol=0)
    assert torch.equal(chain.table.time, whole.table.time[chain.kept])


@pytest.mark.parametrize("spec", ["", "10", "1"])
@pytest.mark.parametrize("name", DISCRETE)
def test_alpha_and_sigma_fill_the_unit_circle_and_the_neighbours_line_up(name: str, spec: str) -> None:
    t = Chain(SCHEDULES[name](40), respace(40, spec)).table
    for alpha, sigma in ((t.alpha, t.sigma), (t.alpha_to, t.sigma_to)):
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=1e-12, atol=0)
    assert torch.equal(t.alpha_to[1:], t.alpha[:-1]) and torch.equal(t.time_to[1:], t.time[:-1])
    assert t.alpha_to[0] == 1 and t.last[0] == 1 and (t.last[1:] == 0).all()


@pytest.mark.parametrize("spec", ["", "10"])
@pytest.mark.parametrize("name", DISCRETE)
def test_the_posterior_is_bayes_rule(name: str, spec: str) -> None:
    """Condition the joint Gaussian of (x_{t-1}, x_t) given x_0 on x_t."""
    chain = Chain(SCHEDULES[name](40), respace(40, spec))
    t, keep = chain.table, (1 - chain.betas).sqrt()
    cov = keep * t.sigma_to**2
    gain = cov / (keep**2 * t.sigma_to**2 + chain.betas)
    torch.testing.assert_close(t.coef_xt, gain, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(t.coef_x0, t.alpha_to - gain * t.alpha, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(t.log_min.exp()[1:], (t.sigma_to**2 - gain * cov)[1:], rtol=1e-9, atol=1e-12)
    assert t.log_min[0] == t.log_min[1]  # 0 itself has no logarithm
    torch.testing.assert_close(t.log_max.exp(), chain.betas)


@pytest.mark.parametrize("kept", [[0], [17], [39]])
def test_a_chain_of_one_step_works(kept: list[int]) -> None:
    chain = Chain(Cosine(40), kept)
    assert chain.steps == 1 and all(column.isfinite().all() for column in chain.table)
    assert chain.table.coef_x0.item() == pytest.approx(1) and chain.table.coef_xt.item() == 0


@pytest.mark.parametrize(("rescale", "last"), [(True, 975.0), (False, 39.0)])
def test_the_network_sees_the_schedules_step_number_out_of_1000_or_plain(rescale: bool, last: float) -> None:
    for spec in ("", "10"):
        assert Chain(Cosine(40), respace(40, spec), rescale_time=rescale).table.time[-1] == last


def test_a_chain_is_looked_up_by_u_and_walked_from_its_noisy_end() -> None:
    chain = Chain(Cosine(40))
    step = chain(torch.tensor([0.0, 0.999, 5.5 / 40], dtype=torch.float64))
    assert torch.equal(step.sigma, chain.table.sigma[[0, 39, 5]])
    walked = list(chain)
    assert torch.equal(torch.stack([s.sigma for s in walked]), chain.table.sigma.flip(0))
    assert all(s.sigma.ndim == 0 and s.sigma.dtype == torch.float64 for s in walked)


U = torch.linspace(0.001, 0.999, 50, dtype=torch.float64)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_a_continuous_schedule_gets_noisier_and_is_found_again_by_its_ratio(name: str) -> None:
    schedule = SCHEDULES[name]()
    level = schedule(U)
    ratio = level.sigma / level.alpha
    assert (ratio.diff() > 0).all() and all(c.dtype == torch.float64 for c in level)
    torch.testing.assert_close(schedule.u_of(ratio), U)
    assert (schedule.u_of(torch.tensor([0.0, 1e9], dtype=torch.float64)) < 1).all()


@pytest.mark.parametrize("of", [Chain(Cosine(40)), evenly(Flow(), 9), evenly(VE(), 9), Chain(Cosine(40), [3])])
def test_a_step_is_found_again_by_a_ratio_near_its_own(of: Grid) -> None:
    ratio = of.table.sigma / of.table.alpha  # infinity, in pure noise
    for nudge in (0.999, 1.0, 1.001):
        assert torch.equal(of(of.u_of(ratio * nudge)).sigma, of.table.sigma)
    ends = of.u_of(torch.tensor([0.0, math.inf], dtype=torch.float64))
    assert ends.dtype == torch.float64 and torch.equal(of(ends).sigma, of.table.sigma[[0, -1]])


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize("name", CONTINUOUS)
def test_a_walk_ends_at_the_image_and_its_steps_join(name: str, steps: int) -> None:
    t = evenly(SCHEDULES[name](), steps).table
    assert t.alpha_to[0] == 1 and t.sigma_to[0] == 0 and t.last.tolist() == [1.0] + (steps - 1) * [0.0]
    assert torch.equal(t.alpha_to[1:], t.alpha[:-1]) and torch.equal(t.sigma_to[1:], t.sigma[:-1])
    assert (t.log_min[1:] <= t.log_max[1:] + 1e-12).all() and t.log_min[0] == t.log_max[0]
    assert all(column.isfinite().all() for column in t)


def test_flow_starts_at_pure_noise_and_ve_at_the_papers_levels() -> None:
    """Karras et al. 2022, eq. 5, for N = 5."""
    assert evenly(Flow(), 4).table.sigma.tolist() == [0.25, 0.5, 0.75, 1.0]
    ends = [80 ** (1 / 7) + i / 4 * (0.002 ** (1 / 7) - 80 ** (1 / 7)) for i in range(5)]
    grid = evenly(VE(), 5)
    np.testing.assert_allclose(grid.table.sigma.flip(0), [e**7 for e in ends], rtol=1e-12)
    assert grid.start == pytest.approx(80) and evenly(Flow(), 4).start == Chain(Cosine(40)).start == 1.0
    assert evenly(VE(0.1, 50.0), 1).table.sigma.tolist() == pytest.approx([50.0])  # a single step starts at the most noise


@pytest.mark.parametrize("name", CONTINUOUS)
def test_the_posterior_of_a_walk_is_bayes_rule(name: str) -> None:
    t = evenly(SCHEDULES[name](), 9).table
    keep, beta = t.alpha / t.alpha_to, t.sigma**2 - (t.alpha / t.alpha_to * t.sigma_to) ** 2
    cov = keep * t.sigma_to**2
    gain = cov / (keep**2 * t.sigma_to**2 + beta)
    torch.testing.assert_close(t.coef_xt, gain, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(t.coef_x0, t.alpha_to - gain * t.alpha, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(t.log_min.exp()[1:], (t.sigma_to**2 - gain * cov)[1:], rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("ends", [(1.0, 1.0), (2.0, 1.0), (0.0, 80.0)])
def test_ve_refuses_ends_that_are_no_range(ends: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="sigma_min"):
        VE(*ends)


# ---- shifts, the end in pure noise, and where the levels of a grid lie


@pytest.mark.parametrize("name", DISCRETE)
def test_a_shift_moves_log_snr_and_a_terminal_step_is_pure_noise(name: str) -> None:
    whole = SCHEDULES[name](100)
    ratio = [Chain(s).table.sigma / Chain(s).table.alpha for s in (whole, Adjusted(whole, 4.0))]
    torch.testing.assert_close(ratio[1], 4 * ratio[0], rtol=1e-6, atol=0)
    assert torch.equal(Chain(Adjusted(whole)).table.alpha.float(), Chain(whole).table.alpha.float())
    before, after = Chain(whole).table, Chain(Adjusted(whole, zero_terminal=True)).table
    assert after.alpha[-1] == 0 and after.sigma[-1] == 1
    torch.testing.assert_close(after.alpha[0], before.alpha[0])
    kept = after.alpha / before.alpha  # Lin et al.: sqrt(alpha_bar) loses a constant and is stretched
    assert (kept.diff() < 0).all() and torch.isfinite(after.log_max).all()


@pytest.mark.parametrize("schedule", [Flow(), CosineVP(), Sigmoid()])
def test_a_shift_of_a_continuous_schedule_moves_its_levels_and_keeps_their_time(schedule) -> None:
    shifted = Shifted(schedule, 3.0)
    plain, moved = schedule(U), shifted(U)
    torch.testing.assert_close(moved.sigma / moved.alpha, 3 * plain.sigma / plain.alpha)
    torch.testing.assert_close(schedule(moved.time / 1000).sigma, moved.sigma)
    torch.testing.assert_close(shifted.u_of(moved.sigma / moved.alpha), U)
    end = shifted(torch.ones(1, dtype=torch.float64))
    assert end.alpha == 0 and end.sigma == 1


def test_flows_shift_is_the_papers() -> None:
    """Esser et al. 2024, eq. 23: t' = s t / (1 + (s - 1) t)."""
    torch.testing.assert_close(Shifted(Flow(), 3.0)(U).sigma, 3 * U / (1 + 2 * U))


@pytest.mark.parametrize("name", ["cosine_vp", "sigmoid"])
def test_variance_preserving_schedules_fill_the_unit_circle(name: str) -> None:
    level = SCHEDULES[name]()(torch.cat([U, torch.tensor([0.0, 1.0])]))
    torch.testing.assert_close(level.alpha**2 + level.sigma**2, torch.ones(52, dtype=torch.float64), rtol=1e-12, atol=0)
    assert level.alpha[-1] == 0 and level.sigma[-2] == 0


@pytest.mark.parametrize("steps", [1, 2, 5, 18])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_grid_has_the_steps_asked_for_and_begins_at_the_noisy_end(name: str, grid: str, steps: int) -> None:
    row = GRIDS[grid]() if isinstance(GRIDS[grid], type) else GRIDS[grid]
    schedule = Chain(SCHEDULES[name](1000)) if name in DISCRETE else SCHEDULES[name]()
    u = row(schedule, steps)
    assert len(u) == steps and u[-1] == 1 and (u.diff() > 0).all() and u[0] >= 0
    if name in DISCRETE:
        kept = steps_at(u, 1000)
        assert len(set(kept)) == steps and kept == sorted(kept) and kept[-1] == 999
    else:
        assert all(column.isfinite().all() for column in walk(schedule, u).table)


def test_a_karras_grid_of_ve_is_the_papers_and_one_of_a_chain_is_near_it() -> None:
    expected = torch.linspace(0.002 ** (1 / 7), 80 ** (1 / 7), 18, dtype=torch.float64) ** 7
    torch.testing.assert_close(walk(VE(rho=3.0), GRIDS["karras"]()(VE(rho=3.0), 18)).table.sigma, expected)
    chain = Chain(Cosine(4000))
    kept = chain.at(torch.tensor(steps_at(GRIDS["karras"]()(chain, 18), 4000)))
    ends = (chain.table.sigma / chain.table.alpha)[0] ** (1 / 7), 80 ** (1 / 7)  # its own least noise
    wanted = torch.linspace(*map(float, ends), 18, dtype=torch.float64) ** 7
    near = (kept.sigma / kept.alpha)[4:-1] / wanted[4:-1]
    assert (near.log().abs() < 0.1).all()
    even = walk(VE(), GRIDS["logsnr"](VE(), 9)).table.sigma.log().diff()
    torch.testing.assert_close(even, even[:1].expand(8))


def test_steps_that_fall_together_are_parted() -> None:
    assert steps_at(torch.tensor([0.0, 0.0, 0.01, 1.0]), 10) == [0, 1, 2, 9]
    assert steps_at(torch.tensor([0.95, 0.97, 1.0]), 10) == [7, 8, 9]
    with pytest.raises(ValueError, match="at most 2"):
        steps_at(torch.linspace(0, 1, 3), 2)


@pytest.mark.parametrize("of", [Chain(Cosine(40)), evenly(Flow(), 9), evenly(VE(), 9), Chain(Cosine(40), [3, 30])])
def test_a_level_between_steps_has_no_more_noise_than_asked(of: Grid) -> None:
    asked = torch.tensor([0.01, 0.3, 1.0, 30.0], dtype=torch.float64)
    level = of.level(asked)
    found = level.sigma / level.alpha
    assert (found <= asked * (1 + 1e-6))[1:].all() and (found > asked / 2)[1:].all()
    own = of.table.sigma[1] / of.table.alpha[1]
    torch.testing.assert_close(of.level(own).sigma, of.table.sigma[1])
