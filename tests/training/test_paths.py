"""What --objective path learns: the points of the paths that the weights of a run's beginning walk."""

import pytest
import torch

from conftest import TINY, flags, torchrun
from iddpm import build, fit
from iddpm.cli.main import main
from iddpm.config import Config, check
from iddpm.diffusion.denoiser import wide
from iddpm.diffusion.solvers import Dpmpp2M
from iddpm.errors import UserError
from iddpm.store.log import read_rows
from iddpm.training.paths import Paths

CPU, LEVELS = torch.device("cpu"), 4
LEAPS = dict(objective="path", path_steps=LEVELS, solver="consistency", sampling_steps="1", init_from="teacher")
KINDS = {
    "chain": dict(parametrization="v"),
    "flow": dict(noise_schedule="flow", parametrization="flow"),
    "ve": dict(noise_schedule="ve", parametrization="edm"),
}


def config_of(kind: str, **more: object) -> Config:
    flat = {k: v for k, v in TINY.items() if kind == "chain" or k not in ("diffusion_steps", "noise_schedule")}
    return Config().updated(flat | LEAPS | dict(learn_sigma=False) | KINDS[kind] | more)


def paths_of(config: Config) -> Paths:
    torch.manual_seed(0)
    paths = Paths(config, CPU, LEVELS)
    with torch.no_grad():
        for p in paths.net.parameters():  # or its last layer says nothing
            p.copy_(torch.randn_like(p) * 0.05)
    return paths


@pytest.mark.parametrize("kind", KINDS)
def test_a_place_comes_to_every_point_of_one_path_of_the_solver(kind: str) -> None:
    config = config_of(kind)
    paths, schedule = paths_of(config), build.schedule(config)
    found: list[dict[float, tuple]] = [{} for _ in range(6)]
    for step in range(LEVELS, 2 * LEVELS):
        batch, u = paths(step)
        level = schedule(u)
        alpha, sigma = wide((level.alpha, level.sigma), batch.x0)
        for k, xt in enumerate(alpha * batch.x0 + sigma * batch.eps):
            found[k][float(level.sigma[k] / level.alpha[k])] = xt, batch.x0[k]
    denoise = build.drawing(paths.config, paths.net, {})
    for place in found:
        assert len(place) == LEVELS, "each level once"
        at = [place[ratio][0] for ratio in sorted(place, reverse=True)]
        ends = [end for _, end in place.values()]
        assert all(torch.equal(end, ends[0]) for end in ends)
        with torch.no_grad():
            walked = [x for x, _ in Dpmpp2M()(denoise, at[0][None], paths.grid, None)]
        for mine, theirs in zip([*at[1:], ends[0]], walked, strict=True):
            torch.testing.assert_close(mine, theirs[0], rtol=1e-3, atol=1e-3)  # x_t goes by way of x0 and eps


def test_places_have_paths_of_their_own_and_blocks_others() -> None:
    paths = paths_of(config_of("flow", class_cond=True, num_classes=3, classes=("a", "b", "c"), class_dropout=0.5))
    (first, _), (same, _), (other, _) = (paths(step) for step in (0, 1, LEVELS))
    assert torch.equal(first.x0, same.x0) and not torch.equal(first.x0, other.x0)
    assert len({tuple(x.flatten().tolist()) for x in first.x0}) == 6
    seen = torch.cat([paths(step)[0].cond["y"] for step in range(0, 40 * LEVELS, LEVELS)]).bincount(minlength=4) / 240
    torch.testing.assert_close(seen, torch.tensor([1 / 6, 1 / 6, 1 / 6, 1 / 2]), rtol=0, atol=0.12)


def test_the_loss_is_nothing_where_the_network_leaps_to_the_ends() -> None:
    config = config_of("flow")
    paths, loss, schedule = paths_of(config), build.objective(config), build.schedule(config)
    batch, u = paths(0)

    def leap(x: torch.Tensor, t: torch.Tensor, off: float = 0.0) -> torch.Tensor:
        return (x - batch.x0 - off) / wide((schedule(u).sigma,), x)[0]  # the velocity whose x0 is the end

    exact = loss(build.denoiser(config, leap), schedule, batch.x0, batch.eps, u)
    missed = loss(build.denoiser(config, lambda x, t: leap(x, t, 0.1)), schedule, batch.x0, batch.eps, u)
    assert exact["mse"].max() < 1e-9 and exact["loss"].max() < 1e-5
    torch.testing.assert_close(missed["mse"], torch.full((6,), 0.01), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (dict(init_from=""), "--init_from RUN"),
        (dict(noise_candidates=4), "--noise_candidates has no part"),
        (dict(validation="5%"), "--validation has no part"),
        (dict(schedule_sampler="loss-second-moment"), "--schedule_sampler has no part"),
        (dict(task="enlarge", small_size="4"), "take --objective consistency"),
    ],
)
def test_what_has_no_part_in_it_is_refused(more: dict, line: str) -> None:
    with pytest.raises(UserError, match=line):
        fit.require_fit(check(config_of("flow", **more)))


def test_two_processes_learn_the_paths_of_one(run_of_v, pictures, tmp_path) -> None:
    settings = flags(objective="path", path_steps=4, steps=6, batch_size=6, log_interval=1, save_interval=100, sample_interval=0)
    words = ["train", str(pictures), "--init_from", str(run_of_v), *settings, "--device", "cpu"]
    assert main([*words, "--run", str(tmp_path / "one")]) == 0
    process = torchrun(2, *words, "--run", tmp_path / "two")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err

    one, two = ([row["loss"] for row in read_rows(tmp_path / name) if "loss" in row] for name in ("one", "two"))
    assert len(one) == 6 and one == pytest.approx(two, rel=1e-4)


@pytest.fixture(scope="module")
def run_of_v(pictures, tmp_path_factory):
    """A run of a model of v, hardly trained."""
    run = tmp_path_factory.mktemp("teacher") / "run"
    settings = {k: v for k, v in TINY.items() if k != "device"} | dict(learn_sigma=False, parametrization="v", steps=2)
    settings |= dict(augment=0.5, noise_candidates=2, validation="20%", schedule_sampler="loss-second-moment")  # of images alone
    assert main(["train", str(pictures), "--run", str(run), *flags(**settings), "--device", "cpu"]) == 0
    return run
