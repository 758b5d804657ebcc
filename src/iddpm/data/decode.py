"""One image file: from bytes to the uint8 array that a network is trained on."""

from pathlib import Path, PurePath
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from iddpm.errors import UserError
from iddpm.store.remote import Unreachable, opened, remote

EXTENSIONS = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def decode(source: str | Path | BinaryIO, channels: int) -> Image.Image:
    """The first frame, turned as its EXIF says, in mode L, RGB or RGBA for 1, 3 or 4 channels.

    Transparency is laid over white unless 4 channels are asked for. 16-bit grey is scaled to 0..255;
    float grey may span 0..1 or 0..255. Raises UserError when the file cannot be read or its range is unclear; Unreachable
    where its storage gives no answer, which says nothing about the file.
    """
    if channels not in MODES:
        raise UserError(f"{channels} channels are not supported: use 1 (grey), 3 (RGB) or 4 (RGBA)")
    try:
        with Image.open(opened(source) if isinstance(source, PurePath) and remote(source) else source) as image:
            image.load()
            return _convert(_upright(image), MODES[channels])
    except Unreachable:
        raise
    except Exception as error:  # damaged files make Pillow raise almost anything
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # whose text repeats the path
            reason = "of no known format"
        name = source if isinstance(source, (str, PurePath)) else getattr(source, "name", "an image")
        raise UserError(f"{name} is not a readable image ({reason}): repair or remove it") from error


def prepare(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Scale to cover (height, width), crop the centre: uint8 (C, height, width).

    As in improved-diffusion: halve by box averaging while at least twice too large, then bicubic.
    """
    assert min(height, width) >= 1, f"cannot resize to {height} x {width}"
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    size = round(image.width * scale), round(image.height * scale)
    pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    crop = pixels[top : top + height, left : left + width].reshape(height, width, -1)
    return np.ascontiguousarray(crop.transpose(2, 0, 1))


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF says nothing about the pixels, so it costs only the orientation
        return image


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bit(image)
    if image.has_transparency_data:
        # through RGBA, because a palette or a transparent colour only gets its alpha there
        image = image.convert("RGBA")
        if mode != "RGBA":
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    elif image.mode != mode:
        image = image.convert("RGB")  # exact for grey; CMYK has no direct way to RGBA
    return image if image.mode == mode else image.convert(mode)


def _eight_bit(image: Image.Image) -> Image.Image:
    grey = np.asarray(image)
    low, high = grey.min(), grey.max()
    full = 65535.0  # also of mode I, which is what Pillow makes of some 16-bit files
    if image.mode == "F":
        full = 1.0 if high <= 1 else 255.0
    if not 0 <= low <= high <= full:  # also false for nan
        raise ValueError(f"{image.mode} values {low} .. {high}; 8 or 16 bits would do")
    return Image.fromarray(np.rint(grey * (255.0 / full)).astype(np.uint8))
