"""What is done to images, against Pillow's own operations and closed forms; depth, floats, channels, classes, and the order."""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import iddpm
from conftest import TINY, flags
from iddpm import rng
from iddpm.cli.main import main
from iddpm.config import Config, check
from iddpm.data import Images, Order, prepare
from iddpm.data.batches import make_batch, open_data, order_of, require_used
from iddpm.data.check import check as check_data
from iddpm.data.decode import decode_deep
from iddpm.data.order import Balanced
from iddpm.data.own import Own
from iddpm.data.pack import pack
from iddpm.data.preparation import Preparation, signed
from iddpm.errors import UserError

NOISE = np.random.default_rng(0)
DEEP = Preparation(bits=16)


def noise(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return NOISE.integers(0, np.iinfo(dtype).max + 1, shape, dtype)


def png16(pixels: np.ndarray, interlaced: bool = False) -> bytes:
    """A PNG of 16 bits by hand, each row unfiltered: (H, W, C) uint16, C from 1 to 4."""
    height, width, channels = pixels.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def saved(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def opened(**settings: object) -> None:
    """As training opens its images."""
    config = Config().updated(settings)
    require_used(config, open_data(config)[0])


# ---- how images fit


def test_contained_images_lie_whole_in_the_middle_of_white():
    pixels = noise(20, 40, 3)
    found = prepare(Image.fromarray(pixels), 16, 16, "contain")
    small = Image.fromarray(pixels).resize((20, 10), Image.Resampling.BOX).resize((16, 8), Image.Resampling.BICUBIC)
    expected = np.full((16, 16, 3), 255, np.uint8)
    expected[4:12] = np.asarray(small)
    np.testing.assert_array_equal(found, expected.transpose(2, 0, 1))


def test_what_lies_around_a_transparent_image_is_nothing():
    found = prepare(Image.new("RGBA", (8, 4), (1, 2, 3, 200)), 8, 8, "contain")
    assert found[:, 0, 0].tolist() == [255, 255, 255, 0]
    assert found[:, 4, 4].tolist() == [1, 2, 3, 200]
    deep = prepare(np.full((4, 8, 4), 900, np.uint16), 8, 8, "contain")  # nor around one of 16 bits
    assert deep[:, 0, 0].tolist() == [65535, 65535, 65535, 0] and deep[:, 4, 4].tolist() == [900] * 4


@pytest.mark.parametrize(("at", "first"), [(0.0, 0), (0.5, 12), (0.999, 23)])
def test_a_part_along_the_longer_side_is_cut_where_it_is_asked_for(at: float, first: int):
    pixels = noise(16, 40, 3)
    found = prepare(Image.fromarray(pixels), 16, 16, "anywhere", at)
    np.testing.assert_array_equal(found, pixels[:, first : first + 16].transpose(2, 0, 1))


def anywhere(tmp_path: Path, **more: object) -> tuple[Config, Images]:
    for k in range(4):
        saved(tmp_path / "wide" / f"{k}.png", np.tile(np.arange(40, dtype=np.uint8) * 6, (16, 1)))
    settings = dict(path=str(tmp_path / "wide"), image_size="16", image_channels=1, fit="anywhere", batch_size=8, labels="none")
    config = Config().updated(settings | more)
    data, config = open_data(config)
    assert isinstance(data, Images)
    return config, data


def test_where_images_are_cut_depends_on_seed_step_and_place_alone(tmp_path, monkeypatch):
    config, data = anywhere(tmp_path)
    x = make_batch(config, data, order_of(config, data), 3, 24).x0
    places = rng.uniform(config.train.seed, rng.PLACE, 3, 8).tolist()
    expected = [int((40 - 16) * place) * 6 for place in places]  # the value at the left edge of a ramp
    assert ((x[:, 0, 0, 0] + 1) * 127.5).round().int().tolist() == expected
    assert len(set(expected)) > 4
    halves = []
    for rank in (0, 1):
        with monkeypatch.context() as patch:
            patch.setattr("iddpm.parallel.processes.share", lambda n, rank=rank: range(rank * n // 2, (rank + 1) * n // 2))
            halves.append(make_batch(config, data, order_of(config, data), 3, 24).x0)
    assert torch.equal(torch.cat(halves), x)
    still = make_batch(config, data, order_of(config, data), 3, 24, train=False).x0
    assert ((still[:, 0, 0, 0] + 1) * 127.5).round().unique().tolist() == [12 * 6]


# ---- depth


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_png_of_16_bits_keeps_every_bit(channels: int):
    pixels = noise(5, 7, channels, dtype=np.uint16)
    if channels == 4:
        pixels[..., 3] |= 1  # none is wholly transparent, whose colour is not kept
    np.testing.assert_array_equal(decode_deep(io.BytesIO(png16(pixels)), channels), pixels)


@pytest.mark.parametrize("order", "<>")
def test_a_tiff_of_16_bit_colours_keeps_every_bit_in_either_order_of_bytes(order: str):
    pixels, mark = noise(4, 6, 3, dtype=np.uint16), {"<": b"II*\0", ">": b"MM\0*"}[order]
    tags = [(256, 3, 1, 6), (257, 3, 1, 4), (258, 3, 3, 134), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 140), (277, 3, 1, 3),
            (278, 3, 1, 4), (279, 4, 1, pixels.nbytes), (284, 3, 1, 1)]  # fmt: skip
    file = mark + struct.pack(order + "IH", 8, len(tags))
    for tag, kind, count, value in tags:
        file += struct.pack(order + "HHI", tag, kind, count)
        file += struct.pack(order + "HH", value, 0) if kind == 3 and count == 1 else struct.pack(order + "I", value)
    file += struct.pack(order + "I", 0)
    assert len(file) == 134
    file += struct.pack(order + "HHH", 16, 16, 16) + pixels.astype(order + "u2").tobytes()
    np.testing.assert_array_equal(decode_deep(io.BytesIO(file), 3), pixels)


def test_grey_of_16_bits_is_not_clipped_to_white_at_either_depth(tmp_path):
    ramp = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    eight, deep = (Images.open(tmp_path, (8, 8), 1, how=how) for how in (Preparation(), DEEP))
    np.testing.assert_array_equal(deep.batch([0])[0, 0], ramp)
    np.testing.assert_array_equal(eight.batch([0])[0, 0], np.rint(ramp / 257))
    assert "grey of 16 bits" in eight.describe()
    assert "16 bits;" in deep.describe() and "taken otherwise" not in deep.describe()


def test_eight_bits_are_the_same_image_at_16_and_are_told(tmp_path):
    pixels = noise(8, 8, 3)
    saved(tmp_path / "a.png", pixels)
    deep = Images.open(tmp_path, (8, 8), how=DEEP)
    np.testing.assert_allclose(signed(deep.batch([0])), signed(pixels.transpose(2, 0, 1)[None]), atol=1e-7)
    assert "8 bits, which 16 make no finer" in deep.describe()


def test_scaling_at_16_bits_is_that_of_float_planes(tmp_path):
    pixels = noise(12, 12, 3, dtype=np.uint16)
    (tmp_path / "a.png").write_bytes(png16(pixels))
    found = Images.open(tmp_path, (8, 8), how=DEEP).batch([0])[0]
    for plane, made in zip(pixels.transpose(2, 0, 1), found, strict=True):
        scaled = np.asarray(Image.fromarray(plane.astype(np.float32)).resize((8, 8), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(made, np.rint(scaled).clip(0, 65535))


def test_16_bits_with_grey_and_transparency_are_cut_to_8_and_told(tmp_path):
    (tmp_path / "a.png").write_bytes(png16(noise(8, 8, 2, dtype=np.uint16)))
    data = Images.open(tmp_path, (8, 8), 3, how=DEEP)
    assert data.batch([0]).dtype == np.uint16
    assert "transparency" in data.describe()


def test_colour_as_grey_and_grey_as_colour_at_16_bits():
    pixels = noise(3, 3, 3, dtype=np.uint16)
    grey = decode_deep(io.BytesIO(png16(pixels)), 1)
    assert np.abs(grey[..., 0] - pixels @ [0.299, 0.587, 0.114]).max() <= 0.5
    assert (decode_deep(io.BytesIO(png16(pixels[..., :1])), 3) == pixels[..., :1]).all()


@pytest.mark.parametrize(("span", "low", "high"), [("unit", 0, 1), ("signed", -1, 1)])
@pytest.mark.parametrize("bits", [8, 16])
def test_floats_span_what_is_declared(tmp_path, span: str, low: float, high: float, bits: int):
    values = np.linspace(low, high, 2 * 4 * 4 * 3, dtype=np.float32).reshape(2, 4, 4, 3)
    np.save(tmp_path / "x.npy", values)
    data = Images.open(tmp_path / "x.npy", (4, 4), how=Preparation(bits=bits, floats=span))
    x = signed(data.batch([0, 1])).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(x, 2 * (values - low) / (high - low) - 1, atol=1.01 / (2**bits - 1))
    assert f"rounded to {bits} bits" in data.describe()


def test_floats_of_unknown_span_are_refused_with_what_to_say(tmp_path):
    np.save(tmp_path / "x.npy", np.full((2, 4, 4, 3), 0.25, np.float32))
    with pytest.raises(UserError, match="--floats unit"):
        Images.open(tmp_path / "x.npy", (4, 4))
    np.save(tmp_path / "x.npy", np.full((2, 4, 4, 3), 2.0, np.float32))
    with pytest.raises(UserError, match="--floats signed is -1 to 1"):
        Images.open(tmp_path / "x.npy", (4, 4), on_broken="fail", how=Preparation(floats="signed"))
    saved(tmp_path / "a" / "a.png", noise(8, 8))
    with pytest.raises(UserError, match="--floats has no effect"):
        opened(path=str(tmp_path / "a"), floats="unit", labels="none")


# ---- channels


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_arrays_of_many_channels_are_read_scaled_and_never_recoloured(tmp_path, dtype: type):
    pixels = noise(3, 16, 16, 5, dtype=dtype)
    np.save(tmp_path / "x.npy", pixels)
    how = Preparation(bits=8 * np.dtype(dtype).itemsize)
    same = Images.open(tmp_path / "x.npy", (16, 16), 5, how=how)
    np.testing.assert_array_equal(same.batch([0, 1, 2]), pixels.transpose(0, 3, 1, 2))
    half = Images.open(tmp_path / "x.npy", (8, 8), 5, how=how).batch([1])[0]
    blocks = pixels[1].reshape(8, 2, 8, 2, 5).mean((1, 3)).transpose(2, 0, 1)
    assert np.abs(half - blocks).max() <= (1 if dtype == np.uint8 else 0.5)  # bytes are rounded after rows and columns
    with pytest.raises(UserError, match="5 channels, where --image_channels is 3"):
        Images.open(tmp_path / "x.npy", (8, 8), 3, on_broken="fail", how=how)


def test_a_run_of_many_channels_and_16_bits_trains_samples_and_measures(tmp_path, capsys):
    np.save(tmp_path / "x.npy", noise(12, 8, 8, 5, dtype=np.uint16))
    settings = TINY | dict(image_channels=5, bit_depth="16", class_cond=False, eval_every=0)
    assert main(["train", str(tmp_path / "x.npy"), "--run", str(tmp_path / "r"), *flags(**settings)]) == 0
    assert (
        main(["sample", str(tmp_path / "r"), "--num_samples", "2", "--out", str(tmp_path / "s.npz"), "--sampling_steps", "2"])
        == 0
    )
    drawn = np.load(tmp_path / "s.npz")["arr_0"]
    assert drawn.shape == (2, 8, 8, 5) and drawn.dtype == np.uint16 and (drawn % 257).any()  # finer than 8 bits
    model = iddpm.load(tmp_path / "r")
    np.testing.assert_array_equal(model.sample(2, seed=0, steps=2), drawn)
    assert np.isfinite(model.bits_per_dim(drawn, steps=2)).all()  # what it draws, it can measure
    assert main(["nll", str(tmp_path / "r"), str(tmp_path / "x.npy"), "--sampling_steps", "4"]) == 0
    assert json.loads((tmp_path / "r" / "nll.json").read_text())["bits_per_dim"] > 16  # no model is shorter than noise
    capsys.readouterr()
    assert main(["sample", str(tmp_path / "r"), "--num_samples", "2", "--out", str(tmp_path / "pngs")]) == 2
    assert "end it in .npz" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "r"), "--reference", str(tmp_path / "x.npy"), "--num_samples", "4"]) == 2


def test_a_programs_own_images_keep_16_bits():
    pixels = noise(2, 8, 8, 3, dtype=np.uint16)
    own = Own(list(pixels), (8, 8), 3, how=DEEP)  # type: ignore[arg-type]
    np.testing.assert_array_equal(own.batch([0, 1]), pixels.transpose(0, 3, 1, 2))
    floats = pixels.transpose(0, 3, 1, 2) / np.float64(32767.5) - 1
    own = Own(list(floats), (8, 8), 3, how=DEEP)  # type: ignore[arg-type]
    np.testing.assert_array_equal(own.batch([0, 1]), pixels.transpose(0, 3, 1, 2))


# ---- classes


def zoo(tmp_path: Path, **counts: int) -> Path:
    for name, count in counts.items():
        for k in range(count):
            saved(tmp_path / "zoo" / name / f"{k}.png", np.full((8, 8), 10 * len(name) + k, np.uint8))
    return tmp_path / "zoo"


def test_some_classes_alone_are_read_and_numbered_anew(tmp_path):
    path = zoo(tmp_path, bird=2, cat=3, dog=4)
    data = Images.open(path, (8, 8), 1, how=Preparation(only=("dog", "bird")))
    assert data.classes == ("bird", "dog")
    assert data.labels is not None and data.labels.tolist() == [0, 0, 1, 1, 1, 1]
    assert all(str(file.parent.name) in data.classes for file in data.files)
    assert "6 of 9 images: those of --only_classes dog, bird" in data.describe()
    with pytest.raises(UserError, match="no such class; there are cat"):
        Images.open(path, (8, 8), 1, how=Preparation(only=("cats",)))
    held_out = zoo(tmp_path / "b", dog=1, cat=1)  # has no bird: held-out images need not have every class
    assert Images.open(held_out, (8, 8), 1, classes=data.classes, how=data.how).labels.tolist() == [1]


@pytest.mark.parametrize("class_cond", [True, False])
def test_a_run_of_some_classes_is_measured_on_these(tmp_path, class_cond: bool):
    path = zoo(tmp_path, bird=4, cat=4, dog=4)
    settings = TINY | dict(class_cond=class_cond, only_classes="dog,bird", balance=True)
    assert main(["train", str(path), "--run", str(tmp_path / "r"), *flags(**settings)]) == 0
    config = Config.from_json((tmp_path / "r" / "config.json").read_text())
    assert config.data.classes == (("bird", "dog") if class_cond else ()) and config.data.balance
    assert main(["nll", str(tmp_path / "r"), str(path), "--sampling_steps", "2"]) == 0
    assert json.loads((tmp_path / "r" / "nll.json").read_text())["images"] == 8


def test_balanced_classes_come_equally_often_and_each_image_as_often_as_the_others_of_its_class():
    labels = np.repeat([0, 1, 4], [100, 10, 3])
    order = Balanced(labels, 7)
    block = 3 * (4096 // 3)
    indices = order.indices(0, block)
    assert np.bincount(labels[indices]).tolist() == [1365, 1365, 0, 0, 1365]
    counts = np.bincount(indices, minlength=113)
    for label in (0, 1, 4):
        assert np.ptp(counts[labels == label]) <= 1
    assert np.abs(np.bincount(labels[indices[:300]])[[0, 1, 4]] - 100).max() < 40  # mixed, from the start


def test_a_balanced_order_is_a_function_of_the_position_alone():
    labels = np.random.default_rng(3).integers(0, 5, 60)
    whole = Balanced(labels, 1).indices(0, 9000)
    again = Balanced(labels, 1)
    for start, count in ((8000, 500), (17, 3), (4090, 40)):  # as a resumed run, or another process, asks for it
        np.testing.assert_array_equal(again.indices(start, count), whole[start : start + count])
    assert not np.array_equal(Balanced(labels, 2).indices(0, 100), whole[:100])


def test_a_resumed_balanced_run_is_the_same_run(tmp_path):
    path = zoo(tmp_path, bird=2, cat=7)
    settings = TINY | dict(class_cond=True, balance=True, save_interval=2)
    weights = []
    for name, parts in dict(whole=[4], parts=[2, 4]).items():
        for steps in parts:
            assert main(["train", str(path), "--run", str(tmp_path / name), *flags(**settings | dict(steps=steps))]) == 0
        weights.append(load_file(tmp_path / name / "checkpoints" / "step_00000004" / "weights.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_what_has_no_effect_is_refused(tmp_path):
    for settings, word in (
        (dict(balance=True, labels="none"), "--balance has no effect"),
        (dict(only_classes="cat", labels="none"), "--only_classes has no effect"),
        (dict(bit_depth="12"), "--bit_depth '12' is not one of: 8, 16"),
        (dict(fit="stretch"), "--fit 'stretch' is not one of"),
        (dict(floats="0..1"), "--floats"),
        (dict(labels="attributes:"), "which?"),
        (dict(labels="atributes:Male"), "--labels"),
    ):
        with pytest.raises(UserError, match=word):
            check(Config().updated(settings))
    flat = zoo(tmp_path, cat=3)
    for k in range(3):
        (flat / "cat" / f"{k}.png").rename(flat / f"{k}.png")
    (flat / "cat").rmdir()
    for settings in (dict(balance=True), dict(only_classes="cat")):
        with pytest.raises(UserError, match="has no classes"):
            opened(path=str(flat), image_size="8", **settings)


CELEBA = {"list_attr_celeba.txt": "3\nMale Smiling\na.jpg  1 -1\nb.jpg -1 -1\nc.jpg  1  1\n",
          "list_attr_celeba.csv": "image_id,Male,Smiling\na.jpg,1,-1\nb.jpg,-1,-1\nc.jpg,1,1\n"}  # fmt: skip


@pytest.mark.parametrize("name", CELEBA)
def test_attributes_of_a_table_are_classes(tmp_path, name: str):
    for k in "abc":
        saved(tmp_path / "set" / "img_align_celeba" / f"{k}.jpg", noise(8, 8, 3))
    (tmp_path / "set" / name).write_text(CELEBA[name])
    data = Images.open(tmp_path / "set", (8, 8), labels="attributes:Male,Smiling")
    assert data.labels is not None
    assert [data.classes[y] for y in data.labels] == ["Male+not_Smiling", "not_Male+not_Smiling", "Male+Smiling"]
    one = Images.open(tmp_path / "set", (8, 8), labels="attributes:Smiling")
    assert one.classes == ("Smiling", "not_Smiling") and one.labels is not None and one.labels.tolist() == [1, 1, 0]
    with pytest.raises(UserError, match="no attribute 'Smilling'; near it are Smiling"):
        Images.open(tmp_path / "set", (8, 8), labels="attributes:Smilling")
    with pytest.raises(UserError, match="put it beside the images"):
        Images.open(tmp_path / "set" / "img_align_celeba", (8, 8), labels="attributes:Smiling")


# ---- packed and checked by the same functions


@pytest.mark.parametrize("how", [Preparation("contain"), DEEP, Preparation(only=("cat",))])
def test_what_is_packed_is_what_would_be_read(tmp_path, how: Preparation):
    path = zoo(tmp_path, bird=2, cat=3)
    (path / "cat" / "deep.png").write_bytes(png16(noise(9, 14, 3, dtype=np.uint16)))
    direct = Images.open(path, (8, 8), how=how)
    for workers in (1, 2):
        pack(path, tmp_path / f"packed{workers}", (8, 8), how=how, workers=workers)
    packed = Images.open(tmp_path / "packed1", (8, 8), how=Preparation(bits=how.bits))
    everything = np.arange(len(direct))
    np.testing.assert_array_equal(packed.batch(everything), direct.batch(everything))
    assert direct.labels is not None and packed.labels is not None
    assert packed.labels.tolist() == direct.labels.tolist() and packed.classes == direct.classes
    assert (tmp_path / "packed1" / "part-00000.npy").read_bytes() == (tmp_path / "packed2" / "part-00000.npy").read_bytes()


def test_check_tells_of_depth_and_channels(tmp_path):
    path = zoo(tmp_path, cat=3)
    (path / "cat" / "deep.png").write_bytes(png16(noise(9, 14, 3, dtype=np.uint16)))
    assert any("--bit_depth 16" in line for line in check_data(path).lines)
    np.save(tmp_path / "x.npy", NOISE.random((4, 8, 8, 5), np.float32))
    found = check_data(tmp_path / "x.npy", how=Preparation(floats="unit"))
    assert any("float32 of 5 channels (4)" in line for line in found.lines)
    assert any("--image_channels 5" in line for line in found.lines)


def test_the_plain_order_is_as_ever():
    config = Config()
    labels = np.zeros(5, np.int64)

    class Data:
        def __len__(self) -> int:
            return 5

    data = Data()
    data.labels = labels  # type: ignore[attr-defined]
    same = order_of(config, data), Order(5, 0)  # type: ignore[arg-type]
    np.testing.assert_array_equal(same[0].indices(3, 20), same[1].indices(3, 20))
