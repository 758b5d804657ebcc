"""What is drawn is of one job: never mixed, written over or deleted, and its classes are told by name."""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import TINY, flags
from iddpm import build
from iddpm.cli.main import main
from iddpm.config import Config
from iddpm.data import Images
from iddpm.diffusion.grid import from_noise
from iddpm.errors import UserError
from iddpm.sampling.job import job
from iddpm.sampling.sheets import grid
from iddpm.sampling.writers import file_name
from iddpm.store.checkpoint import load, save


def sample(run: Path, capsys: pytest.CaptureFixture[str], **settings: object) -> tuple[int, str]:
    code = main(["sample", str(run), *flags(**{"num_samples": 3, "sampling_steps": 2, "device": "cpu", **settings})])
    told = capsys.readouterr()
    return code, told.out + told.err


@pytest.fixture
def own(run, tmp_path) -> Path:
    """A copy of the tiny run, to write into."""
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def renamed(run: Path, config: Config, to: Path, classes: tuple[str, ...]) -> Path:
    """A run like the tiny one, with other names of its classes."""
    saved = load(next((run / "checkpoints").glob("step_*")))
    save(to, config.updated(dict(classes=classes)), saved)
    return to


def test_pictures_of_other_settings_get_names_of_their_own(own, capsys):
    for settings in (dict(), dict(sampling_steps=20), dict(seeds="7-9", num_samples=0), dict()):
        settings = {k: v for k, v in {"num_samples": 3, **settings}.items() if v}
        assert main(["sample", str(own), *flags(device="cpu", **{"sampling_steps": 2, **settings})]) == 0
        capsys.readouterr()
    names = sorted(p.name for p in (own / "samples").glob("sample_*"))
    assert names == ["sample_00000004_3.png", "sample_00000004_3_2.png", "sample_00000004_3_3.png"]  # the fourth is the first


@pytest.mark.parametrize("name", ["x.npz", "x.png", "x"])
def test_what_another_job_drew_is_not_written_over(own, capsys, tmp_path, name):
    out = tmp_path / name
    assert sample(own, capsys, out=out)[0] == 0
    first = {p: p.read_bytes() for p in tmp_path.glob(f"{name}*/*")} | ({out: out.read_bytes()} if out.suffix else {})
    assert sample(own, capsys, out=out)[0] == 0  # the same job
    for other in (dict(sampling_steps=3), dict(seeds="5-7", num_samples=0), dict(ema_rate=0)):
        settings = {"num_samples": 3, "sampling_steps": 2, "device": "cpu", "out": out, **other}
        assert main(["sample", str(own), *flags(**{k: v for k, v in settings.items() if v != 0 or k == "ema_rate"})]) == 2
        assert "already holds something else" in capsys.readouterr().err
    assert all(path.read_bytes() == content for path, content in first.items())


def test_a_model_trained_anew_in_its_folder_is_another(own, config, capsys, tmp_path):
    assert sample(own, capsys, out=tmp_path / "x")[0] == 0
    saved = load(next((own / "checkpoints").glob("step_*")))
    shutil.rmtree(own / "checkpoints")
    for average in saved.averages.values():
        average["out.2.bias"] += 1
    save(own, config, saved)
    assert sample(own, capsys, out=tmp_path / "x")[0] == 2


def test_the_second_of_two_that_draw_into_one_place_is_told(launcher, own, capsys, tmp_path):
    out = tmp_path / "x.npz"
    job = ("--seeds", "0-79", "--batch_size", 8, "--sampling_steps", 20, "--device", "cpu", "--out", out)
    first = launcher.start("sample", own, *job, said=tmp_path / "said")
    while first.running() and not list(tmp_path.glob("x.npz.partial/0*.npy")):
        time.sleep(0.01)
    code, said = sample(own, capsys, out=out)
    assert first.wait() == [0] and (code, "another command is drawing into" in said) == (2, True)
    with np.load(out) as file:
        assert len(file["arr_0"]) == 80


def test_a_folder_of_the_users_beside_the_file_is_left_alone(own, capsys, tmp_path):
    (tmp_path / "x.npz.partial").mkdir()
    (tmp_path / "x.npz.partial" / "thesis.txt").write_text("years of work")
    code, said = sample(own, capsys, out=tmp_path / "x.npz")
    assert code == 2 and "thesis.txt is in the way" in said
    assert (tmp_path / "x.npz.partial" / "thesis.txt").read_text() == "years of work"


def test_a_link_in_its_place_is_not_followed(own, capsys, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "000000000.npy").write_text("years of work")
    (tmp_path / "x.npz.partial").symlink_to("mine")
    code, said = sample(own, capsys, out=tmp_path / "x.npz")
    assert code == 2 and "x.npz.partial is in the way" in said
    assert (tmp_path / "mine" / "000000000.npy").read_text() == "years of work"


def test_rows_stand_in_the_order_in_which_classes_are_asked_for():
    images = np.stack([np.full((8, 8, 1), 40 * k + 40, np.uint8) for k in range(3)])
    for order in ([2, 0], [0, 2]):
        sheet = np.asarray(grid(images[order], order, ("a", "b", "c")))[:, :, 0].astype(int)
        cells = [v for v in sheet[:, sheet.shape[1] - 20] if v in (40, 80, 120)]
        assert list(dict.fromkeys(cells)) == [40 * k + 40 for k in order]


def test_a_batch_that_a_power_cut_damaged_is_drawn_again(own, capsys, tmp_path, monkeypatch):
    from iddpm.sampling import draw

    images = draw.images

    def two(*args):
        yield from list(images(*args))[:2]
        raise KeyboardInterrupt

    settings = dict(out=tmp_path / "x.npz", batch_size=1, num_samples=4)
    monkeypatch.setattr(draw, "images", two)
    assert sample(own, capsys, **settings)[0] == 75
    (tmp_path / "x.npz.partial" / "000000001.npy").write_bytes(b"")
    monkeypatch.setattr(draw, "images", images)
    assert "1 of 4 images are there already" in sample(own, capsys, **settings)[1]
    assert sample(own, capsys, **{**settings, "out": tmp_path / "y.npz"})[0] == 0
    with np.load(tmp_path / "x.npz") as a, np.load(tmp_path / "y.npz") as b:
        assert np.array_equal(a["arr_0"], b["arr_0"])


NAMES = ("dog/cat", "red, round", "../../out", "a_b", "caf\udce9", "é", "中", "line\nend", ".", "CON", "x" * 300)


def test_classes_of_any_name_are_drawn_named_and_read_back(run, config, capsys, tmp_path):
    for k in range(0, len(NAMES) - 2, 3):
        names = NAMES[k : k + 3]
        other = renamed(run, config, tmp_path / f"r{k}", names)
        out = tmp_path / "deep" / f"x{k}"
        assert sample(other, capsys, out=out)[0] == 0
        assert len(list(out.glob("*.png"))) == 3 and sorted(p.name for p in tmp_path.iterdir() if "out" in p.name) == []
        data = Images.open(out, (8, 8), 1)
        assert data.rule == "labels.csv" and data.labels is not None
        by_file = {name: data.classes[y] for name, y in zip(data.names, data.labels)}
        assert set(by_file.values()) == set(names)
        assert sample(other, capsys, out=tmp_path / f"y{k}.npz")[0] == 0
        with np.load(tmp_path / f"y{k}.npz") as file:
            assert [str(file["classes"][y]) for y in file["arr_1"]] == list(names)


@pytest.mark.parametrize(("name", "file"), [("disc", "disc"), ("a b-c", "a b-c"), ("é", "é"), ("a/b", "a%2Fb"), ("a_b", "a%5Fb")])
def test_names_in_files_are_escaped_where_they_must_be(name, file):
    assert file_name(name) == file


def test_two_long_names_stay_two():
    assert file_name("x" * 300) != file_name("x" * 301) and len(file_name("x" * 300)) == 80


@pytest.mark.parametrize(
    ("classes", "labels", "expected"),
    [
        (("cat", "dog"), "dog,0", [1, 0]),
        (("red, round", "plain"), "red, round", [0]),
        (("red, round", "plain"), '"red, round",plain', [0, 1]),
        (("3", "7", "11"), "7,11", [1, 2]),
        (("caf\u00e9", "the"), "cafe\u0301", [0]),
    ],
)
def test_labels_are_names_and_numbers_only_where_these_are_no_names(config, classes, labels, expected):
    asked = config.updated(dict(classes=classes, num_classes=len(classes)))
    assert list(job(asked, range(len(expected)), labels).labels) == expected


@pytest.mark.parametrize(
    ("classes", "labels", "said"),
    [
        (("3", "7", "11"), "1", "the model knows 3, 7, 11$"),
        (("a", "b", "a,b"), "a,b", "is one class, and several"),
        (("cat", "dog"), "²", "the model knows cat, dog"),
    ],
)
def test_labels_that_name_nothing_or_two_things_are_refused(config, classes, labels, said):
    with pytest.raises(UserError, match=said):
        job(config.updated(dict(classes=classes, num_classes=len(classes))), range(2), labels)


def test_a_grid_has_no_boxes_for_letters_that_its_font_lacks():
    images = np.zeros((2, 8, 8, 1), np.uint8)
    plain, accents = (np.asarray(grid(images, [0, 1], names)) for names in (("cafe", "#1"), ("café", "中")))
    np.testing.assert_array_equal(plain, accents)


# ---- few steps, and what is not finite


@pytest.mark.parametrize("spec", ["1", "ddim1", "ddim2", "1,1", "2"])
def test_few_steps_begin_in_noise(config, spec):
    chain = config.updated(dict(diffusion_steps=1000, sampling_steps=spec))
    assert build.grid(chain).kept[-1] == 999
    published = build.grid(chain.updated(dict(published=True)))
    assert published.kept == {"1": [0], "ddim1": [0], "ddim2": [0, 500], "1,1": [0, 500], "2": [0, 999]}[spec]


def test_the_published_steps_stay_where_they_begin_in_noise(config):
    for spec in ("ddim50", "250", "10,15,20"):
        chain = config.updated(dict(diffusion_steps=1000, sampling_steps=spec))
        assert build.grid(chain).kept == build.grid(chain.updated(dict(published=True))).kept
    assert from_noise([0, 3], torch.tensor([1.0, 0.9, 0.5, 0.1])) == [0, 3]


def test_few_ancestral_steps_of_the_large_variance_are_told(pictures, tmp_path, capsys, run):
    settings = {k: v for k, v in TINY.items() if k != "learn_sigma"} | dict(steps=1, diffusion_steps=200, sampling_steps=25)
    assert main(["train", str(pictures), "--run", str(tmp_path / "r"), *flags(**settings)]) == 0
    capsys.readouterr()
    assert "25 steps are too few for --solver ancestral" in sample(tmp_path / "r", capsys, sampling_steps=25)[1]
    assert "too few" not in sample(tmp_path / "r", capsys, sampling_steps=25, solver="ddim")[1]
    assert "too few" not in sample(run, capsys, out=tmp_path / "x.png")[1]  # learns its variance


@pytest.mark.parametrize("verb", ["sample", "nll", "evaluate"])
def test_weights_that_are_not_finite_are_not_used(own, config, pictures, capsys, tmp_path, verb):
    saved = load(next((own / "checkpoints").glob("step_*")))
    shutil.rmtree(own / "checkpoints")
    for average in saved.averages.values():
        average["out.2.bias"][0] = float("nan")
    save(own, config, saved)
    rest = {"sample": [], "nll": [str(pictures)], "evaluate": ["--reference", str(pictures), "--metrics", "kd"]}[verb]
    assert main([verb, str(own), *rest, *flags(num_samples=4, device="cpu")]) == 2
    assert "is not finite in out.2.bias" in capsys.readouterr().err


def test_images_that_are_not_finite_are_not_drawn(own, config, capsys, tmp_path):
    saved = load(next((own / "checkpoints").glob("step_*")))
    shutil.rmtree(own / "checkpoints")
    for average in saved.averages.values():
        average["out.2.bias"] += 1e38
    save(own, config, saved)
    code, said = sample(own, capsys, out=tmp_path / "x.npz", clip_denoised=False)
    assert code == 2 and "what this network draws is not finite" in said


def test_a_full_disk_is_one_line(launcher, own, tmp_path):
    if os.geteuid() or os.system(f"mkdir {tmp_path}/m && mount -t tmpfs -o size=100k none {tmp_path}/m 2>/dev/null"):
        pytest.skip("cannot mount a small disk here")
    try:
        command = ("sample", own, "--num_samples", 2000, "--batch_size", 1000, "--sampling_steps", 1, "--device", "cpu")
        process = launcher.start(*command, "--out", tmp_path / "m" / "x.npz", said=tmp_path / "said")
        assert process.wait() == [2]
        told = process.said.read_text()
        assert "No space left" in told and "Traceback" not in told
    finally:
        os.system(f"umount {tmp_path}/m")


def test_a_folder_says_its_job(own, capsys, tmp_path):
    assert sample(own, capsys, out=tmp_path / "x")[0] == 0
    assert len(json.loads((tmp_path / "x" / "job.json").read_text())["weights"][0]) == 64
    with Image.open(next((tmp_path / "x").glob("*.png"))) as image:
        assert image.size == (8, 8)
