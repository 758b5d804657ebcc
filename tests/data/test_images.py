"""Folders as data sets: what is found, how it is labelled, and what happens to broken files."""

import json
import os
import subprocess
import unicodedata
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iddpm.data import EXTENSIONS, Images
from iddpm.errors import UserError

NO_CACHE = 0
CACHES = pytest.mark.parametrize("cache_bytes", [2 << 30, NO_CACHE], ids=["cached", "uncached"])


def fill(root: Path, *names: str) -> Path:
    """Images of one grey each: 0, 10, 20, ... in the order of the names given."""
    for k, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (6, 5), 10 * k).save(root / name)
    return root


def opened(path: Path, **options: Any) -> Images:
    return Images.open(path, image_size=(4, 4), channels=1, **options)


def greys(data: Images, *indices: int) -> list[int]:
    return data.batch(indices)[:, 0, 0, 0].tolist()


def opened_and_read(path: Path, cache_bytes: int, *indices: int) -> tuple[Images, list[int]]:
    data = opened(path, cache_bytes=cache_bytes)
    return data, greys(data, *indices)


@CACHES
def test_images_are_found_in_sorted_order_without_hidden_files(tmp_path: Path, cache_bytes: int) -> None:
    fill(tmp_path, "b.png", "a/z.JPG", "a/deep/er/y.webp", ".hidden.png", ".git/x.png")
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "png").write_text("not an image either")
    data = opened(tmp_path, cache_bytes=cache_bytes)
    assert [path.relative_to(tmp_path).as_posix() for path in data.files] == [
        "a/deep/er/y.webp",
        "a/z.JPG",
        "b.png",
    ]
    assert len(data) == 3
    batch = data.batch([2, 0, 2])
    assert batch.dtype == np.uint8
    assert batch.shape == (3, 1, 4, 4)
    assert greys(data, 2, 1, 2) == [0, 10, 0]


def test_the_cache_changes_nothing(tmp_path: Path) -> None:
    for k, size in enumerate([(9, 30), (64, 31), (8, 8)]):
        pixels = np.random.default_rng(k).integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{k}.png")
    cached, uncached = (Images.open(tmp_path, (8, 12), cache_bytes=size) for size in (3 * 3 * 8 * 12, 3 * 3 * 8 * 12 - 1))
    assert cached._cache is not None
    assert uncached._cache is None
    np.testing.assert_array_equal(cached.batch([1, 2, 0]), uncached.batch([1, 2, 0]))


def test_a_cached_batch_can_be_written_to(tmp_path: Path) -> None:
    data = opened(fill(tmp_path, "a.png", "b.png"))
    data.batch([0, 1])[:] = 99
    assert greys(data, 0, 1) == [0, 10]


def test_a_single_file_is_a_data_set_of_one(tmp_path: Path) -> None:
    fill(tmp_path, "a.png", "b.png")
    assert list(opened(tmp_path / "b.png").files) == [tmp_path / "b.png"]


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    fill(tmp_path, "root/a.png", "elsewhere/b.png")
    (tmp_path / "root/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/linked/back").symlink_to(tmp_path / "root")
    assert [path.name for path in opened(tmp_path / "root").files] == ["a.png", "b.png"]


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        opened(tmp_path / "nowhere")


def test_an_empty_folder_says_which_files_are_looked_for(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("text")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(UserError, match=", ".join(EXTENSIONS)):
            opened(path)


@pytest.mark.parametrize("options", [{"on_broken": "ignore"}, {"labels": "magic"}])
def test_unknown_choices_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="use one of"):
        opened(fill(tmp_path, "a.png"), **options)


def test_sub_folders_are_classes(tmp_path: Path) -> None:
    data = opened(fill(tmp_path, "dog/a_1.png", "cat/b_1.png", "cat/deep/c_1.png"))
    assert data.classes == ("cat", "dog")
    assert data.labels is not None
    assert data.labels.dtype == np.int64
    assert data.labels.tolist() == [0, 0, 1]
    assert data.rule == "sub-folder names"
    assert "3 images" in data.describe()
    assert "2 classes (cat, dog)" in data.describe()


def test_prefixes_are_classes_when_images_lie_loose(tmp_path: Path) -> None:
    data = opened(fill(tmp_path, "dog_1.png", "cat_2_x.png", "sub/cat_1.png"))
    assert data.classes == ("cat", "dog")
    assert data.labels is not None
    assert data.labels.tolist() == [0, 1, 0]
    assert "underscore" in data.rule


def test_names_without_a_rule_have_no_labels(tmp_path: Path) -> None:
    data = opened(fill(tmp_path, "dog_1.png", "cat.png"))
    assert data.labels is None
    assert data.classes == ()
    assert data.rule == "none"


def test_labels_can_be_left_out(tmp_path: Path) -> None:
    assert opened(fill(tmp_path, "dog_1.png", "cat_1.png"), labels="none").labels is None


@pytest.mark.parametrize(("rule", "reason"), [("file", "labels.csv"), ("folder", "cat.png"), ("prefix", "cat.png")])
def test_a_rule_that_does_not_fit_says_why(rule: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason):
        opened(fill(tmp_path, "cat.png"), labels=rule)


def test_a_rule_can_be_forced(tmp_path: Path) -> None:
    data = opened(fill(tmp_path, "x/dog_1.png", "y/cat_1.png"), labels="prefix")
    assert data.classes == ("cat", "dog")
    assert data.labels is not None
    assert data.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labels.json", json.dumps({"s/a.png": "dog", "s/b.png": "cat", "s/c.png": "dog"})),
        (
            "labels.json",
            json.dumps({"labels": [["s/a.png", "dog"], ["./s/b.png", "cat"], ["s\\c.png", "dog"]]}),
        ),
        ("labels.csv", "path,label\ns/a.png,dog\ns/b.png,cat\ns/c.png,dog\n"),
        ("labels.csv", "\ufeffs/a.png, dog\r\n\r\ns/b.png,cat\r\ns/c.png,dog"),
        (
            "dataset.json",
            json.dumps({"labels": [["s/a.png", "dog"], ["s/b.png", "cat"], ["s/c.png", "dog"]]}),
        ),
    ],
)
def test_a_label_file_comes_before_folders(name: str, text: str, tmp_path: Path) -> None:
    fill(tmp_path, "s/a.png", "s/b.png", "s/c.png")
    (tmp_path / name).write_text(text, encoding="utf-8")
    data = opened(tmp_path)
    assert data.classes == ("cat", "dog")
    assert data.rule == name
    assert data.labels is not None
    assert data.labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("name", "text"),
    [("labels.json", '{"a.png": 10, "b.png": 9, "c.png": 2}'), ("labels.csv", "a.png,10\nb.png,9\nc.png,2")],
)
def test_whole_numbers_keep_their_order(name: str, text: str, tmp_path: Path) -> None:
    fill(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / name).write_text(text)
    data = opened(tmp_path)
    assert data.classes == ("2", "9", "10")
    assert data.labels is not None
    assert data.labels.tolist() == [2, 1, 0]


def test_a_label_file_of_null_means_no_labels(tmp_path: Path) -> None:
    fill(tmp_path, "00000/a.png", "00001/b.png")
    (tmp_path / "dataset.json").write_text('{"labels": null}')
    data = opened(tmp_path)
    assert data.labels is None
    assert "dataset.json" in data.describe()


def test_entries_without_an_image_are_told(tmp_path: Path) -> None:
    fill(tmp_path, "a.png")
    (tmp_path / "labels.json").write_text('{"a.png": 1, "gone.png": 2}')
    data = opened(tmp_path)
    assert data.classes == ("1",)
    assert "1 of its entries" in data.describe()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("labels.json", "{", "labels.json: "),
        ("labels.json", "3", "labels.json: "),
        ("labels.json", '{"a.png": 1}', "no label for b.png"),
        ("labels.json", '{"a.png": 1, "b.png": [2]}', r"the label \[2\]"),
        ("labels.json", '{"a.png": true, "b.png": 2}', "the label True"),
        ("labels.csv", "a.png\nb.png", "labels.csv: "),
        ("labels.csv", "a.png;x\nb.png;y", "'b.png;y' has no comma before a label"),
        ("labels.csv", "", "no label for a.png"),
        ("labels.csv", "a.png,0,x\nb.png,1,y", "has 3 columns without a line that calls the wanted one label"),
        ("labels.csv", "path,label\na.png,cat, black\nb.png,dog", "has 3 columns of 2; quote a label"),
        ("labels.csv", "label,filename\ncat,a.png\ndog,b.png", "its first column is called label"),
        ("labels.json", '{"a.png": 1, "b.png": 2, "a.png": 2}', "it says two things of 'a.png'"),
    ],
)
def test_a_faulty_label_file_is_named(name: str, text: str, message: str, tmp_path: Path) -> None:
    fill(tmp_path, "a.png", "b.png")
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        opened(tmp_path)


def test_labels_follow_the_classes_of_a_run(tmp_path: Path) -> None:
    data = opened(fill(tmp_path, "dog/1.png", "ape/1.png"), classes=["ape", "cat", "dog"])
    assert data.classes == ("ape", "cat", "dog")
    assert data.labels is not None
    assert data.labels.tolist() == [0, 2]


def test_a_class_that_the_run_does_not_know_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'emu' is not among"):
        opened(fill(tmp_path, "dog/1.png", "emu/1.png"), classes=["ape", "cat", "dog"])


def test_many_classes_are_abbreviated(tmp_path: Path) -> None:
    text = opened(fill(tmp_path, *(f"{c}/{k}.png" for c in "abcdefghij" for k in "12"))).describe()
    assert "10 classes (a, b, c, d, ..., j)" in text


@CACHES
def test_a_broken_file_is_replaced_by_the_next_of_its_class(tmp_path: Path, cache_bytes: int) -> None:
    fill(tmp_path, "cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png")
    (tmp_path / "cat/2.png").write_text("broken")
    with pytest.warns(UserWarning, match=r"cat/2\.png is not a readable image") as caught:
        data, seen = opened_and_read(tmp_path, cache_bytes, 0, 1, 2, 3, 1)
    assert seen == [0, 0, 20, 30, 0]
    assert greys(data, 1) == [0]  # without a second warning, which would be an error
    assert len(caught) == 1
    assert [path for path, _ in data.broken] == [tmp_path / "cat/2.png"]
    assert len(data) == 4
    assert data.labels is not None
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert "1 unreadable" in data.describe()


@CACHES
def test_a_class_with_only_broken_files_takes_image_and_label_from_the_next(tmp_path: Path, cache_bytes: int) -> None:
    fill(tmp_path, "cat/1.png", "dog/1.png", "emu/1.png")
    (tmp_path / "cat/1.png").write_text("broken")
    with pytest.warns(UserWarning, match="cat"):
        data, seen = opened_and_read(tmp_path, cache_bytes, 0)
    assert seen == [10]
    assert data.labels is not None
    assert data.labels.tolist() == [1, 1, 2]
    assert data.classes == ("cat", "dog", "emu")


@CACHES
def test_a_broken_file_can_be_an_error(tmp_path: Path, cache_bytes: int) -> None:
    fill(tmp_path, "a.png", "b.png")
    (tmp_path / "b.png").write_text("broken")
    with pytest.raises(UserError, match=r"b\.png"):
        opened(tmp_path, on_broken="fail", cache_bytes=cache_bytes).batch([0, 1])


@CACHES
def test_a_folder_of_broken_files_is_an_error(tmp_path: Path, cache_bytes: int) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_text("broken")
    with pytest.raises(UserError, match="none of the 2 images is readable"):
        opened(tmp_path, cache_bytes=cache_bytes).batch([0])


@CACHES
def test_broken_files_can_be_left_out(tmp_path: Path, cache_bytes: int) -> None:
    fill(tmp_path, "cat/1.png", "cat/2.png", "dog/1.png")
    (tmp_path / "cat/1.png").write_text("broken")
    with pytest.warns(UserWarning, match="1 of 3 files are broken and left out"):
        data = opened(tmp_path, cache_bytes=cache_bytes, on_broken="leave")
    assert data.names == ["cat/2.png", "dog/1.png"] and data.labels is not None and data.labels.tolist() == [0, 1]
    assert greys(data, 0, 1) == [10, 20]
    assert "1 unreadable file, left out" in data.describe()


@CACHES
def test_many_broken_files_are_replaced_in_order(tmp_path: Path, cache_bytes: int) -> None:
    names = [f"{c}/{k:03}.png" for c in ("cat", "dog") for k in range(100)]
    fill(tmp_path, *names[:1])
    for k, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("broken")
        if k % 10 == 5:
            Image.new("L", (6, 5), k).save(tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        data, seen = opened_and_read(tmp_path, cache_bytes, *range(200))
    good = [k for k in range(200) if k % 10 == 5]
    wanted = [next((g for g in good if g >= k and g // 100 == k // 100), 5 + 100 * (k // 100)) for k in range(200)]
    assert seen == wanted
    assert len(data.broken) == 180


# ---- what is hardly classes


@pytest.mark.parametrize(
    ("names", "why"),
    [
        ("train/cat.png train/dog.png test/cat.png test/dog.png", "test and train look like splits"),
        ("Training/1.png Validation/1.png Training/2.png Validation/2.png", "look like splits"),
        ("IMG_1.png IMG_2.png DSC_3.png DSC_4.png", "begin with DSC_"),
        ("20240101_1.png 20240101_2.png 20240102_1.png 20240102_2.png", "begin with 20240101_"),
        ("cat_1.png cat_2.png cat_3.png cat_4.png", "one class"),
        ("0_a.png 1_a.png 2_a.png 3_a.png", "differ for every image"),
        ("a/1.png b/1.png c/1.png d/1.png", "differ for every image"),
    ],
)
def test_what_is_hardly_classes_is_left_unless_asked_for(names: str, why: str, tmp_path: Path) -> None:
    data = opened(fill(tmp_path, *names.split()))
    assert data.labels is None and why in data.rule and why in data.describe()
    asked = data.rule.partition("--labels ")[2].split()[0]
    assert opened(tmp_path, labels=asked).labels is not None


def test_splits_are_told_whatever_the_labels_are(tmp_path: Path) -> None:
    data = opened(fill(tmp_path, "train/cat_1.png", "test/cat_2.png", "train/dog_1.png"))
    assert data.classes == ("cat", "dog")
    assert f"test and train look like parts of one set, and all are used: give {tmp_path / 'test'} to use one" in data.describe()


def test_folders_around_all_images_are_looked_into(tmp_path: Path) -> None:
    names = fill(tmp_path, "d/images/cat/1.png", "d/images/cat/2.png", "d/images/dog/1.png")
    data = opened(names / "d")
    assert data.classes == ("cat", "dog") and data.rule == "sub-folder names below images/"
    assert opened(tmp_path).rule == "sub-folder names below d/images/"
    assert opened(tmp_path, labels="folder").classes == ("d",)
    assert opened(tmp_path / "d" / "images" / "cat", classes=["cat", "dog"]).labels is None
    (tmp_path / "d" / "images" / "labels.csv").write_text("cat/1.png,x\ncat/2.png,y\ndog/1.png,y")
    assert opened(tmp_path).classes == ("x", "y")


def test_a_folder_of_a_class_of_the_run_is_that_class(tmp_path: Path) -> None:
    data = opened(fill(tmp_path, "dog/1.png", "dog/2.png"), classes=["cat", "dog"])
    assert data.labels is not None and data.labels.tolist() == [1, 1]


def test_folders_of_programs_hold_no_images(tmp_path: Path) -> None:
    data = opened(fill(tmp_path, "a/1.png", "a/@eaDir/1.png/thumb.jpg", "__MACOSX/a/1.png", "$RECYCLE.BIN/2.png", "a/2.png"))
    assert data.names == ["a/1.png", "a/2.png"]


def test_what_is_left_out_is_counted_by_ending(tmp_path: Path) -> None:
    fill(tmp_path, "a.png", "b.png")
    for name in ("c.XYZ", "d.xyz", "e.mov", "README"):
        (tmp_path / name).write_text("")
    assert "left out: 1 mov, 1 without an ending, 2 xyz" in opened(tmp_path).describe()


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_accents_in_either_form_are_one_name(form: str, tmp_path: Path) -> None:
    other = "NFD" if form == "NFC" else "NFC"
    fill(tmp_path, unicodedata.normalize(form, "café/é.png"), "the/1.png")
    data = opened(tmp_path, classes=[unicodedata.normalize(other, "café"), "the"])
    assert data.labels is not None and data.labels.tolist() == [0, 1]
    name = unicodedata.normalize(other, "café/é.png")
    (tmp_path / "labels.csv").write_text(f"{name},x\nthe/1.png,y", encoding="utf-8")
    assert opened(tmp_path).classes == ("x", "y")


@pytest.mark.parametrize(
    ("name", "content", "classes"),
    [
        ("labels.csv", b'a.png,"red, round"\nb.png,"two\nlines"', ("red, round", "two\nlines")),
        ("labels.csv", "a.png,x\u2028y\nb.png,z".encode(), ("x\u2028y", "z")),
        ("labels.csv", "a.png,é\nb.png,z".encode("utf-16"), ("z", "é")),
        ("labels.json", b'{"a.png": "dog/cat", "b.png": "../x"}', ("../x", "dog/cat")),
    ],
)
def test_classes_may_have_any_name(name: str, content: bytes, classes: tuple[str, ...], tmp_path: Path) -> None:
    fill(tmp_path, "a.png", "b.png")
    (tmp_path / name).write_bytes(content)
    assert opened(tmp_path).classes == classes


def test_a_label_file_that_says_two_things_of_an_image_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, "a.png", "b.png")
    (tmp_path / "labels.csv").write_text("a.png,x\nb.png,y\na.png,y")
    with pytest.raises(UserError, match=r"says 'x' and 'y' of a\.png: remove one"):
        opened(tmp_path)


def test_a_label_file_without_end_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, "a.png")
    (tmp_path / "labels.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"labels\.json: "):
        opened(tmp_path)


# ---- whose images these are


def test_the_identity_tells_which_part_is_another(tmp_path: Path) -> None:
    def parts() -> dict[str, str]:
        return opened(tmp_path).identity()

    def changed() -> set[str]:
        nonlocal now
        before, now = now, parts()
        return {part for part in now if now[part] != before[part]}

    fill(tmp_path, "cat/1.png", "cat/2.png", "dog/1.png")
    now = parts()
    assert changed() == set()
    Image.new("L", (6, 5), 99).save(tmp_path / "cat/1.png")
    assert "contents" in changed()
    (tmp_path / "cat/2.png").rename(tmp_path / "dog/2.png")
    assert changed() >= {"names", "labels"}
    fill(tmp_path, "cat/3.png")
    assert changed() >= {"count", "names"}


# ---- odd files


def test_fifos_sockets_and_loops_are_no_images(tmp_path: Path) -> None:
    fill(tmp_path, "a.png", "sub/b.png")
    os.mkfifo(tmp_path / "x.png")
    (tmp_path / "null.png").symlink_to("/dev/zero")
    (tmp_path / "lost.png").symlink_to("nowhere")
    (tmp_path / "sub/up").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to("self")
    assert opened(tmp_path).names == ["a.png", "sub/b.png"]


def test_folders_deeper_than_the_stack_are_read(tmp_path: Path) -> None:
    deep = tmp_path
    for _ in range(1100):
        deep = deep / "d"
        deep.mkdir()
    fill(deep, "a.png")
    try:
        assert opened(tmp_path).names == ["d/" * 1100 + "a.png"]
    finally:
        subprocess.run(["rm", "-r", tmp_path / "d"], check=True)  # which shutil.rmtree cannot


def test_good_folders_open_without_warnings(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened(fill(tmp_path, "a.png", "b.gif", "c.tif"))
