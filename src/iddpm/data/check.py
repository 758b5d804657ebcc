"""What a set of images is, before anything is trained on it: `iddpm data check`."""

import hashlib
import io
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shlex import quote
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from iddpm.data.decode import MODES, decode, opened_image, raw_of
from iddpm.data.images import PROGRESS_FROM, Images
from iddpm.data.labels import splits
from iddpm.data.preparation import AS_EVER, Preparation
from iddpm.errors import UserError
from iddpm.store.remote import Unreachable
from iddpm.words import many

SHOWN = 3  # of anything that is listed
THUMB = 8  # pixels of a side, by which near duplicates are found
NEAR = 6.0  # of 255, the root of the mean square by which two thumbs may differ; and an eighth of their own contrast
COMPARED = 20_000  # images that are compared with each other, at most: 4e8 pairs take seconds
CELL, ROWS, COLUMNS = 64, 12, 12  # of the sheet
GREY, ALPHA = ("1", "L", "LA", "I", "F", "I;16"), ("LA", "La", "PA", "RGBA", "RGBa")
FEW = 5000  # images, below which a network learns them by heart


class Look(NamedTuple):
    """One image: its kind, (width, height), a digest of its file, and (THUMB, THUMB, 3) uint8 of it."""

    mode: str
    size: tuple[int, int]
    digest: bytes
    thumb: np.ndarray


class Checked(NamedTuple):
    """What to print, and pictures of the images, a row for each class where there are classes."""

    lines: list[str]
    sheet: Image.Image


def check(path: str | Path, labels: str = "auto", how: Preparation = AS_EVER) -> Checked:
    """Read and decode every image once; UserError where there is none, or none is readable."""
    data = Images.open(path, (CELL, CELL), cache_bytes=0, labels=labels, how=how)
    first = data.source.pixels(data.names[0])
    if first is not None and first.shape[2] not in MODES:
        data.channels = data.depth = first.shape[2]
    looks, broken = dict[int, Look](), list[str]()
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        quiet = None if len(data) > PROGRESS_FROM else True
        for k, found in enumerate(tqdm(pool.map(lambda k: _look(data, k), range(len(data))), "images", len(data), disable=quiet)):
            if isinstance(found, Look):
                looks[k] = found
            else:
                broken.append(str(found))
    if not looks:
        raise UserError(f"none of the {len(data)} images is readable; the first problem: {broken[0]}")
    lines, advice = [f"{data.source.path}: {many(len(data), 'image')}"], list[str]()
    if data.source.left_out:
        lines.append(f"left out: {data.source.rest()}")
    if how.only:
        lines.append(data.divided.strip())
    for part in (_sizes, _modes):
        part(looks, lines, advice)
    if told := data.told():
        lines.append(told)
    _classes(data, lines, advice)
    if broken:
        lines += [f"broken: {many(len(broken), 'file')}", *(f"  {text}" for text in broken[:SHOWN])]
        advice.append("--on_broken skip lets other images stand in for broken ones, and is the default; --on_broken fail stops")
    _doubles(data, looks, lines, advice)
    if parts := splits(data.source, data.names):
        lines.append(f"parts: {' and '.join(parts)} look like parts of one set, and all would be trained on")
        held = next((name for name in parts if not name.lower().startswith("train")), [*parts][-1])
        train = next(name for name in parts if name != held)
        advice.append(f"iddpm train {quote(str(parts[train]))} --validation {quote(str(parts[held]))} keeps the parts apart")
    elif len(data) >= 100:
        advice.append("--validation 5% holds out images, by which learning by heart is seen")
    if len(data) < FEW:
        advice.append(f"few images ({len(data):,}): --augment 0.12 and, where left and right are alike, --random_flip True")
    return Checked([*lines, *(f"advice: {line}" for line in advice)], _sheet(data, sorted(looks)))


def _look(data: Images, k: int) -> Look | UserError:
    try:
        content, held = data.source.read(data.names[k]), data.source.pixels(data.names[k])
        if held is not None and not (held.dtype == np.uint8 and held.shape[2] in MODES):
            found = data.load(k)
            if isinstance(found, UserError):
                return found
            thumb = np.asarray(_shown(found).resize((THUMB, THUMB), Image.Resampling.BOX))
            mode = f"{held.dtype} of {many(held.shape[2], 'channel')}"
            return Look(mode, held.shape[1::-1], hashlib.blake2b(content, digest_size=16).digest(), thumb)
        file = io.BytesIO(content)
        file.name = str(data.files[k])
        image = decode(file, 3, floats=data.how.floats)
        file.seek(0)
        with opened_image(file) as header:
            mode = header.mode if header.mode == "RGBA" or not header.has_transparency_data else "RGBA"
            mode += ";16" * bool(raw_of(header))
        thumb = np.asarray(image.resize((THUMB, THUMB), Image.Resampling.BOX))
        return Look(mode, image.size, hashlib.blake2b(content, digest_size=16).digest(), thumb)
    except Unreachable:  # says nothing about the file
        raise
    except UserError as error:
        return error


def _shown(pixels: np.ndarray) -> Image.Image:
    """An image (C, H, W) uint8 as a picture in colour: of 2, or more than 4 channels, the first alone."""
    return Image.fromarray(pixels[:3].transpose(1, 2, 0) if len(pixels) in (3, 4) else pixels[0]).convert("RGB")


def _sizes(looks: dict[int, Look], lines: list[str], advice: list[str]) -> None:
    sizes = Counter(look.size for look in looks.values())
    sides = np.array(sorted(min(look.size) for look in looks.values()))
    common = ", ".join(f"{w}x{h} ({n})" for (w, h), n in sizes.most_common(SHOWN))
    lines.append(
        f"width x height: {common}{f' and {len(sizes) - SHOWN} others' * (len(sizes) > SHOWN)}; "
        f"shorter side {sides[0]} to {sides[-1]}, half are above {int(np.median(sides))}"
    )
    fit = 1 << int(np.log2(max(8, np.quantile(sides, 0.1))))  # nine in ten images are at least so large
    small = int((sides < fit).sum())
    text = f"--image_size {min(fit, 1024)}: nine in ten images have as many pixels or more"
    advice.append(text + f"; {many(small, 'image')} would be enlarged" * bool(small))
    if long := sum(max(look.size) > 2 * min(look.size) for look in looks.values()):
        advice.append(
            f"{many(long, 'image')} are more than twice as long as wide: the centre is trained on; --fit or --image_size HxW"
        )
    if np.median(sides) > 2 * fit:
        advice.append("iddpm data pack PATH OUT --image_size N decodes large images once, not in every epoch")


def _modes(looks: dict[int, Look], lines: list[str], advice: list[str]) -> None:
    modes = Counter(look.mode for look in looks.values())
    lines.append("kinds: " + ", ".join(f"{mode} ({n})" for mode, n in modes.most_common()))
    if set(modes) <= set(GREY):
        advice.append("--image_channels 1: all images are grey")
    if any("16" in mode or mode[0] in "IF" or mode.startswith("float") for mode in modes):
        advice.append("--bit_depth 16 keeps what is finer than 8 bits; else it is cut to these")
    if many_channels := next((mode for mode in modes if " of " in mode), ""):
        advice.append(f"--image_channels {many_channels.split()[-2]}: that many lie in the arrays")
    if any(mode.removesuffix(";16") in ALPHA for mode in modes):
        advice.append("--image_channels 4 keeps transparency; else it is laid over white")


def _classes(data: Images, lines: list[str], advice: list[str]) -> None:
    if data.labels is None:
        lines.append(f"classes: {data.rule}")
        return
    counts = dict(sorted(zip(data.classes, np.bincount(data.labels, minlength=len(data.classes)).tolist()), key=lambda c: -c[1]))
    few, many_ = min(counts.values()), max(counts.values())
    shown = [f"{name} ({n})" for name, n in counts.items()]
    some = shown if len(shown) <= 10 else [*shown[:5], "...", *shown[-2:]]
    lines.append(f"classes: {len(counts)}, from {data.rule}: {', '.join(some)}")
    advice.append(f"--class_cond True learns the {len(counts)} classes; --labels none forgets them")
    alike = [group for group in _alike(data.classes) if len(group) > 1]
    if alike:
        advice.append(f"{' and '.join(alike[0])} are {len(alike[0])} classes, by their case or blanks alone: rename what is one")
    if many_ > 10 * few:
        advice.append(f"{shown[-1]} has less than a tenth of the images of {shown[0]}; --balance draws all classes equally often")


def _alike(classes: Sequence[str]) -> Collection[list[str]]:
    """The names in groups that differ by case and blanks alone."""
    groups = defaultdict[str, list[str]](list)
    for name in classes:
        groups["".join(name.casefold().split())].append(name)
    return groups.values()


def _doubles(data: Images, looks: dict[int, Look], lines: list[str], advice: list[str]) -> None:
    """Exact duplicates by the content of their files, near ones by their thumbs; each group once."""
    by_content = defaultdict[bytes, list[int]](list)
    for k, look in looks.items():
        by_content[look.digest].append(k)
    same = [group for group in by_content.values() if len(group) > 1]
    firsts = [group[0] for group in by_content.values()]
    drawn = firsts
    if len(firsts) > COMPARED:
        drawn = sorted(np.random.default_rng(0).choice(firsts, COMPARED, replace=False).tolist())
    near = _near(drawn, np.stack([looks[k].thumb for k in drawn]))
    for word, pairs in (("exact", [(g[0], k) for g in same for k in g[1:]]), ("near", near)):
        of = f" (of {len(drawn)} compared)" if word == "near" and len(drawn) < len(firsts) else ""
        lines.append(f"{word} duplicates: {len(pairs)}{of}")
        lines += [f"  {data.names[b]} of {data.names[a]}" for a, b in pairs[:SHOWN]]
        labels = data.labels
        if labels is not None and (torn := [(a, b) for a, b in pairs if labels[a] != labels[b]]):
            lines.append(f"  {len(torn)} of them in another class, as {data.names[torn[0][1]]} and {data.names[torn[0][0]]}")
    if same or near:
        advice.append("duplicates are learned by heart first: remove them; --validation 5% keeps equal files on one side")


def _near(which: list[int], thumbs: np.ndarray) -> list[tuple[int, int]]:
    """Each image that is nearly an earlier one, with that: (earlier, later). All pairs are compared."""
    x = thumbs.reshape(len(thumbs), -1).astype(np.float32)
    contrast = np.sqrt(x.reshape(len(x), -1, 3).var(1).mean(1))  # from place to place, in each colour
    square = (x * x).sum(1)
    limit = np.minimum(NEAR, contrast / 8) ** 2 * x.shape[1]
    out = list[tuple[int, int]]()
    for a in range(0, len(x), 1024):
        block = slice(a, min(a + 1024, len(x)))
        distance = square[block, None] + square[None, : block.stop] - 2 * x[block] @ x[: block.stop].T
        rows, columns = np.nonzero(distance <= np.minimum(limit[block, None], limit[None, : block.stop]) + 1)
        seen = set[int]()
        for row, column in zip((rows + a).tolist(), columns.tolist()):
            if column < row and row not in seen and limit[row] > 1:  # of one plain colour are many that have nothing in common
                seen.add(row)
                out.append((which[column], which[row]))
    return out


def _sheet(data: Images, good: list[int]) -> Image.Image:
    labels = data.labels
    rows = [[k for k in good if labels[k] == c] for c in range(min(ROWS, len(data.classes)))] if labels is not None else []
    if not rows:
        some = [good[int(k)] for k in np.linspace(0, len(good) - 1, min(len(good), ROWS * COLUMNS)).round()]
        rows = [some[k : k + COLUMNS] for k in range(0, len(some), COLUMNS)]
    picked = [[row[int(k)] for k in np.linspace(0, len(row) - 1, min(len(row), COLUMNS)).round()] for row in rows]
    sheet = Image.new("RGB", (CELL * max(map(len, picked)), CELL * len(picked)), "white")
    for y, row in enumerate(picked):
        for x, pixels in enumerate(data.batch(row)):
            sheet.paste(_shown(pixels), (CELL * x, CELL * y))
    return sheet
