"""Where drawn images go: a folder, an npz or a grid. Each writer knows how many images of the job it already holds.

So a killed job goes on where it was, and a finished one is complete.
"""

import io
import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from tqdm import tqdm

from iddpm.config import Config, image_size
from iddpm.errors import UserError
from iddpm.parallel import processes
from iddpm.sampling.job import Job, class_name
from iddpm.sampling.sheets import grid, picture, save_picture
from iddpm.store.remote import opened, remote, replace, scratch


class Writer(Protocol):
    done: int

    def write(self, batch: np.ndarray) -> None: ...

    def held(self) -> np.ndarray:
        """All images so far, (N, H, W, C) uint8; not after `close`."""
        ...

    def close(self) -> None: ...


class Folder:
    """One PNG per image, NAME.png by seed, with the class in front where there is one; job.json says which job it is."""

    def __init__(self, out: Path, config: Config, job: Job, identity: dict[str, Any]):
        self.out, record = out, out / "job.json"
        ours = record.exists() and json.loads(record.read_text()) == identity
        if out.exists() and not ours and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} already holds something else: give another --out")
        out.mkdir(parents=True, exist_ok=True)
        replace(record, lambda file: file.write(json.dumps(identity).encode()))
        names = [f"{class_name(config, y)}_" if y >= 0 else "" for y in job.labels]
        self.files = [out / f"{name}{seed:06d}.png" for name, seed in zip(names, job.seeds)]
        there = {file.name for file in out.iterdir()}
        self.done = next((k for k, file in enumerate(self.files) if file.name not in there), len(self.files))

    def write(self, batch: np.ndarray) -> None:
        for image in batch:
            save_picture(picture(image), self.files[self.done])
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
    """An npz (arr_0 uint8 NHWC, arr_1 labels), or a picture of all images, gathered in OUT.partial on the way."""

    def __init__(self, out: Path, config: Config, job: Job, identity: dict[str, Any]):
        self.out, self.config, self.job, self.identity = out, config, job, identity
        self.partial = out.with_name(out.name + ".partial")
        height, width = image_size(config.model)
        shape = (len(job.seeds), height, width, config.model.image_channels)
        self.done, mode = 0, "w+"
        record = self.partial / "job.json"
        if record.exists() and (held := json.loads(record.read_text()))["job"] == identity:
            self.done, mode = held["done"], "r+"
        else:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
        self.array = np.lib.format.open_memmap(self.partial / "arr_0.npy", mode, np.uint8, shape)

    def write(self, batch: np.ndarray) -> None:
        self.array[self.done : self.done + len(batch)] = batch
        self.array.flush()
        self.done += len(batch)
        text = json.dumps({"job": self.identity, "done": self.done})
        replace(self.partial / "job.json", lambda file: file.write(text.encode()))

    def held(self) -> np.ndarray:
        return np.array(self.array[: self.done])

    def close(self) -> None:
        """Turn what was gathered into the file asked for, in one step."""
        replace(self.out, self._finished)
        del self.array
        shutil.rmtree(self.partial)

    def _finished(self, to: Any) -> None:
        if self.out.suffix != ".npz":
            grid(np.asarray(self.array), self.job.labels, self.config.data.classes).save(to, format="PNG")
            return
        labels = np.array(self.job.labels, dtype=np.int64)
        with zipfile.ZipFile(to, "w") as file:
            file.write(str(self.array.filename), "arr_0.npy")
            if len(labels) and labels.min() >= 0:
                with file.open("arr_1.npy", "w") as member:
                    np.lib.format.write_array(member, labels)


class RemoteArray(Array):
    """As Array on a remote storage: each batch is a file of OUT.partial, and gathered in one on this machine."""

    def __init__(self, out: Path, config: Config, job: Job, identity: dict[str, Any]):
        parts = out.with_name(out.name + ".partial")
        assert remote(parts)
        self.out, self.config, self.job, self.done, self.parts = out, config, job, 0, parts
        self.partial = Path(tempfile.mkdtemp(dir=scratch()))
        height, width = image_size(config.model)
        shape = (len(job.seeds), height, width, config.model.image_channels)
        self.array = np.lib.format.open_memmap(self.partial / "arr_0.npy", "w+", np.uint8, shape)
        record = self.parts / "job.json"
        if record.exists() and json.loads(record.read_text()) == identity:
            for part in sorted(self.parts.glob("*.npy")):
                if int(part.stem) == self.done:
                    batch = np.load(io.BytesIO(part.read_bytes()))
                    self.array[self.done : self.done + len(batch)] = batch
                    self.done += len(batch)
        else:
            self.parts.rmtree()
            record.write_text(json.dumps(identity))

    def write(self, batch: np.ndarray) -> None:
        replace(self.parts / f"{self.done:09d}.npy", lambda file: np.save(file, batch))
        self.array[self.done : self.done + len(batch)] = batch
        self.done += len(batch)

    def close(self) -> None:
        super().close()
        self.parts.rmtree()


def writer(out: Path, config: Config, job: Job, identity: dict[str, Any]) -> Writer:
    """The writer for a path: .png a grid, .npz an archive, anything without a suffix a folder."""
    if out.suffix not in (".png", ".npz", ""):
        raise UserError(f"--out {out}: end it in .png (a grid), .npz, or no suffix (a folder of PNGs)")
    if out.suffix and out.is_dir():
        raise UserError(f"--out {out} is a folder: give another name")
    if out.suffix == ".png" and len(job.seeds) > 1024:
        raise UserError(f"--out {out}: a grid holds at most 1024 images; take .npz or a folder for {len(job.seeds)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    return (Folder if not out.suffix else RemoteArray if remote(out) else Array)(out, config, job, identity)


def draw_into(
    out: Path,
    config: Config,
    job: Job,
    identity: dict[str, Any],
    draw: Callable[[Job, Callable[[], Any]], Iterator[np.ndarray]],
    ticks: Callable[[int], int],
    keep: bool = False,
) -> np.ndarray | None:
    """Draw what a file or folder does not hold yet of a job, by draw(rest, tick), and finish it; the first process writes.

    A bar expects ticks(n) calls of tick for n images. Returns all images, (N, H, W, C) uint8, where the first
    process is to `keep` them.
    """
    to = writer(out, config, job, identity) if processes.rank() == 0 else None
    done = processes.same(to.done if to else 0)
    if done and to:
        print(f"{done} of {len(job.seeds)} images are there already")
    rest = job.part(done)
    with tqdm(total=ticks(len(rest.seeds)), unit="step", desc=f"{len(rest.seeds)} images", disable=None if to else True) as bar:
        for batch in draw(rest, bar.update):
            if to:
                to.write(batch)
    if to is None:
        return None
    held = to.held() if keep else None
    to.close()
    return held
