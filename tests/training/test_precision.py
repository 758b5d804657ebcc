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
    monkeypatch.setattr(precision, "HOPELESS", float("inf"))  # whatever this machine has
    config, (line,) = precision.settle(Config(), torch.device("cpu"))
    assert config.train.precision == chosen
    assert f"precision: {chosen} " in line and f"bf16 takes {times[1] / times[0]:.2f} of the time" in line


def test_what_is_emulated_is_not_timed(monkeypatch):
    monkeypatch.setattr(precision, "HOPELESS", 0.0)
    monkeypatch.setattr(precision, "measured", lambda *args: pytest.fail("timed"))
    config, (line,) = precision.settle(Config(), torch.device("cpu"))
    assert (config.train.precision, line) == ("fp32", "precision: fp32 (this device has no faster one)")


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


@pytest.mark.parametrize(("settings", "size"), [
    (dict(image_size="1024", channel_mult="1,1"), "64x64"), (dict(image_size="96x160", channel_mult="1,1"), "24x40"),
    (dict(image_size="256", channel_mult="1,1,1,1,1,1,1"), "128x128"), (dict(image_size="80", channel_mult="1,1,1,1,1"), "80x80"),
])  # fmt: skip
def test_large_images_are_timed_small_as_far_as_the_network_takes_them(monkeypatch, settings, size):
    seen = []
    real = precision.example
    monkeypatch.setattr(
        precision, "example", lambda config, *rest: (seen.append(config.model.image_size), real(config, *rest))[1]
    )
    config = Config().updated({**SMALL, "num_channels": 8, "attention_resolutions": "", **settings})
    assert precision.measured(config, torch.device("cpu"), ["fp32"])["fp32"] > 0
    assert seen[-1] == size


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
