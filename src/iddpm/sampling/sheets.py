"""Sheets of images, for people to look at."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from unicodedata import combining, normalize

import numpy as np
from PIL import Image, ImageDraw, PngImagePlugin

from iddpm.config import Config, Model, image_size
from iddpm.config.choices import row
from iddpm.parallel import processes
from iddpm.sampling.images import eight_bits
from iddpm.sampling.job import Job, enlarged, job, trained_classes
from iddpm.store.remote import replace

LINE = 12  # pixels of a caption's line: six are lower than the lowest row of images
WIDE = 1600  # pixels that a sheet of columns may be wide, if one of them is narrower
About = PngImagePlugin.PngInfo | None  # texts that a picture keeps


class Layout(NamedTuple):
    """A grid's size (width, height), a cell's, their corners (left, top) by image, and names by their height."""

    size: tuple[int, int]
    zoom: int
    cell: tuple[int, int]
    corners: dict[int, tuple[int, int]]
    names: list[tuple[int, str]]


def layout(n: int, height: int, width: int, labels: Sequence[int], classes: Sequence[str]) -> Layout:
    """Of n images in separated cells; with classes, one or more rows of each, its name in front."""
    zoom = max(1, round(64 / max(height, width)))  # small images are enlarged, pixel by pixel
    labelled = len(labels) > 0 and min(labels) >= 0
    if labelled:
        kinds = list(dict.fromkeys(labels))  # in the order asked for
        columns = min(16, max(list(labels).count(k) for k in kinds))
        rows = []
        for kind in kinds:
            own = [k for k, y in enumerate(labels) if y == kind]
            rows += [(kind, own[a : a + columns]) for a in range(0, len(own), columns)]
    else:
        columns = max(1, round(n**0.5))
        rows = [(-1, list(range(a, min(a + columns, n)))) for a in range(0, n, columns)]
    gap, w, h = 2 * max(1, zoom // 2), width * zoom, height * zoom
    names = {kind: _drawable(classes[kind], kind) if 0 <= kind < len(classes) else str(kind) for kind, _ in rows}
    margin = 8 + max(int(ImageDraw.Draw(Image.new("L", (1, 1))).textlength(t)) for t in names.values()) if labelled else 0
    size = (margin + columns * (w + gap) + gap, len(rows) * (h + gap) + gap)
    tops = [gap + r * (h + gap) for r in range(len(rows))]
    corners = {k: (margin + gap + c * (w + gap), top) for top, (_, own) in zip(tops, rows) for c, k in enumerate(own)}
    told = [(top + h // 2, names[kind]) for top, (kind, _) in zip(tops, rows)] if labelled else []
    return Layout(size, zoom, (w, h), corners, told)


def grid(images: np.ndarray, labels: Sequence[int], classes: Sequence[str], caption: str = "") -> Image.Image:
    """Images (N, H, W, C) as a `layout`, with a caption below, of parts that end with ", "."""
    n, height, width, _ = images.shape
    at = layout(n, height, width, labels, classes)
    lines = _wrapped(caption, at.size[0] - 8)
    sheet = Image.new("RGB", (at.size[0], at.size[1] + LINE * len(lines)), "white")
    pen = ImageDraw.Draw(sheet)
    for k, line in enumerate(lines):
        pen.text((4, at.size[1] + LINE * k), line, fill="black")
    for middle, name in at.names:
        pen.text((4, middle), name, fill="black", anchor="lm")
    for k, corner in at.corners.items():
        sheet.paste(picture(images[k]).convert("RGB").resize(at.cell, Image.Resampling.NEAREST), corner)
    return sheet


def caption(config: Config, job: Job, step: int) -> str:
    """What a grid shows: of which step, how drawn, from which seeds."""
    s, seeds = config.sample, list(job.seeds)
    run = seeds == list(range(seeds[0], seeds[0] + len(seeds))) and len(seeds) > 1
    from_seeds = (
        f"seeds {seeds[0]} to {seeds[-1]}" if run else f"seed {', '.join(map(str, seeds[:8]))}{' ...' * (len(seeds) > 8)}"
    )
    guided = f", guidance {s.guidance:g}" if s.guidance != 1 else ""
    steps = "its own" if getattr(row("solver", s.solver), "own_steps", False) else s.sampling_steps
    return f"step {step}, {s.solver}, {steps} steps{guided}, {from_seeds}"


def _wrapped(text: str, width: int) -> list[str]:
    """A caption in lines of at most so many pixels, as far as its parts allow."""
    pen, lines = ImageDraw.Draw(Image.new("L", (1, 1))), list[str]()
    for part in text.split(", ") if text else ():
        longer = f"{lines[-1]}, {part}" if lines else part
        if lines and pen.textlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(part)
    return lines


def cells(sheet: Image.Image, config: Config) -> np.ndarray | None:
    """The images (N, H, W, 3) uint8 in a run's own grid; None where it is another picture than that."""
    task, (height, width) = preview(config), image_size(config.model)
    at = layout(len(task.seeds), height, width, task.labels, config.data.classes)
    below = sheet.height - at.size[1]  # the caption
    if sheet.width != at.size[0] or below not in range(0, 6 * LINE, LINE):
        return None
    pixels, (w, h), middle = np.asarray(sheet.convert("RGB")), at.cell, at.zoom // 2
    return np.stack(
        [
            pixels[y + middle : y + h : at.zoom, x + middle : x + w : at.zoom]
            for x, y in (at.corners[k] for k in range(len(at.corners)))
        ]
    )


def _drawable(name: str, kind: int) -> str:
    """A class's name in the letters that the font has, which are those of ASCII: without accents, or else its number."""
    plain = "".join(c for c in normalize("NFKD", name) if not combining(c))
    return plain if plain.isascii() and plain.isprintable() else f"#{kind}"


def comparison(columns: Mapping[str, np.ndarray]) -> Image.Image:
    """A row for each image and a named column for each version of it, (N, H, W, C) of any size, enlarged to the largest.

    More columns than WIDE has room for go on below, all rows again.
    """
    cell = max(96, *(max(versions.shape[1:3]) for versions in columns.values()))
    gap, top, rows = 4, 16, len(next(iter(columns.values())))
    most = max(1, (WIDE - gap) // (cell + gap))
    bands = -(-len(columns) // most)
    across, band = -(-len(columns) // bands), top + gap + rows * (cell + gap)
    sheet = Image.new("RGB", (across * (cell + gap) + gap, bands * band), "white")
    pen = ImageDraw.Draw(sheet)
    for k, (name, versions) in enumerate(columns.items()):
        left, above = gap + k % across * (cell + gap), k // across * band
        pen.text((left + cell // 2, above + top // 2 + 1), name, fill="black", anchor="mm")
        for r, image in enumerate(versions):
            fit = cell / max(image.shape[:2])
            size = round(image.shape[1] * fit), round(image.shape[0] * fit)
            enlarged = picture(image).convert("RGB").resize(size, Image.Resampling.NEAREST)
            sheet.paste(enlarged, (left, above + top + gap + r * (cell + gap)))
    return sheet


def picture(image: np.ndarray) -> Image.Image:
    """One image (H, W, C) in 8 bits as Pillow's, to look at; of 2, or more than 4 channels, the first alone."""
    shown = eight_bits(image)
    return Image.fromarray(shown if shown.shape[-1] in (3, 4) else shown[..., 0])


def whole(image: np.ndarray) -> Image.Image:
    """One image (H, W, C) with all that it holds, for a PNG of its own; `no_png` tells for which models there is one."""
    return Image.fromarray(image[..., 0]) if image.dtype == np.uint16 else picture(image)


def no_png(model: Model) -> str:
    """Why the images of a model cannot be PNGs of their own; empty where they can."""
    channels, deep = model.image_channels, model.bit_depth == "16"
    if channels in ((1,) if deep else (1, 3, 4)):
        return ""
    return "a PNG of 16 bits is written of grey images alone" if deep else f"a PNG has 1, 3 or 4 channels, not {channels}"


def preview(config: Config, count: int = 64) -> Job:
    """The job of a run's own grid: fixed seeds, of each class as many as fit in `count`, or `count` images."""
    known = trained_classes(config)
    per_class = max(1, count // max(1, known)) * known
    return job(config, range(min(per_class, 256) if config.model.class_cond else count))


def comparison_file(
    config: Config, path: Path, drawn: np.ndarray, given: np.ndarray, originals: np.ndarray | None, about: About = None
) -> None:  # fmt: skip
    """A picture, a row for each image: the given one, of small ones the bicubic enlargement, the model's, the original if known.

    All (N, H, W, C) uint8, but the originals (N, C, H, W).
    """
    before = {"small": given, "bicubic": enlarged(config, given)} if config.task.enlarges else {"given": given}
    columns = {**before, "model": drawn}
    if originals is not None:
        columns["original"] = originals.transpose(0, 2, 3, 1)
    save_picture(comparison(columns), path, about)


def save_picture(sheet: Image.Image, path: Path, about: About = None) -> None:
    """Write a PNG in one step; of several processes, the first does."""
    if processes.rank():
        return
    replace(path, lambda file: sheet.save(file, format="PNG", pnginfo=about), lasting=False)
