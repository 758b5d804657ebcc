"""`--preset auto` on real images: what it sees of them, when it applies, and that its choice is kept."""

import json

import numpy as np
import pytest
from PIL import Image

import iddpm
from conftest import TINY, flags, torchrun
from iddpm.cli.main import main
from iddpm.config import Config
from iddpm.errors import UserError
from iddpm.training import auto

SHORT = dict(steps=2, device="cpu", sample_interval=0, num_channels=32, precision="fp32", batch_size=4, sampling_steps=3)


def config_of(run) -> Config:
    return Config.from_json((run / "config.json").read_text())


@pytest.fixture(autouse=True)
def a_device_of_known_speed(monkeypatch):
    monkeypatch.setattr(auto, "_gflops", lambda device: 100.0)


def test_it_sees_number_size_colour_and_classes(pictures, tmp_path):
    assert auto._look(str(pictures), {}, None) == dict(
        images=22, height=8, width=8, alike=True, channels=1, classes=3, smallest=7
    )
    for k, size in enumerate([(40, 30), (64, 48), (100, 90)]):
        Image.fromarray(np.full((size[1], size[0], 3), (k, 200, 3), np.uint8)).save(tmp_path / f"{k}.png")
    found = auto._look(str(tmp_path), {}, None)
    assert (found["height"], found["width"], found["alike"], found["channels"], found["classes"]) == (48, 64, False, 3, 0)


def test_a_data_set_of_a_programs_own_is_seen_as_well():
    own = [(np.zeros((12, 16, 3), np.uint8) + np.arange(3, dtype=np.uint8), k % 2) for k in range(10)]
    found = auto._look("", {}, own)
    assert found == dict(images=10, height=12, width=16, alike=True, channels=3, classes=2, smallest=5)
    grey = [np.zeros((12, 16, 3), np.uint8)] * 3  # arrays are taken as they are, grey or not; files are converted
    assert (auto._look("", {}, grey)["channels"], auto._look("", {}, [Image.fromarray(grey[0])])["channels"]) == (3, 1)
    assert auto._look("", {}, [np.zeros((5, 12, 16), np.float32)])["channels"] == 5


@pytest.mark.parametrize("label", [-1, "cat", None, 1.5])
def test_labels_that_are_no_numbers_are_refused_in_one_line(label):
    with pytest.raises(UserError, match="image 1 of the data set has the label"):
        auto._look("", {}, [(np.zeros((8, 8), np.uint8), 0), (np.zeros((8, 8), np.uint8), label)])
    with pytest.raises(UserError, match="has the shape"):
        auto._look("", {}, [np.zeros(8, np.uint8)])


def test_a_preset_beside_it_is_read_as_if_it_were_given(pictures, tmp_path, capsys):
    assert main(["train", str(pictures), "--run", str(tmp_path / "r"), "--preset", "auto,digits", *flags(**SHORT)]) == 0
    config = config_of(tmp_path / "r")
    assert (config.train.lr_decay, config.train.lr_anneal_steps, config.diffusion.learn_sigma) == (0, -1, True)
    assert "--lr " not in capsys.readouterr().out


def test_augment_alone_is_no_recipe():
    assert auto.applies("", {"augment": 0.0}) and not auto.applies("", {"num_channels": 32})


def test_a_bare_command_has_its_recipe_chosen_told_and_kept(pictures, tmp_path, capsys):
    run = tmp_path / "r"
    given = {k: v for k, v in SHORT.items() if k != "num_channels"}
    assert main(["train", str(pictures), "--run", str(run), *flags(**given)]) == 0
    told, config = capsys.readouterr().out, config_of(run)
    assert config.preset == "auto" and config.diffusion.parametrization == "v" and config.train.optimizer == "muon"
    assert (config.model.image_size, config.model.image_channels, config.train.batch_size) == ("8", 1, 4)
    assert "--image_size 8 --image_channels 1  (all of the 22 images have 8x8 pixels)" in told
    assert main(["train", "--run", str(run), "--steps", "3"]) == 0
    assert config_of(run).updated({"steps": 2}).flat() == config.flat()


def test_it_leaves_commands_alone_that_are_a_recipe_themselves(pictures, tmp_path):
    assert main(["train", str(pictures), "--run", str(tmp_path / "r"), *flags(**dict(TINY, steps=1))]) == 0
    assert config_of(tmp_path / "r").diffusion.parametrization == "eps"
    for preset, given in (("none", {}), ("digits", {}), ("", {"noise_schedule": "flow"}), ("", {"patch_size": 2})):
        assert not auto.applies(preset, given)
    assert auto.applies("", {"lr": 1e-3, "image_size": "32", "class_cond": True, "dropout": 0.2})


def test_flags_of_the_network_win_where_auto_is_asked_for(pictures, tmp_path):
    assert main(["train", str(pictures), "--run", str(tmp_path / "r"), "--preset", "auto", *flags(**SHORT)]) == 0
    config = config_of(tmp_path / "r")
    assert (config.model.num_channels, config.diffusion.parametrization) == (32, "v")


def test_another_method_is_put_on_top(pictures, tmp_path):
    assert main(["train", str(pictures), "--run", str(tmp_path / "r"), "--preset", "auto,edm", *flags(**SHORT)]) == 0
    config = config_of(tmp_path / "r")
    assert (config.diffusion.noise_schedule, config.model.image_size, config.sample.solver) == ("ve", "8", "heun")


def test_contradictions_are_refused_before_the_device_is_timed(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(auto, "_gflops", lambda device: pytest.fail("the device was timed"))
    assert main(["train", str(pictures), "--run", str(tmp_path / "r"), "--time", "1h", "--steps", "5"]) == 2
    assert "give one" in capsys.readouterr().err and not (tmp_path / "r").exists()


def test_a_library_call_has_its_recipe_chosen_as_well(pictures, tmp_path):
    run = iddpm.train(pictures, run=tmp_path / "r", **{k: v for k, v in SHORT.items() if k != "num_channels"})
    assert config_of(run).preset == "auto"


@pytest.mark.slow
def test_two_processes_agree_on_the_recipe(pictures, tmp_path):
    process = torchrun(2, "train", pictures, "--run", tmp_path / "r", "--steps", 2, "--device", "cpu", "--sample_interval", 0)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert json.loads((tmp_path / "r" / "config.json").read_text())["preset"] == "auto"
