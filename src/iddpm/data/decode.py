"""One image file: from bytes to the array of 8 or 16 bits that a network is trained on."""

import contextlib
import math
import sys
from io import BytesIO
from pathlib import Path, PurePath
from threading import Lock
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError, features

from iddpm.data.preparation import SPANS, Preparation, Say, levels, recoloured
from iddpm.errors import UserError, readable

with contextlib.suppress(ImportError):  # the extra [heic]
    import pillow_heif

    pillow_heif.register_heif_opener()

# Pillow knows many more, among them PostScript, which it hands to a program: nothing but these is ever decoded.
ENDINGS = {
    "PNG": ("png",), "JPEG": ("jpg", "jpeg", "jpe", "jfif"), "WEBP": ("webp",), "BMP": ("bmp",), "GIF": ("gif",),
    "TIFF": ("tif", "tiff"), "PPM": ("ppm", "pgm", "pbm", "pnm"),
}  # fmt: skip
if features.check("avif"):
    ENDINGS["AVIF"] = ("avif",)
if "HEIF" in Image.OPEN:
    ENDINGS["HEIF"] = ("heic", "heif")
EXTENSIONS = tuple(ending for endings in ENDINGS.values() for ending in endings)
MODES = {1: "L", 3: "RGB", 4: "RGBA"}

# Pillow's own limits are there for servers: it would call a large photo, or one with a program's settings in its text, damaged.
PIXELS = 1 << 29  # that an image may have here: 1.6 GB while it is decoded
Image.MAX_IMAGE_PIXELS = None
PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = 1 << 26, 1 << 28
LARGE = 1 << 26  # pixels from which images are decoded one at a time, whatever the number of threads
_large = Lock()


def decode(source: str | Path | BinaryIO, channels: int, say: Say = lambda note: None, floats: str = "") -> Image.Image:
    """The first frame, turned as its EXIF says, in sRGB, in mode L, RGB or RGBA for 1, 3 or 4 channels.

    Transparency is laid over white unless 4 channels are asked for. 16-bit grey is scaled to 0..255; float grey spans what
    `floats` says of `SPANS`, else 0..1 or 0..255. `say` is told what was taken otherwise than it lies there. UserError when
    the file cannot be read or its range is unclear.
    """
    if channels not in MODES:
        raise UserError(f"{channels} channels are not supported: use 1 (grey), 3 (RGB) or 4 (RGBA)")
    name = source if isinstance(source, (str, PurePath)) else getattr(source, "name", "an image")
    with readable(name, "is not a readable image"), opened_image(source) as image:
        if raw_of(image):
            say("colours of 16 bits cut to 8")
        if getattr(image, "is_animated", False) and image.format != "MPO":  # a camera's previews are no frames
            say("the first of several frames")
        with _large if math.prod(image.size) > LARGE else contextlib.nullcontext():
            image.load()
            return _convert(_upright(image), MODES[channels], say, floats)


def decode_deep(source: BinaryIO, channels: int, say: Say = lambda note: None, floats: str = "") -> np.ndarray:
    """As `decode`, but (H, W, C) uint16: what lies there in 16 bits or floats keeps them, 8 bits are scaled.

    What Pillow cannot do at that depth (another colour profile than sRGB, grey with transparency) is done in 8 bits, and told.
    """
    name = getattr(source, "name", "an image")
    with readable(name, "is not a readable image"), opened_image(source) as image:
        raw, profile = raw_of(image), image.info.get("icc_profile")
        grey = image.mode[0] in "IF"
        if not (grey or raw in COLOURS) or image.has_transparency_data > (image.mode == "RGBA") or _differs(image, profile, say):
            if grey or raw:
                say("16 bits cut to 8, for transparency or a colour profile")
            told = say if not (grey or raw) else lambda note: None  # which was told already
            eight = np.asarray(decode(source, channels, told, floats))
            return levels(eight.reshape(*eight.shape[:2], -1), Preparation(bits=16), told)
        if grey:
            found = np.asarray(_upright(image))
            held = np.rint(_spanned(found, image.mode, floats, 65535)[0]).astype(np.uint16)[..., None]
        else:  # Pillow keeps one byte of the two: the high ones, then read in the other order, the low ones
            high = np.asarray(_upright(image)).astype(np.uint16)
            source.seek(0)
            with opened_image(source) as other:
                other.tile = [tile._replace(args=_other_order(tile.args)) for tile in other.tile]  # type: ignore[attr-defined]
                other.load()
                held = high * 256 + np.asarray(_upright(other))
            if image.mode == "RGBA":  # so that no hidden colour comes in at the edges when it is scaled
                held[held[..., 3] == 0, :3] = 65535
        return recoloured(held, channels, say)


COLOURS = tuple(f"{mode};16{order}" for mode in ("RGB", "RGBA") for order in "BLN")  # how Pillow names colours of 16 bits


def raw_of(image: Image.Image) -> str:
    """How a picture of 16-bit colours lies in its file; "" for another."""
    args = image.tile[0].args if getattr(image, "tile", None) else ""  # type: ignore[attr-defined]
    raw = args[0] if isinstance(args, tuple) and args else args
    return raw if isinstance(raw, str) and ";16" in raw and not image.mode.startswith("I") else ""


def _other_order(args: Any) -> Any:
    """A tile's arguments with the two bytes of each number the other way round."""
    raw = args[0] if isinstance(args, tuple) else args
    order = raw[-1] if raw[-1] != "N" else "L" if sys.byteorder == "little" else "B"
    raw = raw[:-1] + ("L" if order == "B" else "B")
    return (raw, *args[1:]) if isinstance(args, tuple) else raw


def _differs(image: Image.Image, profile: bytes | None, say: Say) -> bool:
    """Whether a colour profile says other colours than sRGB's."""
    if not profile:
        return False
    plain = image if image.mode in ("RGB", "RGBA") else Image.new("L", (1, 1))
    plain = plain.convert("RGB") if plain.mode == "RGBA" else plain
    return _in_srgb(plain, profile, say) is not plain


def opened_image(file: str | Path | BinaryIO) -> Image.Image:
    """A file of one of our formats, whose pixels are yet to be read; ValueError where it is none, or claims too many."""
    try:
        image = Image.open(file, formats=list(ENDINGS))
    except UnidentifiedImageError:  # whose text repeats the path
        raise ValueError("of no known format") from None
    if (pixels := math.prod(image.size)) > PIXELS:
        image.close()
        raise ValueError(f"{pixels / 1e6:.0f} million pixels, the most are {PIXELS / 1e6:.0f}")
    return image


def prepare(image: Image.Image | np.ndarray, height: int, width: int, fit: str = "cover", at: float = 0.5) -> np.ndarray:
    """Scale to cover (height, width), crop the centre: uint8 (C, height, width); of an array (H, W, C) of its own type.

    As in improved-diffusion: halve by box averaging while at least twice too large, then bicubic. `at`, from 0 to 1, is where the
    crop lies between both ends, 0.5 the centre. With `fit` "contain" the whole is scaled to lie within, in the middle of white,
    or of nothing where there is transparency. An array's channels are scaled one by one.
    """
    assert min(height, width) >= 1, f"cannot resize to {height} x {width}"
    if fit == "contain":
        return _contained(image, height, width)
    if isinstance(image, np.ndarray):
        most = np.iinfo(image.dtype).max
        planes = image.transpose(2, 0, 1).astype(np.uint8 if most == 255 else np.float32)
        made = np.concatenate([prepare(Image.fromarray(plane), height, width, fit, at) for plane in planes])
        return np.rint(made).clip(0, most).astype(image.dtype)
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    if image.width * image.height * scale**2 > 64 * width * height:  # very long: enlarge no more than what is seen
        seen = [min(side, math.ceil(part / scale) + 8) for side, part in zip(image.size, (width, height))]  # bicubic needs 2 more
        left, top = (int((side - part) * at) for side, part in zip(image.size, seen))
        image = image.crop((left, top, left + seen[0], top + seen[1]))
    size = round(image.width * scale), round(image.height * scale)
    pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    top, left = int((pixels.shape[0] - height) * at), int((pixels.shape[1] - width) * at)
    crop = pixels[top : top + height, left : left + width].reshape(height, width, -1)
    return np.ascontiguousarray(crop.transpose(2, 0, 1))


def _contained(image: Image.Image | np.ndarray, height: int, width: int) -> np.ndarray:
    across, down = image.size if isinstance(image, Image.Image) else image.shape[1::-1]
    scale = min(width / across, height / down)
    h, w = max(1, min(height, round(down * scale))), max(1, min(width, round(across * scale)))
    small = prepare(image, h, w)
    whole = np.full((len(small), height, width), np.iinfo(small.dtype).max, small.dtype)
    if len(small) == 4:
        whole[3] = 0
    top, left = (height - h) // 2, (width - w) // 2
    whole[:, top : top + h, left : left + w] = small
    return whole


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1  # else it would be copied, a sixth of all time
        return ImageOps.exif_transpose(image) if turned else image
    except Exception:  # damaged EXIF says nothing about the pixels, so it costs only the orientation
        return image


def _convert(image: Image.Image, mode: str, say: Say, floats: str) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F":
        held, span = _spanned(np.asarray(image), image.mode, floats, 255)
        say(f"grey of {'floats' if image.mode == 'F' else '16 bits'}, {span} scaled to 0..255")
        image = Image.fromarray(np.rint(held).astype(np.uint8))
    alpha = None
    if image.has_transparency_data:
        # through RGBA, because a palette or a transparent colour only gets its alpha there
        grey = image.mode in ("L", "LA", "La")
        image = image.convert("RGBA")
        alpha, image = image.getchannel("A"), image.convert("L" if grey else "RGB")
    if profile:
        image = _in_srgb(image, profile, say)
    if alpha is not None:
        image = image.convert("RGB")
        image.putalpha(alpha)
        if mode != "RGBA":
            if np.asarray(alpha).min() < 255:
                say("transparency laid over white")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    elif image.mode != mode:
        image = image.convert("RGB")  # exact for grey; CMYK has no direct way to RGBA
    return image if image.mode == mode else image.convert(mode)


SRGB = ImageCms.createProfile("sRGB")


def _in_srgb(image: Image.Image, profile: bytes, say: Say) -> Image.Image:
    """The image in sRGB; as it is where its colour profile is that, or cannot be used."""
    try:
        held = ImageCms.ImageCmsProfile(BytesIO(profile))
        if image.mode == "P" or (image.mode == "L" and held.profile.xcolor_space.strip() == "RGB"):
            image = image.convert("RGB")
        turn = ImageCms.buildTransform(held, SRGB, image.mode, "RGB")
        if image.mode == "RGB":  # sRGB has many names, and going through it would cost a rounding
            trial = Image.fromarray(np.indices((4, 4, 4)).reshape(3, 8, 8).transpose(1, 2, 0).astype(np.uint8) * 85)
            if np.abs(np.asarray(ImageCms.applyTransform(trial, turn), int) - np.asarray(trial, int)).max() <= 2:
                return image
        made = ImageCms.applyTransform(image, turn)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        say("a colour profile that cannot be used")
        return image
    say("another colour profile, made sRGB")
    assert made is not None
    return made


def _spanned(grey: np.ndarray, mode: str, floats: str, most: int) -> tuple[np.ndarray, str]:
    """Grey of 16 bits or floats as float64 from 0 to `most`, and what it spans, in words; ValueError where it lies outside."""
    low, high = grey.min(), grey.max()
    least, full = 0.0, 65535.0  # also of mode I, which is what Pillow makes of some 16-bit files
    if mode == "F":
        least, full = SPANS.get(floats, (0.0, 1.0 if high <= 1 else 255.0))
    if not least <= low <= high <= full:  # also false for nan
        raise ValueError(f"{mode} values {low} .. {high}; 8 or 16 bits would do")
    return (grey.astype(np.float64) - least) * (most / (full - least)), f"{least:.0f}..{full:.0f}"
