"""Every way in which images are given is the same images."""

import io
import os
import shutil
import tarfile
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import iddpm
from iddpm.config import Sample, Which, fields_of, own_numbers, settings_of
from iddpm.data.preparation import Preparation
from iddpm.data.sources import archive
from iddpm.errors import UserError
from iddpm.measure import features, image_sets
from iddpm.measure.image_sets import ImageSet, Like, drawn, open_images
from iddpm.sampling import open as opening
from iddpm.sampling.job import job
from iddpm.sampling.open import Opened, restore
from iddpm.store.weights import Weights, read_weights


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (9, 12, 10, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def forms(pixels, tmp_path_factory) -> dict[str, str]:
    """The same nine images as a folder, both kinds of .npz, a .zip and two .tar."""
    root = tmp_path_factory.mktemp("forms")
    folder = root / "folder"
    folder.mkdir()
    for k, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{'ab'[k % 2]}_{k}.png")
    shutil.make_archive(str(root / "packed"), "zip", folder)
    for name, how in (("packed.tar", "w"), ("packed.tar.gz", "w:gz")):
        with tarfile.open(root / name, how) as tar:
            for file in folder.iterdir():
                tar.add(file, file.name)
    np.savez(root / "plain.npz", pixels, np.arange(9) % 2)
    np.savez_compressed(root / "small.npz", pixels)
    names = ("folder", "packed.zip", "packed.tar", "packed.tar.gz", "plain.npz", "small.npz")
    return {name: str(root / name) for name in names}


@pytest.mark.parametrize("form", ["folder", "packed.zip", "packed.tar", "packed.tar.gz", "plain.npz", "small.npz"])
def test_every_form_gives_the_same_pixels_by_number(forms, pixels, form):
    images = open_images(forms[form])
    assert (images.n, images.size, images.channels, images.kind, images.native) == (9, (12, 10), 3, "colour", (12, 10))
    order = sorted(range(9), key=lambda k: f"{'ab'[k % 2]}_{k}.png") if "npz" not in form else range(9)
    wanted = pixels[list(order)].transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(images.take([8, 0, 3]), wanted[[8, 0, 3]])
    if form != "small.npz":
        assert images.labels.tolist() == [k % 2 for k in order]


def test_an_npz_that_is_not_compressed_stays_on_the_disk(forms):
    from iddpm.data import open_npz
    from iddpm.store.remote import place

    assert isinstance(open_npz(place(forms["plain.npz"]))[0], np.memmap)
    assert not isinstance(open_npz(place(forms["small.npz"]))[0], np.memmap)


@pytest.mark.parametrize("form", ["folder", "packed.zip", "packed.tar"])
def test_a_reference_is_scaled_and_read_like_the_samples(forms, form):
    images = open_images(forms[form], Like("samples", (6, 6), 1))
    assert images.take([0, 1]).shape == (2, 1, 6, 6)
    assert (images.kind, images.native, images.size) == ("colour", (12, 10), (6, 6))  # the first two as they lie there


def test_features_are_kept_for_images_read_in_one_way_alone(forms):
    extractor = SimpleNamespace(name="e", identity="i", widths={"pool": 1})

    def key(how: Preparation) -> str:
        return features._key(open_images(forms["folder"], Like("samples", (6, 6), 3, how)), np.arange(9), extractor)

    as_ever = key(Preparation())
    assert key(Preparation(fit="contain")) != as_ever != key(Preparation(floats="unit"))
    assert key(Preparation(fit="anywhere")) == as_ever == key(Preparation(only=("a", "b")))  # the same pixels


def test_of_the_runs_classes_are_the_images_by_the_runs_own_rule(tmp_path, pixels):
    for k, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{k}.png")
    lines = [f"{k}.png {1 if k < 4 else -1}" for k in range(len(pixels))]
    (tmp_path / "list_attr_celeba.txt").write_text("\n".join([str(len(pixels)), "Male", *lines]))
    how = Preparation(only=("Male",))
    assert open_images(str(tmp_path), Like("samples", (6, 6), 3, how, "attributes:Male")).n == 4
    every = open_images(str(tmp_path), Like("samples", (6, 6), 3, how))
    assert every.n == len(pixels) and not every.how.only  # which is told


def test_images_of_channels_that_no_metric_sees_are_refused_before_they_are_read(forms):
    with pytest.raises(UserError, match="5 channels: metrics see 1, 3 or 4"):
        open_images(forms["folder"], Like("the run", (6, 6), 5))


def test_the_digest_is_of_the_content_and_the_order(forms, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(forms["folder"], copy)
    ours, theirs = open_images(forms["folder"]), open_images(str(copy))
    assert ours.digest(range(9)) == theirs.digest(range(9))
    assert ours.digest([0, 1]) != ours.digest([1, 0]) != ours.digest([1])
    path = next(copy.iterdir())
    Image.fromarray(np.zeros((12, 10, 3), np.uint8)).save(path)
    assert ours.digest(range(9)) != open_images(str(copy)).digest(range(9))


def bad(folder, pixels, what):
    """Something that is no set of samples, and what is said of it."""
    if what == "mixed":
        Image.fromarray(pixels[0]).save(folder / "a.png")
        Image.fromarray(pixels[0, :8]).save(folder / "b.png")
        return folder, "b.png has 8x10 pixels, and .*a.png 12x10"
    if what == "dtype":
        np.savez(folder / "f.npz", pixels.astype(np.float32))
        return folder / "f.npz", "holds float32 9 x 12 x 10 x 3; uint8 or uint16 images"
    if what == "shape":
        np.savez(folder / "f.npz", pixels[..., :2])
        return folder / "f.npz", "holds images of 2 channels: metrics see 1, 3 or 4"
    if what == "name":
        np.savez(folder / "f.npz", images=pixels)
        return folder / "f.npz", "holds no arr_0 but images"
    if what == "archive":
        (folder / "f.zip").write_bytes(b"no archive")
        return folder / "f.zip", "not a readable archive"
    if what == "broken":
        Image.fromarray(pixels[0]).save(folder / "a.png")
        (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:20])
        return folder, "a.png is not a readable image"
    if what == "gzip":
        (folder / "f.tar.gz").write_bytes(b"\x1f\x8b no archive")
        return folder / "f.tar.gz", "not a readable archive"
    return folder / what, f"{what} does not exist: give a run, an .npz"


ABSENT = ["absent", "absent.npz", "absent.zip", "absent.tar.gz"]


@pytest.mark.parametrize("what", ["mixed", "dtype", "shape", "name", "archive", "gzip", "broken", *ABSENT])
def test_what_is_no_set_of_images_is_one_line(tmp_path, pixels, what):
    path, said = bad(tmp_path, pixels, what)
    with pytest.raises(UserError, match=said):
        open_images(str(path))


def test_mixed_sizes_in_an_archive_are_refused_as_in_a_folder(tmp_path, pixels):
    for name, image in (("a", pixels[0]), ("b", pixels[0, :8])):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    shutil.make_archive(str(tmp_path.parent / "mixed"), "zip", tmp_path)
    for name in (tmp_path, tmp_path.parent / "mixed.zip"):
        with pytest.raises(UserError, match=r"b\.png has 8x10 pixels, and .*a\.png 12x10: samples must be of one size"):
            open_images(str(name))


def test_an_npz_reference_of_another_size_is_refused(forms):
    with pytest.raises(UserError, match="holds images of 12x10, and x of 8x8: give equal sizes"):
        open_images(forms["plain.npz"], Like("x", (8, 8), 3))


# ---- what a mixed set is


def mixed(folder, pixels, *modes):
    """A folder and a .zip of the same images in these modes."""
    (folder / "in").mkdir()
    for k, mode in enumerate(modes):
        Image.fromarray(pixels[k % 9]).convert(mode).save(folder / "in" / f"{k:03d}.png")
    shutil.make_archive(str(folder / "packed"), "zip", folder / "in")
    return str(folder / "in"), str(folder / "packed.zip")


@pytest.mark.parametrize(("modes", "channels", "kind"), [
    ("L RGB RGB", 3, "colour"), ("L L RGB", 3, "colour"), ("RGB RGBA L", 4, "transparent"), ("L L L", 1, "grey"),
])  # fmt: skip
def test_one_grey_file_turns_no_set_grey(tmp_path, pixels, modes, channels, kind):
    for name in mixed(tmp_path, pixels, *modes.split()):
        images = open_images(name)
        assert (images.channels, images.kind) == (channels, kind)
        rgb = np.asarray(Image.fromarray(pixels[1]).convert(modes.split()[1]).convert("RGB")).transpose(2, 0, 1)
        np.testing.assert_array_equal(images.take([1])[0, :3], rgb if channels > 1 else rgb[:1])
        as_reference = open_images(name, Like("samples", (12, 10), 1))
        assert (as_reference.channels, as_reference.kind) == (1, kind)


def test_what_is_read_otherwise_than_it_lies_there_is_told(tmp_path, pixels, capsys):
    for name in mixed(tmp_path, pixels, "L", "LA"):
        open_images(name)
        assert not capsys.readouterr().out
        open_images(name, Like("samples", (12, 10), 1))
        assert not capsys.readouterr().out  # nothing shines through
    Image.new("LA", (10, 12), (0, 9)).save(tmp_path / "in" / "002.png")
    open_images(str(tmp_path / "in"), Like("samples", (12, 10), 1))
    assert "taken otherwise than stored: 1 (transparency laid over white)" in capsys.readouterr().out


def test_colour_behind_the_first_headers_is_never_lost_in_silence(tmp_path, pixels, monkeypatch):
    monkeypatch.setattr(image_sets, "LOOKED_AT", 2)
    for name in mixed(tmp_path, pixels, "L", "L", "RGB"):
        assert open_images(name).channels == 3


# ---- archives


class Counted(io.BytesIO):
    """A file that counts the bytes that are read of it."""

    count = 0

    def read(self, size=-1):
        content = super().read(size)
        self.count += len(content)
        return content

    def readinto(self, buffer):
        n = super().readinto(buffer)
        self.count += n
        return n


@pytest.mark.parametrize("form", ["packed.zip", "packed.tar", "packed.tar.gz"])
def test_an_archive_is_read_at_the_same_cost_in_any_order(forms, form, monkeypatch):
    files = []

    def opened(path):
        files.append(Counted(path.read_bytes()))
        return files[-1]

    monkeypatch.setattr(archive, "opened", opened)
    costs, contents = [], []
    for step in (1, -1):
        held = archive.Archive(image_sets.place(forms[form]))
        (file,), at_first = files[-1:], files[-1].count
        contents.append({name: held.read(name) for name in held.names[::step]})
        costs.append((at_first, file.count - at_first))
    assert costs[0] == costs[1] and contents[0] == contents[1]
    if form.endswith("gz"):  # read through once, and then no more
        size = len(image_sets.place(forms[form]).read_bytes())
        assert costs[0] == (pytest.approx(size, abs=8), 0)


def test_an_archive_that_is_gone_leaves_nothing_open(forms, tmp_path):
    for name in ("packed.zip", "packed.tar", "packed.tar.gz"):
        open_images(forms[name])  # an open file that is collected is a warning, and so an error
    with pytest.raises(UserError, match=r"gone\.zip is not a readable archive"):
        archive.Archive(tmp_path / "gone.zip")


# ---- what a run draws


@pytest.fixture(scope="module")
def draw(run) -> Callable[..., ImageSet]:
    weights = read_weights(run)
    net = restore(weights, torch.device("cpu"))

    def make(weights: Weights = weights, seeds=range(4), labels="", precision="fp32", **changed) -> ImageSet:
        config = weights.config.updated({"sampling_steps": "5"} | changed)
        return drawn(Opened(weights, config, net, torch.device("cpu"), Which(precision=precision)), job(config, seeds, labels))

    return make


def another(name: str) -> tuple[dict[str, object], object]:
    """What else must be set for a setting of Sample to have an effect, and a value of it that the tiny run does not have."""
    field, around = fields_of(Sample).get(name), {}
    if field is None:
        field = own_numbers(Sample)[name]
        around = {chooser: rows[0] for chooser, rows in field.rows.items()}
    elif allowed := field.allowed():
        return {}, [choice for choice in allowed if choice != field.default][-1]
    default = field.default
    if isinstance(default, bool):
        return around, not default
    return around, default + (0.5 if isinstance(default, float) else 1) if isinstance(default, (int, float)) else "4"


@pytest.mark.parametrize("name", sorted(set(settings_of(Sample)) - {"found"}))  # which follows from the grid
def test_every_setting_of_drawing_is_told_and_makes_other_images_of_it(draw, name):
    around, value = another(name)
    ours, other = draw(**around), draw(**around, **{name: value})
    assert other.about[name] == value != ours.about[name]
    assert other.digest(range(4)) != ours.digest(range(4)) == draw(**around).digest(range(4))


def test_how_images_came_to_be_is_told(draw, run):
    about = draw(sampling_steps="4", precision="bf16").about
    assert about["steps"] == 4 and about["precision"] == "bf16" and about["checkpoint_step"] == 4 and about["ema_rate"] == 0.9
    assert str(run) in about["weights"] and about["trained_on"]


def test_other_weights_arithmetic_seeds_classes_and_code_are_other_images(draw, run, monkeypatch):
    digests = [draw().digest(range(4)), draw().digest([1, 0]), draw().digest([0, 1])]
    for changed in (
        dict(weights=read_weights(run, ema_rate=0)), dict(weights=read_weights(run, ema_rate=0.99)), dict(precision="bf16"),
        dict(seeds=range(1, 5)), dict(labels="disc"),
    ):  # fmt: skip
        digests.append(draw(**changed).digest(range(4)))
    for module, name in ((image_sets, "DRAWING"), (iddpm, "__version__")):
        monkeypatch.setattr(module, name, "another")
        digests.append(draw().digest(range(4)))
    assert len(set(digests)) == len(digests)


def test_the_same_images_are_the_same_whatever_their_place_in_a_job(draw):
    assert draw(seeds=range(8)).digest([2, 3]) == draw(seeds=range(2, 10)).digest([0, 1])


def test_the_weights_of_many_draws_are_read_once_and_again_when_they_change(draw, run, tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    shutil.copy(read_weights(run).path, path)
    read = []
    monkeypatch.setattr(opening, "sha256", lambda path: read.append(path) or str(len(read)))
    one, two = (draw(weights=read_weights(path)).digest([0]) for _ in range(2))
    assert read == [path] and one == two
    os.utime(path, (1, 1))
    assert draw(weights=read_weights(path)).digest([0]) != one and len(read) == 2
