"""`data check` tells what is in a set; `data pack` writes it once; `--validation 5%` divides it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iddpm.cli.main import main
from iddpm.data import Images
from iddpm.data.pack import pack
from iddpm.data.sources import pixels

RNG = np.random.default_rng(0)


def picture(side: int = 16) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (side, side, 3), np.uint8)).resize((32, 24), Image.Resampling.BICUBIC)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    for k in range(20):
        file = root / ("cat" if k < 14 else "dog") / f"{k:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(5).save(file)  # smooth, as a photo is
    return root


def test_check_tells_what_was_put_into_a_set(photos, tmp_path, capsys):
    (photos / "dog" / "again.png").write_bytes((photos / "cat" / "03.png").read_bytes())
    with Image.open(photos / "cat" / "04.png") as image:
        image.save(photos / "cat" / "near.jpg", quality=90)
    picture(4).convert("L").save(photos / "cat" / "grey.png")
    picture(4).convert("RGBA").save(photos / "cat" / "alpha.png")
    (photos / "dog" / "broken.png").write_bytes(b"\x89PNG\r\n")
    (photos / "film.mov").write_bytes(b"")
    assert main(["data", "check", str(photos), str(tmp_path / "sheet.png")]) == 0
    told = capsys.readouterr().out
    for line in (
        "25 images", "left out: 1 mov", "width x height: 32x24 (24)", "RGB (22)", "L (1)", "RGBA (1)",
        "classes: 2, from sub-folder names: cat (17), dog (8)", "broken: 1 file", "broken.png", "exact duplicates: 1\n",
        "dog/again.png of cat/03.png", "1 of them in another class", "near duplicates: 1\n", "cat/near.jpg of cat/04.png",
        "--image_channels 4", "--class_cond True", "--on_broken fail", "--image_size 16",
    ):  # fmt: skip
        assert line in told, told
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (12 * 64, 2 * 64)


def test_check_tells_how_images_are_taken_and_classes_that_differ_by_case(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    frames = [picture(k) for k in range(2)]
    frames[0].save(photos / "dog" / "film.gif", save_all=True, append_images=frames[1:])
    (photos / "Dog").mkdir()
    picture(5).save(photos / "Dog" / "5.png")
    assert main(["data", "check", str(photos)]) == 0
    told = capsys.readouterr().out
    assert "taken otherwise than stored: 1 (the first of several frames)" in told
    assert "Dog and dog are 2 classes, by their case or blanks alone" in told
    assert main(["data", "check", str(photos)]) == 2
    assert "check.png is there already: iddpm data check" in capsys.readouterr().err


def test_check_advises_to_keep_parts_apart(photos, tmp_path, capsys, monkeypatch):
    (photos / "cat").rename(photos / "train")
    (photos / "dog").rename(photos / "test")
    monkeypatch.chdir(tmp_path)
    assert main(["data", "check", str(photos)]) == 0
    told = capsys.readouterr().out
    assert f"iddpm train {photos}/train --validation {photos}/test" in told and "look like splits" in told
    assert main(["data", "check", str(photos)]) == 2  # its pictures are there already
    assert main(["data", "check", str(photos), "--image_size", "8"]) == 2


def test_no_near_duplicates_are_found_among_noise_or_plain_colours(tmp_path, capsys):
    for k in range(30):
        Image.new("RGB", (8, 8), (100 + k // 10, 0, 0)).save(tmp_path / f"{k}.png")
        Image.fromarray(RNG.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / f"n{k}.png")
    assert main(["data", "check", str(tmp_path), str(tmp_path / "sheet.png")]) == 0
    assert "near duplicates: 0\n" in capsys.readouterr().out


def contents(root: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in root.iterdir()}


def test_the_command_that_is_proposed_after_packing_says_when_to_stop(photos, tmp_path, capsys):
    assert main(["data", "pack", str(photos), str(tmp_path / "x"), "--image_size", "8", "--workers", "1"]) == 0
    assert f"next: iddpm train {tmp_path / 'x'} --image_size 8 --time 1h\n" in capsys.readouterr().out


def test_a_pack_is_the_same_images_and_bytes_however_it_came_about(photos, tmp_path, monkeypatch):
    (photos / "dog" / "broken.png").write_bytes(b"\x89PNG\r\n")
    monkeypatch.setattr("iddpm.data.pack.PART", 6 * 8 * 8 * 3)  # six images a part
    one, two = tmp_path / "one", tmp_path / "two"
    assert "20 images of 8x8, 3 channels, 2 classes; 1 broken image left out" in pack(photos, one, (8, 8))
    pack(photos, two, (8, 8))
    (two / pixels.INDEX).unlink()  # as if it had been killed in its third part
    (two / "part-00002.json").unlink()
    (two / "part-00002.npy").write_bytes(b"half")
    assert main(["data", "pack", str(photos), str(two), "--image_size", "8", "--workers", "1"]) == 0
    assert contents(one) == contents(two) and len(list(one.glob("*.npy"))) == 5
    with pytest.warns(UserWarning, match="broken"):
        known = Images.open(photos, (8, 8), on_broken="leave")
    data = Images.open(one, (8, 8))
    assert (data.batch(range(20)) == known.batch(range(20))).all()
    assert data.classes == known.classes and (data.labels == known.labels).all()
    assert main(["data", "pack", str(photos), str(two), "--image_size", "16"]) == 2
    assert main(["data", "pack", str(photos), str(photos), "--image_size", "8"]) == 2
    (one / "part-00001.npy").write_bytes((one / "part-00003.npy").read_bytes())
    assert main(["data", "check", str(one), str(tmp_path / "s.png")]) == 2


def test_two_processes_pack_the_same_bytes(photos, tmp_path, monkeypatch):
    monkeypatch.setattr("iddpm.data.pack.PART", 6 * 8 * 8 * 3)
    one, two = tmp_path / "one", tmp_path / "two"
    pack(photos, one, (8, 8))
    pack(photos, two, (8, 8), workers=2)
    assert contents(one) == contents(two)


def test_a_share_is_held_out_by_content_whatever_the_names(photos):
    for k in range(20):
        content = next(photos.rglob(f"{k:02d}.png")).read_bytes()
        (photos / "dog" / f"copy_of_{k:02d}.png").write_bytes(content)
    held, rest = (Images.open(photos, (8, 8), part=part) for part in ((0, 0.3), (0.3, 1)))
    number = re.compile(r"(\d\d)\.png$")
    theirs, ours = ({number.search(name)[1] for name in data.names} for data in (held, rest))  # type: ignore[index]
    assert len(held) + len(rest) == 40 and not theirs & ours and len(held) == 2 * len(theirs)
    assert rest.classes == held.classes and len(rest.labels) == len(rest)
    assert f"{len(held)} of 40 images: 30.00% of them, by their content" in held.describe()
    copied = photos.parent / "elsewhere"
    photos.rename(copied)
    assert [str(name) for name in Images.open(copied, (8, 8), part=(0, 0.3)).names] == list(held.names)


def test_training_holds_out_a_share(photos, tmp_path, capsys):
    tiny = "--num_channels 8 --num_res_blocks 1 --channel_mult 1 --attention_resolutions= --num_heads 1".split()
    command = ["train", str(photos), "--run", str(tmp_path / "run"), "--preset", "none", "--image_size", "8", "--batch_size", "4"]
    last = "--steps 2 --validation_interval 1 --device cpu --precision fp32 --diffusion_steps 10 --sampling_steps 4".split()
    assert main([*command, *tiny, *last, "--validation", "30%"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert any("val_loss" in row for row in rows)
    assert "of 20 images: 70.00% of them, by their content" in capsys.readouterr().out
    for bad in ("0%", "100%", "200%"):
        assert main([*command[:3], str(tmp_path / "new"), *command[4:], *tiny, *last, "--validation", bad]) == 2


def test_the_command_that_follows_a_pack_reads_it(tmp_path, capsys):
    np.save(tmp_path / "five.npy", np.zeros((4, 8, 8, 5), np.uint16))
    how = ["--image_size", "8", "--image_channels", "5", "--bit_depth", "16"]
    assert main(["data", "pack", str(tmp_path / "five.npy"), str(tmp_path / "pack"), *how]) == 0
    assert f"next: iddpm train {tmp_path / 'pack'} {' '.join(how)}" in capsys.readouterr().out
