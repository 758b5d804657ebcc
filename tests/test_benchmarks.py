"""The benchmarks keep running: all can be imported, and the contestants do what they are asked, in small."""

import argparse
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from inception_oracles import ORACLES

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Imports a benchmark with its folder in the path, as when it is run; afterwards its modules are forgotten."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before, path = set(sys.modules), list(sys.path)

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
        assert spec and spec.loader
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if Path(str(getattr(sys.modules[name], "__file__", ""))).parent == BENCHMARKS:
            del sys.modules[name]


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_a_benchmark_can_be_imported_and_has_a_command(name: str, script) -> None:
    module = script(name)
    assert module.__doc__
    assert name == "common" or callable(module.main)


@pytest.mark.parametrize("name", ["ours", "diffusers"])
def test_a_contestant_does_what_it_is_asked(name: str, script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "diffusers":
        if not (ORACLES / "diffusers").exists():
            pytest.skip("make .venv/oracles/ready")
        monkeypatch.syspath_prepend(str(ORACLES))
    contestants = script("contestants")
    size = contestants.Size(channels=8, blocks=1, batch=2)
    made = contestants.CONTESTANTS[name](size)
    before = [p.detach().clone() for p in made.net.parameters()]
    made.step()
    after = [p.detach().clone() for p in made.net.parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(before, after))
    made.save(tmp_path)
    made.step()
    made.step()
    assert any(not torch.equal(a, b) for a, b in zip(after, made.net.parameters()))
    if name == "ours":  # the others import torchvision to go on
        made.restore(tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(after, made.net.parameters()))
    made.sample(2)
    counted = contestants.facts(made)
    assert counted["weights"] == sum(p.numel() for p in made.net.parameters())
    weights = [m.weight for m in made.net.modules() if isinstance(m, torch.nn.Conv2d)]
    assert counted["flops"] > 3 * 2 * size.batch * sum(w.numel() for w in weights)  # at one pixel: forward and twice backward


def test_the_bound_of_ours_and_of_the_plain_loop_take_as_many_calls(script) -> None:
    contestants = script("contestants")
    made = contestants.ours(contestants.Size(channels=8, blocks=1, batch=2))
    calls = []
    made.net.register_forward_hook(lambda *_: calls.append(1))
    made.sample(3)
    assert len(calls) == 3
    total = made.nll(4)
    assert len(calls) == 7 and total.shape == (2,)


@pytest.mark.slow
def test_all_measures_print_their_tables(script, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    speed = script("speed")
    monkeypatch.setattr(speed, "convolution_peak", lambda: {"fp32": 100.0, "bf16": 200.0})
    tiny = [
        "--only",
        "ours",
        "--channels",
        "8",
        "--batch",
        "2",
        "--rounds",
        "1",
        "--images",
        "4",
        "--what",
        "step,sample,nll,load,store",
    ]
    monkeypatch.setattr(sys, "argv", ["speed.py", *tiny])
    speed.main()
    printed = capsys.readouterr().out
    assert printed.count("| ours |") == 7
    for line in ("A step of training", "Sampling", "Likelihood", "opened and read once", "read once more", "Saving", "Restoring"):
        assert f"\n{line}" in printed or line in printed
    assert f"torch {torch.__version__}" in printed


def test_contestants_take_turns_and_ratios_are_by_the_medians(script) -> None:
    common, order = script("common"), []

    def call(name: str, seconds: list[float]):
        left = iter(seconds)
        return lambda: order.append(name) or next(left)

    times = common.interleaved({"a": call("a", [9, 4, 2, 6]), "b": call("b", [9, 1, 2, 2])}, rounds=3)
    assert order == list("abababab")
    assert times == {"a": [4, 2, 6], "b": [1, 2, 2]}
    assert common.ratio(times["a"], times["b"]) == "2.00 (1.00 to 4.00)"


def test_a_contestant_that_ends_early_is_told_with_what_it_said(script) -> None:
    common = script("common")
    worker = common.Worker([sys.executable, "-c", "import sys; print('chatter'); sys.exit('no such thing')"])
    with pytest.raises(RuntimeError, match="no such thing"):
        worker.answer()


def test_quality_scores_ours_once_and_goes_on(script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    quality = script("quality")
    trained = []

    def train(name: str, args: object, seed: int, folder: Path) -> dict[str, object]:
        trained.append((name, seed))
        found = dict(kd=0.5 + seed + 0.1 * (name == "diffusers"), scores={}, steps=10, train_seconds=60.0)
        return found | dict(about=quality.about(name, args, seed))

    monkeypatch.setattr(quality, "result", train)
    monkeypatch.setattr(quality, "lacks", lambda name, args: "a checkout" * (name == "original"))

    def run(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", ["quality.py", "data", "--time", "1m", "--out", str(tmp_path), *more])
        quality.main()
        return capsys.readouterr().out

    assert "original is left out: it needs a checkout" in run("--only", "ours,original,diffusers")
    printed = run("--seeds", "0,1", "--only", "diffusers,ours")
    assert trained == [("ours", 0), ("diffusers", 0), ("diffusers", 1), ("ours", 1)]
    assert "| ours | 1.000 | 0.707 | 0.500, 1.500 | 10 | 1.0 |\n| diffusers | 1.100 |" in printed  # best first
    run("--time", "2m", "--only", "ours")
    assert trained[-1] == ("ours", 0)  # another time is another result


def test_what_was_drawn_is_scored_again_but_not_trained_again(script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quality, trained, scores = script("quality"), [], iter([RuntimeError("killed"), 0.7, 0.6, 0.5])

    def train(args: object, seed: int, folder: Path) -> dict[str, object]:
        trained.append(seed)
        (folder / "ema.npz").touch()
        (folder / "raw.npz").touch()
        return dict(steps=3)

    def score(images: Path, args: object) -> float:
        if isinstance(found := next(scores), Exception):
            raise found
        return found

    monkeypatch.setattr(quality, "ours", train)
    monkeypatch.setattr(quality, "score", score)
    args = argparse.Namespace(time="1m", samples=8, calls=2, ours="train", original_flags="", data="data")
    with pytest.raises(RuntimeError, match="killed"):
        quality.result("ours", args, 0, tmp_path / "ours")
    found = quality.result("ours", args, 0, tmp_path / "ours")
    assert found["kd"] == 0.6 and found["scores"] == {"ema": 0.7, "raw": 0.6} and found["steps"] == 3
    assert trained == [0]
    args.ours = "train --preset edm"
    monkeypatch.setattr(quality, "score", lambda images, args: 0.1)
    quality.result("ours", args, 0, tmp_path / "ours")
    assert trained == [0, 0]  # of another command, nothing is taken over


@pytest.mark.parametrize("text", ["20", "m", "", "20d"])
def test_what_is_no_time_is_refused(text: str, script) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no time"):
        script("quality").seconds(text)
