"""Models of 16 bits draw 16 bits, into files and into arrays."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import TINY, flags
from iddpm.cli.main import main
from iddpm.config import Which
from iddpm.measure.image_sets import open_images
from iddpm.sampling import edit
from iddpm.sampling.open import open_weights

NOISE = np.random.default_rng(0).integers(0, 2**16, (12, 8, 8, 1), np.uint16)


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> Path:
    """A run on grey images of 16 bits."""
    folder = tmp_path_factory.mktemp("deep")
    np.save(folder / "x.npy", NOISE)
    settings = TINY | dict(bit_depth="16", class_cond=False, steps=2)
    assert main(["train", str(folder / "x.npy"), "--run", str(folder / "r"), *flags(**settings)]) == 0
    return folder / "r"


def drawn(run: Path, out: Path, count: int = 3) -> Path:
    assert main(["sample", str(run), *flags(num_samples=count, sampling_steps=2, out=out)]) == 0
    return out


def test_files_hold_all_bits(deep, tmp_path):
    pixels = np.load(drawn(deep, tmp_path / "a.npz"))["arr_0"]
    assert pixels.dtype == np.uint16 and (pixels % 257).any()  # finer than 8 bits
    folder = drawn(deep, tmp_path / "pngs")
    (folder / "000002.png").unlink()
    drawn(deep, folder)  # one is drawn again
    for k, file in enumerate(sorted(folder.glob("*.png"))):
        np.testing.assert_array_equal(np.asarray(Image.open(file)), pixels[k, ..., 0])
    assert np.asarray(Image.open(drawn(deep, tmp_path / "sheet.png"))).dtype == np.uint8


def test_they_are_measured_at_8_bits_which_is_told(deep, tmp_path, capsys):
    file = drawn(deep, tmp_path / "a.npz", count=12)
    pixels = np.load(file)["arr_0"][[3, 1], ..., 0]
    np.testing.assert_array_equal(open_images(str(file)).take([3, 1])[:, 0], np.rint(pixels / 257).astype(np.uint8))
    assert "16 bits (0 to 65535), measured at 8" in capsys.readouterr().out


def test_an_edit_keeps_what_a_mask_leaves(deep):
    opened = open_weights(deep, Which(device="cpu"))
    mask = np.arange(64).reshape(8, 8) < 32
    found = edit.variations(opened.config, opened.net, opened.device, NOISE[0], [0, 1], None, 0.8, mask)
    assert found.dtype == np.uint16 and np.abs(found[:, 4:].astype(int) - NOISE[0, 4:]).max() <= 1
    assert (found[0, :4] != found[1, :4]).any()


def test_a_png_of_colours_would_lose_them(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.repeat(NOISE, 3, axis=3))
    settings = TINY | dict(bit_depth="16", class_cond=False, steps=1, image_channels=3)
    assert main(["train", str(tmp_path / "x.npy"), "--run", str(tmp_path / "r"), *flags(**settings)]) == 0
    assert main(["sample", str(tmp_path / "r"), *flags(num_samples=2, out=tmp_path / "pngs")]) == 2
    assert "a PNG of 16 bits is written of grey images alone: end it in .npz" in capsys.readouterr().err


def test_two_processes_draw_what_one_does(deep, launcher, tmp_path):
    whole = np.load(drawn(deep, tmp_path / "one.npz", count=5))["arr_0"]
    two = flags(num_samples=5, sampling_steps=2, batch_size=2, out=tmp_path / "two.npz")
    launcher.start("sample", deep, *two, said=tmp_path / "said", processes=2).succeed()
    np.testing.assert_array_equal(np.load(tmp_path / "two.npz")["arr_0"], whole)
