"""Training: the gradient, the memory of a run, and what it does when things go wrong."""

import json
import os
import signal

import numpy as np
import pytest
import torch

from conftest import SLOW, TINY, flags
from iddpm.data import Order
from iddpm.data.batches import make_batch
from iddpm.errors import UserError
from iddpm.parallel import processes
from iddpm.store import checkpoint
from iddpm.store.log import Logger, Meter, read_rows
from iddpm.store.weights import read_weights
from iddpm.training.ema import EMA
from iddpm.training.loop import train
from iddpm.training.state import LossScale, TrainState, initialise
from iddpm.training.step import learning_rate, method_of, train_step
from iddpm.training.trial import dry_run

CPU = torch.device("cpu")
FLOW = dict(noise_schedule="flow", parametrization="flow", weighting="flow", learn_sigma=False, solver="ddim", steps=6)
EDM = dict(noise_schedule="ve", parametrization="edm", weighting="edm", learn_sigma=False, steps=6)


def one_step(config, data, poison=1.0):
    state = TrainState(config, CPU)
    torch.manual_seed(1)
    for p in state.params.values():  # the zero-initialised layers would hide the rest of the gradient
        torch.nn.init.normal_(p, std=0.05)
    batch = make_batch(config, data, Order(len(data), 0), 0, 0)
    batch = batch._replace(x0=batch.x0 * poison)
    before = {k: p.detach().clone() for k, p in state.params.items()}
    train_step(state, config, method_of(config, state.net), batch, Meter())
    return state, before


@pytest.mark.parametrize("micro", [1, 2, 4, 5])
def test_any_microbatch_gives_the_gradient_of_the_whole_batch(config, data, micro):
    whole, _ = one_step(config, data)
    split, _ = one_step(config.updated(dict(microbatch=micro)), data)
    for name, p in whole.params.items():
        torch.testing.assert_close(split.params[name].grad, p.grad, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize(("law", "exchanges"), [("uniform", 0), ("stratified", 0), ("loss-second-moment", 1)])
@pytest.mark.parametrize(("weighting", "more"), [("uniform", 0), ("uncertainty", 1)])
def test_processes_exchange_losses_only_for_what_reads_them(config, data, monkeypatch, law, exchanges, weighting, more):
    asked = []
    for name in ("sum_", "gather", "count", "every"):
        real = getattr(processes, name)
        monkeypatch.setattr(processes, name, lambda *args, real=real: (asked.append(args), real(*args))[1])
    state, _ = one_step(config.updated(dict(schedule_sampler=law, weighting=weighting)), data)
    assert len(asked) == exchanges + more and not state.skipped


def assert_same_checkpoint(a, b):
    for kind in ("weights", "optimizer"):
        assert getattr(a, kind).keys() == getattr(b, kind).keys()
        for name, tensor in getattr(a, kind).items():
            assert torch.equal(tensor, getattr(b, kind)[name]), name
    for rate, average in a.averages.items():
        assert all(torch.equal(t, b.averages[rate][name]) for name, t in average.items())
    assert dict(a.state, seconds=0) == dict(b.state, seconds=0)  # the time that each has taken


@pytest.mark.parametrize(
    "settings",
    [
        dict(dropout=0.2, random_flip=True),
        SLOW(dict(objective="vlb", schedule_sampler="loss-second-moment", diffusion_steps=4, sampling_steps="4", steps=30)),
        dict(precision="bf16", microbatch=4, schedule_sampler="stratified"),
        SLOW(dict(FLOW, schedule_sampler="logit-normal")),
        SLOW(dict(EDM, schedule_sampler="lognormal", solver="dpmpp_2m")),
        dict(FLOW, schedule_sampler="loss-second-moment"),
        dict(EDM, schedule_sampler="lognormal", weighting="uncertainty", solver="dpmpp_2m"),
    ],
    ids=["dropout and flips", "loss-aware law", "bf16 in microbatches", "flow", "edm", "loss-aware law of a flow", "uncertainty"],
)
def test_ten_steps_equal_five_and_five_bit_for_bit(config, data, tmp_path, settings):
    config = config.updated({"steps": 10, **settings})
    once = train(config, data, tmp_path / "once")
    half = config.updated(dict(steps=config.train.steps // 2))
    train(half, data, tmp_path / "twice")
    assert_same_checkpoint(checkpoint.load(train(config, data, tmp_path / "twice")), checkpoint.load(once))
    assert [r["step"] for r in read_rows(tmp_path / "twice")] == list(range(1, config.train.steps + 1))


def test_a_loss_aware_law_warms_up_and_is_restored(config, data, tmp_path):
    settings = dict(objective="vlb", schedule_sampler="loss-second-moment", diffusion_steps=2, sampling_steps="2", steps=30)
    config = config.updated(settings)
    train(config, data, tmp_path)
    state = TrainState(config, CPU)
    assert not state.law.warm()
    state.restore(checkpoint.load(checkpoint.newest(tmp_path)[0]), config)
    assert state.law.warm()


def test_samples_drawn_on_the_way_do_not_disturb_the_run(config, data, tmp_path):
    plain = train(config.updated(dict(dropout=0.1)), data, tmp_path / "plain")
    watched = train(config.updated(dict(dropout=0.1, sample_interval=2)), data, tmp_path / "watched")
    assert_same_checkpoint(checkpoint.load(plain), checkpoint.load(watched))
    assert sorted(p.name for p in (tmp_path / "watched" / "samples").iterdir()) == ["step_00000002.png", "step_00000004.png"]


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(config, data):
    state, before = one_step(config, data, poison=torch.nan)
    assert (state.step, state.skipped, state.skipped_in_a_row) == (1, 1, 1)
    assert all(torch.equal(p, before[k]) for k, p in state.params.items())
    assert state.ema.updates == 0


def test_fifty_bad_steps_in_a_row_end_the_run(config, data, tmp_path):
    with pytest.raises(UserError, match="50 steps in a row"):
        train(config.updated(dict(steps=80, lr=1e30, log_interval=40)), data, tmp_path)


def test_the_rate_is_warmed_up_and_annealed(config):
    config = config.updated(dict(lr=1.0, lr_warmup_steps=4, lr_anneal_steps=-1, steps=10))
    assert [learning_rate(config, s, 10) for s in (0, 1, 3, 5, 9)] == pytest.approx([0.25, 0.45, 0.7, 0.5, 0.1])
    assert learning_rate(config.updated(dict(lr_anneal_steps=0)), 9, 10) == 1.0


def test_averages_follow_their_closed_form():
    w = torch.zeros(1)
    ema = EMA({"w": w}, (0.5, 0.9), warmup=False)
    warm = EMA({"w": w}, (0.9999,), warmup=True)
    w += 1
    for _ in range(3):
        ema.update()
        warm.update()
    assert ema.averages[0.5]["w"].item() == pytest.approx(1 - 0.5**3)
    assert ema.averages[0.9]["w"].item() == pytest.approx(1 - 0.9**3)
    assert warm.averages[0.9999]["w"].item() == pytest.approx(1 - (2 / 11) * (3 / 12) * (4 / 13))


def test_the_loss_scale_grows_halves_and_has_a_floor():
    scale = LossScale(True, growth=0.5)
    scale.update(True)
    assert scale.factor == 2**20.5
    for _ in range(100):
        scale.update(False)
    assert scale.factor == 1.0


def test_fp16_skips_overflows_and_then_trains(config, data, tmp_path):
    state, _ = one_step(config.updated(dict(precision="fp16")), data)
    assert state.scale.lg in (19.0, 20.001)
    folder = train(config.updated(dict(precision="fp16")), data, tmp_path)
    assert checkpoint.load(folder).state["lg_loss_scale"] != 0


def test_the_log_holds_terms_by_quartile_rates_and_speed(run):
    row = read_rows(run)[-1]
    assert {"loss", "mse", "vb", "grad_norm", "lr", "images_per_second", "step", "images"} <= row.keys()
    for name in ("loss", "mse", "vb"):
        assert {f"{name}_q{q}" for q in range(4)} & row.keys()
    header, *rows = (run / "progress.csv").read_text().splitlines()
    assert set(row) <= set(header.split(","))
    assert len(rows) == 4


def test_quartiles_are_means_over_their_images():
    meter = Meter()
    meter.add({"loss": torch.tensor([1.0, 2.0, 6.0])}, torch.tensor([0, 3, 3]))
    meter.add({"grad_norm": torch.tensor([4.0])})
    assert meter.read() == {"loss": 3.0, "loss_q0": 1.0, "loss_q3": 4.0, "grad_norm": 4.0}


def test_a_resumed_log_drops_rows_past_its_checkpoint(tmp_path):
    logger = Logger(tmp_path)
    for step in (1, 2, 3):
        logger.row(step=step, loss=0.5)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # a crash cut this line short
    Logger(tmp_path, step=2).row(step=3, loss=0.25, skipped=1)
    assert [(r["step"], r["loss"]) for r in read_rows(tmp_path)] == [(1, 0.5), (2, 0.5), (3, 0.25)]
    assert (tmp_path / "progress.csv").read_text().split() == ["step,loss,skipped", "1,0.5,", "2,0.5,", "3,0.25,1"]


def test_tensorboard_events_are_written(config, data, tmp_path):
    train(config.updated(dict(log_to="tensorboard")), data, tmp_path)
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_a_dry_run_tells_and_writes_nothing(config, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = []
    dry_run(config, data, said.append)
    text = "\n".join(said)
    assert all(word in text for word in ("weights", "one step", "images (6, 1, 8, 8)", "MiB"))
    assert not list(tmp_path.iterdir())


def test_fine_tuning_takes_what_fits_and_names_what_does_not(config, run):
    wider = TrainState(config.updated(dict(num_classes=5)), CPU)
    weights = read_weights(run)
    with pytest.raises(UserError, match=r"label_emb\.weight: --init_reset"):
        initialise(wider, weights, reset=False)
    assert initialise(wider, weights, reset=True) == ["label_emb.weight"]
    name = "time_embed.0.weight"
    assert torch.equal(wider.params[name], weights.tensors[name])
    assert torch.equal(wider.ema.averages[0.9][name], weights.tensors[name])


# ---- real processes


def test_ctrl_c_saves_and_the_same_command_goes_on(launcher, pictures, tmp_path):
    command, said, err = ("train", pictures, "--run", tmp_path / "r"), tmp_path / "out", tmp_path / "err"
    process = launcher.start(*command, *flags(**dict(TINY, steps=100_000, log_interval=5)), said=said, err=err)
    process.until("step 5/")
    process.kill(number=signal.SIGINT)
    assert process.wait() == [75]
    answer, saved = err.read_text().strip().splitlines()
    assert "finishing this step, then saving" in answer and "all is saved" in saved
    step = checkpoint.load(checkpoint.newest(tmp_path / "r")[0]).step
    out = launcher.start("train", "--run", tmp_path / "r", "--steps", step + 3, "--lr", "0.0005", said=said).succeed()
    assert f"resuming {tmp_path / 'r'} at step {step}" in out
    rows = read_rows(tmp_path / "r")
    assert rows[-1]["step"] == step + 3
    assert rows[-1]["lr"] == 0.0005
    assert any("changed on resume: lr 0.001 -> 0.0005" in r.get("event", "") for r in rows)


def test_a_stop_is_not_kept_waiting_by_a_sheet_of_samples(config, data, tmp_path, monkeypatch):
    from iddpm.training import loop, preview

    draw, begun = preview.draw_sheet, []

    def stops(*args):
        begun.append(args)
        os.kill(os.getpid(), signal.SIGTERM)
        draw(*args)
        raise AssertionError("drawn to its end")

    monkeypatch.setattr(preview, "draw_sheet", stops)
    said = []
    with pytest.raises(loop.Stopped, match="stopped at step 3; all is saved"):
        train(config.updated(dict(steps=9, sample_interval=2)), data, tmp_path / "r", say=said.append)
    assert len(begun) == 1 and "samples: none of this step: the run is to stop" in said
    assert checkpoint.newest(tmp_path / "r")[0].name == "step_00000003" and not list((tmp_path / "r" / "samples").iterdir())
    monkeypatch.undo()
    train(config.updated(dict(steps=9, sample_interval=2)), data, tmp_path / "r", say=said.append)
    assert [p.name for p in sorted((tmp_path / "r" / "samples").iterdir())] == [f"step_{k:08d}.png" for k in (4, 6, 8, 9)]


def test_a_full_disk_leaves_the_last_checkpoint_whole(launcher, pictures, tmp_path):
    command, err = ("train", pictures, "--run", tmp_path / "r", *flags(**dict(TINY, steps=2))), tmp_path / "err"
    launcher.start(*command, said=tmp_path / "said").succeed()
    kept = checkpoint.newest(tmp_path / "r")[0]
    small = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); entry()"  # less than weights need
    full = launcher.start(*command, "--steps", 4, said=tmp_path / "said", err=err, program=small)
    assert full.wait() == [2]
    assert len(err.read_text().strip().splitlines()) == 1
    assert checkpoint.newest(tmp_path / "r") == (kept, [])
    assert checkpoint.verify(kept) is None
    assert [p.name for p in (tmp_path / "r" / "checkpoints").iterdir()] == [kept.name]


def test_config_json_of_a_run_reads_back(run, config):
    from iddpm.config import Config

    assert Config.from_json((run / "config.json").read_text()) == config
    assert json.loads((run / "config.json").read_text())["data"]["classes"] == ["across", "disc", "down"]


def test_the_initial_weights_come_from_the_seed(config):
    one, same, other = (TrainState(config.updated(dict(seed=s)), CPU).params["input_blocks.0.0.weight"] for s in (3, 3, 4))
    assert torch.equal(one, same)
    assert not np.allclose(one.detach(), other.detach())
