"""Every named method from end to end: trained, stopped and gone on with, sampled, measured; two of them on two processes."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import SLOW, TINY, diagonal, flags
from iddpm import build
from iddpm.cli.main import main
from iddpm.config import Config, Model, fields_of
from iddpm.config.choices import choices
from iddpm.data import Order
from iddpm.data.batches import make_batch, open_data
from iddpm.store.log import read_rows

BASE = dict(TINY, batch_size=4, ema_rate="0.9") | dict(learn_sigma=False)
CHAIN = dict(diffusion_steps=20, noise_schedule="cosine")
METHODS: dict[str, dict] = {
    "ddpm": dict(CHAIN, noise_schedule="linear"),
    "iddpm hybrid": dict(CHAIN, learn_sigma=True),
    "iddpm vlb": dict(CHAIN, learn_sigma=True, objective="vlb", schedule_sampler="loss-second-moment"),
    "v": dict(CHAIN, parametrization="v", schedule_sampler="stratified", solver="ddim", eta=0.3),
    "x0": dict(CHAIN, parametrization="x0", weighting="flow", solver="dpmpp_2m"),
    "edm": dict(
        noise_schedule="ve", parametrization="edm", schedule_sampler="lognormal", weighting="edm", sigma_data=0.6, sigma_max=40.0,
        solver="dpmpp_2m",
    ),
    "flow": dict(noise_schedule="flow", parametrization="flow", schedule_sampler="logit-normal", weighting="flow", solver="ddim"),
    "v, continuous": dict(
        noise_schedule="cosine_vp", parametrization="v", weighting="sigmoid", snr_shift=2.0, solver="unipc", grid="logsnr",
        class_cond=True, class_dropout=0.3, guidance=2.0, guidance_kind="apg",
    ),
    "v to the end of noise": dict(
        CHAIN, parametrization="v", zero_terminal_snr=True, snr_shift=2.0, weighting="min_snr", noise_candidates=3, solver="ddim",
        grid="karras",
    ),
    "jit": dict(
        noise_schedule="flow", parametrization="x0", weighting="flow", schedule_sampler="logit-normal", solver="heun",
        network="dit", patch_size=2, width=32, depth=2, heads=2,
    ),
    "flow, guided": dict(
        noise_schedule="flow", parametrization="flow", class_cond=True, class_dropout=0.3, trained_guidance=3.0, guidance=2.0,
        solver="ddim",
    ),
    "consistency": dict(
        noise_schedule="ve", parametrization="edm", schedule_sampler="lognormal", objective="consistency", gap_halvings=1,
        dropout=0.1,
        solver="consistency", grid="karras",
    ),
    "path": dict(
        CHAIN, parametrization="v", objective="path", path_steps=4, init_from="v", solver="consistency", sampling_steps=1,
    ),
    "flow, looking": dict(noise_schedule="flow", parametrization="x0", weighting="flow", schedule_sampler="loss-second-moment"),
}  # fmt: skip


UNET = {k for k in BASE if fields_of(Model).get(k) and "network" in fields_of(Model)[k].only}


def settings(name: str) -> dict:
    of_others = (*CHAIN, *(UNET if "network" in METHODS[name] else ()))
    return {k: v for k, v in BASE.items() if k not in of_others} | METHODS[name]


def tensors(run, step: int) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"step_{step:08d}"
    return {f"{file.name}:{k}": v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.fixture(scope="module")
def trained(made_once, pictures):
    """A run of each method of four steps; and another that was stopped after two."""

    def train(root):
        for name in METHODS:
            chosen = settings(name)
            if "init_from" in chosen:
                chosen["init_from"] = root / chosen["init_from"] / "whole"
            for run, ends in (("whole", [4]), ("parted", [2, 4])):
                for steps in ends:
                    line = flags(**chosen | dict(steps=steps))
                    assert main(["train", str(pictures), "--run", str(root / name / run), *line]) == 0

    return made_once("methods", train)


@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_was_stopped_ends_with_the_same_bits(trained, name):
    whole, parted = (tensors(trained / name / run, 4) for run in ("whole", "parted"))
    assert whole.keys() == parted.keys() and len(whole) > 50
    assert all(torch.equal(whole[k], parted[k]) for k in whole)
    losses = [[row["loss"] for row in read_rows(trained / name / run) if "loss" in row] for run in ("whole", "parted")]
    assert losses[0] == losses[1] and np.isfinite(losses[0]).all()


WALKS = [name for name in choices("solver") if name != "consistency"]
EVERY_SOLVER = ("iddpm hybrid", "edm", "flow", "v, continuous")  # the others with their own


@pytest.mark.parametrize(("name", "solver"), [*((name, "") for name in METHODS), *diagonal(EVERY_SOLVER, WALKS)])
def test_it_draws_with_every_solver(trained, name, solver, tmp_path):
    chosen = ["--solver", solver] if solver else []
    command = ["sample", str(trained / name / "whole"), "--num_samples", "2", "--sampling_steps", "4", "--device", "cpu", *chosen]
    assert main([*command, "--out", str(tmp_path / "x.npz")]) == 0
    with np.load(tmp_path / "x.npz") as file:
        images = file["arr_0"]
    assert images.shape == (2, 8, 8, 1) and images.std() > 0


def test_guided_images_are_others_and_the_weak_model_may_be_an_earlier_checkpoint(trained, tmp_path, capsys):
    """Each kind of guidance draws from the trained run; what says nothing is refused."""
    run, found = trained / "v, continuous" / "parted", {}
    command = ["sample", str(run), "--num_samples", "3", "--sampling_steps", "4", "--device", "cpu"]
    early = str(run / "checkpoints" / "step_00000002")
    kinds = {
        "plain": ["--guidance", "1"],
        "cfg": ["--guidance", "60", "--guidance_kind", "cfg"],
        "apg": ["--guidance", "60", "--guidance_kind", "apg", "--apg_norm", "0.001"],
        "zero": ["--guidance", "60", "--guidance_kind", "cfg_zero"],
        "rescaled": ["--guidance", "60", "--guidance_rescale", "0.7"],
        "interval": ["--guidance", "60", "--guidance_low", "0.01", "--guidance_high", "5"],
        "thresholded": ["--guidance", "1000", "--dynamic_threshold", "0.9"],
        "auto": ["--guidance", "1", "--autoguide", early, "--autoguidance", "60"],
        "both": ["--guidance", "60", "--autoguide", early, "--autoguidance", "60"],
        "first known": ["--guidance", "1", "--skip_first", "True"],
    }
    for kind, line in kinds.items():
        assert main([*command, *line, "--out", str(tmp_path / f"{kind}.npz")]) == 0, kind
        with np.load(tmp_path / f"{kind}.npz") as file:
            found[kind] = file["arr_0"].tobytes()
    same = [(a, b) for a in found for b in found if a < b and found[a] == found[b]]
    assert not same
    for line in (["--guidance", "1", "--guidance_rescale", "0.5"], ["--autoguidance", "2"], ["--autoguide", str(run)]):
        assert main([*command, *line, "--out", str(tmp_path / "no.npz")]) == 2, line
    assert "a class" not in capsys.readouterr().err


def test_a_share_of_the_classes_is_dropped_the_same_on_any_process_and_not_in_validation(pictures):
    settings = METHODS["v, continuous"] | dict(TINY, learn_sigma=False, batch_size=400, class_dropout=0.3)
    data, config = open_data(Config().updated(settings | dict(path=str(pictures), num_classes=3)))
    order = Order(len(data), 0)
    y = make_batch(config, data, order, 1, 0).cond["y"]
    assert 0.2 < (y == 3).float().mean() < 0.4
    assert (make_batch(config, data, order, 1, 0, train=False).cond["y"] < 3).all()
    assert build.network(config).label_emb.num_embeddings == 4


def test_the_nearest_of_several_noises_is_taken(pictures):
    settings = METHODS["ddpm"] | dict(TINY, learn_sigma=False, path=str(pictures), batch_size=16)
    data, one = open_data(Config().updated(settings))
    few = [make_batch(one.updated(dict(noise_candidates=k)), data, Order(len(data), 0), 1, 0) for k in (1, 2, 8)]
    far = torch.stack([(b.eps - b.x0).square().flatten(1).sum(1) for b in few])
    assert (far.diff(dim=0) <= 0).all() and (far[2] < far[0]).float().mean() > 0.7
    assert abs(few[2].eps.mean()) < 0.15  # still about the noise it was: of 8 candidates, not of thousands


def test_trained_guidance_teaches_its_scales_and_leaves_images_without_a_class_at_1(pictures):
    settings = METHODS["flow, guided"] | dict(TINY, learn_sigma=False, batch_size=400, path=str(pictures))
    config = Config().updated({k: v for k, v in settings.items() if k not in CHAIN})
    data, config = open_data(config)
    cond = make_batch(config, data, Order(len(data), 0), 0, 0).cond
    scale, dropped = cond["scale"], cond["y"] == config.model.num_classes
    assert (scale[dropped] == 1).all() and 80 < dropped.sum() < 160
    assert 0.4 < (scale[~dropped] == 1).float().mean() < 0.6
    assert scale.max() <= 3 and scale[scale > 1].mean().item() == pytest.approx(2, abs=0.2)
    assert "scale" not in make_batch(config, data, Order(len(data), 0), 0, 0, train=False).cond


@pytest.mark.parametrize(("flag", "line"), [
    (["--guidance", "4"], "learned guidance from 1 to 3"), (["--guidance", "0.5"], "--guidance_kind cfg"),
    (["--guidance", "2", "--guidance_rescale", "0.5"], "--guidance_rescale needs"),
])  # fmt: skip
def test_what_a_network_did_not_learn_of_guidance_is_refused(trained, flag, line, tmp_path, capsys):
    run = str(trained / "flow, guided" / "whole")
    assert main(["sample", run, "--num_samples", "2", "--out", str(tmp_path / "x.npz"), *flag]) == 2
    assert line in capsys.readouterr().err
    assert main(["sample", run, "--num_samples", "2", "--out", str(tmp_path / "x.npz"), *flag, "--guidance_kind", "cfg"]) == 0


def test_a_trained_model_is_tuned_to_leap_and_what_needs_a_denoiser_is_refused(trained, pictures, tmp_path, capsys):
    teacher, run = str(trained / "edm" / "whole"), tmp_path / "leaps"
    command = ["train", str(pictures), "--init_from", teacher, "--objective", "consistency", "--run", str(run)]
    assert main([*command, "--images", "0", "--device", "cpu"]) == 2 and "--steps N" in capsys.readouterr().err
    assert main([*command, "--steps", "2", "--batch_size", "4", "--device", "cpu"]) == 0
    config = Config.from_json((run / "config.json").read_text())
    assert (config.sample.solver, config.sample.sampling_steps) == ("consistency", "2")
    assert (config.diffusion.weighting, config.diffusion.noise_schedule) == ("uniform", "ve")
    assert config.numbers()["sigma_data"] == 0.6 and config.numbers()["gap_halvings"] == 4
    for steps in ("1", "2"):
        assert (
            main(["sample", str(run), "--num_samples", "2", "--sampling_steps", steps, "--out", str(tmp_path / f"{steps}.npz")])
            == 0
        )
    capsys.readouterr()
    for verb, line in (
        (["sample", str(run), "--solver", "ddim"], "take consistency"),
        (["sample", str(run), "--skip_first"], "makes the image"),
        (["sample", str(run), "--find_grid", "3", "--grid", "found_path"], "it was tuned from"),
        (["sample", teacher, "--solver", "consistency"], "--init_from"),
        (["nll", str(run), str(pictures)], "it was tuned from"),
        (["nll", str(run), str(pictures), "--ode"], "it was tuned from"),
        (["edit", str(run), "--seeds", "1,2", "--solver", "consistency"], "--solver"),
    ):
        assert main([*verb, "--device", "cpu"]) == 2
        assert line in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("consistency", "path")])
def test_its_bits_per_dimension_are_finite_and_no_wonder(trained, name, pictures, tmp_path):
    """Of a network that has hardly learned: not below what 8-bit images can be, nor beyond a uniform guess by far."""
    run, out = trained / name / "whole", tmp_path / "nll.json"
    command = [
        "nll",
        str(run),
        str(pictures),
        "--num_samples",
        "4",
        "--sampling_steps",
        "8",
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    assert main(command) == 0
    assert 0.5 < json.loads(out.read_text())["bits_per_dim"] < 60


@pytest.mark.parametrize(("name", "by"), [SLOW("flow", "found_path"), ("v", "found_bound"), SLOW("v, continuous", "found_path")])
def test_a_grid_that_was_found_is_kept_and_drawn_with(trained, name, by, tmp_path, capsys):
    command = ["sample", str(trained / name / "parted"), "--device", "cpu", "--grid", by]
    drawn = [*command, "--solver", "ddim", "--num_samples", "2", "--out", str(tmp_path / "x.npz"), "--sampling_steps"]
    assert main([*drawn, "5"]) == 2 and "--find_grid 5" in capsys.readouterr().err
    assert main([*command, "--find_grid", "5"]) == 0
    assert main([*drawn, "5"]) == 0 and main([*drawn, "4"]) == 2
    (u,) = json.loads((trained / name / "parted" / "grids.json").read_text())[by].values()
    assert len(u) == 5 and u == sorted(set(u)) and u[-1] == 1
    for idle in (["--sampling_steps", "5"], ["--out", "x.png"], ["--num_samples", "2"], ["--solver", "heun"]):
        assert main([*command, "--find_grid", "5", *idle]) == 2
    assert main(["train", "x", "--steps", "1", "--grid", by]) == 2


def test_a_bound_needs_no_steps_for_a_solver_and_says_its_grid(trained, pictures, tmp_path):
    """Of a run whose solver reads three: a chain of one step is measured, and on another grid it is another job."""
    run, out = trained / "v, continuous" / "whole", tmp_path / "nll.json"
    command = ["nll", str(run), str(pictures), "--num_samples", "2", "--device", "cpu", "--out", str(out), "--sampling_steps"]
    assert main([*command, "1"]) == 0
    found = []
    for grid in ("uniform", "karras"):
        assert main([*command, "4", "--grid", grid]) == 0
        found.append(json.loads(out.read_text())["bits_per_dim"])
        figures = json.loads((tmp_path / "metrics.json").read_text())
        assert grid in json.dumps(figures)
    assert found[0] != found[1]


@pytest.mark.parametrize(("name", "line"), [
    ("edm", ["--grid", "karras", "--trace", "hutchinson"]), SLOW("flow", []), SLOW("v", ["--dequantization", "uniform"]),
    SLOW("iddpm hybrid", []),
])  # fmt: skip
def test_the_likelihood_by_the_ode_says_how_it_was_found(trained, name, line, pictures, tmp_path, capsys):
    out = tmp_path / "ode.json"
    command = ["nll", str(trained / name / "whole"), str(pictures), "--num_samples", "3", "--device", "cpu", "--out", str(out)]
    assert main([*command, "--ode", "True", "--sampling_steps", "8", *line]) == 0
    found = json.loads(out.read_text())
    assert 0.5 < found["bits_per_dim"] < 80 and found["steps"] == 8 and len(found["per_image"]) == found["images"] == 3
    assert found["trace"] == ("hutchinson" if "hutchinson" in line else "exact") and found["trace"] in capsys.readouterr().out
    assert found["dequantization"] == ("uniform" if "uniform" in line else "truncated_normal")
    assert main([*command, "--trace", "exact"]) == 2 and main([*command, "--ode", "True", "--curve", "5,8"]) == 2


@pytest.mark.parametrize("name", ["flow", SLOW("edm")])
def test_two_processes_train_what_one_does(launcher, trained, name, pictures, tmp_path):
    line = flags(**settings(name))
    launcher.start("train", pictures, "--run", tmp_path / "two", *line, said=tmp_path / "said", processes=2).succeed()
    one, two = tensors(trained / name / "whole", 4), tensors(tmp_path / "two", 4)
    assert one.keys() == two.keys()
    for a, b in zip(read_rows(trained / name / "whole"), read_rows(tmp_path / "two")):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
    close = [torch.allclose(one[k].double(), two[k].double(), rtol=0, atol=2e-3) for k in one]  # Adam's steps are 1e-3 each
    assert all(close)


@pytest.mark.parametrize(("name", "drawn"), [("flow", "fixed_small"), ("edm", "fixed_small"), ("ddpm", "fixed_large")])
def test_few_large_steps_are_drawn_with_the_posteriors_variance_and_bounded_with_betas(name, drawn):
    config = Config().updated(METHODS[name])
    assert build.sampling_denoiser(config, None).variance.__name__ == drawn
    assert build.bound_denoiser(config, None).variance.__name__ == "fixed_large"
