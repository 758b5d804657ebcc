"""Drawing images: image number i depends on its seed alone, and a killed job goes on where it was."""

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from iddpm import build, rng
from iddpm.checkpoint import Weights
from iddpm.config import Config, image_size
from iddpm.diffusion.denoiser import Network
from iddpm.diffusion.solvers import State, run
from iddpm.errors import UserError


class Job(NamedTuple):
    """Which images to draw: one for each seed, of the class beside it (none: -1)."""

    seeds: Sequence[int]
    labels: Sequence[int]


def job(config: Config, seeds: Sequence[int], labels: str = "") -> Job:
    """The job of some seeds; seed s takes the (s modulo n)-th of the n labels asked for, by default of all classes.

    `labels` are names or numbers, comma-separated; UserError where the model does not know one, or knows no classes.
    """
    if not config.model.class_cond:
        if labels:
            raise UserError("--labels: this model was trained without classes")
        return Job(seeds, [-1] * len(seeds))
    names, wanted = config.data.classes, []
    for text in (part.strip() for part in labels.split(",") if part.strip()):
        if text in names:
            wanted.append(names.index(text))
        elif text.isdigit() and int(text) < config.model.num_classes:
            wanted.append(int(text))
        else:
            raise UserError(f"--labels {text}: the model knows {', '.join(names)} (or 0 to {config.model.num_classes - 1})")
    wanted = wanted or list(range(config.model.num_classes))
    return Job(seeds, [wanted[s % len(wanted)] for s in seeds])


def restore(weights: Weights, device: torch.device, precision: str = "fp32") -> Network:
    """The trained network of some weights, ready to predict."""
    net = build.network(weights.config)
    try:
        net.load_state_dict(weights.tensors)
    except RuntimeError as e:
        raise UserError(f"{weights.path} does not hold the network its config names: {str(e).splitlines()[1].strip()}") from None
    return build.in_precision(net.to(device).eval().requires_grad_(False), device, precision)


def to_uint8(x: Tensor) -> np.ndarray:
    """Images (B, C, H, W) in [-1, 1] as (B, H, W, C) uint8, rounded to the nearest level."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


@torch.inference_mode()
def images(
    config: Config, net: Network, job: Job, device: torch.device, batch_size: int = 64, tick: Callable[[], Any] = lambda: None
) -> Iterator[np.ndarray]:
    """The images of a job in order, batch by batch, (n, H, W, C) uint8; `tick` is called after each solver step."""
    denoiser = build.denoiser(config.diffusion, net, config.sample.sampling_steps, config.sample.clip_denoised)
    shape, solver = (config.model.image_channels, *image_size(config.model)), build.solver(config.sample)
    for a in range(0, len(job.seeds), batch_size):
        seeds = job.seeds[a : a + batch_size]
        labels = torch.tensor(job.labels[a : a + batch_size], device=device)

        def noise(k: int, seeds: Sequence[int] = seeds) -> Tensor:
            return rng.normal(0, rng.SAMPLE, k, seeds, shape).to(device)

        path = solver(denoiser, noise(0), noise, {"y": labels} if config.model.class_cond else {})
        yield to_uint8(run(_ticking(path, tick)))


def _ticking(path: Iterable[State], tick: Callable[[], Any]) -> Iterator[State]:
    for state in path:
        tick()
        yield state


# ---- where they go: each writer knows how many images of the job it already holds


class Writer(Protocol):
    done: int

    def write(self, batch: np.ndarray) -> None: ...

    def close(self) -> None: ...


class Folder:
    """One PNG per image, NAME.png by seed, with the class in front where there is one; job.json says which job it is."""

    def __init__(self, out: Path, config: Config, job: Job, identity: dict[str, Any]):
        self.out, record = out, out / "job.json"
        ours = record.exists() and json.loads(record.read_text()) == identity
        if out.exists() and not ours and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} already holds something else: give another --out")
        out.mkdir(parents=True, exist_ok=True)
        _replace(record, json.dumps(identity).encode())
        names = [f"{config.data.classes[y]}_" if y >= 0 else "" for y in job.labels]
        self.files = [out / f"{name}{seed:06d}.png" for name, seed in zip(names, job.seeds)]
        self.done = next((k for k, file in enumerate(self.files) if not file.exists()), len(self.files))

    def write(self, batch: np.ndarray) -> None:
        for image in batch:
            file = self.files[self.done]
            aside = file.with_name(f".{file.name}")
            _picture(image).save(aside, format="PNG")
            os.replace(aside, file)
            self.done += 1

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
        _replace(self.partial / "job.json", json.dumps({"job": self.identity, "done": self.done}).encode())

    def close(self) -> None:
        """Turn what was gathered into the file asked for, in one step."""
        aside = self.out.with_name("." + self.out.name)
        if self.out.suffix == ".npz":
            labels = np.array(self.job.labels, dtype=np.int64)
            with zipfile.ZipFile(aside, "w") as file:
                file.write(self.partial / "arr_0.npy", "arr_0.npy")
                if self.config.model.class_cond:
                    with file.open("arr_1.npy", "w") as member:
                        np.lib.format.write_array(member, labels)
        else:
            grid(np.asarray(self.array), self.job.labels, self.config.data.classes).save(aside, format="PNG")
        os.replace(aside, self.out)
        del self.array
        shutil.rmtree(self.partial)


def writer(out: Path, config: Config, job: Job, identity: dict[str, Any]) -> Writer:
    """The writer for a path: .png a grid, .npz an archive, anything without a suffix a folder."""
    if out.suffix not in (".png", ".npz", ""):
        raise UserError(f"--out {out}: end it in .png (a grid), .npz, or no suffix (a folder of PNGs)")
    if out.suffix and out.is_dir():
        raise UserError(f"--out {out} is a folder: give another name")
    if out.suffix == ".png" and len(job.seeds) > 1024:
        raise UserError(f"--out {out}: a grid holds at most 1024 images; take .npz or a folder for {len(job.seeds)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    return (Array if out.suffix else Folder)(out, config, job, identity)


# ---- pictures


def grid(images: np.ndarray, labels: Sequence[int], classes: Sequence[str]) -> Image.Image:
    """Images (N, H, W, C) uint8 in separated cells; with classes, one or more rows of each, its name in front."""
    n, height, width, _ = images.shape
    zoom = max(1, round(64 / max(height, width)))  # small images are enlarged, pixel by pixel
    labelled = len(labels) > 0 and min(labels) >= 0
    if labelled:
        kinds = sorted(set(labels))
        columns = min(16, max(labels.count(k) if isinstance(labels, list) else list(labels).count(k) for k in kinds))
        rows = []
        for kind in kinds:
            own = [k for k, y in enumerate(labels) if y == kind]
            rows += [(kind, own[a : a + columns]) for a in range(0, len(own), columns)]
    else:
        columns = max(1, round(n**0.5))
        rows = [(-1, list(range(a, min(a + columns, n)))) for a in range(0, n, columns)]
    gap, w, h = 2 * max(1, zoom // 2), width * zoom, height * zoom
    names = {kind: classes[kind] if 0 <= kind < len(classes) else str(kind) for kind, _ in rows}
    margin = 8 + max(int(ImageDraw.Draw(Image.new("L", (1, 1))).textlength(t)) for t in names.values()) if labelled else 0
    sheet = Image.new("RGB", (margin + columns * (w + gap) + gap, len(rows) * (h + gap) + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for r, (kind, members) in enumerate(rows):
        top = gap + r * (h + gap)
        if labelled:
            pen.text((4, top + h // 2), names[kind], fill="black", anchor="lm")
        for c, k in enumerate(members):
            cell = _picture(images[k]).convert("RGB").resize((w, h), Image.Resampling.NEAREST)
            sheet.paste(cell, (margin + gap + c * (w + gap), top))
    return sheet


def grid_file(config: Config, net: Network, device: torch.device, path: Path, count: int = 64) -> None:
    """A grid of fixed seeds: of each class as many as fit in `count`, or `count` images."""
    per_class = max(1, count // max(1, config.model.num_classes)) * config.model.num_classes
    task = job(config, range(min(per_class, 256) if config.model.class_cond else count))
    drawn = np.concatenate(list(images(config, net, task, device)))
    aside = path.with_name("." + path.name)
    grid(drawn, task.labels, config.data.classes).save(aside, format="PNG")
    os.replace(aside, path)


def _picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _replace(path: Path, content: bytes) -> None:
    aside = path.with_name("." + path.name)
    aside.write_bytes(content)
    os.replace(aside, path)
