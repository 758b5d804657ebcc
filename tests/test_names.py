"""Whatever a class is called: a folder, an archive and a list of it agree, it can be asked for, drawn, written and read again."""

import csv
import io
import os
import tarfile
from pathlib import Path
from unicodedata import normalize
from urllib.parse import unquote

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from iddpm.config import Config
from iddpm.data import Images
from iddpm.sampling.job import Job, job
from iddpm.sampling.sheets import grid
from iddpm.sampling.writers import Folder, file_name

FEW = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
EVER = settings(max_examples=2000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

letters = st.characters(exclude_characters="/\0", exclude_categories=("Cs",))
marks = st.sampled_from(
    ["é", "e\u0301", "ü", "中", "a,b", 'say "x"', " a", "a ", "%2F", "#3", "~", "-1", "0", "007", "IMG", "train", "a.png"]
)
raw = st.binary(min_size=1, max_size=12).map(os.fsdecode)  # in no encoding: as surrogates
names = st.one_of(st.text(letters, min_size=1, max_size=40), marks, raw)


def usable(name: str) -> bool:
    """Whether a folder can have it, and is not hidden."""
    return not set("/\0") & set(name) and not name.startswith(".") and len(os.fsencode(name)) < 200


def form(name: str) -> str:
    return normalize("NFC", name)


def png(k: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8), 20 * k).save(file, "PNG")
    return file.getvalue()


def labelled(images: Images) -> list[str]:
    """The class of each image, in the order of the pixels, which tell which it is."""
    assert images.labels is not None
    order = np.argsort(images.batch(np.arange(len(images)))[:, 0, 0, 0])
    return [form(images.classes[images.labels[k]]) for k in order]


def agree(root: Path, classes: list[str]) -> None:
    """All that is claimed of classes of these names."""
    members = {f"{name}/{k}.png": png(2 * c + k) for c, name in enumerate(classes) for k in range(2)}
    wanted = [form(name) for name in classes for _ in range(2)]
    folder = root / "data"
    for name, content in members.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    with tarfile.open(root / "data.tar", "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    for place in (folder, root / "data.tar"):
        assert labelled(Images.open(place, (8, 8), 1, labels="folder")) == wanted, place.name
    listed = root / "listed"
    listed.mkdir()
    with open(listed / "labels.csv", "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = csv.writer(file)
        for k, name in enumerate(wanted):
            (listed / f"{k}.png").write_bytes(png(k))
            rows.writerow([f"{k}.png", name])
    if all(name == name.strip() for name in wanted):  # spaces around a comma are nobody's
        assert labelled(Images.open(listed, (8, 8), 1, labels="file")) == wanted

    known = tuple(dict.fromkeys(wanted))
    config = Config().updated(dict(class_cond=True, classes=known, num_classes=len(known), image_channels=1, image_size="8"))
    for k, name in enumerate(known):
        if name == name.strip():
            quoted = io.StringIO()
            csv.writer(quoted).writerow([name])
            assert job(config, [0], quoted.getvalue().rstrip("\r\n") or name).labels == [k], repr(name)

    escaped = [file_name(name) for name in known]
    assert len({name.casefold() for name in escaped}) == len({name.casefold() for name in known})
    for name, safe in zip(known, escaped):
        assert not set('/\\\0:*?"<>|_') & set(safe) and safe.isprintable()
        if "~" not in safe[-10:]:
            assert unquote(safe, errors="surrogateescape") == name

    labels = list(range(len(known)))
    images = np.stack([np.full((8, 8, 1), 20 * k, np.uint8) for k in labels])
    assert grid(images, labels, known).size[0] > 8
    writer = Folder(root / "drawn", config, Job(range(len(known)), labels), {"job": 1})
    writer.write(images)
    writer.close()
    again = Images.open(root / "drawn", (8, 8), 1)
    assert "labels." in again.rule
    assert labelled(again) == [form(name) for name in known]


def drawn(classes: list[str]) -> list[str]:
    """Of the names those that a folder can have, each in one form of its accents, and one case of its letters."""
    kept = {form(name).casefold(): name for name in classes if usable(name)}
    assume(len(kept) > 1)
    return list(kept.values())


@FEW
@given(st.lists(names, min_size=2, max_size=5))
def test_any_name_of_a_class_works(tmp_path_factory: pytest.TempPathFactory, classes: list[str]) -> None:
    agree(tmp_path_factory.mktemp("names"), drawn(classes))


@pytest.mark.slow
@EVER
@given(st.lists(names, min_size=2, max_size=5))
def test_two_thousand_lists_of_names(tmp_path_factory: pytest.TempPathFactory, classes: list[str]) -> None:
    agree(tmp_path_factory.mktemp("names"), drawn(classes))
