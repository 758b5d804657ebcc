"""TrainLoop: the published run's numbers, the original's defects mended, and the methods that forks override."""

import math
import textwrap
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from golden_rules import fill, image_tensor, load, noise
from iddpm.errors import UserError
from iddpm.interop.openai.python import fp16_util, logger, resample, script_util, train_util
from iddpm.interop.openai.python.train_util import TrainLoop
from launcher import Launcher

Batches = Iterator[tuple[Tensor, dict[str, Tensor]]]


class Line(nn.Module):
    """A model of two weights, far smaller than a U-Net, that any loop must take."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Conv1d(1, 1, 1, bias=False)
        self.shift = nn.Parameter(torch.zeros(1))
        nn.init.constant_(self.scale.weight, 0.5)

    def forward(self, x: Tensor, timesteps: Tensor, **cond: Tensor) -> Tensor:
        flat = x.flatten(2).flatten(1)[:, None]
        return self.scale(flat.to(self.scale.weight.dtype)).reshape(x.shape).to(x.dtype) + self.shift

    def convert_to_fp16(self) -> None:
        self.apply(fp16_util.convert_module_to_f16)


def images(n: int = 1000, bad: Callable[[int], bool] = lambda k: False) -> Batches:
    """Random batches of 4; a bad one holds infinity."""
    rows = np.random.RandomState(1)
    for k in range(n):
        batch = torch.from_numpy(rows.uniform(-1, 1, (4, 1, 2, 2))).float()
        yield batch * (math.inf if bad(k) else 1), {}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the loops log and save; with a loss scale from which the first gradients do not overflow."""
    monkeypatch.setattr(train_util, "INITIAL_LOG_LOSS_SCALE", 8.0)
    with logger.scoped_configure(str(tmp_path), ["log", "csv"]):
        yield tmp_path


def loop(kind: type[TrainLoop] = TrainLoop, data: Batches | None = None, model: nn.Module | None = None, **changes: Any) -> Any:
    torch.manual_seed(0)
    np.random.seed(0)
    settings: dict[str, Any] = dict(
        model=model or Line(), diffusion=script_util.create_gaussian_diffusion(steps=8, noise_schedule="cosine"),
        data=data or images(), batch_size=4, microbatch=-1, lr=0.01, ema_rate="0.9,0.99", log_interval=1, save_interval=4,
        resume_checkpoint="", lr_anneal_steps=6,
    )  # fmt: skip
    return kind(**settings | changes)


def saved(folder: Path, name: str) -> Any:
    return torch.load(folder / name, weights_only=True)


def log(folder: Path) -> str:
    return (folder / "log.txt").read_text()


# ---- the published run


GOLDEN = load("training.json")
CONFIG = GOLDEN["train_config"]


class Recorded(resample.ScheduleSampler):
    """The steps and weights that the published run drew."""

    def __init__(self) -> None:
        self.trace = iter(GOLDEN["microbatch_trace"])

    def weights(self) -> np.ndarray:
        raise AssertionError("sample is overridden")

    def sample(self, batch_size: int, device: Any) -> tuple[Tensor, Tensor]:
        drawn = next(self.trace)
        assert len(drawn["t"]) == batch_size
        return torch.tensor(drawn["t"]), torch.tensor(drawn["weights"])


def digest(weights: dict[str, Tensor]) -> np.ndarray:
    flat = [weights[name].double().flatten() for name in GOLDEN["param_names"]]
    return np.array([[w.sum().item(), w.square().sum().item(), w[:7].sum().item()] for w in flat])


def test_the_published_run_ends_at_the_published_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = count()
    monkeypatch.setattr(torch, "randn_like", lambda x: noise(next(numbers), tuple(x.shape)))
    net, diffusion = script_util.create_model_and_diffusion(**GOLDEN["model_config"])
    shape = (CONFIG["batch_size"], 3, 32, 32)
    data = ((image_tensor(100 + k, shape), {}) for k in count())
    heard = []
    monkeypatch.setattr(
        train_util, "log_loss_dict", lambda d, t, losses: heard.append({k: v.tolist() for k, v in losses.items()})
    )
    TrainLoop(
        model=fill(net), diffusion=diffusion, data=data, batch_size=CONFIG["batch_size"], microbatch=CONFIG["microbatch"],
        lr=CONFIG["lr"], ema_rate=CONFIG["ema_rate"], log_interval=1, save_interval=8, resume_checkpoint="",
        schedule_sampler=Recorded(), weight_decay=CONFIG["weight_decay"], lr_anneal_steps=CONFIG["lr_anneal_steps"],
    ).run_loop()  # fmt: skip
    for ours, published in zip(heard, GOLDEN["microbatch_trace"], strict=True):
        torch.testing.assert_close(ours, published["losses"], rtol=1e-3, atol=0)
    sure = np.array(["qkv.bias" not in p for p in GOLDEN["param_names"]])  # Adam amplifies rounding there
    for name, file in {"model": "model", "ema_0.9": "ema_0.9_", "ema_0.99": "ema_0.99_"}.items():
        ours = digest(saved(folder, f"{file}000008.pt"))
        np.testing.assert_allclose(ours[sure], load("training.npz")[name][sure], rtol=1e-2, atol=1e-2)
    assert sorted(p.name for p in folder.glob("*.pt")) == [f for f in GOLDEN["files"] if f.endswith(".pt")]


# ---- what the files hold


def test_a_file_holds_the_updates_that_its_name_says(folder: Path) -> None:
    """B7: 000000 is the start, N has N updates, and the last step is saved once."""
    loop().run_loop()
    assert sorted(p.name for p in folder.glob("model*")) == ["model000000.pt", "model000004.pt", "model000006.pt"]
    assert saved(folder, "model000000.pt")["scale.weight"].item() == 0.5
    steps = {n: {int(s["step"]) for s in saved(folder, f"opt{n:06d}.pt")["state"].values()} for n in (0, 4, 6)}
    assert steps == {0: set(), 4: {4}, 6: {6}}
    assert not list(folder.glob("*.tmp"))


def test_a_folder_with_checkpoints_is_not_overwritten(folder: Path) -> None:
    loop().run_loop()
    with pytest.raises(UserError, match=r"holds model000006\.pt already: go on with --resume_checkpoint"):
        loop().run_loop()


def test_checkpoints_go_where_the_variable_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSION_BLOB_LOGDIR", str(folder / "elsewhere"))
    monkeypatch.setenv("DIFFUSION_TRAINING_TEST", "1")
    loop().run_loop()
    names = sorted(p.name for p in (folder / "elsewhere").glob("model*"))
    assert names == ["model000000.pt", "model000004.pt"], "the run ends after the first save past the start"


# ---- the gradient


@pytest.mark.parametrize("microbatch", [1, 2, 3])
def test_microbatches_leave_the_gradient_as_it_is(microbatch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """B8: the original adds the microbatches' means, here 4 to 1.3 times the gradient."""
    monkeypatch.setattr(torch, "randn_like", lambda x: 0.1 + 0 * x)

    def gradient(size: int) -> list[Tensor]:
        t = iter([0, 3, 5, 7])

        class Same(resample.UniformSampler):
            def sample(self, batch_size: int, device: Any) -> tuple[Tensor, Tensor]:
                return torch.tensor(list(islice(t, batch_size))), torch.ones(batch_size)

        training = loop(microbatch=size)
        training.schedule_sampler = Same(training.diffusion)
        training.forward_backward(*next(images()))
        return [p.grad for p in training.model_params]

    torch.testing.assert_close(gradient(microbatch), gradient(-1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("use_fp16", [False, True])
def test_a_step_without_a_finite_gradient_is_skipped_and_counted(folder: Path, use_fp16: bool) -> None:
    """B9: neither weights, averages nor moments move; the loss scale is halved."""
    training = loop(data=images(bad=lambda k: k == 1), use_fp16=use_fp16, lr_anneal_steps=0)
    before: list[list[float]] = []
    for batch, cond in islice(training.data, 3):
        training.run_step(batch, cond)
        training.step += 1
        before.append([training.master_params[0].detach().sum().item(), training.ema_params[0][0].detach().sum().item()])
    assert before[0] == before[1] != before[2]
    assert training.skipped == 1 and logger.getkvs()["skipped"] == 1 and "step 1 is skipped" in log(folder)
    assert [int(s["step"]) for s in training.opt.state.values()] == [2] * len(training.master_params)
    assert training.lg_loss_scale == pytest.approx(7.002 if use_fp16 else 0)


def test_fifty_bad_steps_in_a_row_end_the_run_and_the_loss_scale_has_a_floor(folder: Path) -> None:
    """B9: the original went on to a loss scale of 2^-16203."""
    training = loop(data=images(bad=lambda k: True), use_fp16=True, lr_anneal_steps=0)
    with pytest.raises(UserError, match="50 steps in a row"):
        training.run_loop()
    assert training.skipped == 50 and training.lg_loss_scale == 0


def test_a_loss_that_is_not_a_number_leaves_the_law_of_t_alone() -> None:
    training = loop(data=images(bad=lambda k: k == 3), lr_anneal_steps=30)
    training.schedule_sampler = resample.LossSecondMomentResampler(training.diffusion, history_per_term=2)
    training.run_loop()
    assert training.skipped == 1 and np.isfinite(training.schedule_sampler.weights()).all()


def test_a_parameter_without_a_gradient_is_no_fault() -> None:
    """B20: the original raises TypeError."""

    class Spare(Line):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Parameter(torch.ones(3))

    training = loop(model=Spare())
    training.run_loop()
    assert training.model.spare.tolist() == [1, 1, 1]


# ---- resuming


def resumed(folder: Path, name: str = "model000004.pt", **changes: Any) -> Any:
    return loop(resume_checkpoint=str(folder / name), **changes)


def finished(folder: Path) -> dict[str, Any]:
    return {n: saved(folder, f"{n}000006.pt") for n in ("model", "ema_0.9_", "ema_0.99_")}


@pytest.mark.parametrize("use_fp16", [False, True])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(folder: Path, use_fp16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """B5, given the same data and numbers: weights, averages, moments, loss scale and the sampler's history come back."""
    monkeypatch.setattr(torch, "randn_like", lambda x: 0.1 + 0 * x)
    monkeypatch.setattr(np.random, "choice", lambda n, size, p: np.arange(size[0]) + 2)
    parts: dict[str, Any] = dict(use_fp16=use_fp16, weight_decay=0.1)

    def sampler(training: Any) -> Any:
        training.schedule_sampler = resample.LossSecondMomentResampler(training.diffusion, history_per_term=3)
        return training

    sampler(whole := loop(**parts)).run_loop()
    expected = finished(folder)
    diffusion, rest = script_util.create_gaussian_diffusion(steps=8, noise_schedule="cosine"), islice(images(), 4, None)
    law = resample.LossSecondMomentResampler(diffusion, history_per_term=3)
    again = resumed(folder, data=rest, schedule_sampler=law, **parts)
    assert again.resume_step == 4
    again.run_loop()
    torch.testing.assert_close(finished(folder), expected, rtol=0, atol=0)
    torch.testing.assert_close(law.state_dict(), whole.schedule_sampler.state_dict())
    assert again.lg_loss_scale == pytest.approx(whole.lg_loss_scale) and again.lg_loss_scale == (
        pytest.approx(8.006) if use_fp16 else 0
    )
    assert "the data starts over" in log(folder)


def test_the_rate_and_decay_asked_for_win_over_the_checkpoint_s(folder: Path) -> None:
    """B6."""
    loop().run_loop()
    again = resumed(folder, lr=0.5, weight_decay=0.25)
    assert [(g["lr"], g["weight_decay"]) for g in again.opt.param_groups] == [(0.5, 0.25)]
    assert len(again.opt.state) == 2, "the moments are there"


@pytest.mark.parametrize("name", ["ema_0.9_000004.pt", "latest.pt"])
def test_a_file_whose_name_is_not_a_model_s_is_resumed_with_all_beside_it(folder: Path, name: str) -> None:
    """B4: the original starts at step 0, without a word."""
    loop().run_loop()
    if name == "latest.pt":
        for other in [*folder.glob("*000000.pt"), *folder.glob("*000006.pt")]:
            other.unlink()
        (folder / "model000004.pt").rename(folder / name)
    again = resumed(folder, name)
    assert again.resume_step == 4 and len(again.opt.state) == 2
    torch.testing.assert_close(again.ema_params[1][0], saved(folder, "ema_0.99_000004.pt")["shift"])


def test_weights_alone_start_at_step_0_and_say_so(folder: Path) -> None:
    loop().run_loop()
    (folder / "model000006.pt").rename(folder / "best.pt")
    again = resumed(folder, "best.pt")
    assert again.resume_step == 0 and again.model.scale.weight.item() != 0.5
    assert "best.pt does not say its step" in log(folder)


def test_the_true_number_of_steps_of_an_original_file_is_the_optimizer_s(folder: Path) -> None:
    """B7: the original's model000004 holds 5 updates."""
    loop().run_loop()
    opt = saved(folder, "opt000006.pt")
    torch.save({k: opt[k] for k in ("state", "param_groups")}, folder / "opt000004.pt")
    assert resumed(folder).resume_step == 6


def test_missing_averages_and_moments_are_announced(folder: Path) -> None:
    """B4: the original replaces them in silence."""
    loop().run_loop()
    (folder / "ema_0.9_000004.pt").unlink()
    (folder / "opt000004.pt").unlink()
    again = resumed(folder)
    assert again.resume_step == 4
    assert "no ema_0.9_000004.pt beside" in log(folder) and "opt000004.pt: the optimizer starts anew" in log(folder)
    torch.testing.assert_close(again.ema_params[0], [p.detach() for p in again.master_params])


@pytest.mark.parametrize("before", [False, True])
def test_moments_cross_between_fp16_and_fp32(folder: Path, before: bool) -> None:
    loop(use_fp16=before).run_loop()
    slots = saved(folder, "opt000004.pt")["state"]
    flat = torch.cat([slots[k]["exp_avg"].flatten() for k in slots])
    again = resumed(folder, use_fp16=not before)
    assert [s["exp_avg"].shape for s in again.opt.state.values()] == [p.shape for p in again.master_params]
    torch.testing.assert_close(torch.cat([s["exp_avg"].flatten() for s in again.opt.state.values()]), flat)


def test_guided_diffusions_two_flat_moments_are_cut_up(folder: Path) -> None:
    loop(use_fp16=True).run_loop()
    opt = saved(folder, "opt000004.pt")
    (slot,) = opt["state"].values()  # by name: scale.weight with 3 dimensions, then shift with one; there the vectors come first
    parts = [{n: m if n == "step" else m[[k]].view(view) for n, m in slot.items()} for k, view in ((0, (1,)), (1, (1, 1)))]
    order = [name for name, _ in Line().named_parameters()]
    assert order == ["shift", "scale.weight"]
    three = loop(model=(three := Wider()), lr_anneal_steps=4)
    assert len(list(three.model.parameters())) == 3
    groups = [{**opt["param_groups"][0], "params": [0, 1]}]
    parts[0] = {n: m if n == "step" else torch.cat([m, m + 1]) for n, m in parts[0].items()}
    torch.save({"state": dict(enumerate(parts)), "param_groups": groups}, folder / "opt000004.pt")
    torch.save(three.model.state_dict(), folder / "model000004.pt")
    again = resumed(folder, model=Wider(), ema_rate="0.5")
    got = {name: again.opt.state[p]["exp_avg"].flatten().tolist() for name, p in again.model.named_parameters()}
    first, second = slot["exp_avg"].tolist()
    assert got == {"shift": [first], "more": [pytest.approx(first + 1)], "scale.weight": [second]}


class Wider(Line):
    """With another vector."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Parameter(torch.zeros(1))


def test_another_network_s_moments_are_refused(folder: Path) -> None:
    loop().run_loop()
    nine = {"step": torch.tensor(1.0), "exp_avg": torch.ones(9), "exp_avg_sq": torch.ones(9)}
    torch.save({"state": {0: nine}, "param_groups": [{"params": [0]}]}, folder / "opt000004.pt")
    with pytest.raises(UserError, match=r"opt000004\.pt is of another network"):
        resumed(folder)


@pytest.mark.parametrize(
    ("name", "step"),
    [("a/model000123.pt", 123), ("model5.pt", 5), ("a/ema_0.9999_010000.pt", 0), ("model_best.pt", 0), ("latest.pt", 0)],
)
def test_steps_in_names(name: str, step: int) -> None:
    assert train_util.parse_resume_step_from_filename(name) == step


# ---- what forks do


def test_find_resume_checkpoint_is_asked_each_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop().run_loop()
    monkeypatch.setattr(train_util, "find_resume_checkpoint", lambda: str(folder / "model000004.pt"))
    assert loop().resume_step == 4


@pytest.mark.parametrize("use_fp16", [False, True])
def test_overridden_methods_are_called_by_one_another(use_fp16: bool) -> None:
    calls: list[str] = []

    def watch(name: str) -> Any:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return getattr(TrainLoop, name)(self, *args, **kwargs)

        return method

    step = [
        "run_step",
        "forward_backward",
        "optimize_fp16" if use_fp16 else "optimize_normal",
        "_log_grad_norm",
        "_anneal_lr",
        "log_step",
    ]
    start = ["_load_and_sync_parameters", *(["_setup_fp16"] if use_fp16 else [])]
    state = [
        "_load_ema_parameters",
        "_state_dict_to_master_params",
        "_load_optimizer_state",
        "save",
        "_master_params_to_state_dict",
    ]
    fork = type("Fork", (TrainLoop,), {name: watch(name) for name in {*start, *step, *state}})
    first = loop(fork, use_fp16=use_fp16, lr_anneal_steps=1, ema_rate=0.9, save_interval=1)
    assert calls == start
    first.run_loop()
    save = ["save", "_master_params_to_state_dict", "_master_params_to_state_dict"]
    assert calls == [*start, *save, *step, *save]
    calls.clear()
    loop(fork, use_fp16=use_fp16, ema_rate=0.9, resume_checkpoint=f"{logger.get_dir()}/model000001.pt")
    assert calls == [*start, "_load_ema_parameters", "_state_dict_to_master_params", "_load_optimizer_state"]


def test_sampler_methods_are_called_by_one_another() -> None:
    class Fork(resample.LossAwareSampler):
        def __init__(self) -> None:
            self.heard: list[Any] = []

        def weights(self) -> np.ndarray:
            return np.array([0, 0, 3.0, 1.0, 0, 0, 0, 0])

        def update_with_all_losses(self, ts: Any, losses: Any) -> None:
            self.heard += zip(ts, losses)

    training = loop(schedule_sampler=(law := Fork()), lr_anneal_steps=2)
    training.run_loop()
    assert len(law.heard) == 8 and {t for t, _ in law.heard} <= {2, 3}
    assert all(type(t) is int and type(loss) is float for t, loss in law.heard)


def test_the_end_of_the_data_ends_the_run(folder: Path) -> None:
    loop(data=images(3), lr_anneal_steps=0).run_loop()
    assert (folder / "model000003.pt").exists() and "the data ends at step 3" in log(folder)


def test_a_run_without_an_end_says_so(folder: Path) -> None:
    loop(data=images(1), lr_anneal_steps=0).run_loop()
    assert "training goes on until it is stopped" in log(folder)


def test_conditions_reach_the_model_in_microbatches() -> None:
    seen = []

    class Conditional(Line):
        def forward(self, x: Tensor, timesteps: Tensor, **cond: Tensor) -> Tensor:
            seen.append({name: value.tolist() for name, value in cond.items()})
            return super().forward(x, timesteps)

    data = ((batch, {"y": torch.arange(4)}) for batch, _ in images())
    loop(data=data, model=Conditional(), microbatch=3, lr_anneal_steps=1).run_loop()
    assert seen == [{"y": [0, 1, 2]}, {"y": [3]}]


def test_losses_are_logged_whole_and_by_quartile() -> None:
    diffusion = script_util.create_gaussian_diffusion(steps=8)
    train_util.log_loss_dict(diffusion, torch.tensor([0, 1, 7]), {"loss": torch.tensor([1.0, 2.0, 6.0])})
    assert logger.getkvs() == {"loss": 3.0, "loss_q0": 1.5, "loss_q3": 6.0}


def test_guided_diffusions_trainer_takes_the_step_of_the_loop() -> None:
    for use_fp16 in (False, True):
        training = loop(use_fp16=use_fp16, lr_anneal_steps=0)
        trainer = fp16_util.MixedPrecisionTrainer(model=Line(), use_fp16=use_fp16, initial_lg_loss_scale=8.0)
        opt = torch.optim.AdamW(trainer.master_params, lr=0.01, weight_decay=0)
        batch, _ = next(images())
        torch.manual_seed(0)
        np.random.seed(0)
        training.run_step(batch, {})
        torch.manual_seed(0)
        np.random.seed(0)
        t, _ = training.schedule_sampler.sample(4, "cpu")
        trainer.zero_grad()
        trainer.backward(training.diffusion.training_losses(trainer.model, batch, t)["loss"].mean())
        assert trainer.optimize(opt)
        ours, loops = (
            trainer.master_params_to_state_dict(trainer.master_params),
            training._master_params_to_state_dict(training.master_params),
        )
        torch.testing.assert_close(ours, loops)
        assert not torch.equal(ours["shift"], torch.zeros(1))


# ---- several processes

TWO = """
    import os, sys, torch, numpy as np
    sys.path[:0] = [{tests!r}, {here!r}]
    torch.set_num_threads(1)
    from iddpm.interop.openai.python import dist_util, logger, resample, script_util, train_util
    from test_python_training import Line, images
    dist_util.setup_dist()
    dist_util.setup_dist()  # again does nothing
    import torch.distributed as dist
    rank = dist.get_rank()
    logger.configure({folder!r})
    torch.manual_seed(rank)
    np.random.seed(rank)
    model = Line()
    with torch.no_grad():
        model.shift.fill_(rank)  # to be levelled
    diffusion = script_util.create_gaussian_diffusion(steps=4, noise_schedule="cosine")
    law = resample.LossSecondMomentResampler(diffusion, history_per_term=2)
    def loop(**more):
        return train_util.TrainLoop(model=model, diffusion=diffusion, data=images(), batch_size=4, microbatch=2, lr=0.01,
            ema_rate="0.9", log_interval=2, save_interval=100, schedule_sampler=law, **more)
    loop(resume_checkpoint="", lr_anneal_steps=10).run_loop()
    again = loop(resume_checkpoint={folder!r} + "/model000010.pt", lr_anneal_steps=12)  # the original hangs here (B2)
    again.run_loop()
    law.update_with_local_losses(torch.arange(1 + rank), torch.full((1 + rank,), 9.0))  # and raises here (B11)
    state = torch.cat([model.scale.weight.flatten(), model.shift, *(p.flatten() for p in again.ema_params[0])]).tolist()
    open({folder!r} + f"/state{{rank}}", "w").write(f"{{state}} {{law.weights().tolist()}} {{law._warmed_up()}}")
    logger.get_current().close()
    os._exit(0)  # gloo's threads now and then abort an interpreter that ends, after all is done
"""


@pytest.fixture(scope="module")
def two(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """What two processes say of themselves."""
    folder, here = tmp_path_factory.mktemp("two"), Path(__file__).parent
    program = textwrap.dedent(TWO.format(tests=str(here.parent), here=str(here), folder=str(folder / "run")))
    launcher.start(said=folder / "said", processes=2, program=program).succeed()
    return folder / "run", [(folder / "run" / f"state{k}").read_text() for k in range(2)]


def test_two_processes_on_cpus_hold_the_same_weights_after_training_and_resuming(two: tuple[Path, list[str]]) -> None:
    """B2, B10: gradients are averaged by gloo; the resumed run does not hang."""
    zero, one = two[1]
    assert zero == one, "weights, averages and the law of t"
    assert zero.endswith("True"), "the law is warm, so its weights say something"


def test_two_processes_write_the_files_of_one(two: tuple[Path, list[str]]) -> None:
    """B23: rank 0 the checkpoints and the table, the others a log of their own."""
    names = {p.name for p in two[0].iterdir()}
    assert {"log.txt", "log-rank001.txt", "progress.csv", "model000012.pt", "ema_0.9_000012.pt", "opt000012.pt"} <= names
    header, first, *_ = (two[0] / "progress.csv").read_text().splitlines()
    assert dict(zip(header.split(","), first.split(",")))["samples"] == "8", "those of both"
