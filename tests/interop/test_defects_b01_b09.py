"""Defects B1 to B9, but for those of several processes: resuming, files, gradients."""

import math
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import TINY as NATIVE
from iddpm import build
from iddpm.config import Config
from iddpm.diffusion.grid import Chain
from iddpm.diffusion.law import LossSecondMoment
from iddpm.diffusion.schedule import Linear
from iddpm.interop.openai.formats import files, flags
from iddpm.interop.openai.python import logger
from iddpm.store.checkpoint import Saved
from iddpm.training import loop as train
from iddpm.training import step as training_step
from iddpm.training.state import LossScale, TrainState
from interop.test_defects import TINY, TRAIN, command, held, one_step, red_with, rows
from interop.written import same, write

CPU = torch.device("cpu")
LAW = dict(schedule_sampler="loss-second-moment")
RUN = TRAIN | LAW | dict(dropout=0.2)


@pytest.fixture(scope="module")
def runs(pictures, tmp_path_factory) -> Path:
    """A run of four steps in whole/, and one of two in half/. Read them; do not change them."""
    root = tmp_path_factory.mktemp("runs")
    for name, end in (("whole", 4), ("half", 2)):
        assert command(root / name, "image_train", data_dir=pictures, **TINY, **RUN | {"steps": end}) == 0
    return root


def gone_on_with(runs: Path, data: Path, folder: Path, **settings: object) -> int:
    """The exit code of the run of half/, copied, when it goes on to step 4."""
    shutil.copytree(runs / "half", folder, dirs_exist_ok=True)
    resume = dict(resume_checkpoint=folder / "model000002.pt")
    return command(folder, "image_train", data_dir=data, **TINY, **RUN | resume | settings)


# ---- B1


def np_int(patch):
    patch.setattr(LossSecondMoment, "__init__", lambda self, schedule: np.zeros([schedule.steps], dtype=np.int))


def history_is_not_loaded(patch):
    patch.setattr(LossSecondMoment, "load_state_dict", lambda self, state: None)


@red_with(np_int, raises=AttributeError, says="no attribute 'int'")
def test_b01_training_with_the_loss_aware_law_of_t_runs(pictures, tmp_path):
    assert command(tmp_path, "image_train", data_dir=pictures, **TINY, **TRAIN, **LAW) == 0


@red_with(history_is_not_loaded)
def test_b01_the_history_of_the_law_survives_a_resume(runs, pictures, tmp_path):
    assert gone_on_with(runs, pictures, tmp_path) == 0
    saved, _ = files.load_run(tmp_path / "model000004.pt")
    assert saved.optimizer["law.counts"].sum() == 4 * 4  # losses of 4 steps of 4 images


# ---- B4


def number_from_the_name(patch):
    """Where it is not modelN.pt, step 0: no optimizer, the weights as their own averages, and not a word."""

    def old(path: Path, config: Config) -> tuple[Saved, None]:
        digits, weights = path.name.split("model")[-1].split(".")[0], files.read(path)
        step = int(digits) if digits.isdigit() else 0
        rates = [float(r) for r in config.train.ema_rate.split(",")]
        state = dict(step=step, images=0, skipped=0, skipped_in_a_row=0, ema_updates=step, lg_loss_scale=0.0, law=[])
        return Saved(step, weights, dict.fromkeys(rates, weights), {}, state), None

    patch.setattr(files, "load_run", old)


@pytest.mark.parametrize("name", ["latest.pt", "model_best.pt", "ema_0.99_000010.pt"])
@red_with(number_from_the_name, says="11")
def test_b04_a_file_of_any_name_is_resumed_with_its_step_its_optimizer_and_its_averages(name, tmp_path):
    source = write(tmp_path, settings=TINY)
    if not name.startswith("ema"):
        source.model.rename(tmp_path / name)
    config = flags.to_config("images", TINY | {"ema_rate": "0.9,0.99"})
    saved, _ = files.Store(tmp_path, tmp_path / name, config).newest()
    assert saved.step == 11
    assert same(saved.averages[0.9], source.averages[0.9]) and same(saved.weights, source.weights)
    assert saved.optimizer["out.2.weight.exp_avg"].abs().sum() > 0


@pytest.mark.parametrize("missing", ["ema_0.9_000010.pt", "opt000010.pt"])
@red_with(number_from_the_name)
def test_b04_a_missing_average_or_optimizer_is_named_and_not_replaced(missing, pictures, tmp_path, capsys):
    source = write(tmp_path, settings=TINY)
    (tmp_path / missing).unlink()
    settings = TRAIN | dict(resume_checkpoint=source.model, steps=12)
    assert command(tmp_path, "image_train", data_dir=pictures, **TINY, **settings) == 2
    assert f"{missing} is missing beside" in capsys.readouterr().err


# ---- B5


def after_restoring(patch: pytest.MonkeyPatch, change: Callable[[TrainState], None]) -> None:
    restore = TrainState.restore

    def old(self: TrainState, *args: Any) -> None:
        restore(self, *args)
        change(self)

    patch.setattr(TrainState, "restore", old)


def loss_scale_of_20(patch):
    after_restoring(patch, lambda state: setattr(state.scale, "lg", 20.0))


def data_from_the_start(patch):
    after_restoring(patch, lambda state: setattr(state, "images", 0))


def random_numbers_of_the_process(patch):
    numbers = count()
    patch.setattr(training_step, "_dropout_seed", lambda *args: next(numbers))


def logs_are_truncated(patch):
    class Old(logger.CSVOutputFormat):
        def __init__(self, filename: str):
            Path(filename).unlink(missing_ok=True)
            super().__init__(filename)

    patch.setattr(logger, "CSVOutputFormat", Old)


@red_with(data_from_the_start, random_numbers_of_the_process, logs_are_truncated)
def test_b05_a_resumed_run_is_the_run_that_was_not_interrupted(runs, pictures, tmp_path):
    """In its images, random numbers and logs; the history of the law of t is B1's."""
    assert gone_on_with(runs, pictures, tmp_path) == 0
    for kind in ("model", "ema_0.9_"):
        assert same(held(tmp_path, 4, kind), held(runs / "whole", 4, kind))
    assert [r["step"] for r in rows(tmp_path)] == ["1", "2", "3", "4"]
    assert (tmp_path / "log.txt").read_text().startswith((runs / "half" / "log.txt").read_text())


@red_with(loss_scale_of_20, says=r"20\.0 == 13\.25")
def test_b05_the_loss_scale_is_resumed(tmp_path):
    config = flags.to_config("images", TINY | {"use_fp16": True})
    state, fresh = TrainState(config, CPU), TrainState(config, CPU)
    state.scale.lg, state.step = 13.25, 7
    path = files.save_run(tmp_path, config, state.to_saved())
    fresh.restore(files.Store(tmp_path, path, config).newest()[0], config)
    assert fresh.scale.lg == 13.25


# ---- B6


def rates_of_the_checkpoint(patch):
    step = train.train_step

    def old(state: TrainState, config: Config, *args: Any) -> None:
        step(state, config.updated({"lr": TRAIN["lr"], "weight_decay": 0.0}), *args)

    patch.setattr(train, "train_step", old)


@pytest.mark.parametrize(("asked", "holds"), [
    (dict(lr=0.0), lambda before, after: torch.equal(before, after)),
    (dict(weight_decay=1000.0), lambda before, after: after.abs().max() < 10 * TRAIN["lr"]),  # each step begins from 0
])  # fmt: skip
@red_with(rates_of_the_checkpoint)
def test_b06_the_rate_and_the_decay_asked_for_on_resume_are_used(asked, holds, runs, pictures, tmp_path):
    assert gone_on_with(runs, pictures, tmp_path, **asked) == 0
    before, after = (held(tmp_path, n)["input_blocks.0.0.weight"] for n in (2, 4))
    assert holds(before, after)


# ---- B7


def saved_before_the_step_is_counted(patch):
    save = files.save_run

    def old(folder: Path, config: Config, saved: Saved) -> Path:
        return save(folder, config, saved._replace(step=max(saved.step - 1, 0)))

    patch.setattr(files, "save_run", old)


def count_of_the_name(patch):
    read = files.read_optimizer
    patch.setattr(files, "read_optimizer", lambda path, shapes: (read(path, shapes)[0], int(path.stem.removeprefix("opt"))))


def written_in_place(patch):
    def old(path: Path, write: Callable[[Any], Any]) -> None:
        with open(path, "wb") as file:
            write(file)

    patch.setattr(files, "replace", old)


@red_with(saved_before_the_step_is_counted)
def test_b07_a_file_holds_the_updates_that_its_name_says_and_is_written_once(runs, pictures, tmp_path):
    assert gone_on_with(runs, pictures, tmp_path, steps=5) == 0
    steps = {p.name: {int(s["step"]) for s in torch.load(p, weights_only=True)["state"].values()} for p in tmp_path.glob("opt*")}
    assert steps == {"opt000000.pt": set(), "opt000002.pt": {2}, "opt000004.pt": {4}, "opt000005.pt": {5}}
    assert same(held(tmp_path, 2), held(runs / "half", 2)), "the file it came from"


@red_with(count_of_the_name)
def test_b07_a_file_of_the_originals_holds_the_updates_that_its_optimizer_counts(tmp_path):
    source = write(tmp_path, number=2, updates=3, settings=TINY)
    assert files.load_run(source.model)[0].step == 3


@red_with(written_in_place)
def test_b07_a_write_that_fails_leaves_no_file(runs, pictures, tmp_path, monkeypatch):
    def fail(content: Any, file: Any) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    assert gone_on_with(runs, pictures, tmp_path) == 2
    assert {p.name for p in tmp_path.glob("*.pt")} == {p.name for p in (runs / "half").glob("*.pt")}


# ---- B8, B9


@pytest.fixture(scope="module")
def small(pictures) -> Config:
    return Config().updated(NATIVE | dict(path=str(pictures), class_cond=False))


def means_are_added(patch):
    """Each microbatch counts as its mean, whatever its size."""
    made = build.objective

    def old(config: Config) -> Callable[..., dict[str, Tensor]]:
        def loss(denoiser: Any, schedule: Any, x0: Tensor, *args: Any) -> dict[str, Tensor]:
            return {k: v * config.train.batch_size / len(x0) for k, v in made(config)(denoiser, schedule, x0, *args).items()}

        return loss

    patch.setattr(build, "objective", old)


@pytest.mark.parametrize("micro", [1, 2, 4, 5])
@red_with(means_are_added)
def test_b08_any_microbatch_gives_the_same_gradient(micro, small, data):
    whole, parts = (one_step(small.updated({"microbatch": size}), data) for size in (-1, micro))
    a, b = (torch.cat([p.grad.flatten() for p in run[1].params.values()]) for run in (whole, parts))
    assert ((a - b).norm() / a.norm()).item() < 1e-6
    assert parts[2]["grad_norm"] == pytest.approx(whole[2]["grad_norm"], rel=1e-6)


def nothing_is_checked(patch):
    patch.setattr(torch, "isfinite", lambda x: torch.ones_like(x, dtype=torch.bool))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@red_with(nothing_is_checked)
def test_b09_a_step_without_a_finite_gradient_moves_nothing_and_is_counted(precision, small, data):
    config = small.updated(LAW | {"precision": precision})
    before, after, logged = one_step(config, data, spoil=math.inf)
    for ours, was in ((after.params, before.params), *((after.ema.averages[r], before.ema.averages[r]) for r in (0.9, 0.99))):
        assert all(torch.equal(ours[name], was[name]) for name in was)
    assert not after.optimizer.state and after.law.state_dict()["counts"].sum() == 0
    assert (after.step, after.skipped, after.scale.lg) == (1, 1, 19.0 if precision == "fp16" else 0.0)
    assert "grad_norm" not in logged


def no_floor(patch):
    def old(self: LossScale, good: bool) -> None:
        self.lg += self.growth if good else -1

    patch.setattr(LossScale, "update", old)


@red_with(no_floor, says="-20")
def test_b09_the_loss_scale_has_a_floor(small, data):
    scale = LossScale(True, 1e-3)
    for _ in range(40):
        scale.update(False)
    assert scale.lg == 0


def no_end(patch):
    patch.setattr(train, "MAX_SKIPS", 10**9)


@red_with(no_end)
def test_b09_fifty_steps_in_a_row_without_a_finite_gradient_end_the_run(pictures, tmp_path, capsys):
    settings = TRAIN | dict(lr=1e30, steps=52, batch_size=1, save_interval=1000, log_interval=1000)
    assert command(tmp_path, "image_train", data_dir=pictures, **TINY, **settings) == 2
    assert "50 steps in a row had no finite gradient" in capsys.readouterr().err


def every_loss_counts(patch):
    def old(self: LossSecondMoment, u: Tensor, losses: Tensor) -> None:
        for step, loss in zip((u * self.steps).long().tolist(), losses.tolist()):
            self._losses[step, self._counts[step] % self._losses.shape[1]] = loss
            self._counts[step] = min(self._counts[step] + 1, self._losses.shape[1])

    patch.setattr(LossSecondMoment, "update", old)


@red_with(every_loss_counts)
def test_b09_a_loss_that_is_not_a_number_does_not_poison_the_law_of_t():
    law = LossSecondMoment(Chain(Linear(3)), history=2)
    for losses in ([1.0, 2.0, 4.0], [1.0, 2.0, 4.0], [1.0, math.nan, math.inf]):
        law.update((torch.arange(3) + 0.5) / 3, torch.tensor(losses))
    p = law.probabilities()
    assert p.tolist() == pytest.approx([0.999 * w / 7 + 0.001 / 3 for w in (1, 2, 4)])
