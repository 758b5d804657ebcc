"""Editing: what a mask keeps, how much a strength leaves, what lies between two images, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import TINY, flags
from iddpm.cli.edit import _mask
from iddpm.cli.main import main
from iddpm.config import Config, Which
from iddpm.sampling.edit import noise_of, slerp, variations
from iddpm.sampling.open import open_weights
from iddpm.store.remote import place

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def opened(run):
    return open_weights(place(str(run)), Which(device="cpu"), dict(sampling_steps="all", solver="ddim"))


IMAGE = np.full((8, 8, 1), 200, np.uint8)
IMAGE[2:5, 3:6] = 40


def test_what_the_mask_keeps_stays_to_the_bit(opened) -> None:
    mask = np.zeros((8, 8), bool)
    mask[:, :4] = True
    found = variations(opened.config, opened.net, CPU, IMAGE, [0, 5], _y(opened), 1.0, mask)
    assert found.shape == (2, 8, 8, 1) and (found[:, :, 4:] == IMAGE[:, 4:]).all()
    assert (found[:, :, :4] != IMAGE[:, :4]).any() and (found[0] != found[1]).any()


def test_little_strength_leaves_the_image_and_whole_strength_nothing_of_it(opened) -> None:
    off = []
    for strength in (0.05, 0.5, 1.0):
        found = variations(opened.config, opened.net, CPU, IMAGE, [3], _y(opened), strength)
        off.append(np.abs(found[0].astype(int) - IMAGE).mean())
    assert off[0] < 15 and off[0] < off[1]
    other = np.full_like(IMAGE, 7)
    whole = [variations(opened.config, opened.net, CPU, image, [3], _y(opened), 1.0) for image in (IMAGE, other)]
    assert np.array_equal(*whole)


def _y(opened) -> int | None:
    return 0 if opened.config.model.class_cond else None


def test_a_first_call_that_is_left_out_changes_nothing_part_of_the_way(opened) -> None:
    """There x is not all noise: neither from an image, nor on the way to its noise."""
    found = []
    for config in (opened.config, opened.config.updated(dict(skip_first=True))):
        part = variations(config, opened.net, CPU, IMAGE, [3], _y(opened), 0.4)
        found.append((part, noise_of(config, opened.net, CPU, IMAGE, _y(opened)).numpy()))
    assert all(np.array_equal(a, b) for a, b in zip(*found))


def test_an_image_of_another_size_is_told(run, tmp_path, capsys) -> None:
    Image.fromarray(np.zeros((12, 20), np.uint8)).save(tmp_path / "wide.png")
    line = [str(run), str(tmp_path / "wide.png"), "--labels", "disc", "--out", str(tmp_path / "x.png"), "--device", "cpu"]
    assert main(["edit", *line, "--sampling_steps", "3"]) == 0
    assert "12x20 pixels: scaled and cropped to 8x8" in capsys.readouterr().out


def test_what_is_read_otherwise_than_it_lies_there_is_told(run, tmp_path, capsys) -> None:
    """An image of 16 bits is cut to 8, and what is transparent in a mask is light."""
    Image.fromarray(np.full((8, 8), 30000, np.uint16)).save(tmp_path / "deep.png")
    mask = np.zeros((8, 8, 4), np.uint8)
    mask[:4, :, 3] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    line = [str(run), str(tmp_path / "deep.png"), "--mask", str(tmp_path / "mask.png"), "--labels", "disc", "--device", "cpu"]
    assert main(["edit", *line, "--sampling_steps", "3", "--out", str(tmp_path / "new" / "x.png")]) == 0  # a folder is made
    told = capsys.readouterr().out
    assert "deep.png: taken otherwise than stored: 1 (grey of 16 bits, 0..65535 scaled to 0..255)" in told
    assert "mask.png: taken otherwise than stored: 1 (transparency laid over white)" in told


def test_the_arc_keeps_the_length_and_ends_at_its_ends() -> None:
    a, b = torch.randn(2, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(slerp(a[None], b[None], 0.0), a[None])
    torch.testing.assert_close(slerp(a[None], b[None], 1.0), b[None])
    middle = slerp(a[None], b[None], 0.5)
    assert middle.norm() == pytest.approx((a.norm() * b.norm()).sqrt().item(), rel=0.05)
    assert torch.equal(slerp(a[None], a[None], 0.3), a[None])


def test_an_image_is_found_again_from_its_noise(opened) -> None:
    x = noise_of(opened.config, opened.net, CPU, IMAGE, _y(opened))
    assert x.shape == (1, 1, 8, 8) and torch.isfinite(x).all()


def test_the_command(run, tmp_path, capsys) -> None:
    a, b, mask, small, empty = (tmp_path / f"{name}.png" for name in ("a", "b", "mask", "small", "empty"))
    Image.fromarray(IMAGE[..., 0]).save(a)
    Image.fromarray(255 - IMAGE[..., 0]).save(b)
    light = np.zeros((8, 8), np.uint8)
    light[:4] = 255
    Image.fromarray(light).save(mask)
    Image.fromarray(light[:6]).save(small)
    Image.fromarray(0 * light).save(empty)
    classes = ["--labels", "disc"] if "disc" in _classes(run) else []
    command = ["edit", str(run), "--device", "cpu", "--solver", "ddim", "--sampling_steps", "5", *classes]
    for k, line in enumerate((
        [str(a), str(b), "--seeds", "0-2"], [str(a), "--mask", str(mask), "--strength", "1"], [str(a), str(b), "--between"],
        ["--seeds", "3,7", "--frames", "4"],
    )):  # fmt: skip
        out = tmp_path / f"out_{k}.png"
        assert main([*command, *line, "--out", str(out)]) == 0, line
        with Image.open(out) as drawn:
            assert drawn.size[0] > 8
        assert main([*command, *line, "--out", str(out)]) == 2  # is there already
    assert main([*command, "--seeds", "3,7", "--out", str(tmp_path / "x.gif")]) == 0
    with Image.open(tmp_path / "x.gif") as moving:
        assert moving.n_frames == 16
    (tmp_path / "masks").mkdir()
    for path in (mask, empty):
        (tmp_path / "masks" / path.name).write_bytes(path.read_bytes())
    capsys.readouterr()
    for words, line in {
        "must be alike": [str(a), "--mask", str(small)],
        "all dark": [str(a), "--mask", str(empty)],
        "give two, not 1": [str(a), "--between"],
        "two seeds": [],
        "no effect between": [str(a), str(b), "--between", "--strength", "0.4"],
        "of --between": [str(a), "--frames", "4"],
        "between two images ddim leads": [str(a), str(b), "--between", "--solver", "heun"],
        "ends in .png or .gif": ["--seeds", "3,7", "--out", str(tmp_path / "x.npz")],
        "ends in .png": [str(a), "--out", str(tmp_path / "y.gif")],  # a sheet does not move
        "no effect without --guidance": [str(a), "--guidance_low", "1"],
        "names 2 classes": [str(a), "--labels", "disc,down"],
        "holds 2 images": [str(a), "--mask", str(tmp_path / "masks")],
    }.items():
        assert main([*command, *line]) == 2
        assert words in capsys.readouterr().err


def _classes(run) -> str:
    return (run / "config.json").read_text()


def test_a_mask_lies_on_the_image_as_the_image_is_fitted(tmp_path) -> None:
    """The mask's left half, of a wide image that --fit contain shows whole; the white around it is not to be filled."""
    image, mask = tmp_path / "image.png", tmp_path / "mask.png"
    Image.new("RGB", (32, 16)).save(image)
    half = Image.new("L", (32, 16))
    half.paste(255, (0, 0, 16, 16))
    half.save(mask)
    found = _mask(str(mask), [str(image)], Config().updated(dict(image_size="8", fit="contain")))
    expected = np.zeros((8, 8), bool)
    expected[2:6, :4] = True
    np.testing.assert_array_equal(found, expected)
    covered = _mask(str(mask), [str(image)], Config().updated(dict(image_size="8")))
    assert covered[:, :4].all() and not covered[:, 4:].any()


def test_of_more_channels_than_a_picture_has_the_first_is_shown_and_told(tmp_path, capsys) -> None:
    np.save(tmp_path / "five.npy", np.zeros((4, 8, 8, 5), np.uint8))
    settings = flags(**TINY | dict(image_channels=5, steps=1))
    assert main(["train", str(tmp_path / "five.npy"), "--run", str(tmp_path / "r"), *settings]) == 0
    np.save(tmp_path / "one.npy", np.zeros((1, 8, 8, 5), np.uint8))
    how = flags(solver="ddim", sampling_steps=3, device="cpu", out=tmp_path / "x.png")
    assert main(["edit", str(tmp_path / "r"), str(tmp_path / "one.npy"), *how]) == 0
    assert "of 5 channels the first alone" in capsys.readouterr().out
