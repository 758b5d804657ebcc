"""Sets of images to measure: what a run draws, as it is asked for; an .npz, a folder, a .zip or .tar of images."""

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image

from iddpm import sample
from iddpm.checkpoint import Weights
from iddpm.config import Config, image_size
from iddpm.data import Images, decode, open_npz, prepare
from iddpm.data.archive import ENDINGS, Archive
from iddpm.data.labels import from_prefix_or_folder, number
from iddpm.diffusion.denoiser import Network
from iddpm.errors import UserError
from iddpm.places import fetch, opened, place, sha256


class Like(NamedTuple):
    """What other images are to be like."""

    name: str
    size: tuple[int, int]
    channels: int


class ImageSet(NamedTuple):
    """Images of one size, read or drawn by their numbers."""

    name: str  # as the user gave it
    n: int
    size: tuple[int, int]  # (H, W)
    channels: int
    take: Callable[[Sequence[int]], np.ndarray]  # numbers -> uint8 (n, C, H, W)
    digest: Callable[[Sequence[int]], str]  # of the content of those images
    home: Path  # the folder beside which what is computed of them is kept
    labels: np.ndarray | None = None  # (n,) int64
    classes: tuple[str, ...] = ()
    title: Callable[[int], str] = str  # what one image is called
    about: Mapping[str, Any] = {}  # how they came to be: solver, steps, checkpoint ...
    kind: str = "colour"  # what they are as they lie there: grey, colour or transparent

    def like(self) -> Like:
        return Like(self.name, self.size, self.channels)


KINDS = {1: "grey", 3: "colour", 4: "transparent"}


def open_images(name: str, like: Like | None = None) -> ImageSet:
    """The images of an .npz (arr_0), a folder or an archive; UserError where they are not of one size.

    With `like`, the images of a folder or archive are scaled and cropped to its size as for training, and read with its channels.
    """
    path = place(name)
    if path.suffix == ".npz":
        return _npz(name, path, like)
    if path.name.lower().endswith(ENDINGS):
        return _archive(name, path, like)
    if path.is_dir():
        return _folder(name, path, like)
    if not path.exists():
        raise UserError(f"{name} does not exist: give a run, an .npz of images, a folder of them, or a .zip or .tar")
    raise UserError(f"{name} is no set of images: give a run, an .npz of images, a folder of them, or a .zip or .tar")


def _npz(name: str, path: Path, like: Like | None) -> ImageSet:
    images, labels = open_npz(path)
    n, height, width, channels = images.shape
    if like and like.size != (height, width):
        raise UserError(
            f"{name} holds images of {height}x{width}, and {like.name} of {like.size[0]}x{like.size[1]}: give equal sizes"
        )

    def take(numbers: Sequence[int]) -> np.ndarray:
        return np.ascontiguousarray(np.stack([images[int(k)] for k in numbers]).transpose(0, 3, 1, 2))

    def digest(numbers: Sequence[int]) -> str:
        return _digest(images[int(k)].tobytes() for k in numbers)

    return ImageSet(name, n, (height, width), channels, take, digest, path.parent, labels, kind=KINDS[channels])


def _folder(name: str, path: Path, like: Like | None) -> ImageSet:
    def open_with(rule: str, size: tuple[int, int], channels: int) -> Images:
        return Images.open(path, size, channels, on_broken="fail", cache_bytes=0, labels=rule)

    first = _header_of(open_with("none", (8, 8), 3).files[0])
    size, channels = (like.size, like.channels) if like else first
    try:
        data = open_with("auto", size, channels)
    except UserError:  # labels that make no sense do not matter here; whatever else is wrong comes again
        data = open_with("none", size, channels)
    if not like:
        for file in data.files:
            _require(str(file), _header_of(file)[0], size, str(data.files[0]))

    def digest(numbers: Sequence[int]) -> str:
        return _digest(data.files[int(k)].read_bytes() for k in numbers)

    def title(k: int) -> str:
        return data.files[k].relative_to(path).as_posix()

    return ImageSet(
        name, len(data), size, channels, data.batch, digest, path, data.labels, data.classes, title, kind=KINDS[first[1]]
    )  # fmt: skip


def _archive(name: str, path: Path, like: Like | None) -> ImageSet:
    archive = Archive(path)
    names = archive.names
    first = _header(io.BytesIO(archive.read(names[0])), names[0])
    size, channels = (like.size, like.channels) if like else first

    def load(k: int) -> np.ndarray:
        file = io.BytesIO(archive.read(names[k]))
        file.name = f"{name}:{names[k]}"
        image = decode(file, channels)
        if not like:
            _require(file.name, image.size[::-1], size, names[0])
        return prepare(image, *size)

    def take(numbers: Sequence[int]) -> np.ndarray:
        return np.stack([load(int(k)) for k in numbers])

    def digest(numbers: Sequence[int]) -> str:
        return _digest(archive.read(names[int(k)]) for k in numbers)

    found, _ = from_prefix_or_folder(path, names)
    labels, classes = number(found, None) if found else (None, ())
    home, kind = path.parent, KINDS[first[1]]
    return ImageSet(name, len(names), size, channels, take, digest, home, labels, classes, names.__getitem__, kind=kind)


def drawn(
    config: Config, net: Network, weights: Weights, device: torch.device, job: sample.Job, home: Path, precision: str
) -> ImageSet:
    """What a run draws: image k is that of the job's k-th seed, and is drawn when it is asked for."""
    m, s, paint = config.model, config.sample, sample.painter(config, net, device)
    model = sha256(fetch(weights.path) or weights.path)
    from iddpm import build

    about = dict(
        solver=s.solver, steps=build.chain(config.diffusion, s.sampling_steps).steps, sampling_steps=s.sampling_steps, eta=s.eta,
        clip_denoised=s.clip_denoised, weights=str(weights.path), checkpoint_step=weights.about["step"],
        ema_rate=weights.about.get("ema_rate", 0), precision=precision, trained_on=config.data.path,
    )  # fmt: skip

    def take(numbers: Sequence[int]) -> np.ndarray:
        part = sample.Job([job.seeds[int(k)] for k in numbers], [job.labels[int(k)] for k in numbers])
        return paint(part).cpu().numpy().transpose(0, 3, 1, 2)

    def digest(numbers: Sequence[int]) -> str:
        seeds = [(job.seeds[int(k)], job.labels[int(k)]) for k in numbers]
        return _digest([f"{model} {about | {'weights': '', 'trained_on': ''}} {seeds}".encode()])

    labels = np.array(job.labels, np.int64) if m.class_cond else None
    return ImageSet(
        str(home), len(job.seeds), image_size(m), m.image_channels, take, digest, home, labels, config.data.classes,
        lambda k: f"seed {job.seeds[k]}", about, KINDS[m.image_channels],
    )  # fmt: skip


def _digest(parts: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _header(file: BinaryIO, name: str) -> tuple[tuple[int, int], int]:
    """(height, width) and channels (1, 3 or 4) of an image file, from its first bytes."""
    try:
        with file, Image.open(file) as image:
            channels = 4 if image.has_transparency_data else 1 if image.mode[0] in "1LIF" else 3
            turned = image.getexif().get(0x0112, 1) >= 5
            return (image.size if turned else image.size[::-1]), channels
    except Exception as e:  # damaged files make Pillow raise almost anything
        raise UserError(f"{name} is not a readable image ({e}): repair or remove it") from None


def _header_of(path: Path) -> tuple[tuple[int, int], int]:
    return _header(opened(path), str(path))


def _require(name: str, found: tuple[int, int], size: tuple[int, int], first: str) -> None:
    if found != size:
        raise UserError(f"{name} has {found[0]}x{found[1]} pixels, and {first} {size[0]}x{size[1]}: samples must be of one size")
