"""Sets of images to measure: what a run draws, as it is asked for; an .npz, a folder, a .zip or .tar of images."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import iddpm
from iddpm import build
from iddpm.config import Config, Sample, image_size, own_numbers, settings_of
from iddpm.data import Images, open_npz
from iddpm.data.arrays import require_images
from iddpm.data.decode import opened_image
from iddpm.data.preparation import Preparation, preparation
from iddpm.data.sources import ENDINGS, Source, open_source
from iddpm.errors import UserError, readable
from iddpm.sampling.draw import painter
from iddpm.sampling.images import eight_bits
from iddpm.sampling.job import Job
from iddpm.sampling.open import Opened, digest_of
from iddpm.store.remote import Unreachable, place

DRAWING = 1  # of how images are drawn: a change beyond rounding counts it up, and so makes features of images drawn before void
LOOKED_AT = 64  # headers that tell what a set holds, where reading all would cost as much as the images


class Like(NamedTuple):
    """What other images are to be like."""

    name: str
    size: tuple[int, int]
    channels: int
    how: Preparation = Preparation()
    rule: str = "auto"  # where the classes come from that `how` names


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
    kind: str = "colour"  # what they are as they lie there: grey, colour or transparent; mixed ones are what most says
    native: tuple[int, int] | None = None  # (H, W) of the first as it lies there; None for images that are drawn
    mixed: bool = False  # whether others are of other sizes
    how: Preparation = Preparation()  # what is done to others to be like them; of their classes are those that these are of
    rule: str = "auto"  # where others' classes come from

    def like(self) -> Like:
        return Like(self.name, self.size, self.channels, self.how, self.rule)


KINDS = {1: "grey", 3: "colour", 4: "transparent"}


def open_images(name: str, like: Like | None = None) -> ImageSet:
    """The images of an .npz (arr_0), a folder or an archive; UserError where they are not of one size.

    With `like`, the images of a folder or archive are scaled and cropped to its size as for training, and read with its channels.
    Without, one image in colour makes a grey set colour, and one that is transparent makes it transparent.
    """
    path = place(name)
    if like and like.channels not in KINDS:
        raise UserError(f"{like.name} has images of {like.channels} channels: metrics see 1, 3 or 4; take iddpm nll")
    if not path.exists():
        raise UserError(f"{name} does not exist: give a run, an .npz of images, a folder of them, or a .zip or .tar")
    if path.suffix == ".npz":
        return _npz(name, path, like)
    if path.is_dir() or path.name.lower().endswith(ENDINGS):
        return _files(name, path, like)
    raise UserError(f"{name} is no set of images: give a run, an .npz of images, a folder of them, or a .zip or .tar")


def write_images(path: Path, images: np.ndarray) -> str:
    """Keep an array as an .npz and give its name for `open_images`; UserError, without its folder, where that would refuse it."""
    np.savez(path, require_images(Path(path.stem), images, any_kind=False))
    return str(path)


def _npz(name: str, path: Path, like: Like | None) -> ImageSet:
    images, labels, classes = open_npz(path)
    n, height, width, channels = images.shape
    if channels not in KINDS:
        raise UserError(f"{name} holds images of {channels} channels: metrics see 1, 3 or 4")
    if images.dtype == np.uint16:
        print(f"{name}: 16 bits (0 to 65535), measured at 8")
    if like and like.size != (height, width):
        raise UserError(
            f"{name} holds images of {height}x{width}, and {like.name} of {like.size[0]}x{like.size[1]}: give equal sizes"
        )

    def take(numbers: Sequence[int]) -> np.ndarray:
        return np.ascontiguousarray(eight_bits(np.stack([images[int(k)] for k in numbers])).transpose(0, 3, 1, 2))

    def digest(numbers: Sequence[int]) -> str:
        return _digest(images[int(k)].tobytes() for k in numbers)

    size, kind = (height, width), KINDS[channels]
    return ImageSet(name, n, size, channels, take, digest, path.parent, labels, classes, kind=kind, native=size)


def _files(name: str, path: Path, like: Like | None) -> ImageSet:
    source = open_source(path)
    looked_at = source.names[:LOOKED_AT] if like else source.names
    found = {k: _header(source, k) for k in looked_at}
    headers = {k: header for k, header in found.items() if isinstance(header, Header)}
    if not headers:
        raise next(fault for fault in found.values() if isinstance(fault, UserError))
    first, most = next(iter(headers)), max(header.channels for header in headers.values())
    native = headers[first].size
    size, channels = (like.size, like.channels) if like else (native, most)
    if not like:
        for k, header in headers.items():
            _require(str(source.path / k), header.size, size, str(source.path / first))

    how = like.how if like else Preparation()

    def labelled(rule: str) -> Images:
        only = how._replace(only=()) if rule == "none" else how
        return Images.open(path, size, channels, on_broken="leave", cache_bytes=0, labels=rule, how=only)

    try:
        data = labelled(like.rule if like and how.only else "auto")
    except UserError:  # labels that make no sense do not matter here; whatever else is wrong comes again
        data = labelled("none")
    if told := data.told():
        print(f"{name}: {told}")

    def digest(numbers: Sequence[int]) -> str:
        return _digest(data.source.read(data.names[int(k)]) for k in numbers)

    return ImageSet(
        name, len(data), size, channels, data.batch, digest, source.home, data.labels, data.classes, data.names.__getitem__,
        kind=KINDS.get(most, f"of {most} channels"), native=native, how=data.how,
        mixed=len({header.size for header in headers.values()}) > 1,
    )  # fmt: skip


def drawing(config: Config, precision: str, ema_rate: float) -> dict[str, Any]:
    """What decides samples beside weights, seeds and classes, as a figure tells it."""
    how = {name: f.default for name, f in own_numbers(Sample).items()}  # also those of other solvers
    how |= {name: value for name, value in config.flat().items() if name in settings_of(Sample)}
    how["found"] = list(config.sample.found)  # as it comes back from JSON
    return how | dict(steps=build.grid(config).steps, precision=precision, ema_rate=ema_rate)


def drawn(model: Opened, job: Job) -> ImageSet:
    """What a run draws: image k is that of the job's k-th seed, and is drawn when it is asked for."""
    config, weights, home = model.config, model.weights, model.home
    m, paint = config.model, painter(config, model.net, model.device)
    how = drawing(config, model.which.precision, weights.about.get("ema_rate", 0))
    about = how | dict(weights=str(weights.path), checkpoint_step=weights.about["step"], trained_on=config.data.path)
    made_by = [DRAWING, iddpm.__version__, digest_of(weights), how]

    def take(numbers: Sequence[int]) -> np.ndarray:
        part = Job([job.seeds[int(k)] for k in numbers], [job.labels[int(k)] for k in numbers])
        return eight_bits(paint(part).cpu().numpy()).transpose(0, 3, 1, 2)

    def digest(numbers: Sequence[int]) -> str:
        asked = [(job.seeds[int(k)], job.labels[int(k)]) for k in numbers]
        return _digest([json.dumps([made_by, asked], sort_keys=True).encode()])

    labels = np.array(job.labels, np.int64) if m.class_cond else None
    return ImageSet(
        str(home), len(job.seeds), image_size(m), m.image_channels, take, digest, home, labels, config.data.classes,
        lambda k: f"seed {job.seeds[k]}", about,
        KINDS.get(m.image_channels, f"of {m.image_channels} channels"), how=preparation(config, bits=8),
        rule=config.data.labels,
    )  # fmt: skip


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


class Header(NamedTuple):
    """What the first bytes of an image file tell."""

    size: tuple[int, int]  # (H, W)
    channels: int  # 1, 3 or 4


def _header(source: Source, name: str) -> Header | UserError:
    """What a file's header tells, or what is wrong with it: such a file is left out, and told, when the images are read."""
    if (held := source.pixels(name)) is not None:
        return Header((held.shape[0], held.shape[1]), held.shape[2])
    try:
        with (
            readable(source.path / name, "is not a readable image"),
            source.open_file(name) as file,
            opened_image(file) as image,
        ):
            channels = 4 if image.has_transparency_data else 1 if image.mode[0] in "1LIF" else 3
            turned = image.getexif().get(0x0112, 1) >= 5
            return Header(image.size if turned else image.size[::-1], channels)
    except Unreachable:
        raise
    except UserError as e:
        return e


def _require(name: str, found: tuple[int, int], size: tuple[int, int], first: str) -> None:
    if found != size:
        raise UserError(f"{name} has {found[0]}x{found[1]} pixels, and {first} {size[0]}x{size[1]}: samples must be of one size")
