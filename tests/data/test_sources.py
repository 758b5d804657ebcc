"""A folder and an archive of the same files are the same images, with the same labels."""

import io
import os
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iddpm.data import Images
from iddpm.data.sources import source as rules
from iddpm.errors import UserError

Files = Mapping[str, bytes]


def png(k: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 5), (10 * k, 50, 0)).save(file, "PNG")
    return file.getvalue()


def pictures(*names: str, **others: str) -> Files:
    return {name: png(k) for k, name in enumerate(names)} | {name: text.encode() for name, text in others.items()}


SETS: dict[str, Files] = {
    "loose": pictures("a.png", "b.png", "c.png"),
    "classes": pictures("cat/1.png", "cat/2.png", "dog/1.png", "dog/deep/2.png"),
    "wrapped": pictures("top/cat/1.png", "top/cat/2.png", "top/dog/1.png"),
    "wrapped twice": pictures("x/y/cat/1.png", "x/y/dog/1.png", "x/y/dog/2.png"),
    "one folder": pictures("cat/1.png", "cat/2.png"),
    "label file": {**pictures("0/a.png", "0/b.png"), "labels.csv": b"0/a.png,x\n0/b.png,y"},
    "label file within": {
        **pictures("top/0/a.png", "top/0/b.png"), "top/dataset.json": b'{"labels": [["0/a.png", 3], ["0/b.png", 1]]}',
    },
    "label file at the root": {**pictures("top/a.png", "top/b.png"), "labels.json": b'{"top/a.png": "x", "top/b.png": "y"}'},
    "null": {**pictures("00000/a.png", "00001/b.png"), "dataset.json": b'{"labels": null}'},
    "prefixes": pictures("cat_1.png", "cat_2.png", "dog_1.png"),
    "splits": pictures("train/1.png", "train/2.png", "test/1.png"),
    "tools": {
        **pictures("cat/1.png", "cat/2.png", "dog/1.png"),
        "__MACOSX/cat/._1.png": b"x", "@eaDir/1.png": b"x", ".hidden.png": b"x",
    },
    "others": {**pictures("cat/1.png", "dog/1.png", "dog/2.png"), "readme.txt": b"", "dog/film.mov": b""},
    "names": pictures("caf\u00e9/\u00fc.png", "\u4e2d/a b.png", "\u4e2d/x,y.png"),
}  # fmt: skip


def as_zip(path: Path, files: Files, how: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", how) as held:
        for name, content in files.items():
            held.writestr(name, content)
    return path


def as_windows_zip(path: Path, files: Files) -> Path:
    with zipfile.ZipFile(path, "w") as held:
        for name, content in files.items():
            info = zipfile.ZipInfo("x")
            info.filename, info.create_system = name.replace("/", "\\"), 0
            held.writestr(info, content)
    return path


def as_tar(path: Path, files: Files, dots: str = "", mode: str = "w") -> Path:
    with tarfile.open(path, mode) as held:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(dots + name)
            info.size = len(content)
            held.addfile(info, io.BytesIO(content))
    return path


FORMS: dict[str, Callable[[Path, Files], Path]] = {
    "zip": lambda at, files: as_zip(at / "d.zip", files),
    "stored zip": lambda at, files: as_zip(at / "d.ZIP", files, zipfile.ZIP_STORED),
    "zip of Windows": lambda at, files: as_windows_zip(at / "d.zip", files),
    "tar": lambda at, files: as_tar(at / "d.tar", files),
    "tar of .": lambda at, files: as_tar(at / "d.tar", files, "./"),
    "tgz": lambda at, files: as_tar(at / "d.tgz", files, mode="w:gz"),
}


def as_folder(path: Path, files: Files) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def seen(path: Path, rule: str) -> tuple[object, ...]:
    try:
        data = Images.open(path, (4, 4), labels=rule)
    except UserError as e:
        return (str(e).replace(str(path), "DATA"),)
    labels = None if data.labels is None else data.labels.tolist()
    said = data.describe().replace(str(path), "DATA")
    return data.names, labels, data.classes, said, data.identity(), data.batch(range(len(data))).tobytes()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("files", SETS)
def test_an_archive_is_the_folder_of_its_files(files: str, form: str, tmp_path: Path) -> None:
    folder, archive = as_folder(tmp_path / "d", SETS[files]), FORMS[form](tmp_path, SETS[files])
    for rule in ("auto", "file", "folder", "prefix", "none"):
        assert seen(archive, rule) == seen(folder, rule), rule


def test_links_in_a_tar_are_followed_as_in_a_folder(tmp_path: Path) -> None:
    folder = as_folder(tmp_path / "d", SETS["classes"])
    (folder / "dog/linked.png").symlink_to("../cat/1.png")
    (folder / "dog/twice.png").symlink_to("linked.png")
    (folder / "dog/gone.png").symlink_to("nowhere.png")
    (folder / "dog/loop.png").symlink_to("loop.png")
    (folder / "more").symlink_to("cat")
    os.link(folder / "cat/2.png", folder / "dog/hard.png")
    with tarfile.open(tmp_path / "d.tar", "w") as held:
        held.add(folder, ".")
    assert seen(tmp_path / "d.tar", "folder") == seen(folder, "folder")
    assert {"dog/linked.png", "dog/twice.png", "dog/hard.png"} <= set(Images.open(folder, (4, 4)).names)


def test_names_that_lead_out_of_an_archive_are_left(tmp_path: Path) -> None:
    archive = as_tar(tmp_path / "d.tar", {"../out.png": png(0), "/a.png": png(1), "b/../c.png": png(2)})
    assert Images.open(archive, (4, 4)).names == ["a.png", "c.png"]


def test_what_a_member_holds_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "LARGEST", 1000)
    files = {"a.png": png(0), "b.png": bytes(2000)}
    for path in (as_folder(tmp_path / "d", files), as_zip(tmp_path / "d.zip", files), as_tar(tmp_path / "d.tar", files)):
        with pytest.raises(UserError, match=r"b\.png holds 0\.0 GiB: no more than"):
            Images.open(path, (4, 4), on_broken="fail")


@pytest.mark.parametrize("on_broken", ["skip", "leave", "fail"])
@pytest.mark.parametrize("make", [as_zip, as_tar])
def test_an_archive_with_a_bomb_is_refused_however_broken_files_are_treated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[..., Path], on_broken: str
) -> None:
    monkeypatch.setattr(rules, "LARGEST", 1000)
    suffix = "zip" if make is as_zip else "tar"
    with pytest.raises(UserError, match=r"b\.png holds 0\.0 GiB: no more than"):
        Images.open(make(tmp_path / f"d.{suffix}", {"a.png": png(0), "b.png": bytes(2000)}), (4, 4), on_broken=on_broken)


def test_a_sparse_member_of_a_tar_is_not_believed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "d.tar", "w", format=tarfile.PAX_FORMAT) as held:
        data = f"1\n{3 * 10**9 - 1}\n1\n".encode().ljust(512, b"\0") + bytes(512)
        info = tarfile.TarInfo("z.png")
        info.size = len(data)
        info.pax_headers = {
            "GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "z.png", "GNU.sparse.realsize": str(3 * 10**9),
        }  # fmt: skip
        held.addfile(info, io.BytesIO(data))
    with pytest.raises(UserError, match=r"z\.png holds 2\.8 GiB"):
        Images.open(tmp_path / "d.tar", (4, 4), on_broken="fail")


def test_a_gzip_that_unpacks_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from iddpm.data.sources import archive

    monkeypatch.setattr(archive, "UNPACKED", -(10**9))
    with pytest.raises(UserError, match="unpacks to more than"):
        Images.open(as_tar(tmp_path / "d.tgz", SETS["loose"], mode="w:gz"), (4, 4))


@pytest.mark.parametrize("seed", range(3))
def test_damaged_archives_are_one_line(seed: int, tmp_path: Path) -> None:
    """Bytes are changed anywhere: the archive is read, or refused in words."""
    rng = np.random.default_rng(seed)
    whole = [form(tmp_path, SETS["classes"]) for form in FORMS.values()]
    for path in whole:
        content = path.read_bytes()
        for k in range(40):
            spoilt = np.frombuffer(content, np.uint8).copy()
            spoilt[rng.integers(0, len(spoilt), 1 + k % 5)] = rng.integers(0, 256, 1 + k % 5)
            path.write_bytes(spoilt[: len(spoilt) if k % 4 else int(rng.integers(len(spoilt)))].tobytes())
            with suppress(UserError):
                Images.open(path, (4, 4), on_broken="fail").identity()
