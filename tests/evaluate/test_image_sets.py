"""Every way in which images are given is the same images."""

import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from iddpm.errors import UserError
from iddpm.evaluate.image_sets import Like, open_images


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
    with tarfile.open(root / "packed.tar", "w") as tar:
        tar.add(folder, "inside")
    with tarfile.open(root / "packed.tar.gz", "w:gz") as tar:
        tar.add(folder, "inside")
    np.savez(root / "plain.npz", pixels, np.arange(9) % 2)
    np.savez_compressed(root / "small.npz", pixels)
    names = ("folder", "packed.zip", "packed.tar", "packed.tar.gz", "plain.npz", "small.npz")
    return {name: str(root / name) for name in names}


@pytest.mark.parametrize("form", ["folder", "packed.zip", "packed.tar", "packed.tar.gz", "plain.npz", "small.npz"])
def test_every_form_gives_the_same_pixels_by_number(forms, pixels, form):
    images = open_images(forms[form])
    assert (images.n, images.size, images.channels, images.kind) == (9, (12, 10), 3, "colour")
    order = sorted(range(9), key=lambda k: f"{'ab'[k % 2]}_{k}.png") if "npz" not in form else range(9)
    wanted = pixels[list(order)].transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(images.take([8, 0, 3]), wanted[[8, 0, 3]])
    if form != "small.npz":
        assert images.labels.tolist() == [k % 2 for k in order]


def test_an_npz_that_is_not_compressed_stays_on_the_disk(forms):
    from iddpm.data import open_npz
    from iddpm.places import place

    assert isinstance(open_npz(place(forms["plain.npz"]))[0], np.memmap)
    assert not isinstance(open_npz(place(forms["small.npz"]))[0], np.memmap)


@pytest.mark.parametrize("form", ["folder", "packed.zip", "packed.tar"])
def test_a_reference_is_scaled_and_read_like_the_samples(forms, form):
    images = open_images(forms[form], Like("samples", (6, 6), 1))
    assert images.take([0, 1]).shape == (2, 1, 6, 6)
    assert images.kind == "colour"  # as it lies there


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
        return folder / "f.npz", "holds float32 9 x 12 x 10 x 3; uint8 images"
    if what == "shape":
        np.savez(folder / "f.npz", pixels[..., :2])
        return folder / "f.npz", r"holds uint8 9 x 12 x 10 x 2; uint8 images N x H x W x C \(1, 3 or 4"
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
    return folder / what, "does not exist: give a run, an .npz"


@pytest.mark.parametrize("what", ["mixed", "dtype", "shape", "name", "archive", "broken", "absent"])
def test_what_is_no_set_of_images_is_one_line(tmp_path, pixels, what):
    path, said = bad(tmp_path, pixels, what)
    with pytest.raises(UserError, match=said):
        open_images(str(path))


def test_mixed_sizes_in_an_archive_are_met_as_they_are_read(tmp_path, pixels):
    for name, image in (("a", pixels[0]), ("b", pixels[0, :8])):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    shutil.make_archive(str(tmp_path.parent / "mixed"), "zip", tmp_path)
    images = open_images(str(tmp_path.parent / "mixed.zip"))
    with pytest.raises(UserError, match=r"8x10 pixels, and a\.png 12x10: samples must be of one size"):
        images.take([0, 1])


def test_an_npz_reference_of_another_size_is_refused(forms):
    with pytest.raises(UserError, match="holds images of 12x10, and x of 8x8: give equal sizes"):
        open_images(forms["plain.npz"], Like("x", (8, 8), 3))
