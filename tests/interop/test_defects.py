"""The defects of the originals, by number, and what their tests share.

The tests are test_bNN_... in test_defects_b01_b09.py, test_defects_b12_b17.py, test_defects_b18_b20.py,
test_defects_b21_b26.py and, of several
processes (B2, B3, B10, B11, B23), test_defects_processes.py.

A test made by `red_with` runs as the code is, and again with a rule of the original's put back, when it must fail.
"""

import csv
import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import flags
from iddpm.cli.main import main
from iddpm.config import Config
from iddpm.data import Order
from iddpm.data.batches import make_batch
from iddpm.interop.openai.python import logger
from iddpm.store.log import Meter
from iddpm.training import loop as train
from iddpm.training.state import TrainState

DEFECTS = {
    1: "np.int stops the loss-aware law of t, and its history is lost on resume",
    2: "resuming on several processes hangs",
    3: "a whole checkpoint goes through one message",
    4: "the step is read off the file's name; missing siblings are replaced in silence",
    5: "loss scale, random numbers, data order and the law's history are not resumed, logs are truncated",
    6: "--lr and --weight_decay are ignored on resume",
    7: "names are off by one, a resumed run overwrites its source, writes are not atomic",
    8: "microbatches change the gradient",
    9: "a NaN is not skipped as a step, the loss scale has no floor, the run goes on for ever",
    10: "processes on CPUs do not average their gradients",
    11: "the loss-aware law sends rows of unequal length",
    12: "too few images, or none, spin for ever",
    13: "labels: by file name alone, numbered anew in each folder, 1000 drawn whatever was trained",
    14: "palettes, transparency, 16-bit grey, orientation and other formats are misread",
    15: "samples are truncated, not rounded, and all held in memory to the end",
    16: "super-resolution: no sigma_small, no DDIM, no labels, base samples in a cycle, two sizes",
    17: "bits/dim: images twice or never, means of means, printed and not kept",
    18: "three image sizes, one first width, attention that is silently left out",
    19: "recomputed activations see another dropout mask",
    20: "small ones: pooling, features, one step, few steps, ddimN, missing gradients and biases, TensorBoard",
    21: "mpi4py is imported everywhere, dependencies are undeclared, the wheel is empty",
    22: "8 GPUs per node, the host's name, a port that may be taken",
    23: "under torchrun or Slurm each process is alone, in the same files",
    24: "no end but that of the annealing; no validation, samples, clipping, warm-up",
    25: "a synchronisation for each image and parameter",
    26: "a recipe repeats a flag and names another batch than its file; a dead link",
}


def red_with(
    *old: Callable[[pytest.MonkeyPatch], None], raises: Any = AssertionError, says: str | None = None
) -> Callable[..., Any]:
    """Also run a test with each of these rules put back, when it must raise, with a message that `says` is found in."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(test).parameters.values())

        @functools.wraps(test)
        def both(rule: Callable[[pytest.MonkeyPatch], None] | None, monkeypatch: pytest.MonkeyPatch, **fixtures: Any) -> None:
            if "monkeypatch" in (p.name for p in own):
                fixtures["monkeypatch"] = monkeypatch
            if rule is None:
                return test(**fixtures)
            rule(monkeypatch)
            with pytest.raises(raises, match=says) as caught:
                test(**fixtures)
            print(f"\n{test.__name__}, {rule.__name__}: {caught.type.__name__}: {' '.join(str(caught.value).split())[:200]}")
            return None

        names = [p for p in inspect.signature(both, follow_wrapped=False).parameters.values() if p.name != "fixtures"]
        shared = [p for p in own if p.name != "monkeypatch"]
        both.__signature__ = inspect.Signature([*names, *shared])  # type: ignore[attr-defined]
        return pytest.mark.parametrize("rule", [None, *old], ids=["mended", *(f.__name__ for f in old)])(both)

    return decorate


TINY = dict(
    image_size=8, num_channels=16, num_res_blocks=1, attention_resolutions="4", num_heads=2, learn_sigma=True,
    diffusion_steps=20, noise_schedule="cosine", device="cpu",
)  # fmt: skip
TRAIN = dict(batch_size=4, lr=1e-3, save_interval=2, log_interval=1, ema_rate="0.9", steps=4)


def command(folder: Path, name: str, **settings: object) -> int:
    """One of the original's commands, with its log in a folder; returns the exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_LOGDIR", str(folder))
        for which in ("CURRENT", "DEFAULT"):  # of another test, whose stdout is closed
            patch.setattr(logger.Logger, which, None)
        return main([name, *flags(**settings)])


def held(folder: Path, step: int, kind: str = "model") -> dict[str, Tensor]:
    """The weights of modelSTEP.pt, or of another kind."""
    weights: dict[str, Tensor] = torch.load(folder / f"{kind}{step:06d}.pt", weights_only=True)
    return weights


def rows(folder: Path) -> list[dict[str, str]]:
    """progress.csv."""
    return list(csv.DictReader((folder / "progress.csv").read_text().splitlines()))


def one_step(config: Config, data: Any, spoil: float = 1.0) -> tuple[TrainState, TrainState, dict[str, float]]:
    """States before and after a step on the data's first batch, none of whose weights are 0, and what was logged."""
    states = [TrainState(config, torch.device("cpu")) for _ in range(2)]
    for state in states:
        torch.manual_seed(1)
        for p in state.params.values():
            p.data.normal_(0, 0.1)
        for average in state.ema.averages.values():
            for name, value in average.items():
                value.copy_(state.params[name].detach())
    before, state = states
    batch, meter = make_batch(config, data, Order(len(data), 0), 0, 0), Meter()
    batch.x0[1:2] *= spoil
    train.train_step(state, config, train.method_of(config, state.net), batch, meter)
    return before, state, meter.read()


HERE = Path(__file__).parent


def test_every_defect_has_its_tests():
    texts = [path.read_text() for path in sorted(HERE.glob("test_defects_*.py"))]
    numbers = [[int(n) for n in re.findall(r"^def test_b(\d\d)_", text, re.M)] for text in texts]
    assert all(found == sorted(found) for found in numbers)
    assert {n for found in numbers for n in found} == set(DEFECTS)


def test_the_guide_for_migrating_names_every_defect():
    guide = (HERE.parents[1] / "docs" / "guides" / "migrating.md").read_text()
    assert {int(n) for n in re.findall(r"\bB(\d+)\b", guide)} == set(DEFECTS)
