"""`iddpm data pack`: images decoded and resized once, as arrays that training maps into memory.

OUT/part-00000.npy (n, H, W, C) uint8, of 16 bits uint16, ...; part-00000.json, which images they are of; labels.npy (N) int64;
pack.json, the index, written last. The bytes are those of any number of processes, and of a run that was interrupted and begun
again.
"""

import hashlib
import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from iddpm.data.images import Images
from iddpm.data.preparation import AS_EVER, Preparation
from iddpm.data.sources.pixels import INDEX
from iddpm.errors import UserError, readable
from iddpm.records import decode
from iddpm.store.remote import place, replace, write_file
from iddpm.words import many

PART = 1 << 27  # bytes of a part: what an interruption may cost, and a small number of files
PLAN = "plan.json"  # what the parts in a folder are made of


class Plan(NamedTuple):
    """All that the bytes of a pack depend on, beside the images."""

    path: str
    size: tuple[int, int]
    channels: int
    labels: str
    how: Preparation
    rows: int  # images that a part is made of


def pack(
    path: str | Path,
    out: str | Path,
    size: tuple[int, int],
    channels: int = 3,
    labels: str = "auto",
    workers: int = 1,
    how: Preparation = AS_EVER,
) -> str:
    """Write the images of `path` into `out`, and say what came of it; what is there of the same pack is kept.

    UserError where `out` holds anything else. Broken images are left out, with a count.
    """
    plan = Plan(str(path), size, channels, labels, how, max(1, PART // (size[0] * size[1] * channels * how.bits // 8)))
    images, out = _opened(plan), place(out)
    about = dict(identity=images.identity(), size=size, channels=channels, classes=images.classes, rows=plan.rows)
    told = json.dumps(about | (dict(how=how) if how != AS_EVER else {}))
    if not (out / PLAN).exists():
        if out.exists() and any(out.iterdir()):
            raise UserError(f"{out} holds other files: give a new folder")
        out.mkdir(parents=True, exist_ok=True)
        write_file(out / PLAN, told)
    elif (out / PLAN).read_text() != told:
        raise UserError(f"{out} holds a pack of other images or sizes: give a new folder, or remove it")
    count = -(-len(images) // plan.rows)
    todo = [k for k in range(count) if not (out / _name(k, "json")).exists()]
    for _ in tqdm(_made(partial(_part, plan, out), todo, workers), "parts", len(todo), disable=None if len(todo) > 1 else True):
        pass
    records = []
    for k in range(count):
        with readable(out / _name(k, "json"), "is no record of a part", "remove it"):
            records.append(decode((out / _name(k, "json")).read_bytes(), dict[str, object], str(out / _name(k, "json"))))
    kept = np.concatenate([np.array(record["kept"], np.int64) for record in records])
    broken = [fault for record in records for fault in record["broken"]]  # type: ignore[attr-defined]
    if not len(kept):
        raise UserError(f"none of the {len(images)} images is readable; the first problem: {broken[0]}")
    parts = [(k, len(record["kept"])) for k, record in enumerate(records) if record["kept"]]  # type: ignore[arg-type]
    digest = hashlib.blake2b("".join(str(record["digest"]) for record in records).encode(), digest_size=16)
    if images.labels is not None:
        replace(out / "labels.npy", lambda file: np.save(file, images.labels[kept]))  # type: ignore[index]
        digest.update(images.labels[kept].tobytes())
    shape = (*size, channels)
    index = dict(shape=shape, parts=parts, classes=images.classes, rule=images.rule, sealed=digest.hexdigest(), broken=broken)
    write_file(out / INDEX, json.dumps(index))
    lost = f"; {many(len(broken), 'broken image')} left out, the first: {broken[0]}" if broken else ""
    classes = f", {len(images.classes)} classes" if images.classes else ""
    told = f"; {told}" if (told := images.told()) else ""
    return f"{out}: {many(len(kept), 'image')} of {size[0]}x{size[1]}, {many(channels, 'channel')}{classes}{lost}{told}"


def _made(make: "partial[None]", todo: list[int], workers: int) -> Iterator[None]:
    with ExitStack() as stack:
        if min(workers, len(todo)) > 1:
            pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
            yield from stack.enter_context(pool).map(make, todo)
        else:
            yield from map(make, todo)


@lru_cache(maxsize=1)  # of a process that makes several parts
def _opened(plan: Plan) -> Images:
    return Images.open(plan.path, plan.size, plan.channels, cache_bytes=0, labels=plan.labels, how=plan.how)


def _part(plan: Plan, out: Path, k: int) -> None:
    """Write one part; its record comes last, so that a part without one is made again."""
    images = _opened(plan)
    here = range(k * plan.rows, min((k + 1) * plan.rows, len(images)))
    pixels, kept, broken = np.empty((len(here), *plan.size, plan.channels), plan.how.dtype), list[int](), list[str]()
    for index in here:
        found = images.load(index)
        if isinstance(found, UserError):
            broken.append(str(found))
        else:
            pixels[len(kept)] = found.transpose(1, 2, 0)
            kept.append(index)
    pixels = pixels[: len(kept)]
    if kept:
        replace(out / _name(k, "npy"), lambda file: np.save(file, pixels))
    digest = hashlib.blake2b(pixels.tobytes(), digest_size=16).hexdigest()
    write_file(out / _name(k, "json"), json.dumps(dict(kept=kept, broken=broken, digest=digest)))


def _name(k: int, ending: str) -> str:
    return f"part-{k:05d}.{ending}"
