"""Sampling: image i depends on its seed alone; a killed job goes on; every format holds the same pictures."""

import time

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import SLOW
from iddpm.cli.main import main
from iddpm.config import Draw
from iddpm.errors import UserError
from iddpm.sampling.draw import images as images_of
from iddpm.sampling.draw import painter
from iddpm.sampling.images import as_pixels
from iddpm.sampling.job import asked
from iddpm.sampling.job import job as job_of
from iddpm.sampling.open import restore
from iddpm.sampling.sheets import grid
from iddpm.store.weights import read_weights

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def net(run):
    return restore(read_weights(run), CPU)


def draw(config, net, job, batch_size=64):
    return np.concatenate(list(images_of([painter(config, net, CPU)], job, batch_size)))


def test_rounding_brings_every_level_back():
    levels = torch.arange(256.0)
    x = (levels / 127.5 - 1).reshape(1, 1, 16, 16)
    assert np.array_equal(as_pixels(x).flatten(), np.arange(256))
    assert as_pixels(torch.full((1, 1, 1, 1), 9.0)).item() == 255


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_an_image_depends_on_its_seed_not_on_the_batch(config, net, batch_size):
    job = job_of(config, range(8))
    whole, split = draw(config, net, job), draw(config, net, job, batch_size)
    assert np.abs(whole.astype(int) - split).max() <= 1
    few = draw(config, net, job_of(config, [6, 2]))
    assert np.abs(few.astype(int) - whole[[6, 2]]).max() <= 1


def test_different_seeds_give_different_images(config, net):
    drawn = draw(config, net, job_of(config, range(6), "disc"))
    assert len({image.tobytes() for image in drawn}) == 6


def test_labels_go_by_name_or_number_and_repeat_by_seed(config):
    assert job_of(config, [0, 1, 5], "disc,0").labels == [1, 0, 0]
    assert job_of(config, range(4)).labels == [0, 1, 2, 0]
    with pytest.raises(UserError, match="knows across, disc, down"):
        job_of(config, [0], "square")
    with pytest.raises(UserError, match="0 to 2"):
        job_of(config, [0], "3")


def test_a_class_that_no_seed_takes_is_told(config, capsys):
    task = asked(Draw(labels="disc,down,across", seeds="3,6"), config, None)
    assert task.labels == [1, 1] and "no image of down, across: seed s takes" in capsys.readouterr().out
    asked(Draw(labels="disc,down", num_samples=2), config, None)
    assert not capsys.readouterr().out


def test_labels_for_a_model_without_classes_are_refused(config):
    with pytest.raises(UserError, match="without classes"):
        job_of(config.updated(dict(class_cond=False)), [0], "disc")


def test_png_npz_and_folder_hold_the_same_images(run, config, net, tmp_path, capsys):
    for out in ("a.npz", "a.png", "folder"):
        assert main(["sample", str(run), "--seeds", "3-8", "--out", str(tmp_path / out), "--device", "cpu"]) == 0
        assert str(tmp_path / out) in capsys.readouterr().out
    expected = draw(config, net, job_of(config, range(3, 9)))
    with np.load(tmp_path / "a.npz") as file:
        assert np.array_equal(file["arr_0"], expected)
        assert file["arr_0"].dtype == np.uint8
        assert file["arr_1"].tolist() == [0, 1, 2, 0, 1, 2]
    names = sorted(p.name for p in (tmp_path / "folder").glob("*.png"))
    assert names == sorted(f"{config.data.classes[s % 3]}_{s:06d}.png" for s in range(3, 9))
    for s in range(3, 9):
        held = np.asarray(Image.open(tmp_path / "folder" / f"{config.data.classes[s % 3]}_{s:06d}.png"))
        assert np.array_equal(held, expected[s - 3, :, :, 0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "a.png", "folder"]


def test_a_grid_has_a_separated_row_for_each_class():
    images = np.zeros((6, 8, 8, 3), np.uint8) + np.array([200, 7, 7], np.uint8)
    sheet = np.asarray(grid(images, [0, 1, 2, 0, 1, 2], ("across", "disc", "down")))
    cells = (sheet == [200, 7, 7]).all(-1)
    rows, columns = cells.any(1), cells.any(0)
    assert (np.diff(rows.astype(int)) == 1).sum() == 3
    assert (np.diff(columns.astype(int)) == 1).sum() == 2
    margin = sheet[:, : int(np.argmax(columns))]
    assert all((margin[band] < 100).any() for band in np.array_split(np.arange(len(sheet)), 3)), "each row has its name"


@pytest.mark.parametrize("out", ["killed.npz", SLOW("killed")])
def test_a_killed_job_goes_on_and_ends_with_exactly_its_images(launcher, run, tmp_path, out):
    command = ["sample", run, "--seeds", "0-19", "--batch_size", "1", "--sampling_steps", "20", "--device", "cpu", "--out"]
    process, deadline = launcher.start(*command, tmp_path / out, said=tmp_path / "said"), time.monotonic() + 60

    def written() -> int:
        pattern = "killed/*_*.png" if out == "killed" else "killed.npz.partial/[0-9]*.npy"  # batches of one image
        return len(list(tmp_path.glob(pattern)))

    while written() < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    had = written()
    assert 4 <= had < 20
    assert main([*map(str, command), str(tmp_path / out)]) == 0
    assert main([*map(str, command), str(tmp_path / "whole.npz")]) == 0
    with np.load(tmp_path / "whole.npz") as file:
        whole = file["arr_0"]
    if out == "killed":
        pictures = sorted((tmp_path / out).glob("*.png"), key=lambda p: p.stem.split("_")[1])
        assert np.array_equal(np.stack([np.asarray(Image.open(p)) for p in pictures]), whole[..., 0])
    else:
        with np.load(tmp_path / out) as file:
            assert np.array_equal(file["arr_0"], whole)


def test_a_folder_that_holds_something_else_is_left_alone(run, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert main(["sample", str(run), "--out", str(tmp_path / "mine"), "--device", "cpu"]) == 2
    assert "already holds something else" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "flags", [["--sampling_steps", "ddim5", "--solver", "ddim", "--eta", "0.5"], ["--sampling_steps", "1"], []]
)
def test_sampling_needs_no_flag_and_takes_many(run, flags, tmp_path):
    assert main(["sample", str(run), "--num_samples", "2", "--out", str(tmp_path / "x.png"), "--device", "cpu", *flags]) == 0
