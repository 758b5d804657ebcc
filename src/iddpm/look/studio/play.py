"""What a visitor may do with a model: draw, edit, lead over, enlarge and translate, watching it step by step."""

import base64
import binascii
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from iddpm import build
from iddpm import fit as fitness
from iddpm.config import Config, Which, ema_rates, given_shape, image_size, seed_list
from iddpm.config.choices import choices
from iddpm.data import decode, prepare
from iddpm.data.decode import opened_image
from iddpm.data.preparation import SCALED
from iddpm.errors import UserError
from iddpm.look.serving.asked import HOW, checked, configured
from iddpm.sampling import edit
from iddpm.sampling.draw import painter
from iddpm.sampling.images import Watch, as_pixels, eight_bits
from iddpm.sampling.job import Job, job
from iddpm.sampling.open import Opened, open_weights
from iddpm.sampling.sheets import picture
from iddpm.store.files import BEST, step_dirs, step_of

OWN = {  # of a request, beside how to draw
    "kind": str, "model": str, "step": int, "ema_rate": float, "seeds": str, "labels": str, "strength": float, "image": str,
    "mask": str, "frames": int,
}  # fmt: skip
IMAGES, FRAMES = 16, 24  # that a request may ask for
PIXELS = 1 << 25  # of an uploaded picture: 100 MB while it is decoded
MODELS = 3  # that are kept in memory


class Wish(NamedTuple):
    """What a visitor asks for, checked."""

    opened: Opened
    config: Config
    asked: Mapping[str, Any]

    @property
    def seeds(self) -> list[int]:
        seeds = list(seed_list(self.asked.get("seeds", "0")))
        if not 1 <= len(seeds) <= IMAGES:
            raise UserError(f"{len(seeds)} images: ask for 1 to {IMAGES} at a time")
        return seeds

    @property
    def label(self) -> int | None:
        """The class to draw, of a model that knows classes."""
        return job(self.config, [0], self.asked.get("labels", "")).labels[0] if self.config.model.class_cond else None

    @property
    def strength(self) -> float:
        """How far a picture is led back to noise."""
        if not 0 < (found := float(self.asked.get("strength", 0.5))) <= 1:  # also false for nan
            raise UserError("strength: above 0, to 1")
        return found

    @property
    def frames(self) -> int:
        """How many images lead from a seed to another."""
        if not 2 <= (found := int(self.asked.get("frames", 8))) <= FRAMES:
            raise UserError(f"frames: 2 to {FRAMES}")
        return found

    def image(self, name: str = "image", channels: int = 0) -> np.ndarray:
        """The picture that came with it, as the model takes it: (H, W, C) uint8."""
        if not self.asked.get(name):
            raise UserError("upload a picture first")
        return fitted(self.asked[name], self.config, channels)[0]


# ---- models


def about(name: str, path: Path, device: str) -> dict[str, Any]:
    """What the page must know of a run's model to offer it; UserError where it cannot be played with."""
    opened = newest(path, device)
    config, m = opened.config, opened.config.model
    if config.task.classifies:
        raise UserError(f"{name} is a classifier, which draws nothing")
    s = config.sample
    shape = given_shape(m)
    return dict(
        name=name, task=m.task, size=list(image_size(m)), channels=m.image_channels, given=list(shape) if shape else None,
        classes=list(config.data.classes) if m.class_cond else [], class_cond=m.class_cond,
        guidance=bool(m.class_dropout or m.given_dropout), step=opened.weights.about["step"],
        steps=[int(p.name.removeprefix("step_")) for p in step_dirs(path)], rates=list(ema_rates(config.train)),
        solvers=_solvers(config), kinds=[kind for kind, (fits, _) in KINDS.items() if fits(config)],
        defaults=dict(solver=s.solver, sampling_steps=s.sampling_steps, guidance=s.guidance),
    )  # fmt: skip


def _solvers(config: Config) -> dict[str, str]:
    """The solvers that this model can be drawn with, and what each is."""
    found = {}
    for name, choice in choices("solver").items():
        for steps in ({"sampling_steps": "10"}, {}):  # its own, where ten are none of it: of a shorter chain, of a found grid
            with suppress(UserError):
                configured(config, {"solver": name, **steps})
                found[name] = choice.help
                break
    return found


def newest(path: Path, device: str, step: int = -1, ema_rate: float = -1.0) -> Opened:
    """A model as it lies there now, from memory where it was opened before."""
    steps = step_dirs(path)
    taken = [p for p in steps if step in (-1, step_of(p))]
    # Another run may have come in the place of one of its name, or another step have become the best.
    files = [file for file in (path / "checkpoints" / BEST, *taken[-1:]) if file.exists()]
    return _open(path, step, ema_rate, device, tuple((s.st_ino, s.st_mtime_ns) for s in (file.stat() for file in files)))


@lru_cache(MODELS)
def _open(path: Path, step: int, ema_rate: float, device: str, files: object) -> Opened:
    if step < -1:
        raise UserError(f"step {step}: give that of a checkpoint, or -1 for the newest")
    return open_weights(path, Which(checkpoint_step=step, ema_rate=ema_rate, device=device))


# ---- pictures


def fitted(text: str, config: Config, channels: int = 0) -> tuple[np.ndarray, str]:
    """An uploaded picture (a data: address) at the size that a model takes, (H, W, C) uint8, and a sentence on what was done.

    UserError where it is no picture, or has too many pixels.
    """
    shape = given_shape(config.model) or (config.model.image_channels, *image_size(config.model))
    try:
        file = io.BytesIO(base64.b64decode(text.partition(",")[2], validate=True))
    except (binascii.Error, ValueError):
        raise UserError("the picture did not arrive whole: upload it again") from None
    file.name = "the picture"
    try:
        with opened_image(file) as image:
            if (pixels := image.width * image.height) > PIXELS:
                raise ValueError(f"{pixels / 1e6:.0f} million pixels, the most are {PIXELS / 1e6:.0f}")
    except (OSError, ValueError, SyntaxError, EOFError) as e:
        raise UserError(f"the picture cannot be read: {e}") from None
    file.seek(0)
    notes: list[str] = []
    image, fit = decode(file, channels or shape[0], notes.append), config.data.fit
    if image.size != (shape[2], shape[1]):
        notes.insert(0, f"{image.width}x{image.height} pixels, {SCALED[fit]} to {shape[2]}x{shape[1]}, which the model takes")
    return prepare(image, shape[1], shape[2], fit).transpose(1, 2, 0), "; ".join(notes)


def address(images: np.ndarray, columns: int = 0) -> str:
    """Images (N, H, W, C) side by side, in as many columns, as a data: address of a PNG."""
    n, h, w, c = images.shape
    columns = columns or columns_of(n)
    sheet = np.full((-(-n // columns) * columns, h, w, c), 255, np.uint8)
    sheet[:n] = eight_bits(images)
    whole = sheet.reshape(-1, columns, h, w, c).transpose(0, 2, 1, 3, 4).reshape(-1, columns * w, c)
    file = io.BytesIO()
    picture(whole).save(file, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def columns_of(n: int) -> int:
    """In how many columns the page shows so many images."""
    return n if n <= 4 else -(-n // 2) if n <= 8 else 4


def uint8(x: Tensor) -> np.ndarray:
    """What stands in (B, C, H, W), whatever its scale: beyond the range of images it is shrunk, so that noise is seen as such."""
    far = x.abs().amax()
    return as_pixels(x / far if far > 4 else x).cpu().numpy()


# ---- what may be done: whether a model can, and how


def _draw(wish: Wish, watch: Watch) -> Iterator[np.ndarray]:
    o = wish.opened
    yield (
        painter(wish.config, o.net, o.device, watch=watch)(job(wish.config, wish.seeds, wish.asked.get("labels", "")))
        .cpu()
        .numpy()
    )


def _edit(wish: Wish, watch: Watch) -> Iterator[np.ndarray]:
    o, mask = wish.opened, None
    if wish.asked.get("mask"):
        mask = wish.image("mask", channels=1)[..., 0] > 127
        if not mask.any():
            raise UserError("paint over what is to be drawn anew, or draw all of it without a mask")
    yield edit.variations(wish.config, o.net, o.device, wish.image(), wish.seeds, wish.label, wish.strength, mask, watch)


def _between(wish: Wish, watch: Watch) -> Iterator[np.ndarray]:
    o, config = wish.opened, wish.config
    if len(seeds := wish.seeds) != 2:
        raise UserError("give two seeds to go between, as 3,7")
    a, b = (edit.noise_of_seed(config, o.device, build.grid(config), seed) for seed in seeds)
    for frame in edit.between(config, o.net, o.device, (a, b), wish.label, wish.frames, watch):
        yield frame[None]


def _given(wish: Wish, watch: Watch) -> Iterator[np.ndarray]:
    o, config, seeds = wish.opened, wish.config, wish.seeds
    labels = job(config, seeds, wish.asked.get("labels", "")).labels
    yield painter(config, o.net, o.device, watch=watch)(Job(seeds, labels, np.stack([wish.image()] * len(seeds)))).cpu().numpy()


KINDS: dict[str, tuple[Callable[[Config], bool], Callable[[Wish, Watch], Iterator[np.ndarray]]]] = {
    "draw": (lambda config: config.task.draws, _draw),
    "edit": (lambda config: config.task.draws, _edit),
    "between": (lambda config: config.task.draws and not fitness.leaps(config), _between),
    "given": (lambda config: bool(config.task.inputs), _given),
}


def wish_of(body: object, paths: Callable[[str], Path], device: str) -> Wish:
    """A request as a wish; UserError where it cannot be met. `paths` finds the run of a name."""
    asked = checked(body, OWN | HOW)
    if asked.get("kind") not in KINDS:
        raise UserError(f"kind is one of: {', '.join(KINDS)}")
    opened = newest(paths(asked.get("model", "")), device, asked.get("step", -1), asked.get("ema_rate", -1.0))
    if not KINDS[asked["kind"]][0](opened.config):
        raise UserError(f"{asked['model']} is {opened.config.task.help}, which cannot do this")
    wish = Wish(opened, configured(opened.config, asked), asked)
    _ = wish.seeds, wish.label, wish.strength, wish.frames  # refused now, not when it is their turn
    return wish


def work(wish: Wish, watch: Watch) -> Iterator[np.ndarray]:
    """Do it: images (n, H, W, C) as they are ready."""
    return KINDS[wish.asked["kind"]][1](wish, watch)
