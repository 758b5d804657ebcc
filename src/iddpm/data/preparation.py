"""What is done to images before a network sees them: one value for training, measuring and packing, which cannot differ."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from iddpm.config import Config, names
from iddpm.errors import UserError

Say = Callable[[str], object]  # is told what is taken otherwise than it lies there
Places = Sequence[float] | Tensor | None  # (n,) from 0 to 1
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow makes grey of colours
SCALED = {
    "cover": "scaled and cropped",
    "anywhere": "scaled and cropped",
    "contain": "scaled whole",
}  # an image of another shape, by --fit
SPANS = {"unit": (0.0, 1.0), "signed": (-1.0, 1.0)}  # of --floats


class Preparation(NamedTuple):
    """How images are brought to a network's form, beside their size and channels."""

    fit: str = "cover"  # of the flag of this name: cover, contain or anywhere
    bits: int = 8  # of a pixel's channel: 8 or 16
    floats: str = ""  # what floats span, of SPANS; "": it was not said
    only: tuple[str, ...] = ()  # the classes that are read; none: all

    @property
    def dtype(self) -> type[np.uint8] | type[np.uint16]:
        return np.uint8 if self.bits == 8 else np.uint16

    def places(self, at: Places, n: int) -> list[float]:
        """Where each of n images is cut out: `at` by --fit anywhere, else in the middle."""
        return [0.5] * n if at is None or self.fit != "anywhere" else [float(place) for place in at]


AS_EVER = Preparation()  # as improved-diffusion does it


def preparation(config: Config, bits: int = 0) -> Preparation:
    """That of a run; with `bits`, of images of another depth, such as 8-bit samples are compared with."""
    d = config.data
    return Preparation(d.fit, bits or int(config.model.bit_depth), d.floats, names(d.only_classes))


def signed(pixels: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """Pixels uint8 or uint16, of any shape, as float32 in [-1, 1]."""
    return torch.from_numpy(pixels).to(device).float() / (32767.5 if pixels.dtype == np.uint16 else 127.5) - 1


def levels(held: np.ndarray, how: Preparation, say: Say) -> np.ndarray:
    """An array uint8, uint16 or float at the depth asked for. ValueError for floats out of their span, or that are not finite.

    255 becomes 65535 and back without a rounding; what is lost is told.
    """
    most = np.iinfo(how.dtype).max
    if held.dtype.kind == "f":
        low, high = SPANS[how.floats]
        if not (low - 1e-3 <= held.min() <= held.max() <= high + 1e-3):  # also false for nan
            there = f"floats from {held.min():.4g} to {held.max():.4g}"
            raise ValueError(f"{there}, where --floats {how.floats} is {low:g} to {high:g}")
        say(f"floats from {low:g} to {high:g} rounded to {how.bits} bits")
        return np.rint((held.astype(np.float64).clip(low, high) - low) * (most / (high - low))).astype(how.dtype)
    if held.dtype == how.dtype:
        return held
    if how.bits == 16:
        say("8 bits, which 16 make no finer")
        return held.astype(np.uint16) * 257
    say("16 bits cut to 8")
    return np.rint(held / 257.0).astype(np.uint8)


def recoloured(pixels: np.ndarray, channels: int, say: Say) -> np.ndarray:
    """Pixels (H, W, C) of 1 (grey), 3 (colour) or 4 channels (transparent) in as many channels as asked for, as files are.

    ValueError where either has another number of channels: which of them is which, nobody said.
    """
    there, most = pixels.shape[2], np.iinfo(pixels.dtype).max
    if there == channels:
        return pixels
    if not {there, channels} <= {1, 3, 4}:
        raise ValueError(f"{there} channels, where --image_channels is {channels}: none can be made of others")
    if there == 4:
        alpha = pixels[..., 3:] / most
        if alpha.min() < 1:
            say("transparency laid over white")
        pixels = np.rint(pixels[..., :3] * alpha + most * (1 - alpha)).astype(pixels.dtype)
    if channels == 1:
        return np.rint(pixels @ LUMA)[..., None].astype(pixels.dtype) if pixels.shape[2] == 3 else pixels
    pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    return pixels if channels == 3 else np.concatenate([pixels, np.full_like(pixels[..., :1], most)], 2)


def require_meant(held: np.ndarray | None, how: Preparation, path: object) -> None:
    """UserError where an array of `path` holds floats of which nobody said what they span."""
    if held is not None and held.dtype.kind == "f" and not how.floats:
        there = f"{path} holds {held.dtype}, the first image from {held.min():.4g} to {held.max():.4g}"
        raise UserError(f"{there}: what do they span? --floats unit (0 to 1) or --floats signed (-1 to 1)")
