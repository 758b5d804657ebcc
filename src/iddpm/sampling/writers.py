"""Where drawn images go: a folder, an npz or a grid. Each writer knows how many images of the job it already holds.

So a killed job goes on where it was, and a finished one is complete. What is there already and is of another job, or of nobody
known, is never written over or deleted.
"""

import csv
import hashlib
import io
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, PngImagePlugin

from iddpm.config import Config
from iddpm.errors import UserError, readable, reason
from iddpm.parallel import processes
from iddpm.records import decode
from iddpm.sampling.job import Job, class_name
from iddpm.sampling.sheets import caption, grid, no_png, save_picture, whole
from iddpm.saying import Progress
from iddpm.store.remote import lock, opened, remote, replace, write_file

Identity = dict[str, Any]
MARK = "iddpm-job"  # the key of a picture's text, and the beginning of an npz's comment, that name the job
PART = re.compile(r"job\.json|\d{9}\.npy|arr_0\.npy|\..*")  # what lies in OUT.partial
CHARACTERS = 80  # of a class's name in a file's


class Writer(Protocol):
    done: int

    def write(self, batch: np.ndarray) -> None: ...

    def held(self) -> np.ndarray:
        """All images so far, (N, H, W, C); not after `close`."""
        ...

    def close(self) -> None: ...


class Folder:
    """One PNG per image, NAME.png by seed, with the class in front where there is one.

    job.json says which job it is; labels.csv (labels.json, where a class begins or ends with a blank) has each image's class,
    whatever its name, and is read again as a data set's.
    """

    def __init__(self, out: Path, config: Config, job: Job, identity: Identity):
        record = out / "job.json"
        if out.exists() and _record(record) != identity and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} already holds something else: give another --out")
        out.mkdir(parents=True, exist_ok=True)
        write_file(record, json.dumps(identity))
        classes = [class_name(config, y) if y >= 0 else "" for y in job.labels]
        names = {name: f"{file_name(name)}_" if name else "" for name in set(classes)}
        self.files = [out / f"{names[name]}{seed:06d}.png" for name, seed in zip(classes, job.seeds)]
        if any(name != name.strip() for name in classes):  # what stands around a name in a csv is not taken for a part of it
            write_file(out / "labels.json", json.dumps({file.name: name for file, name in zip(self.files, classes)}))
        elif any(classes):
            table = io.StringIO(newline="")
            csv.writer(table).writerows(zip((file.name for file in self.files), classes))
            write_file(out / "labels.csv", table.getvalue())
        there = {file.name for file in out.iterdir()}
        self.done = next((k for k, file in enumerate(self.files) if file.name not in there), len(self.files))

    def write(self, batch: np.ndarray) -> None:
        for image in batch:
            save_picture(whole(image), self.files[self.done])
            self.done += 1

    def held(self) -> np.ndarray:
        images = []
        for file in self.files[: self.done]:
            with opened(file) as raw, Image.open(raw) as image:
                images.append(np.atleast_3d(np.asarray(image)))
        return np.stack(images)

    def close(self) -> None:
        pass


class Array:
    """An npz (arr_0 NHWC, arr_1 labels, classes) or a picture of all images; until then OUT.partial holds the batches."""

    def __init__(self, out: Path, config: Config, job: Job, identity: Identity):
        self.out, self.config, self.job, self.identity = out, config, job, identity
        self.partial, self.done, self.parts = out.with_name(out.name + ".partial"), 0, list[Path]()
        held = sorted(self.partial.iterdir()) if self.partial.exists() else []
        linked = [self.partial] if not remote(self.partial) and self.partial.is_symlink() else []
        if foreign := next((p for p in (*linked, *held) if p in linked or not PART.fullmatch(p.name) or p.is_dir()), None):
            raise UserError(f"{foreign} is in the way, and no part of a drawing: move {self.partial}, or give another --out")
        if _record(self.partial / "job.json") != identity:
            for left in held:
                left.unlink()
            self.partial.mkdir(parents=True, exist_ok=True)
            write_file(self.partial / "job.json", json.dumps(identity))
        with suppress(OSError, ValueError, EOFError):  # a batch that a crash cut short, and those after it, are drawn again
            while (part := self.partial / f"{self.done:09d}.npy").exists():
                self._count(part, len(_load(part)))

    def _count(self, part: Path, images: int) -> None:
        self.parts.append(part)
        self.done += images

    def write(self, batch: np.ndarray) -> None:
        part = self.partial / f"{self.done:09d}.npy"
        replace(part, lambda file: np.save(file, batch), lasting=False)
        self._count(part, len(batch))

    def held(self) -> np.ndarray:
        return np.concatenate([_load(part) for part in self.parts])

    def close(self) -> None:
        """Turn what was gathered into the file asked for, in one step."""
        replace(self.out, self._save)
        self.partial.rmtree() if remote(self.partial) else shutil.rmtree(self.partial)

    def _save(self, to: Any) -> None:
        classes = self.config.data.classes
        if self.out.suffix != ".npz":
            told = caption(self.config, self.job, self.identity["step"]) if "step" in self.identity else ""
            grid(self.held(), self.job.labels, classes, told).save(to, format="PNG", pnginfo=marked(self.identity))
            return
        labels = np.array(self.job.labels, dtype=np.int64)
        with zipfile.ZipFile(to, "w") as file:
            with file.open("arr_0.npy", "w", force_zip64=True) as member:
                first = _load(self.parts[0])
                kind, shape = np.lib.format.dtype_to_descr(first.dtype), (self.done, *first.shape[1:])
                np.lib.format.write_array_header_1_0(member, dict(descr=kind, fortran_order=False, shape=shape))
                for part in self.parts:  # so that memory holds one at a time
                    member.write(_load(part).tobytes())
            if len(labels) and labels.min() >= 0:
                named = {"arr_1": labels} | ({"classes": np.array(classes)} if classes else {})
                for name, array in named.items():
                    with file.open(f"{name}.npy", "w") as member:
                        np.lib.format.write_array(member, array)
            file.comment = f"{MARK} {digest(self.identity)}".encode()


def _load(part: Path) -> np.ndarray:
    with opened(part) as file:
        batch: np.ndarray = np.load(file)
    return batch


def _record(path: Path) -> Any:
    """What a job.json holds; None where there is none that can be read."""
    try:
        return decode(path.read_bytes(), object, path)
    except FileNotFoundError:
        return None
    except UserError:
        return None


def file_name(name: str) -> str:
    """A class's name as a part of a file's: what no system, or no reader of prefixes, takes as it is stands there as %XX."""
    safe = "".join(c if c.isalnum() or c in " -+=,;()[]{}'!@#$&~^" else _escaped(c) for c in name)
    return safe if len(safe) <= CHARACTERS else f"{safe[: CHARACTERS - 9]}~{hashlib.sha256(safe.encode()).hexdigest()[:8]}"


def _escaped(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogateescape"))


def digest(identity: Identity) -> str:
    """Names a job, in what it has drawn."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def marked(identity: Identity) -> PngImagePlugin.PngInfo:
    """What names a job in a picture."""
    about = PngImagePlugin.PngInfo()
    about.add_text(MARK, digest(identity))
    return about


def is_free(out: Path, identity: Identity) -> bool:
    """Whether nothing lies at a file's path but what the same job has drawn."""
    if not out.exists():
        return True
    try:
        with readable(out), opened(out) as file:
            if out.suffix == ".npz":
                return zipfile.ZipFile(file).comment == f"{MARK} {digest(identity)}".encode()
            with Image.open(file, formats=["PNG"]) as image:
                return image.info.get(MARK) == digest(identity)
    except UserError:
        return False


def free(out: Path, identity: Identity) -> Path:
    """The path itself, or with _2, _3 ... behind its name: the first where nothing lies of another job."""
    tried, k = out, 1
    while not is_free(tried, identity):
        k += 1
        tried = out.with_name(f"{out.stem}_{k}{out.suffix}")
    return tried


def writer(out: Path, config: Config, job: Job, identity: Identity) -> Writer:
    """The writer for a path: .png a grid, .npz an archive, anything without a suffix a folder."""
    if out.suffix not in (".png", ".npz", ""):
        raise UserError(f"--out {out}: end it in .png (a grid), .npz, or no suffix (a folder of PNGs)")
    if out.suffix and out.is_dir():
        raise UserError(f"--out {out} is a folder: give another name")
    if out.suffix == ".png" and len(job.seeds) > 1024:
        raise UserError(f"--out {out}: a grid holds at most 1024 images; take .npz or a folder for {len(job.seeds)}")
    if not out.suffix and (why := no_png(config.model)):
        raise UserError(f"--out {out}: {why}: end it in .npz")
    out.parent.mkdir(parents=True, exist_ok=True)
    return (Array if out.suffix else Folder)(out, config, job, identity)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keep other commands from drawing into the same place, on this machine, until this one ends; UserError where one does."""
    with ExitStack() as stack:
        if not remote(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            path = out.with_name(f".{out.name}.lock")
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            stack.callback(os.close, handle)
            if not (lock(handle) and path.exists() and os.path.samestat(os.fstat(handle), path.stat())):
                raise UserError(f"another command is drawing into {out}: wait for it, or give another --out")
            stack.callback(path.unlink, missing_ok=True)
        yield


def draw_into(
    out: Path,
    config: Config,
    job: Job,
    identity: Identity,
    draw: Callable[[Job, Callable[[], Any]], Iterator[np.ndarray]],
    ticks: Callable[[int], int],
    keep: bool = False,
    replacing: bool = False,
) -> np.ndarray | None:
    """Draw what a file or folder does not hold yet of a job, by draw(rest, tick), and finish it; the first process writes.

    A bar expects ticks(n) calls of tick for n images. Returns all images, (N, H, W, C), where the first
    process is to `keep` them. UserError where a file of another job lies there, unless it is `replacing` that.
    """
    with ExitStack() as stack:
        to, fault = None, ""
        if processes.rank() == 0:
            try:
                stack.enter_context(_alone(out))
                if out.suffix and not (replacing or out.is_dir() or is_free(out, identity)):
                    raise UserError(f"{out} already holds something else: give another --out, or delete it")
                to = writer(out, config, job, identity)
            except (OSError, UserError) as e:
                fault = f"{reason(e)}{f': {e.filename}' if isinstance(e, OSError) and e.filename else ''}"
        if fault := processes.same(fault):
            raise UserError(fault)
        done = processes.same(to.done if to else 0)
        if done and to:
            print(f"{done} of {len(job.seeds)} images are there already")
        rest = job.part(done)
        with Progress(ticks(len(rest.seeds)), "step", f"{len(rest.seeds)} images", shown=bool(to)) as bar:
            for batch in draw(rest, bar.update):
                if to:
                    to.write(batch)
        if to is None:
            return None
        held = to.held() if keep else None
        to.close()
        return held
