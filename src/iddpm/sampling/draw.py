"""Drawing images: image number i depends on its seed alone, and a killed job goes on where it was."""

import dataclasses
import io
import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from iddpm import build, rng
from iddpm.config import Config, image_size, small_size
from iddpm.data.super_res import bicubic, consistent, psnr, shrink, ssim
from iddpm.diffusion.denoiser import Network
from iddpm.diffusion.guidance import classifier_gradient
from iddpm.diffusion.solvers import State, run
from iddpm.errors import UserError
from iddpm.parallel import processes
from iddpm.sampling.sheets import comparison, grid, picture
from iddpm.store.checkpoint import Weights
from iddpm.store.remote import opened, remote, replace, scratch


class Job(NamedTuple):
    """Which images to draw: one for each seed, of the class beside it (none: -1), enlarged from the small image beside it."""

    seeds: Sequence[int]
    labels: Sequence[int]
    low_res: np.ndarray | None = None  # (N, h, w, C) uint8

    def part(self, a: int, b: int | None = None) -> "Job":
        """Images a .. b - 1 of the job."""
        return Job(self.seeds[a:b], self.labels[a:b], None if self.low_res is None else self.low_res[a:b])


def job(config: Config, seeds: Sequence[int], labels: str = "") -> Job:
    """The job of some seeds; seed s takes the (s modulo n)-th of the n labels asked for, by default of all classes.

    `labels` are names or numbers, comma-separated; UserError where the model was not trained on one, or knows no classes.
    """
    if not config.model.class_cond:
        if labels:
            raise UserError("--labels: this model was trained without classes")
        return Job(seeds, [-1] * len(seeds))
    names, known, wanted = config.data.classes, trained_classes(config), []
    for text in (part.strip() for part in labels.split(",") if part.strip()):
        if text in names:
            wanted.append(names.index(text))
        elif text.isdigit() and int(text) < known:
            wanted.append(int(text))
        else:
            shown = f"{', '.join(names[:10])}{', ...' if len(names) > 10 else ''} (or 0 to {known - 1})"
            raise UserError(f"--labels {text}: the model knows {shown if names else f'0 to {known - 1}'}")
    wanted = wanted or list(range(known))
    return Job(seeds, [wanted[s % len(wanted)] for s in seeds])


def trained_classes(config: Config) -> int:
    """How many classes a model was trained on: as many as are named, of those that it has room for."""
    return len(config.data.classes) or config.model.num_classes


def class_name(config: Config, y: int) -> str:
    """The name of class y, or its number where it has none."""
    return config.data.classes[y] if y < len(config.data.classes) else str(y)


def restore(weights: Weights, device: torch.device, precision: str = "fp32") -> Network:
    """The trained network of some weights, ready to predict."""
    with torch.device("meta"):  # so that the weights are in memory once, not twice
        net = build.network(weights.config)
    try:
        net.load_state_dict(weights.tensors, assign=True)
    except RuntimeError as e:
        raise UserError(f"{weights.path} does not hold the network its config names: {str(e).splitlines()[1].strip()}") from None
    return build.in_precision(net.to(device).eval().requires_grad_(False), device, precision)


def as_bytes(x: Tensor) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] as (B, H, W, C) uint8, rounded to the nearest level."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def to_uint8(x: Tensor) -> np.ndarray:
    """As `as_bytes`, in numpy."""
    return as_bytes(x).cpu().numpy()


class Guide(NamedTuple):
    """A classifier of noisy images that pulls samples towards their class, and how strongly."""

    config: Config
    net: Network
    scale: float


def images(
    config: Config,
    net: Network,
    job: Job,
    device: torch.device,
    batch_size: int = 64,
    tick: Callable[[], Any] = lambda: None,
    guide: Guide | None = None,
    low_res_noise: float = 0.0,
) -> Iterator[np.ndarray]:
    """The images of a job in order, batch by batch, (n, H, W, C) uint8; the arguments are those of `painter`.

    Several processes draw `batch_size` images each at a time, call the network equally often, and all get all images.
    """
    draw = painter(config, net, device, tick, guide, low_res_noise)
    for a in range(0, len(job.seeds), batch_size * processes.world()):
        part = job.part(a, a + batch_size * processes.world())
        mine = processes.share(len(part.seeds))
        own = part.part(mine.start, mine.stop) if mine else part.part(0, 1)  # without a share, one goes along: as many calls
        yield processes.gather(draw(own)[: len(mine)]).cpu().numpy()


def painter(
    config: Config,
    net: Network,
    device: torch.device,
    tick: Callable[[], Any] = lambda: None,
    guide: Guide | None = None,
    low_res_noise: float = 0.0,
) -> Callable[[Job], Tensor]:
    """A function that draws all images of a job at once, on this process alone: (n, H, W, C) uint8 on the device.

    `tick` is called after each solver step. `low_res_noise` is the deviation of noise put on the small images, for a model
    trained with it.
    """
    m = config.model
    denoiser = build.denoiser(config.diffusion, net, config.sample.sampling_steps, config.sample.clip_denoised)
    shape, solver = (m.image_channels, *image_size(m)), build.solver(config.sample)
    purpose = rng.UPSAMPLE if m.network == "super_res" else rng.SAMPLE  # an upsampler does not see its base's noise again
    chain = build.chain(guide.config.diffusion, config.sample.sampling_steps) if guide else None

    @torch.inference_mode()
    def draw(job: Job) -> Tensor:
        labels = torch.tensor(job.labels, device=device)

        def noise(k: int) -> Tensor:
            return rng.normal(0, purpose, k, job.seeds, shape).to(device)

        cond = {"y": labels} if m.class_cond else {}
        if m.network == "super_res":
            cond |= _low_res(config, job, low_res_noise, device)
        gradient = classifier_gradient(guide.net, chain, labels, guide.scale) if guide and chain else None
        project = consistent(cond["low_res"]) if config.sample.consistent else None
        path = solver(dataclasses.replace(denoiser, project=project), noise(0), noise, cond, gradient)
        return as_bytes(run(_ticking(path, tick)))

    return draw


def _low_res(config: Config, job: Job, level: float, device: torch.device) -> dict[str, Tensor]:
    assert job.low_res is not None
    small = torch.from_numpy(job.low_res).permute(0, 3, 1, 2).float() / 127.5 - 1
    if level:
        small = small + level * rng.normal(0, rng.LOW_RES, 0, job.seeds, small.shape[1:])
    cond = {"low_res": small.to(device)}
    if config.model.low_res_noise:
        cond["low_res_level"] = torch.full((len(small),), level, device=device)
    return cond


def _ticking(path: Iterable[State], tick: Callable[[], Any]) -> Iterator[State]:
    for state in path:
        tick()
        yield state


# ---- where they go: each writer knows how many images of the job it already holds


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


def solver_steps(config: Config, images: int, batch_size: int) -> int:
    """How many steps one process takes for so many images: what a progress bar counts."""
    steps = build.chain(config.diffusion, config.sample.sampling_steps).steps
    return steps * -(-images // (batch_size * processes.world()))


def grid_file(config: Config, net: Network, device: torch.device, path: Path, count: int = 64) -> None:
    """A grid of fixed seeds: of each class as many as fit in `count`, or `count` images."""
    known = trained_classes(config)
    per_class = max(1, count // max(1, known)) * known
    task = job(config, range(min(per_class, 256) if config.model.class_cond else count))
    drawn = np.concatenate(list(images(config, net, task, device)))
    save_picture(grid(drawn, task.labels, config.data.classes), path)


def shrunk(config: Config, originals: np.ndarray) -> np.ndarray:
    """The small images (N, h, w, C) uint8 that a super-resolution model makes of originals (N, C, H, W) uint8."""
    return to_uint8(shrink(torch.from_numpy(originals).float() / 127.5 - 1, small_size(config.model)))


def enlarged(config: Config, small: np.ndarray) -> np.ndarray:
    """The bicubic enlargement (N, H, W, C) uint8 of small images (N, h, w, C) uint8: the baseline."""
    return to_uint8(bicubic(torch.from_numpy(small).permute(0, 3, 1, 2).float() / 127.5 - 1, image_size(config.model)))


def comparison_file(config: Config, path: Path, drawn: np.ndarray, small: np.ndarray, originals: np.ndarray | None) -> None:
    """A picture, a row for each image: the small one, its bicubic enlargement, the model's, the original where there is one."""
    columns = {"small": small, "bicubic": enlarged(config, small), "model": drawn}
    if originals is not None:
        columns["original"] = originals.transpose(0, 2, 3, 1)
    save_picture(comparison(columns), path)


def fidelity(config: Config, drawn: np.ndarray, small: np.ndarray, originals: np.ndarray) -> dict[str, Any]:
    """Mean PSNR (dB) and SSIM to the originals (N, C, H, W) uint8, of the model's images and of the bicubic ones."""
    truth = torch.from_numpy(originals).float() / 127.5 - 1
    out: dict[str, Any] = {"images": len(drawn)}
    for name, made in (("model", drawn), ("bicubic", enlarged(config, small))):
        x = torch.from_numpy(made).permute(0, 3, 1, 2).float() / 127.5 - 1
        out[f"psnr_{name}"] = psnr(x, truth).clamp(max=100).mean().item()  # an exact copy would be infinite
        if min(x.shape[2:]) >= 11:
            out[f"ssim_{name}"] = ssim(x, truth).mean().item()
    return out


def save_picture(sheet: Image.Image, path: Path) -> None:
    """Write a PNG in one step; of several processes, the first does."""
    if processes.rank():
        return
    replace(path, lambda file: sheet.save(file, format="PNG"))
