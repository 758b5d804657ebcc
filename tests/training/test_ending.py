"""How a run ends: the decay of its rate, by steps or by time; --finish; and what it takes to go on after all."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import campaign
import iddpm.cli.train
import iddpm.training.start
from conftest import TINY, flags
from iddpm.cli.main import main
from iddpm.config import Config, check, seconds_of
from iddpm.errors import UserError
from iddpm.store import checkpoint
from iddpm.store.files import step_dirs
from iddpm.store.log import read_rows
from iddpm.store.weights import read_weights
from iddpm.training import decayed, ending, loop, preview
from iddpm.training.state import TrainState

RUN = {k: v for k, v in TINY.items() if k != "steps"} | dict(num_channels=8, num_heads=1, log_interval=1, keep=1)


class Clock:
    """A clock on which a step of training takes one second, a sheet of samples two, and nothing else any time."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for module in (ending, iddpm.training.start, iddpm.cli.train):
        monkeypatch.setattr(module, "time", clock)
    step, sheet = loop.train_step, preview.sheet

    def train_step(*args):
        step(*args)
        clock.now += 1

    def slow_sheet(*args):
        clock.now += 2
        return sheet(*args)

    monkeypatch.setattr(loop, "train_step", train_step)
    monkeypatch.setattr(preview, "sheet", slow_sheet)
    monkeypatch.setattr(preview, "sheet_seconds", lambda *args: 2.0)
    return clock


def train(pictures: Path, run: Path, *more: object, **settings: object) -> int:
    return main(["train", str(pictures), "--run", str(run), *map(str, more), *flags(**RUN | settings)])


def stop_at(monkeypatch, step: int) -> None:
    """Ask this process to stop once a run has taken so many steps."""
    take = loop.train_step

    def stopping(state, *rest):
        take(state, *rest)
        if state.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "train_step", stopping)


def rates(run: Path) -> list[float]:
    return [row["lr"] for row in read_rows(run) if "lr" in row]


def decay_of(run: Path) -> dict:
    return checkpoint.load(checkpoint.newest(run)[0]).state["decay"]


def kept(run: Path) -> list[str]:
    return [folder.name for folder in step_dirs(run)]


# ---- by steps


def test_the_rate_is_warmed_up_constant_and_falls_to_zero_over_the_last_share(pictures, tmp_path):
    assert train(pictures, tmp_path / "r", steps=10, lr=1.0e-3, lr_warmup_steps=2, lr_decay=0.4) == 0
    assert rates(tmp_path / "r") == pytest.approx([0.5e-3, *[1e-3] * 6, 0.75e-3, 0.5e-3, 0.25e-3])
    assert kept(tmp_path / "r") == ["step_00000006", "step_00000010"]  # that from before the decay stays


def test_a_run_stopped_in_its_decay_goes_on_as_one_that_was_not(pictures, tmp_path, monkeypatch):
    settings = dict(steps=10, lr_decay=0.5, dropout=0.1)
    assert train(pictures, tmp_path / "once", **settings) == 0
    with monkeypatch.context() as m:
        stop_at(m, 8)
        assert train(pictures, tmp_path / "twice", **settings) == 75
    assert train(pictures, tmp_path / "twice", **settings) == 0
    assert not campaign.differing(tmp_path / "once", tmp_path / "twice")


@pytest.fixture(scope="module")
def once(pictures, tmp_path_factory) -> Path:
    """A run of 20 steps, of which the last half decays."""
    run = tmp_path_factory.mktemp("once") / "r"
    assert train(pictures, run, steps=20, lr_decay=0.5, dropout=0.1) == 0
    return run


@pytest.mark.parametrize("stop", [9, 12], ids=["in its decay", "at its end"])
def test_a_longer_run_goes_on_from_before_the_decay_as_if_there_had_been_none(
    pictures, tmp_path, monkeypatch, capsys, once, stop
):
    run, settings = tmp_path / "r", dict(lr_decay=0.5, dropout=0.1, save_interval=5)
    with monkeypatch.context() as m:
        stop_at(m, stop)
        train(pictures, run, steps=12, **settings)
    short = checkpoint.load(checkpoint.newest(run)[0])
    assert main(["train", "--run", str(run), "--steps", "20"]) == 0
    assert (
        f"back to step 6, before the decay; the weights it led to are kept in {run}/ended/step_{stop:08d}"
        in capsys.readouterr().out
    )
    assert not campaign.differing(once, run)
    ended = read_weights(run / "ended" / f"step_{stop:08d}", ema_rate=0)
    assert all((tensor == short.weights[name]).all() for name, tensor in ended.tensors.items())
    assert kept(run) == ["step_00000010", "step_00000020"]


@pytest.mark.parametrize(
    ("settings", "ended"), [(dict(keep=0), [6, 8, 9]), (dict(keep=2, keep_every=4), [8, 9]), (dict(keep=2), [9])], ids=str
)
def test_checkpoints_of_the_decay_that_are_to_be_kept_are_put_away(pictures, tmp_path, settings, ended):
    run = tmp_path / "r"
    assert train(pictures, run, steps=9, lr_decay=0.5, save_interval=2, **settings) == 0
    assert main(["train", "--run", str(run), "--steps", "10"]) == 0
    assert sorted(folder.name for folder in (run / "ended").iterdir()) == [f"step_{step:08d}" for step in ended]


def test_a_decay_that_begins_in_the_warm_up_lets_that_go_on(pictures, tmp_path):
    assert train(pictures, tmp_path / "r", steps=8, lr=1e-3, lr_warmup_steps=4, lr_decay=1.0) == 0
    warm = [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    assert rates(tmp_path / "r") == pytest.approx([1e-3 * w * (8 - step) / 8 for step, w in enumerate(warm)])


def test_how_the_rate_falls_cannot_change_while_it_does_and_another_end_is_told(pictures, tmp_path, monkeypatch, capsys):
    run = tmp_path / "r"
    with monkeypatch.context() as m:
        stop_at(m, 8)
        assert train(pictures, run, steps=10, lr_decay=0.5) == 75
    for flag in ("--lr_decay=0.2", "--lr_decay=0", "--lr_anneal_steps=400"):
        assert "has no effect: the rate of" in refused(capsys, "--run", run, flag)
    assert main(["train", "--run", str(run), "--steps", "9"]) == 0
    assert "learning rate from step 8 on: 0.00025, and 0.0004 by the settings before" in capsys.readouterr().out
    assert rates(run)[8:] == pytest.approx([0.25e-3])


def test_a_kill_while_it_goes_back_costs_nothing(pictures, tmp_path, monkeypatch, once):
    run = tmp_path / "r"
    assert train(pictures, run, steps=12, lr_decay=0.5, dropout=0.1, save_interval=3, keep=0) == 0

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(decayed, "_move", killed)
        assert main(["train", "--run", str(run), "--steps", "20"]) != 0
    assert kept(run) == ["step_00000003", "step_00000006", "step_00000009", "step_00000012"]
    assert main(["train", "--run", str(run)]) == 0
    assert not campaign.differing(once, run)


def test_without_a_checkpoint_from_before_the_decay_it_says_what_it_does(pictures, tmp_path, capsys):
    assert train(pictures, tmp_path / "r", steps=10, lr_decay=0.5) == 0
    shutil.rmtree(step_dirs(tmp_path / "r")[0])
    assert main(["train", "--run", str(tmp_path / "r"), "--steps", "14"]) == 0
    said = capsys.readouterr().out
    assert (
        "no checkpoint from before the decay, which began at step 5, is left: training goes on from the decayed weights" in said
    )
    assert rates(tmp_path / "r")[10:] == pytest.approx([1e-3 * left / 4 for left in (4, 3, 2, 1)])


def test_a_run_of_images_ends_its_decay_where_it_ends(pictures, tmp_path):
    assert train(pictures, tmp_path / "r", images=50, lr_decay=0.25) == 0  # 9 steps of 6
    assert rates(tmp_path / "r")[-3:] == pytest.approx([1e-3, 1e-3, 0.5e-3])


# ---- by time


@pytest.mark.parametrize(
    ("settings", "start", "end"),
    [
        (dict(), 31, 38),  # the last fifth of the 38 s that the last sheet leaves
        (dict(lr_decay=0.5), 19, 38),
        (dict(lr_decay=0.0), 38, 38),
        (dict(sample_interval=10), 27, 32),  # sheets at 10, 20, 30 and at the end
    ],
    ids=["a fifth", "a half", "none", "with sheets on the way"],
)
def test_a_time_is_met_to_the_step_where_each_takes_as_long(pictures, tmp_path, clock, settings, start, end):
    began = clock.now
    assert train(pictures, tmp_path / "r", time="40s", **settings) == 0
    decay = decay_of(tmp_path / "r")
    assert (decay["start"], decay["end"]) == (start, end) and clock.now - began == pytest.approx(40, abs=1)
    assert rates(tmp_path / "r")[start:] == pytest.approx([1e-3 * (end - step) / (end - start) for step in range(start, end)])


def walked(monkeypatch, train: dict, step: Callable[[int], float], slot: float = 1e9) -> tuple[int, float, int]:
    """At which step and second the decay begins, and its steps, where step k takes so long and a process ends after a slot."""
    now, config = [0.0], Config().updated(train)
    monkeypatch.setattr(ending, "time", SimpleNamespace(monotonic=lambda: now[0]))
    state = SimpleNamespace(step=0, seconds=0.0, decay=None, by_clock=True, end=2**62, skipped_in_a_row=0, progress=lambda: 0.0)
    while True:
        clock, ends = ending.Clock(config, state), now[0] + slot
        while now[0] < ends:
            clock.told(clock.read())
            if clock.due():
                clock.begin(1e-3, 1.0)
                return state.decay["start"], state.seconds, state.decay["end"] - state.decay["start"]
            now[0] += step(state.step)
            state.step += 1


@pytest.mark.parametrize(("days", "slot"), [(30, 8 * 3600), (7, 7200), (3, 2700), (3, 1e9)])
def test_a_long_run_in_short_slots_decays_as_one_in_one_piece(monkeypatch, days, slot):
    _, seconds, steps = walked(monkeypatch, dict(time=f"{days}d", lr_decay=0.4), lambda k: 10.0, slot)
    assert seconds == pytest.approx(0.6 * 86400 * days, abs=400) and steps == pytest.approx(0.4 * 8640 * days, abs=40)


@pytest.mark.parametrize(
    ("step", "pace"),
    [
        (lambda k: 300.0 if k == 100 else 1.0, 1.0),  # stopped meanwhile
        (lambda k: 2.0 if k < 200 else 1.0, 1.0),  # more work beside it at first
        (lambda k: 5.0 if k % 100 == 0 else 1.0, 1.04),  # what belongs to training: a measurement each 100 steps
    ],
)
def test_the_steps_of_a_decay_follow_the_pace_and_not_a_pause(monkeypatch, step, pace):
    _, seconds, steps = walked(monkeypatch, dict(time="2000s", lr_decay=0.4), step)
    assert seconds == pytest.approx(1200, abs=5) and steps == pytest.approx(800 / pace, rel=0.02)


def test_parts_of_a_run_count_together_and_what_was_between_does_not(pictures, tmp_path, clock, monkeypatch):
    with monkeypatch.context() as m:
        stop_at(m, 14)
        assert train(pictures, tmp_path / "r", time="40s") == 75
    clock.now += 1000
    assert train(pictures, tmp_path / "r", time="40s") == 0
    assert (decay_of(tmp_path / "r")["start"], decay_of(tmp_path / "r")["end"]) == (31, 38)


def test_a_kill_in_the_decay_replays_the_same_rates_whatever_the_clock(pictures, tmp_path, clock, monkeypatch):
    run, other = tmp_path / "r", tmp_path / "other"
    with monkeypatch.context() as m:
        stop_at(m, 34)
        assert train(pictures, run, time="40s", dropout=0.1) == 75
    shutil.copytree(run, other)
    assert train(pictures, run, time="40s", dropout=0.1) == 0
    assert kept(other) == ["step_00000031", "step_00000034"]
    shutil.rmtree(step_dirs(other)[-1])  # as if it had been killed
    clock.now += 500
    assert train(pictures, other, time="40s", dropout=0.1) == 0
    assert not campaign.differing(run, other)


def test_a_larger_time_goes_on_from_before_the_decay(pictures, tmp_path, clock, capsys):
    run = tmp_path / "r"
    assert train(pictures, run, time="40s") == 0
    capsys.readouterr()
    assert main(["train", "--run", str(run)]) == 0
    assert "is at step 38 of 38 already: a larger --time goes on from step 31, before its decay" in capsys.readouterr().out
    assert main(["train", "--run", str(run), "--time", "1m"]) == 0
    assert "back to step 31" in capsys.readouterr().out
    assert (decay_of(run)["start"], decay_of(run)["end"]) == (47, 58)
    assert rates(run)[:48] == pytest.approx([1e-3] * 48)


def test_a_sheet_that_takes_too_much_of_the_time_is_left_out(pictures, tmp_path, clock, monkeypatch, capsys):
    monkeypatch.setattr(preview, "sheet_seconds", lambda *args: 9.0)
    assert train(pictures, tmp_path / "r", time="40s") == 0
    assert "no sheets of samples: one takes 9 s of --time 40s" in capsys.readouterr().out
    assert decay_of(tmp_path / "r")["end"] == 40 and not (tmp_path / "r" / "samples").exists()


def test_how_long_a_sheet_takes_is_told_before_it_is_drawn(config, data, monkeypatch):
    state, net = TrainState(config, preview.torch.device("cpu")), preview.averaged
    now = [0.0]
    monkeypatch.setattr(preview.time, "monotonic", lambda: now[0])

    def tick(doing: str) -> None:
        now[0] += 3  # each call of the network: one a step, of 3

    before = {k: p.clone() for k, p in state.params.items()}
    assert preview.sheet_seconds(config, state, data, tick) == 9 and net
    assert all((p == before[k]).all() for k, p in state.params.items())


def test_the_share_that_is_done_grows_with_the_time_and_then_with_the_steps(config):
    state = TrainState(config.updated(dict(steps=0, time="100s")), preview.torch.device("cpu"))
    state.seconds, state.step = 40.0, 7
    assert state.progress() == pytest.approx(0.4)
    state.decay = checkpoint.Decay(start=7, end=17, factor=1.0, done=0.4, by="time", until=100.0)
    state.step = 12
    assert state.progress() == pytest.approx(0.7)


def test_a_real_run_ends_about_when_it_is_to(pictures, tmp_path):
    began = time.monotonic()
    assert train(pictures, tmp_path / "r", time="4s") == 0
    state = checkpoint.load(checkpoint.newest(tmp_path / "r")[0]).state
    assert 2 < state["seconds"] <= time.monotonic() - began < 20  # of a test machine with other work, too
    assert state["step"] == state["decay"]["end"] > state["decay"]["start"] + 3


def test_two_processes_agree_on_a_time_and_a_restart_of_them_on_its_decay(launcher, pictures, tmp_path):
    run, said, limit = tmp_path / "r", tmp_path / "said", time.monotonic() + 60
    assert train(pictures, run, steps=2) == 0
    started = launcher.start("train", "--run", run, "--finish", "3s", said=said, processes=2)
    while "the rate falls" not in said.read_text():
        assert time.monotonic() < limit and started.running(), said.read_text()
        time.sleep(0.01)
    started.kill(1, signal.SIGTERM)
    started.wait()
    decay = json.loads((step_dirs(run)[-1] / "state" / "state.json").read_text())["decay"]
    launcher.start("train", "--run", run, said=said, processes=2).succeed()
    assert decay_of(run) == decay
    expected = [min(1, (decay["end"] - step) / (decay["end"] - decay["start"])) for step in range(decay["end"])]
    assert rates(run) == pytest.approx([1e-3 * factor for factor in expected])


# ---- --finish


def test_finish_decays_from_the_rate_of_now_and_a_stop_meanwhile_changes_nothing(pictures, tmp_path, clock, monkeypatch, capsys):
    run, settings = tmp_path / "r", dict(steps=100, lr_anneal_steps=-1, save_interval=50)
    with monkeypatch.context() as m:
        stop_at(m, 20)
        assert train(pictures, run, **settings) == 75
        stop_at(m, 32)
        assert main(["train", "--run", str(run), "--finish", "22s"]) == 75
    assert "is in its decay already" in refused(capsys, "--run", run, "--finish", "30s")
    assert main(["train", "--run", str(run)]) == 0
    decay = decay_of(run)  # three steps that warm up, three that tell the pace; the sheet takes two seconds
    assert (decay["start"], decay["end"], decay["factor"]) == (26, 40, pytest.approx(0.74))
    assert rates(run)[26:] == pytest.approx([1e-3 * 0.74 * (40 - step) / 14 for step in range(26, 40)])
    capsys.readouterr()
    assert main(["train", "--run", str(run), "--finish", "22s"]) == 0
    assert "is at step 40 of 40 already: --steps or --time goes on from step 26, before its decay" in capsys.readouterr().out
    assert "has ended with its decay, at step 40" in refused(capsys, "--run", run, "--finish", "30s")
    assert main(["train", "--run", str(run), "--steps", "100"]) == 0
    assert rates(run) == pytest.approx([1e-3 * (1 - step / 100) for step in range(100)])
    assert "come to 0 already" in refused(capsys, "--run", run, "--finish", "30s")


# ---- what cannot be


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    capsys.readouterr()
    assert main(["train", *map(str, argv)]) == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1
    return said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(time="8h", steps=5), "--steps and --time both say when to stop"),
        (dict(time="8h", images=5), "--images and --time both say when to stop"),
        (dict(time="8"), "give a time as 90s, 45m, 8h, 3d or 2h30m"),
        (dict(time="0s"), "give a time as"),
        (dict(time="1e3s"), "give a time as"),
        (dict(time="8h", lr_anneal_steps=-1), "which --time does not know: --lr_decay 1"),
        (dict(steps=5, lr_decay=0.2, lr_anneal_steps=-1), "both lower the rate"),
        (dict(steps=5, lr_decay=1.5), "from 0 to 1"),
        (dict(finish="1m"), "--finish ends a run that has begun"),
        (dict(finish="1m", steps=5), "not together with --steps"),
        (dict(time="0.01s"), "--time 0.01s is too short: 10 steps, with what goes before them, take at least"),
        (dict(), "say when to stop: --time 8h"),
    ],
    ids=str,
)
def test_contradictions_are_one_line_and_leave_nothing(pictures, tmp_path, capsys, settings, said):
    assert said in refused(capsys, pictures, "--run", tmp_path / "r", *flags(**RUN | settings))
    assert not list(tmp_path.iterdir())


def test_a_time_replaces_the_steps_and_the_annealing_of_a_recipe():
    from iddpm.training.start import new

    made = new("digits", dict(time="5m")).train
    assert (made.steps, made.time, made.lr_decay, made.lr_anneal_steps) == (0, "5m", 0.2, 0)
    kept = new("digits", dict(lr_decay=0.1)).train
    assert (kept.steps, kept.lr_decay, kept.lr_anneal_steps) == (600, 0.1, 0)
    assert new("digits", dict(time="5m", lr_decay=0.0)).train.lr_anneal_steps == 0
    assert new("digits", dict(time="5m", lr_anneal_steps=500)).train.lr_decay == 0
    assert new("digits", dict(lr_decay=0.0)).train.lr_anneal_steps == -1
    with pytest.raises(UserError, match="both say when to stop"):
        check(new("digits", dict(time="5m", steps=3)))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("45m", 2700), ("8h", 28800), ("3d", 259200), ("2h30m", 9000), ("1.5H", 5400), ("2h 30m", 9000), ("", 0)],
)
def test_times_as_people_write_them(text, seconds):
    assert seconds_of(text, "time") == seconds


def test_a_dry_run_and_a_plan_tell_how_many_steps_fit(pictures, tmp_path, capsys):
    assert main(["train", str(pictures), "--run", str(tmp_path / "r"), *flags(**RUN | dict(time="1h")), "--dry_run"]) == 0
    assert "steps in 1h, in the last 20% of which the rate falls to 0" in capsys.readouterr().out
    assert main(["plan", *flags(**RUN | dict(time="1h")), "--device_tflops", "1e-3"]) == 0
    said = capsys.readouterr().out
    assert "images: 60 min" in said and "--steps N" not in said


def test_a_config_keeps_its_time(config):
    config = check(config.updated(dict(steps=0, time="2h30m", lr_decay=0.3)))
    assert Config.from_json(config.to_json()) == config
