"""Decoding and preparing single images, against the reference's goldens and closed forms."""

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageDraw, PngImagePlugin

from iddpm.data import EXTENSIONS, decode, prepare
from iddpm.errors import UserError

GOLDENS = Path(__file__).parents[1] / "goldens"
# the reference resizes palettes as numbers and drops alpha, so a_2, b_3 and a_6 show its defects
SOUND = ("a_0.png", "b_1.png", "a_4.jpg", "b_5.png")


def saved(image: Image.Image, kind: str, **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("name", SOUND)
def test_square_targets_equal_the_reference(name: str, size: int) -> None:
    golden = np.load(GOLDENS / "images.npz")[f"{name}_{size}"]
    result = prepare(decode(GOLDENS / "images" / name, 3), size, size)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, golden)


@pytest.mark.parametrize("size", [32, 64])
def test_a_grey_file_as_grey_equals_the_reference(size: int) -> None:
    golden = np.load(GOLDENS / "images.npz")[f"b_1.png_{size}"]
    np.testing.assert_array_equal(prepare(decode(GOLDENS / "images" / "b_1.png", 1), size, size), golden[:1])


@pytest.mark.parametrize("name", ["a_2.png", "b_3.png", "a_6.gif"])
def test_palettes_and_transparency_become_colours_before_resizing(name: str) -> None:
    with Image.open(GOLDENS / "images" / name) as image:
        colours = np.asarray(image.convert("RGBA"), np.float64)
    alpha = colours[..., 3:] / 255
    over_white = np.rint(colours[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    flat = Image.fromarray(over_white)
    difference = prepare(decode(GOLDENS / "images" / name, 3), 32, 32) - prepare(flat, 32, 32).astype(int)
    assert np.abs(difference).max() <= 1  # Pillow composites in integers


@pytest.mark.parametrize(
    ("size", "target"),
    [
        ((40, 30), (32, 32)),
        ((100, 20), (16, 48)),
        ((9, 50), (8, 4)),
        ((5, 5), (12, 7)),
        ((333, 77), (64, 65)),
    ],
)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_size_is_covered_and_cropped_to_the_target(size: tuple[int, int], target: tuple[int, int], channels: int) -> None:
    mode, colour = {1: ("L", (77,)), 3: ("RGB", (7, 77, 177)), 4: ("RGBA", (7, 77, 177, 255))}[channels]
    result = prepare(Image.new(mode, size, colour), *target)
    assert result.shape == (channels, *target)
    assert np.all(result == np.reshape(colour, (channels, 1, 1)))


def test_an_image_of_the_target_size_is_left_alone() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
    np.testing.assert_array_equal(prepare(Image.fromarray(pixels), 12, 20), pixels.transpose(2, 0, 1))


def test_a_power_of_two_is_averaged_in_blocks() -> None:
    pixels = (np.random.default_rng(0).integers(0, 64, (16, 24)) * 4).astype(np.uint8)
    blocks = pixels.reshape(8, 2, 12, 2).mean((1, 3))  # exact: multiples of 4 in fours
    np.testing.assert_array_equal(prepare(Image.fromarray(pixels), 8, 12)[0], blocks)


def test_the_crop_is_central() -> None:
    ramp = np.tile(np.arange(10, dtype=np.uint8), (4, 1))
    assert prepare(Image.fromarray(ramp), 4, 4)[0, 0].tolist() == [3, 4, 5, 6]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    undo = {  # how the camera would have stored the upright picture
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = saved(Image.fromarray(np.ascontiguousarray(undo)), "PNG", exif=exif)
    np.testing.assert_array_equal(np.asarray(decode(file, 1)), upright)


def test_damaged_exif_costs_only_the_orientation() -> None:
    file = saved(Image.new("RGB", (8, 8), (10, 20, 30)), "PNG", exif=b"Exif\x00\x00XX*\x00nonsense")
    assert np.all(np.asarray(decode(file, 3)) == (10, 20, 30))


@pytest.mark.parametrize("alpha", [0, 51, 128, 255])
def test_alpha_is_laid_over_white(alpha: int) -> None:
    pixel = np.asarray(decode(saved(Image.new("RGBA", (2, 2), (200, 0, 100, alpha)), "PNG"), 3))[0, 0]
    expected = np.array([200, 0, 100]) * alpha / 255 + 255 * (1 - alpha / 255)
    assert np.abs(pixel - expected).max() <= 1


def test_alpha_is_kept_for_four_channels() -> None:
    image = Image.new("RGBA", (2, 2), (200, 0, 100, 51))
    assert np.all(np.asarray(decode(saved(image, "PNG"), 4)) == (200, 0, 100, 51))
    assert np.all(np.asarray(decode(saved(image.convert("RGB"), "PNG"), 4)) == (200, 0, 100, 255))


def test_grey_with_alpha_is_laid_over_white() -> None:
    assert np.asarray(decode(saved(Image.new("LA", (2, 2), (100, 0)), "PNG"), 1)).tolist() == [[255, 255]] * 2


def test_a_transparent_colour_becomes_white() -> None:
    pixels = np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8)
    file = saved(Image.fromarray(pixels), "PNG", transparency=(255, 0, 0))
    assert np.asarray(decode(file, 3)).tolist() == [[[255, 255, 255], [0, 0, 255]]]


def test_a_transparent_palette_entry_becomes_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    for kind in ("PNG", "GIF"):
        file = saved(image, kind, transparency=0)
        assert np.asarray(decode(file, 3)).tolist() == [[[255, 255, 255], [0, 0, 255]]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled(kind: str) -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    expected = [0, 0, 1, 1, 128, 255]  # value / 257 to the nearest
    file = saved(Image.fromarray(values), kind)
    assert np.asarray(decode(file, 1)).tolist() == [expected]
    file.seek(0)
    assert np.asarray(decode(file, 3)).tolist() == [[[value] * 3 for value in expected]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 65535]], np.int32), [0, 255]),
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 17.0, 255.0]], np.float32), [0, 17, 255]),
    ],
)
def test_wide_grey_is_scaled(values: np.ndarray, expected: list[int]) -> None:
    assert np.asarray(decode(saved(Image.fromarray(values), "TIFF"), 1)).tolist() == [expected]


@pytest.mark.parametrize(
    "values",
    [
        np.array([[0, 70000]], np.int32),
        np.array([[-1, 5]], np.int32),
        np.array([[0, 300]], np.float32),
        np.array([[0, np.nan]], np.float32),
    ],
)
def test_grey_of_unclear_range_is_refused(values: np.ndarray) -> None:
    with pytest.raises(UserError, match="8 or 16 bits"):
        decode(saved(Image.fromarray(values), "TIFF"), 1)


def test_cmyk_is_converted() -> None:
    image = Image.new("CMYK", (8, 8), (255, 0, 0, 0))  # pure cyan
    assert np.asarray(decode(saved(image, "TIFF"), 3))[0, 0].tolist() == [0, 255, 255]
    assert np.asarray(decode(saved(image, "TIFF"), 4))[0, 0].tolist() == [0, 255, 255, 255]
    assert np.abs(np.asarray(decode(saved(image, "JPEG"), 3)).astype(int) - [0, 255, 255]).max() < 8


def test_black_and_white_becomes_0_and_255() -> None:
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    assert np.asarray(decode(saved(image, "PNG"), 1)).tolist() == [[0, 255]]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_the_first_frame_of_an_animation_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    file = saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, lossless=True)
    assert np.asarray(decode(file, 3))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("ending", EXTENSIONS)
def test_every_listed_ending_can_be_read(ending: str, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), (255, 255, 255)).save(tmp_path / f"a.{ending}")
    assert np.all(np.asarray(decode(tmp_path / f"a.{ending}", 3)) == 255)


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "missing"])
def test_an_unreadable_file_is_named(damage: str, tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 64))
    ImageDraw.Draw(image).line((0, 0, 63, 63), fill="white")
    whole = saved(image, "JPEG").getvalue()
    path = tmp_path / "broken.jpg"
    if damage != "missing":
        path.write_bytes({"empty": b"", "text": b"hello", "cut": whole[: len(whole) // 2]}[damage])
    with pytest.raises(UserError, match=r"broken\.jpg is not a readable image") as caught:
        decode(path, 3)
    assert "\n" not in str(caught.value)


def test_an_unsupported_number_of_channels_is_refused() -> None:
    with pytest.raises(UserError, match="2 channels"):
        decode(saved(Image.new("L", (2, 2)), "PNG"), 2)


# ---- what Pillow would refuse, or do on its own


def test_a_text_that_unpacks_to_megabytes_is_no_damage() -> None:
    text = PngImagePlugin.PngInfo()
    for name in "abc":
        text.add_text(name, "x" * 30_000_000, zip=True)
    file = saved(Image.new("RGB", (8, 8), (1, 2, 3)), "PNG", pnginfo=text)
    assert np.all(np.asarray(decode(file, 3)) == (1, 2, 3))


def png(width: int, height: int, rows: bytes) -> io.BytesIO:
    """A grey PNG of one bit a pixel, without Pillow, which would need the memory of it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def test_a_large_photo_is_no_damage_and_an_endless_one_is_told() -> None:
    rows = (b"\0" + bytes(14_000 // 8)) * 14_000  # 196 million pixels, above twice Pillow's own limit
    assert decode(png(14_000, 14_000, rows), 1).size == (14_000, 14_000)
    with pytest.raises(UserError, match="10000 million pixels, the most are 537"):
        decode(png(100_000, 100_000, b""), 1)


@pytest.mark.parametrize("size", [(1, 65_500), (65_500, 1), (3, 20_000)])
def test_a_thin_picture_is_cut_before_it_is_enlarged(size: tuple[int, int]) -> None:
    ramp = np.arange(size[0] * size[1]).reshape(size[::-1]) * 2.0
    middle = np.round((ramp.min() + ramp.max()) / 2)
    grey = np.clip(ramp - middle + 128, 0, 255).astype(np.uint8)
    pixels = prepare(Image.fromarray(grey), 256, 256)
    assert pixels.shape == (1, 256, 256)
    assert abs(float(pixels.mean()) - 128) < 6 and pixels.max() - pixels.min() < 30  # the middle, and no more of it


def test_cutting_first_changes_nothing_that_is_seen() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (4, 240), np.uint8)
    image = Image.fromarray(grey)
    whole = np.asarray(image.resize((240 * 8, 32), Image.Resampling.BICUBIC))[:, (240 * 8 - 32) // 2 :][:, :32]
    long = Image.fromarray(np.pad(grey, ((0, 0), (200, 200))))  # now above the limit of length
    assert np.abs(prepare(long, 32, 32)[0].astype(int) - whole).max() <= 1


def test_postscript_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    (tmp_path / "x.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(UserError, match="of no known format"):
        decode(tmp_path / "x.png", 3)
    assert not (tmp_path / "ran").exists()


# ---- colours


def profile(space: bytes, **tags: bytes) -> bytes:
    """An ICC profile of version 2.1 (ICC.1:2001-04): a header of 128 bytes, a table, and the tags."""
    at, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        content += b"\0" * (-len(content) % 4)
        table += name.encode() + struct.pack(">II", at + len(body), len(content))
        body += content
    white = struct.pack(">3i", *(round(x * 65536) for x in (0.9642, 1, 0.8249)))
    head = struct.pack(">I", at + len(body)) + b"test\x02\x10\0\0mntr" + space + b"XYZ " + bytes(12) + b"acsp" + bytes(28)
    return (head + white + bytes(48)).ljust(128, b"\0") + table + body


def xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in values))


def curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


DESCRIPTION = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78)
COMMON = dict(desc=DESCRIPTION, cprt=b"text\0\0\0\0none\0", wtpt=xyz(0.9642, 1, 0.8249))
PRIMARIES = xyz(0.4361, 0.2225, 0.0139), xyz(0.3851, 0.7169, 0.0971), xyz(0.1431, 0.0606, 0.7141)  # sRGB's, under D50


def rgb_profile(red: int, green: int, blue: int, gamma: float) -> bytes:
    columns = {f"{name}XYZ": PRIMARIES[k] for name, k in zip("rgb", (red, green, blue))}
    return profile(b"RGB ", **COMMON, **columns, **{f"{name}TRC": curve(gamma) for name in "rgb"})


def said(image: Image.Image, channels: int, icc: bytes) -> tuple[Image.Image, list[str]]:
    notes: list[str] = []
    return decode(saved(image, "PNG", icc_profile=icc), channels, notes.append), notes


def test_a_colour_profile_is_used() -> None:
    swapped = rgb_profile(1, 0, 2, 2.2)
    image, notes = said(Image.new("RGB", (4, 4), (220, 30, 30)), 3, swapped)
    assert np.abs(np.array(image.getpixel((0, 0))) - (30, 220, 30)).max() <= 6 and notes == ["another colour profile, made sRGB"]
    image, _ = said(Image.new("RGBA", (4, 4), (220, 30, 30, 77)), 4, swapped)
    assert np.abs(np.array(image.getpixel((0, 0))) - (30, 220, 30, 77)).max() <= 6
    image, _ = said(Image.new("P", (4, 4)), 3, swapped)
    assert image.mode == "RGB"


def test_a_darker_gamma_is_used_for_grey_too() -> None:
    grey = profile(b"GRAY", **COMMON, kTRC=curve(1.0))  # 128 is half the light, which sRGB writes as 188
    for image in (Image.new("L", (4, 4), 128), Image.new("LA", (4, 4), (128, 255))):
        found, notes = said(image, 1, grey)
        assert abs(found.getpixel((0, 0)) - 188) <= 1 and notes


def test_srgb_by_its_numbers_changes_nothing() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    for icc in (ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),):
        image, notes = said(Image.fromarray(pixels), 3, icc)
        np.testing.assert_array_equal(np.asarray(image), pixels)
        assert notes == []


@pytest.mark.parametrize("icc", [b"nonsense", rgb_profile(0, 1, 2, 2.2)[:150]])
def test_a_profile_that_cannot_be_used_is_told(icc: bytes) -> None:
    image, notes = said(Image.new("RGB", (4, 4), (220, 30, 30)), 3, icc)
    assert image.getpixel((0, 0)) == (220, 30, 30) and notes == ["a colour profile that cannot be used"]


def test_what_is_taken_otherwise_is_told() -> None:
    notes: list[str] = []
    decode(saved(Image.fromarray(np.array([[0, 65535]], np.uint16)), "PNG"), 1, notes.append)
    decode(saved(Image.fromarray(np.array([[0.0, 1.0]], np.float32)), "TIFF"), 1, notes.append)
    decode(saved(Image.new("RGBA", (2, 2), (0, 0, 0, 9)), "PNG"), 3, notes.append)
    decode(saved(Image.new("L", (2, 2)), "GIF", save_all=True, append_images=[Image.new("L", (2, 2), 9)]), 1, notes.append)
    decode(saved(Image.new("RGB", (2, 2)), "PNG"), 3, notes.append)  # of which nothing is to be said
    assert notes == [
        "grey of 16 bits, 0..65535 scaled to 0..255",
        "grey of floats, 0..1 scaled to 0..255",
        "transparency laid over white",
        "the first of several frames",
    ]
