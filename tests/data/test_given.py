"""Images in pairs: which belong together, what is refused, and that both are cut out and mirrored alike."""

import zipfile
from unicodedata import normalize

import numpy as np
import pytest
import torch
from PIL import Image

from iddpm.data import Images, Order, Own
from iddpm.data.batches import make_batch, open_data
from iddpm.errors import UserError


def save(path, pixels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)


def filled(value: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.full((height, width), value, np.uint8)


@pytest.fixture
def folders(tmp_path):
    """Pictures of values 10, 20, 30, 40, and what is given with them, of 110, 120, 130, 140, under other endings."""
    for k, name in enumerate(("a/1", "a/2", "b/1", "b/x.y"), start=1):
        save(tmp_path / "photos" / f"{name}.png", filled(10 * k))
        save(tmp_path / "sketches" / f"{name}.bmp", filled(100 + 10 * k))
    return tmp_path / "photos", tmp_path / "sketches"


def pairs(photos, sketches, **settings):
    return Images.open(photos, (8, 8), 1, given=sketches, given_channels=1, **settings)


@pytest.mark.parametrize("cache", [0, 1 << 20])
def test_images_of_equal_names_are_pairs_whatever_the_ending(folders, cache):
    pixels = pairs(*folders, cache_bytes=cache).batch(range(4))
    assert pixels.shape == (4, 2, 8, 8)
    assert pixels[:, :, 0, 0].tolist() == [[10, 110], [20, 120], [30, 130], [40, 140]]


def test_an_archive_with_a_folder_around_all_and_other_accents_is_paired(folders, tmp_path):
    photos, sketches = folders
    save(photos / "a" / f"{normalize('NFC', 'café')}.png", filled(1))
    save(sketches / "a" / f"{normalize('NFD', 'café')}.bmp", filled(101))
    with zipfile.ZipFile(tmp_path / "sketches.zip", "w") as packed:
        for file in sketches.rglob("*.bmp"):
            packed.write(file, f"drawn/{file.relative_to(sketches)}")
    one, two = pairs(*folders), pairs(photos, tmp_path / "sketches.zip")
    assert np.array_equal(one.batch(range(5)), two.batch(range(5)))
    assert [1, 101] in two.batch(range(5))[:, :, 0, 0].tolist()
    assert "names are those below drawn/" in two.describe() and "below" not in one.describe()


def test_images_without_a_partner_are_refused_by_name_and_number(folders):
    photos, sketches = folders
    (sketches / "a" / "2.bmp").rename(sketches / "a" / "2_edge.bmp")
    for k in range(5):
        save(sketches / "c" / f"{k}.png", filled(0))
    with pytest.raises(UserError) as e:
        pairs(photos, sketches)
    line = str(e.value)
    assert f"1 image of {photos} without a partner in {sketches} (a/2.png)" in line
    assert f"6 images of {sketches} without a partner in {photos} (a/2_edge.bmp, c/0.png, c/1.png, ...)" in line
    assert "perhaps a/2_edge.bmp" in line and "\n" not in line


def test_two_images_for_one_are_refused(folders):
    photos, sketches = folders
    save(sketches / "a" / "1.png", filled(0))
    with pytest.raises(UserError, match=r"a/1\.bmp, a/1\.png: which of these is of the pair a/1"):
        pairs(photos, sketches)


def test_a_pair_of_two_shapes_is_refused_and_one_of_two_sizes_is_scaled(folders):
    photos, sketches = folders
    save(sketches / "a" / "1.bmp", filled(110, 16, 16))
    assert pairs(photos, sketches).batch([0])[0, :, 0, 0].tolist() == [10, 110]
    save(sketches / "b" / "1.bmp", filled(130, 8, 12))
    for cache in (0, 1 << 20):  # where not all is read at once, some are looked at
        with pytest.raises(UserError, match=r"b/1\.png has 8x8 pixels, and .*b/1\.bmp, given with it, 8x12: crop one"):
            pairs(photos, sketches, cache_bytes=cache)


@pytest.mark.filterwarnings("ignore:.*stand")
@pytest.mark.parametrize("cache", [0, 1 << 20])
@pytest.mark.parametrize("broken", [0, 1])
def test_another_pair_stands_in_for_one_of_which_either_is_broken(folders, broken, cache):
    """Never the picture of one pair beside the other of another."""
    (folders[broken] / "a" / f"2.{('png', 'bmp')[broken]}").write_bytes(b"no image")
    data = pairs(*folders, cache_bytes=cache)
    assert data.batch([0, 1, 2, 3])[:, :, 0, 0].tolist() == [[10, 110], [10, 110], [30, 130], [40, 140]]
    assert len(data.broken) == 1
    left = pairs(*folders, cache_bytes=cache, on_broken="leave")
    assert left.batch(range(len(left)))[:, :, 0, 0].tolist() == [[10, 110], [30, 130], [40, 140]]


def test_the_identity_of_pairs_tells_other_sketches_from_these(folders):
    photos, sketches = folders
    alone, before = Images.open(photos, (8, 8), 1).identity(), pairs(*folders).identity()
    assert {k: v for k, v in before.items() if k != "given"} == alone
    save(sketches / "a" / "1.bmp", filled(99))
    after = pairs(*folders).identity()
    assert after["given"] != before["given"] and {k: v for k, v in after.items() if k != "given"} == alone


@pytest.mark.parametrize("cropped", [False, True])
def test_both_are_cut_out_and_mirrored_alike(config, tmp_path, cropped):
    """The given image is the picture turned to its negative: what is done alike to both leaves them so."""
    rng = np.random.default_rng(0)
    for k in range(6):
        picture = rng.integers(0, 256, (20, 20))
        save(tmp_path / "p" / f"{k}.png", picture)
        save(tmp_path / "g" / f"{k}.png", 255 - picture)
    settings = dict(task="translate", class_cond=False, random_flip=True, random_crop=cropped, image_size="16", batch_size=40)
    config = config.updated(settings | dict(path=str(tmp_path / "p"), given=str(tmp_path / "g"), classes=(), num_classes=0))
    data, config = open_data(config)
    batch = make_batch(config, data, Order(6, 0), 0, 0)
    assert (batch.x0 + batch.cond["given"]).abs().max() < 0.02  # a level of 8 bits is 0.008
    plain = make_batch(config.updated(dict(random_flip=False)), data, Order(6, 0), 0, 0)
    turned = (batch.x0 != plain.x0).flatten(1).any(1)
    assert 8 < turned.sum() < 32
    assert torch.equal(batch.cond["given"][turned], plain.cond["given"][turned].flip(-1))


def test_a_data_set_of_the_programs_own_is_given_images_of_any_number_of_channels():
    pictures = [np.full((8, 8, 3), k, np.uint8) for k in range(4)]
    maps = [np.full((8, 8, 7), 100 + k, np.uint8) for k in range(4)]
    data = Own(pictures, (8, 8), 3, given=maps, given_channels=7)
    assert data.batch([2])[0, :, 0, 0].tolist() == [2] * 3 + [102] * 7
    with pytest.raises(UserError, match="4 images and 3 given"):
        Own(pictures, (8, 8), 3, given=maps[:3], given_channels=7)
    with pytest.raises(UserError, match="8x12"):
        Own(pictures, (8, 8), 3, given=[np.zeros((8, 12, 7), np.uint8)] * 4, given_channels=7)


def test_files_of_two_channels_are_none(folders):
    with pytest.raises(UserError, match="--given_channels 2: files have 1"):
        Images.open(folders[0], (8, 8), 1, given=folders[1], given_channels=2)
