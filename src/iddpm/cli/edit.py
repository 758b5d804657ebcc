"""`iddpm edit`: images drawn anew from a part of the way to noise, filled in where a mask says, or led over into each other."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from iddpm.cli.flags import Parser, Verb, file_to_write
from iddpm.config import Edit, Sample, Which, image_size, make, seed_list, settings_of
from iddpm.errors import UserError
from iddpm.saying import say
from iddpm.store.remote import place
from iddpm.words import many

if TYPE_CHECKING:
    import numpy as np

    from iddpm.config import Config
    from iddpm.data import Images
    from iddpm.data.preparation import Preparation


def _parser(parser: Parser) -> None:
    parser.add_argument("run", help="a run's folder, one of its checkpoints, or a .safetensors file of weights")
    parser.add_argument("images", nargs="*", help="image files; none: two --seeds are led over into each other")
    parser.add_fields(Edit)
    parser.add_fields(Sample, "How to draw them", inherited=True)
    parser.add_fields(Which)


def _edit(run: str, images: list[str], **given: Any) -> None:
    edit, which = make(Edit, given), make(Which, given)
    between = edit.between or not images
    if between and (flag := next((f for f in ("strength", "mask") if f in given), "")):
        raise UserError(f"--{flag} has no effect between two images")
    if not between and "frames" in given:
        raise UserError("--frames are of --between")
    if edit.between and len(images) != 2:
        raise UserError(f"--between leads from one image to another: give two, not {len(images)}")
    seeds = seed_list(edit.seeds) if edit.seeds else [0]
    if not images and len(seeds) != 2:
        raise UserError("give images to edit, or two seeds to go between: --seeds 3,7")
    if between and given.get("solver", "ddim") != "ddim":
        raise UserError(f"--solver {given['solver']}: between two images ddim leads, which comes back the way it went")
    if edit.between and edit.seeds:
        raise UserError("--seeds draw nothing between two images: they are brought back to noise")
    from iddpm import build, fit
    from iddpm.data.decode import MODES
    from iddpm.parallel import processes
    from iddpm.sampling import edit as made
    from iddpm.sampling.job import one_class
    from iddpm.sampling.open import open_weights

    with processes.session(build.device(which.device)):
        opened = open_weights(place(run), which, {k: given[k] for k in given if k in settings_of(Sample)})
        config, net, device = fit.require_steering(opened.config, given), opened.net, opened.device
        if not config.task.draws:
            raise UserError(f"{opened.weights.path} is no model of images alone: it cannot edit them")
        y = one_class(config, edit.labels) if config.model.class_cond or edit.labels else None
        out = edit.out or _free(opened.home / "samples", "between" if between else "edit")
        out = file_to_write(out, "--out", *((".png", ".gif") if between else (".png",)))
        if out.exists():
            raise UserError(f"--out {out}: is there already")
        inputs = [_read(path, config) for path in images]
        mask = _mask(edit.mask, images, config) if edit.mask else None
        if between:
            fit.require_density(config, "--between")
            grid = build.grid(config)
            if images:
                ends = [made.noise_of(config, net, device, image, y) for image in inputs]
            else:
                ends = [made.noise_of_seed(config, device, grid, seed) for seed in seeds]
            frames = list(made.between(config, net, device, (ends[0], ends[1]), y, edit.frames))
            if not processes.rank():
                _save_frames(out, frames)
        else:
            found = [made.variations(config, net, device, image, seeds, y, edit.strength, mask) for image in inputs]
            if not processes.rank():
                _save_sheet(out, inputs, found, seeds)
        if not processes.rank():
            count = edit.frames if between else len(found) * len(seeds)
            channels = config.model.image_channels
            shown = "" if channels in MODES else f" (of {channels} channels the first alone, which is all that a picture shows)"
            say(f"{many(count, 'image')}: {out}{shown}", "wrote", path=out, images=count)


def _free(folder: Path, name: str) -> Path:
    """NAME_1.png of a folder, or the first number that is free."""
    return next(path for k in range(1, 10**6) if not (path := folder / f"{name}_{k}.png").exists())


def _read(path: str, config: "Config") -> "np.ndarray":
    """An image (H, W, C) at the model's size."""
    from iddpm.data.preparation import SCALED, preparation

    how = preparation(config)._replace(only=())
    data = _one(path, config, config.model.image_channels, how)
    (height, width), (h, w) = data.size(0), data.image_size
    if (height, width) != (h, w):
        print(f"{path} has {height}x{width} pixels: {SCALED[how.fit]} to {h}x{w}, which the model draws")
    pixels: np.ndarray = data.batch([0])[0].transpose(1, 2, 0)
    return pixels


def _one(path: str, config: "Config", channels: int, how: "Preparation") -> "Images":
    """The one image of a file, and what it is taken for told; UserError where there are several."""
    from iddpm.data import Images

    data = Images.open(path, image_size(config.model), channels, on_broken="fail", labels="none", how=how)
    if len(data) != 1:
        raise UserError(f"{path} holds {len(data)} images: give image files")
    if told := data.told():
        print(f"{path}: {told}")
    return data


def _mask(path: str, images: list[str], config: "Config") -> "np.ndarray":
    """Where to fill (H, W) bool: the light part of a picture, which must have the size of every image."""
    from PIL import Image

    from iddpm.data import Images, prepare
    from iddpm.data.preparation import Preparation

    (h, w), fit = image_size(config.model), config.data.fit
    how = Preparation(fit, floats=config.data.floats)
    masks = _one(path, config, 1, how)
    height, width = masks.size(0)
    for image in images:
        size = Images.open(image, (h, w), config.model.image_channels, labels="none", cache_bytes=0, how=how).size(0)
        if size != (height, width):
            raise UserError(f"--mask {path} has {width}x{height} pixels, {image} {size[1]}x{size[0]}: they must be alike")
    around: np.ndarray = prepare(Image.new("L", (width, height)), h, w, fit)[0] > 127  # the white of --fit contain stays
    light: np.ndarray = (masks.batch([0])[0, 0] > 127) & ~around
    if light.all() or not light.any():
        raise UserError(f"--mask {path} is all {'light' if light.any() else 'dark'}: what is light is filled, what is dark stays")
    return light


def _save_sheet(out: Path, inputs: "list[np.ndarray]", found: "list[np.ndarray]", seeds: list[int]) -> None:
    import numpy as np

    from iddpm.sampling.sheets import comparison, save_picture

    columns = {f"seed {seed}": np.stack([each[k] for each in found]) for k, seed in enumerate(seeds)}
    save_picture(comparison({"image": np.stack(inputs), **columns}), out)


def _save_frames(out: Path, frames: "list[np.ndarray]") -> None:
    """A strip, or an animated picture that goes there and back."""
    import numpy as np
    from PIL import Image

    from iddpm.sampling.sheets import picture, save_picture
    from iddpm.store.remote import replace

    zoom = max(1, round(128 / max(frames[0].shape)))
    large = [np.repeat(np.repeat(frame, zoom, 0), zoom, 1) for frame in frames]
    if out.suffix == ".png":
        save_picture(picture(np.concatenate(large, axis=1)), out)
        return
    shown = [picture(frame).convert("RGB").quantize(256, Image.Quantize.MEDIANCUT) for frame in (*large, *large[-2:0:-1])]
    replace(out, lambda file: shown[0].save(file, "GIF", save_all=True, append_images=shown[1:], duration=80, loop=0))


VERB = Verb(_edit, _parser, "RUN [IMAGE ...]", "draw an image anew in part, fill in a mask, or go from one image to another")
