"""load_data: the original's batches from a folder, and an error where it would spin for ever."""

from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from golden_rules import FOLDER, load
from iddpm.errors import UserError
from iddpm.interop.openai.python import guided, image_datasets, logger
from iddpm.interop.openai.python.image_datasets import ImageDataset, load_data


@pytest.fixture(autouse=True)
def quiet(tmp_path_factory: pytest.TempPathFactory):
    with logger.scoped_configure(str(tmp_path_factory.mktemp("log")), ["log"]):
        yield


def fill(folder: Path, names: list[str]) -> Path:
    """Plain pictures whose brightness is their place in the list."""
    for k, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((6, 8, 3), k, np.uint8)).save(folder / name)
    return folder


def seen(batch: torch.Tensor) -> list[int]:
    return ((batch[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def take(folder: Path, count: int, **settings):
    return list(islice(load_data(data_dir=str(folder), image_size=4, **settings), count))


def test_batches_are_float_images_and_classes_by_prefix(tmp_path: Path) -> None:
    fill(tmp_path, ["b_0.png", "a_0.png", "b_1.png", "c_0.png"])
    ((x, cond),) = take(tmp_path, 1, batch_size=4, class_cond=True, deterministic=True)
    assert x.shape == (4, 3, 4, 4) and x.dtype == torch.float32
    assert seen(x) == [1, 0, 2, 3], "sorted by name"
    assert cond["y"].tolist() == [0, 1, 1, 2] and cond["y"].dtype == torch.int64
    assert "file names before the first underscore, 3 classes" in (Path(logger.get_dir()) / "log.txt").read_text()


def test_classes_are_sub_folders_where_a_name_has_no_underscore(tmp_path: Path) -> None:
    """B13: the original makes every file a class of its own."""
    fill(tmp_path, ["cat/1.png", "cat/2_x.png", "dog/1.png"])
    ((_, cond),) = take(tmp_path, 1, batch_size=3, class_cond=True, deterministic=True)
    assert cond["y"].tolist() == [0, 0, 1]


def test_classes_that_cannot_be_told_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lies in no sub-folder"):
        load_data(data_dir=str(fill(tmp_path, ["1.png"])), batch_size=1, image_size=4, class_cond=True)


def test_a_deterministic_order_repeats_without_the_last_part(tmp_path: Path) -> None:
    fill(tmp_path, [f"{k}.png" for k in range(5)])
    assert [seen(x) for x, _ in take(tmp_path, 3, batch_size=2, deterministic=True)] == [[0, 1], [2, 3], [0, 1]]


def test_a_random_order_is_torchs_and_shows_each_image_once_an_epoch(tmp_path: Path) -> None:
    fill(tmp_path, [f"{k}.png" for k in range(6)])
    torch.manual_seed(0)
    first, second, again = ([seen(x) for x, _ in take(tmp_path, 6, batch_size=2)] for _ in range(3))
    assert all(sorted(chain(*part)) == list(range(6)) for part in (first[:3], first[3:], second[:3]))
    assert first != second != again
    torch.manual_seed(0)
    assert [seen(x) for x, _ in take(tmp_path, 6, batch_size=2)] == first


@pytest.mark.parametrize("deterministic", [False, True])
def test_too_few_images_for_a_batch_are_an_error_at_once(tmp_path: Path, deterministic: bool) -> None:
    """B12: the original spins for ever."""
    fill(tmp_path, ["1.png", "2.png"])
    with pytest.raises(UserError, match=r"has 2 images: too few for a batch of 3; lower --batch_size"):
        load_data(data_dir=str(tmp_path), batch_size=3, image_size=4, deterministic=deterministic)


def test_shares_too_small_for_a_batch_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, [f"{k}.png" for k in range(5)])
    monkeypatch.setattr(image_datasets, "world", lambda: 2)
    monkeypatch.setattr(image_datasets, "rank", lambda: 1)
    assert seen(take(tmp_path, 1, batch_size=2, deterministic=True)[0][0]) == [1, 3], "every second one"
    with pytest.raises(UserError, match="shared among 2 processes"):
        load_data(data_dir=str(tmp_path), batch_size=3, image_size=4)


@pytest.mark.parametrize(
    ("folder", "message"), [("", "unspecified data directory"), ("none", "does not exist"), (".", "no images")]
)
def test_a_folder_without_images_is_an_error_at_once(
    folder: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        load_data(data_dir=folder, batch_size=1, image_size=4)


def test_mirroring_and_cutting_out_are_guided_diffusions(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 255, 40).astype(np.uint8)[None, :, None], (40, 1, 3))
    for k in range(40):
        Image.fromarray(ramp).save(tmp_path / f"{k}.png")
    settings = dict(data_dir=str(tmp_path), batch_size=40, image_size=8)
    plain, flipped = (next(load_data(**settings, random_flip=flip))[0] for flip in (False, True))
    rising = flipped[:, 0, 0, -1] > flipped[:, 0, 0, 0]
    assert 5 < rising.sum() < 35
    torch.testing.assert_close(torch.where(rising.view(-1, 1, 1, 1), flipped, flipped.flip(-1)), plain)
    assert not torch.equal(next(guided.load_data(**settings))[0], plain), "the default there"
    assert torch.equal(next(guided.load_data(**settings, deterministic=True))[0], plain), "likelihoods are of the images"
    cut = next(load_data(**settings, random_crop=True))[0]
    spans = cut[:, 0, 0, -1] - cut[:, 0, 0, 0]
    full = (plain[:, 0, 0, -1] - plain[:, 0, 0, 0]).max()
    assert cut.shape == plain.shape and 0.7 * full < spans.min() < 0.9 * full < spans.max() <= 1.02 * full


def test_one_image_at_a_time_is_the_published_preparation() -> None:
    names = ["a_0.png", "b_1.png", "a_4.jpg", "b_5.png"]
    data = ImageDataset(32, [str(FOLDER / "images" / n) for n in names], classes=[5, 6, 7, 8], shard=1, num_shards=2)
    assert len(data) == 2
    for k, name in enumerate(names[1::2]):
        x, cond = data[k]
        assert x.dtype == np.float32 and cond["y"].dtype == np.int64 and cond["y"] == [6, 8][k]
        np.testing.assert_array_equal(np.rint((x + 1) * 127.5), load("images.npz")[f"{name}_32"])


def test_images_are_found_in_sub_folders(tmp_path: Path) -> None:
    fill(tmp_path, ["b/1.png", "a.png"])
    assert image_datasets._list_image_files_recursively(str(tmp_path)) == [f"{tmp_path}/a.png", f"{tmp_path}/b/1.png"]
