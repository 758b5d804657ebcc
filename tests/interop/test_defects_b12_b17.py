"""Defects B12 to B17: data, samples, super-resolution, likelihood."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from iddpm.cli.flags import Parser
from iddpm.config import Config
from iddpm.data import Images, Order, batches, given, images, labels, sources
from iddpm.data.batches import Batch, make_batch
from iddpm.data.labels import Found, Label
from iddpm.data.sources import Folder, source
from iddpm.interop.openai import commands
from iddpm.interop.openai.formats import flags
from iddpm.interop.openai.python import script_util
from iddpm.measure import bound as nll
from iddpm.measure.bound import Bound
from iddpm.sampling import draw, writers
from iddpm.sampling import images as pixels
from iddpm.training import loop as train
from interop.test_defects import TINY, TRAIN, command, red_with

CLASSES = TINY | dict(class_cond=True)
SMALL = {k: v for k, v in CLASSES.items() if k != "image_size"} | dict(large_size=16, small_size=8)


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory) -> Path:
    """A step of a model of three classes."""
    folder = tmp_path_factory.mktemp("trained")
    assert command(folder, "image_train", data_dir=pictures, **CLASSES, **TRAIN | {"steps": 1}) == 0
    return folder / "model000001.pt"


@pytest.fixture(scope="module")
def upsampler(pictures, tmp_path_factory) -> Path:
    """A step of a super-resolution model of three classes."""
    folder = tmp_path_factory.mktemp("upsampler")
    assert command(folder, "super_res_train", data_dir=pictures, **SMALL, **TRAIN | {"steps": 1}) == 0
    return folder / "model000001.pt"


def arrays(folder: Path) -> dict[str, np.ndarray]:
    (path,) = folder.glob("samples_*.npz")
    with np.load(path) as file:
        return dict(file)


# ---- B12


def drop_last_loader(patch):
    """Whole batches of each pass over the images, for ever; here for 100 passes."""

    def old(config: Config, data: Images, order: Order, start: int, position: int, end: int) -> Iterator[Batch]:
        for k in range(100):
            for first in range(0, len(data) - config.train.batch_size + 1, config.train.batch_size):
                yield make_batch(config, data, order, k, first)
        raise AssertionError("100 passes, and no end")

    patch.setattr(train, "ahead", old)


@red_with(drop_last_loader, says="100 passes")
def test_b12_a_batch_may_be_larger_than_the_data(pictures, tmp_path):
    assert command(tmp_path, "image_train", data_dir=pictures, **TINY, **TRAIN | dict(batch_size=30, steps=1)) == 0


def nobody_counts_the_files(patch):
    patch.setattr(sources, "Folder", lambda path: Folder(path, []))


@pytest.mark.parametrize("name", ["image_train", "image_nll"])
@red_with(nobody_counts_the_files, raises=Exception)
def test_b12_a_folder_without_images_is_one_line(name, trained, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    settings = {"image_train": TRAIN, "image_nll": dict(model_path=trained)}[name]
    assert command(tmp_path, name, data_dir=tmp_path / "empty", **CLASSES, **settings) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "holds no images" in line


# ---- B13


def numbered_anew(patch):
    """Classes are the ranks of the names in this folder."""
    number = images.number
    patch.setattr(images, "number", lambda found, classes: number(found, None))


def prefix_of_any_name(patch):
    def old(held: source.Source, below: str) -> Found:
        found: list[Label] = [Path(name).name.split("_")[0] for name in held.names]
        return found, "file names"

    patch.setattr(labels, "from_prefix", old)


def all_rows_are_drawn(patch):
    patch.setattr(commands, "trained_classes", lambda config: config.model.num_classes)


def rows_are_not_counted(patch):
    opened = Images.open

    def old(*args: Any, **kwargs: Any) -> Images:
        images = opened(*args, **kwargs)
        images.classes = images.classes[:2]
        return images

    patch.setattr(Images, "open", old)


@red_with(numbered_anew)
def test_b13_the_classes_of_other_data_are_those_of_the_training(trained, pictures, tmp_path, monkeypatch):
    """Of across, disc and down, disc is missing: down stays the third."""
    for name in ("across", "down"):
        (tmp_path / "part" / name).mkdir(parents=True)
        for path in sorted((pictures / name).iterdir())[:2]:
            (tmp_path / "part" / name / path.name).write_bytes(path.read_bytes())
    seen, measure = list[Any](), commands.bits_per_dim
    old = lambda *args, **kwargs: (seen.append(args[2].labels), measure(*args, **kwargs))[1]  # noqa: E731
    monkeypatch.setattr(commands, "bits_per_dim", old)
    settings = dict(model_path=trained, data_dir=tmp_path / "part", timestep_respacing="2")
    assert command(tmp_path, "image_nll", **CLASSES, **settings) == 0
    assert seen[0].tolist() == [0, 0, 2, 2]


@red_with(prefix_of_any_name)
def test_b13_names_without_an_underscore_are_of_the_class_of_their_folder(pictures):
    config = flags.to_config("images", CLASSES | dict(data_dir=str(pictures)))
    images, config = batches.open_data(config)
    assert config.data.classes == ("across", "disc", "down")
    assert [images.classes[y] for y in images.labels] == [file.parent.name for file in images.files]


@red_with(all_rows_are_drawn)
def test_b13_samples_are_of_trained_classes(trained, tmp_path):
    settings = dict(model_path=trained, num_samples=40, batch_size=40, timestep_respacing="1")
    assert command(tmp_path, "image_sample", **CLASSES, **settings) == 0
    assert set(arrays(tmp_path)["arr_1"].tolist()) == {0, 1, 2}


@red_with(rows_are_not_counted, raises=IndexError)
def test_b13_more_classes_than_rows_are_one_line(pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(flags, "NUM_CLASSES", 2)
    assert command(tmp_path, "image_train", data_dir=pictures, **CLASSES, **TRAIN) == 2
    assert "has 3 classes, the network has room for 2" in capsys.readouterr().err


# ---- B14


def originals_decoding(patch):
    """Resized as it lies in the file, then made RGB; jpg, png and gif."""

    def read(path: Path, channels: int) -> Image.Image:
        with Image.open(path) as image:
            image.load()
            return image

    def resized(image: Image.Image, height: int, width: int) -> np.ndarray:
        while min(*image.size) >= 2 * height:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC).convert("RGB"))
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    patch.setattr(images, "decode", read)
    patch.setattr(images, "prepare", resized)
    patch.setattr(source, "EXTENSIONS", ("jpg", "jpeg", "png", "gif"))


PIXELS = np.random.default_rng(3).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def palette(file: Path) -> np.ndarray:
    """16 x 16 pixels of four colours: each pixel of 8 x 8 is the mean of four."""
    colours, which = PIXELS[0, :4], np.random.default_rng(4).integers(0, 4, (16, 16), dtype=np.uint8)
    image = Image.fromarray(which, "L").convert("P")
    image.putpalette(colours.flatten().tolist())
    image.save(file.with_suffix(".png"))
    return colours[which].reshape(8, 2, 8, 2, 3).mean((1, 3))


def transparent(file: Path) -> np.ndarray:
    red = np.zeros((8, 8, 4), np.uint8)
    red[..., 0] = 255
    Image.fromarray(red).save(file.with_suffix(".png"))
    return np.full((8, 8, 3), 255)  # nothing of it, on white


def sixteen_bit_grey(file: Path) -> np.ndarray:
    Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257).save(file.with_suffix(".png"))
    return PIXELS[..., :1].repeat(3, 2)


def upside_down(file: Path) -> np.ndarray:
    image = Image.fromarray(PIXELS)
    exif = image.getexif()
    exif[0x0112] = 3  # turned by half
    image.save(file.with_suffix(".png"), exif=exif)
    return PIXELS[::-1, ::-1]


def in_format(ending: str) -> Callable[[Path], np.ndarray]:
    def write(file: Path) -> np.ndarray:
        Image.fromarray(PIXELS).save(file.with_suffix(f".{ending}"), **({"lossless": True} if ending == "webp" else {}))
        return PIXELS

    write.__name__ = ending
    return write


@pytest.mark.parametrize(
    "write", [palette, transparent, sixteen_bit_grey, upside_down, *map(in_format, ("webp", "bmp", "tiff"))],
    ids=lambda f: f.__name__,
)  # fmt: skip
@red_with(originals_decoding, raises=Exception)
def test_b14_an_image_is_read_as_it_looks(write, tmp_path):
    expected = write(tmp_path / "image")
    pixels = Images.open(tmp_path, (8, 8), 3).batch([0])[0].transpose(1, 2, 0)
    assert abs(pixels - expected.astype(float)).max() <= 1


# ---- B15


def truncated(patch):
    patch.setattr(pixels, "as_pixels", lambda x: ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1))


@red_with(truncated, says="63")
def test_b15_a_pixel_comes_back_as_it_was():
    levels = torch.arange(256).view(1, 1, 16, 16)
    back = pixels.as_pixels(levels.float() / 127.5 - 1)
    assert (back.ravel() != torch.arange(256)).sum() == 0


def held_in_memory(patch):
    def old(self: writers.Array, batch: np.ndarray) -> None:
        self.done += len(batch)

    patch.setattr(writers.Array, "write", old)


@red_with(held_in_memory, raises=Exception)
def test_b15_a_stopped_job_keeps_what_it_has_drawn(trained, tmp_path, monkeypatch, capsys):
    settings = dict(model_path=trained, num_samples=5, batch_size=2, timestep_respacing="2")
    images, drawn = draw.images, []

    def stopped(*args: Any) -> Iterator[np.ndarray]:
        for batch in images(*args):
            if len(drawn) == 2:
                raise KeyboardInterrupt
            drawn.append(batch)
            yield batch

    monkeypatch.setattr(draw, "images", stopped)
    assert command(tmp_path, "image_sample", **CLASSES, **settings) == 75
    assert not list(tmp_path.glob("*.npz"))
    monkeypatch.setattr(draw, "images", images)
    assert command(tmp_path, "image_sample", **CLASSES, **settings) == 0
    assert "4 of 5 images are there already" in capsys.readouterr().out
    assert (arrays(tmp_path)["arr_0"][:4] == np.concatenate(drawn)).all()


# ---- B16


def ddim_is_not_read(patch):
    patch.setitem(flags.MEANINGS, "use_ddim", ("solver", lambda value: "ancestral"))


def base_samples_in_a_cycle(patch):
    read = commands.read_npz
    patch.setattr(commands, "read_npz", lambda *args: (*(np.resize(a, (10, *a.shape[1:])) for a in read(*args)[:2]), ()))


def labels_are_left_out(patch):
    close = writers.Array.close

    def old(self: writers.Array) -> None:
        self.job = self.job._replace(labels=[])
        close(self)

    patch.setattr(writers.Array, "close", old)


def low_res_as_it_comes(patch):
    patch.setattr(given, "shrink", lambda x0, size: F.interpolate(x0, size, mode="area"))


def sigma_small_is_no_flag(patch):
    add = Parser.add_argument

    def old(self: Parser, *names: str, **settings: Any) -> Any:
        return None if names == ("--sigma_small",) else add(self, *names, **settings)

    patch.setattr(Parser, "add_argument", old)


def sigma_small_has_no_default(patch):
    patch.setattr(script_util, "sr_model_and_diffusion_defaults", lambda: dict(flags.SUPER_RES))


def enlarged(folder: Path, model: Path, **settings: object) -> dict[str, np.ndarray]:
    base = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "base.npz", base, np.array([2, 0, 1]))
    flags_given = SMALL | dict(model_path=model, base_samples=folder / "base.npz", num_samples=10)
    assert command(folder, "super_res_sample", **flags_given, timestep_respacing="4", **settings) == 0
    return arrays(folder)


@pytest.mark.parametrize("name", ["super_res_train", "super_res_sample"])
@red_with(sigma_small_is_no_flag, sigma_small_has_no_default, raises=(AssertionError, KeyError))
def test_b16_super_resolution_knows_sigma_small(name, tmp_path, capsys):
    assert script_util.sr_model_and_diffusion_defaults()["sigma_small"] is False
    assert command(tmp_path, name, sigma_small=True) == 2
    assert "unknown argument" not in capsys.readouterr().err


@red_with(labels_are_left_out, raises=KeyError, says="arr_1")
def test_b16_labels_are_kept_and_any_size_will_do(upsampler, tmp_path):
    assert enlarged(tmp_path, upsampler)["arr_1"].tolist() == [2, 0, 1]


@red_with(ddim_is_not_read)
def test_b16_use_ddim_is_used(upsampler, tmp_path):
    images = []
    for ddim in (False, True):
        (tmp_path / str(ddim)).mkdir()
        images.append(enlarged(tmp_path / str(ddim), upsampler, use_ddim=ddim)["arr_0"])
    assert (images[0] != images[1]).any()


@red_with(base_samples_in_a_cycle)
def test_b16_each_base_sample_is_enlarged_once(upsampler, tmp_path):
    assert enlarged(tmp_path, upsampler)["arr_0"].shape == (3, 16, 16, 3)


@red_with(low_res_as_it_comes)
def test_b16_the_small_image_has_8_bits_in_training_as_in_sampling(pictures):
    config = flags.to_config("enlarge", SMALL | TRAIN | dict(data_dir=str(pictures)))
    images, config = batches.open_data(config)
    levels = (make_batch(config, images, Order(len(images), 0), 0, 0).cond["given"] + 1) * 127.5
    assert (levels - levels.round()).abs().max() < 1e-3


# ---- B17


def the_tail_is_dropped(patch):
    measure = commands.bits_per_dim

    def old(*args: Any, chosen: np.ndarray, batch_size: int, **kwargs: Any) -> Bound:
        return measure(*args, chosen=chosen[: len(chosen) // batch_size * batch_size], batch_size=batch_size, **kwargs)

    patch.setattr(commands, "bits_per_dim", old)


def mean_of_the_means_of_batches(patch):
    def old(values: np.ndarray) -> tuple[float, float]:
        means = [values[k : k + 5].mean() for k in range(0, len(values), 5)]
        return float(np.mean(means)), float(np.std(means))

    patch.setattr(nll.Estimate, "mean", staticmethod(old))


@red_with(the_tail_is_dropped, mean_of_the_means_of_batches)
def test_b17_each_image_counts_once_and_the_result_is_kept(trained, pictures, tmp_path, monkeypatch):
    bounds, measure = list[Bound](), commands.bits_per_dim
    old = lambda *args, **kwargs: bounds.append(measure(*args, **kwargs)) or bounds[-1]  # noqa: E731
    monkeypatch.setattr(commands, "bits_per_dim", old)
    settings = dict(model_path=trained, data_dir=pictures, batch_size=5, timestep_respacing="2")
    assert command(tmp_path, "image_nll", **CLASSES, **settings) == 0
    result, (bound,) = json.loads((tmp_path / "nll.json").read_text()), bounds
    assert sorted(bound.indices.tolist()) == list(range(22)) and result["images"] == 22
    assert result["bits_per_dim"] == pytest.approx(bound.total.mean(), rel=1e-9)
    with np.load(tmp_path / "vb_terms.npz") as file:
        assert file["arr_0"][-1] == pytest.approx(bound.decoder.mean(), rel=1e-5), "step 0 is the last column"
