"""Batches: what augments them, and what is held out of them."""

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import TINY, flags
from iddpm.cli.main import main
from iddpm.data import Images, Order
from iddpm.data.batches import make_batch, source_size
from iddpm.store.log import read_rows


def test_a_random_crop_shows_four_fifths_to_all_of_each_side(config, tmp_path):
    """Of a ramp from left to right, a window of share f holds a share f of the range; its place is anywhere."""
    ramp = np.tile(np.linspace(0, 255, 40).round().astype(np.uint8), (40, 1))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    config = config.updated(dict(image_size="32", random_crop=True, class_cond=False, batch_size=400))
    assert source_size(config) == (40, 40)
    data = Images.open(tmp_path, source_size(config), 1)
    x = make_batch(config, data, Order(1, 0), 0, 0).x0
    assert x.shape == (400, 1, 32, 32)
    slope = (x[:, 0, 0, 24] - x[:, 0, 0, 8]) / 2 * 2 * 39 / 40  # of the whole range, over the width of the window
    assert 0.78 < slope.min() < 0.82
    assert 0.98 < slope.max() < 1.02
    middle = (x[:, 0, 0, 15:17].mean(1) + 1) / 2
    assert middle.min() < 0.43 and middle.max() > 0.57


def test_a_batch_depends_on_the_step_and_place_alone(config, data):
    config = config.updated(dict(random_flip=True))
    one, again, other = (make_batch(config, data, Order(len(data), 0), step, 12) for step in (3, 3, 4))
    assert torch.equal(one.x0, again.x0) and torch.equal(one.eps, again.eps)
    assert not torch.equal(one.eps, other.eps)


@pytest.mark.parametrize("task", ["images", "classify"])
def test_held_out_images_are_measured_and_change_nothing(task, pictures, tmp_path):
    settings = dict(TINY, class_cond=True, num_head_channels=8, dropout=0.1)
    settings |= dict(task=task, learn_sigma=False) if task == "classify" else {}
    for name, extra in dict(plain={}, watched=dict(validation_interval=2)).items():
        if extra:
            held_out = tmp_path / "held_out"
            for kind in ("across", "disc", "down"):
                (held_out / kind).mkdir(parents=True)
                Image.fromarray(np.zeros((8, 8), np.uint8)).save(held_out / kind / "0.png")
            extra["validation"] = held_out
        assert main(["train", str(pictures), "--run", str(tmp_path / name), *flags(**settings, **extra)]) == 0
    plain, watched = (read_rows(tmp_path / name) for name in ("plain", "watched"))
    assert [r["loss"] for r in plain] == [r["loss"] for r in watched]
    assert ["val_loss" in r for r in watched] == [False, True, False, True]
    assert ("val_acc@1" in watched[1]) == (task == "classify")


def test_held_out_images_must_be_held_out(pictures, tmp_path, capsys):
    argv = ["train", str(pictures), "--validation", str(pictures), "--run", str(tmp_path / "r"), *flags(**TINY)]
    assert main(argv) == 2
    assert "held-out" in capsys.readouterr().err


def test_the_originals_labels_are_prefixes_where_all_have_one_else_folders(tmp_path):
    for name in ("x/cat_1.png", "x/dog_1.png", "y/dog_2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / name)
    data = Images.open(tmp_path, (8, 8), 1, labels="original")
    assert data.classes == ("cat", "dog") and data.labels.tolist() == [0, 1, 1]
    assert "underscore" in data.describe()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "y" / "bird.png")
    data = Images.open(tmp_path, (8, 8), 1, labels="original")
    assert data.classes == ("x", "y") and "sub-folder" in data.describe()
