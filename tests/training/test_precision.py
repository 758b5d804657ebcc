"""The arithmetic that a run chooses for itself: timed once, said, kept."""

import json

import pytest
import torch

from conftest import TINY, flags
from iddpm.cli.main import main
from iddpm.config import Config
from iddpm.training import precision

SMALL = {name: value for name, value in TINY.items() if name != "precision"}


@pytest.mark.parametrize(("times", "chosen"), [((1.0, 0.5), "bf16"), ((1.0, 0.95), "fp32"), ((0.5, 1.0), "fp32")])
def test_another_is_taken_where_it_is_faster_by_more_than_a_tenth(monkeypatch, times, chosen):
    monkeypatch.setattr(precision, "measured", lambda config, device, names: dict(zip(names, times)))
    config, (line,) = precision.settle(Config(), torch.device("cpu"))
    assert config.train.precision == chosen
    assert chosen in line and f"fp32 {1000 * times[0]:.3g} ms, bf16 {1000 * times[1]:.3g} ms" in line


def test_a_precision_that_is_given_is_not_timed(monkeypatch):
    monkeypatch.setattr(precision, "measured", lambda *args: pytest.fail("timed"))
    given = Config().updated({"precision": "bf16"})
    assert precision.settle(given, torch.device("cpu")) == (given, [])


def test_the_time_is_of_the_network_that_is_trained_and_leaves_randomness_alone():
    config = Config().updated(SMALL)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    seconds = precision.measured(config, torch.device("cpu"), ["fp32", "bf16"])
    assert torch.equal(before, torch.get_rng_state())
    assert set(seconds) == {"fp32", "bf16"} and all(0 < s < 5 for s in seconds.values())
    wide = precision.measured(config.updated({"num_channels": 128}), torch.device("cpu"), ["fp32"])
    assert wide["fp32"] > 3 * seconds["fp32"]  # 64 times the work


def test_a_run_keeps_what_it_chose_when_it_goes_on(pictures, tmp_path, capsys, monkeypatch):
    command = ["train", str(pictures), "--run", str(tmp_path / "r"), *flags(**SMALL)]
    assert main(command) == 0
    assert "precision: " in capsys.readouterr().out
    stored = json.loads((tmp_path / "r" / "config.json").read_text())["train"]["precision"]
    assert stored in ("fp32", "bf16")
    monkeypatch.setattr(precision, "measured", lambda *args: pytest.fail("timed again"))
    for more in ([], ["--precision", "auto"]):
        assert main([*command, "--steps", "5", *more]) == 0
        assert json.loads((tmp_path / "r" / "config.json").read_text())["train"]["precision"] == stored
