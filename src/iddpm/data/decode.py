"""One image file: from bytes to the uint8 array that a network is trained on."""

import contextlib
import math
from collections.abc import Callable
from io import BytesIO
from pathlib import Path, PurePath
from threading import Lock
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError, features

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


def decode(source: str | Path | BinaryIO, channels: int, say: Callable[[str], object] = lambda note: None) -> Image.Image:
    """The first frame, turned as its EXIF says, in sRGB, in mode L, RGB or RGBA for 1, 3 or 4 channels.

    Transparency is laid over white unless 4 channels are asked for. 16-bit grey is scaled to 0..255; float grey may span 0..1 or
    0..255. `say` is told what was taken otherwise than it lies there. Raises UserError when the file cannot be read or its range
    is unclear.
    """
    if channels not in MODES:
        raise UserError(f"{channels} channels are not supported: use 1 (grey), 3 (RGB) or 4 (RGBA)")
    name = source if isinstance(source, (str, PurePath)) else getattr(source, "name", "an image")
    with readable(name, "is not a readable image"), opened_image(source) as image:
        if image.mode == "RGB" and ";16" in str(getattr(image, "tile", "")):
            say("colours of 16 bits cut to 8")
        if getattr(image, "is_animated", False) and image.format != "MPO":  # a camera's previews are no frames
            say("the first of several frames")
        with _large if math.prod(image.size) > LARGE else contextlib.nullcontext():
            image.load()
            return _convert(_upright(image), MODES[channels], say)


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


def prepare(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Scale to cover (height, width), crop the centre: uint8 (C, height, width).

    As in improved-diffusion: halve by box averaging while at least twice too large, then bicubic.
    """
    assert min(height, width) >= 1, f"cannot resize to {height} x {width}"
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    if image.width * image.height * scale**2 > 64 * width * height:  # very long: enlarge no more than what is seen
        seen = [min(side, math.ceil(part / scale) + 8) for side, part in zip(image.size, (width, height))]  # bicubic needs 2 more
        left, top = ((side - part) // 2 for side, part in zip(image.size, seen))
        image = image.crop((left, top, left + seen[0], top + seen[1]))
    size = round(image.width * scale), round(image.height * scale)
    pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    crop = pixels[top : top + height, left : left + width].reshape(height, width, -1)
    return np.ascontiguousarray(crop.transpose(2, 0, 1))


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1  # else it would be copied, a sixth of all time
        return ImageOps.exif_transpose(image) if turned else image
    except Exception:  # damaged EXIF says nothing about the pixels, so it costs only the orientation
        return image


def _convert(image: Image.Image, mode: str, say: Callable[[str], object]) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bit(image, say)
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


def _in_srgb(image: Image.Image, profile: bytes, say: Callable[[str], object]) -> Image.Image:
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


def _eight_bit(image: Image.Image, say: Callable[[str], object]) -> Image.Image:
    grey = np.asarray(image)
    low, high = grey.min(), grey.max()
    full = 65535.0  # also of mode I, which is what Pillow makes of some 16-bit files
    if image.mode == "F":
        full = 1.0 if high <= 1 else 255.0
    if not 0 <= low <= high <= full:  # also false for nan
        raise ValueError(f"{image.mode} values {low} .. {high}; 8 or 16 bits would do")
    say(f"grey of {'floats' if image.mode == 'F' else '16 bits'}, 0..{full:.0f} scaled to 0..255")
    return Image.fromarray(np.rint(grey * (255.0 / full)).astype(np.uint8))
