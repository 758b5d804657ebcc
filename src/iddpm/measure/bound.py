"""Measuring a model: the bound on -log2 p of each image, in bits/dim, term by term. A killed measurement goes on where it was."""

import csv
import dataclasses
import hashlib
import io
import json
import math
import os
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from iddpm import build, rng
from iddpm.config import Config, small_size
from iddpm.data import Images, Order
from iddpm.data.super_res import shrink
from iddpm.diffusion.bound import Term, bound_terms, prior_term
from iddpm.diffusion.denoiser import Cond, Denoiser, Network
from iddpm.errors import UserError
from iddpm.parallel import processes
from iddpm.store.log import duration
from iddpm.store.remote import opened, remote, replace

SAVE_EVERY = 1.0  # seconds of work that a kill may cost ...
SAVE_COST = 20  # ... or this many times what writing the file takes, where that is longer
TABLES = Term._fields[1:]  # vb, x0_mse, eps_mse
ORIGINAL = {"vb": "vb_terms.npz", "eps_mse": "mse_terms.npz", "x0_mse": "xstart_mse_terms.npz"}  # the original's file names


class Bound(NamedTuple):
    """The bound of n images on a chain of K steps, in bits/dim, and the squared errors on the way.

    `mean` and `error` (the standard error of the mean over images; nan for one image) hold the tables vb, x0_mse and eps_mse,
    each (K,), from step 0 (whose vb is the decoder's term) upwards.
    """

    indices: np.ndarray  # (n,) int64: which images of the data, in the order of the draw
    total: np.ndarray  # (n,) float64: the prior's and all the chain's terms
    prior: np.ndarray  # (n,)
    decoder: np.ndarray  # (n,) the term of step 0
    kept: np.ndarray  # (K,) int64: the number of each step in the whole schedule
    schedule_steps: int  # how many that has; more than K where the chain is respaced
    seed: int
    mean: dict[str, np.ndarray]
    error: dict[str, np.ndarray]
    seconds: float  # what measuring took, breaks left out

    @property
    def rest(self) -> np.ndarray:
        """(n,) the terms between decoder and prior, of all steps but 0."""
        return self.total - self.prior - self.decoder


@dataclass
class Progress:
    """Which terms of which images are in, and their sums: all that a killed job needs to go on.

    Sums take in the images one by one in their order, so the batches and processes change nothing but the networks' rounding.
    """

    done: np.ndarray  # (n,) int64: how many of each image's K terms, from the noisiest step down
    total: np.ndarray  # (n,) float64 bits/dim: the prior's and these terms
    prior: np.ndarray  # (n,) float64
    decoder: np.ndarray  # (n,) float64
    sums: np.ndarray  # (2, 3, K) float64: over images, of each step's vb, x0_mse and eps_mse, and of their squares
    seconds: np.ndarray  # (1,) float64: what this took

    @staticmethod
    def blank(n: int, steps: int) -> "Progress":
        sums = np.zeros((2, len(TABLES), steps))
        return Progress(np.zeros(n, np.int64), np.zeros(n), np.zeros(n), np.zeros(n), sums, np.zeros(1))

    def add(self, images: slice, rows: np.ndarray) -> None:
        """Take in the next j terms (b, 3, j) float32 of b neighbouring images that are equally far."""
        terms = rows.shape[2]
        last = self.sums.shape[2] - int(self.done[images.start])
        rows = rows.astype(np.float64)
        for k in range(terms):
            self.total[images] += rows[:, 0, k]
        for row in rows[:, :, ::-1]:
            self.sums[0, :, last - terms : last] += row
            self.sums[1, :, last - terms : last] += row * row
        if terms == last:
            self.decoder[images] = rows[:, 0, -1]
        self.done[images] += terms

    def save(self, path: Path, identity: str) -> None:
        replace(path, lambda file: np.savez(file, identity=np.array(identity), **dataclasses.asdict(self)))

    def load(self, path: Path, identity: str) -> str:
        """Become what was saved of the same job, if anything; returns what else there is to say."""
        try:
            with opened(path) as raw, np.load(raw) as file:
                if (found := str(file["identity"])) != identity:
                    theirs, ours = json.loads(found), json.loads(identity)
                    names = ", ".join(k for k in ours if theirs.get(k) != ours[k])
                    return f"{path} is of another measurement (other {names}): starting anew"
                for name in dataclasses.asdict(self):
                    setattr(self, name, file[name])
        except FileNotFoundError:
            return ""
        except UserError:
            raise
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return f"{path} is damaged: starting anew"
        return f"going on: {self.done.mean() / self.sums.shape[2]:.0%} is there already"


@torch.inference_mode()
def measure(
    config: Config,
    net: Network,
    data: Images,
    device: torch.device,
    *,
    chosen: np.ndarray | None = None,
    num_samples: int = 0,
    batch_size: int = 64,
    seed: int = 0,
    state: Path | None = None,
    identity: Mapping[str, Any] = {},
    say: Callable[[str], None] = print,
    tick: Callable[[int], Any] = lambda terms: None,
) -> Bound:
    """The bound of images, each once; on a respaced chain it is that chain's own. The same on every process.

    The images are `chosen` (their indices), by default a draw by the seed of `num_samples` of them (0: all). The noise of an
    image depends on the seed, its place in the draw and the step. `state` is a file of what is in so far: a call with the
    same `identity` (anything JSON holds) and settings goes on from there. The processes share the batches.
    UserError where an image's bound is not finite.
    """
    denoiser = build.denoiser(config.diffusion, net, config.sample.sampling_steps, config.sample.clip_denoised)
    chain, rank, world = denoiser.chain, processes.rank(), processes.world()
    if chosen is None:
        chosen = Order(len(data), seed).indices(0, min(num_samples or len(data), len(data)))
    job = json.dumps({**identity, **_settings(config, chosen, seed)})
    progress = Progress.blank(len(chosen), chain.steps)
    if rank == 0 and state and (note := progress.load(state, job)):
        say(note)
    _share(progress)
    tick(int(progress.done.sum()))
    stride, keep = 0, _Keeper(progress, state if rank == 0 else None, job)
    with ThreadPoolExecutor(1, "noise") as pool:
        for batches in _rounds(progress.done, chain.steps, batch_size, world):
            mine = batches[rank] if rank < len(batches) else range(0)
            images, first = slice(batches[0].start, batches[-1].stop), int(progress.done[batches[0].start])
            x0, cond = _batch(config, data, chosen[mine.start : mine.stop], device)
            noise = partial(rng.normal, seed, rng.LIKELIHOOD, indices=mine, shape=x0.shape[1:])
            if not stride:
                once = processes.same(_time(denoiser, x0, cond, noise) if rank == 0 else 0.0)
                stride = min(max(1, int(SAVE_EVERY / once)), chain.steps)  # terms between two looks at all processes
                if rank == 0:
                    left = (chain.steps - progress.done).sum() / len(mine) / min(world, len(batches))
                    say(f"{len(chosen)} images, {chain.steps} steps each: about {duration(once * left)}")
            if first == 0:
                prior = prior_term(chain, x0) if mine else x0.new_zeros(0)
                progress.prior[images] = progress.total[images] = processes.gather(prior.cpu()).double().numpy()
            terms = _terms(denoiser, x0, cond, noise, first, pool)
            for a in range(first, chain.steps, stride):
                rows = processes.gather(_rows(terms, min(stride, chain.steps - a), mine)).numpy()
                progress.add(images, rows)
                _require_finite(progress.total[images], data, chosen[images])
                tick(rows.shape[0] * rows.shape[2])
                keep()
    keep(at_once=True)
    return _bound(progress, chosen, np.array(chain.kept), chain.schedule_steps, seed)


class _Keeper:
    """Keeps the time, and writes the progress to a file now and then."""

    def __init__(self, progress: Progress, path: Path | None, job: str):
        self.progress, self.path, self.job = progress, path, job
        self.seen = time.monotonic()
        self.due = self.seen + SAVE_EVERY

    def __call__(self, at_once: bool = False) -> None:
        began = time.monotonic()
        self.progress.seconds += began - self.seen
        self.seen = began
        if self.path and (at_once or began > self.due):
            self.progress.save(self.path, self.job)
            ended = time.monotonic()
            self.due = ended + max(SAVE_EVERY, SAVE_COST * (ended - began))


def _settings(config: Config, chosen: np.ndarray, seed: int) -> dict[str, Any]:
    """What else makes the numbers what they are."""
    model, diffusion, sample = config.model, config.diffusion, config.sample
    return dict(
        images=hashlib.sha256(np.ascontiguousarray(chosen, np.int64).tobytes()).hexdigest(), seed=seed,
        model=dataclasses.asdict(model), diffusion=dataclasses.asdict(diffusion),
        sampling_steps=sample.sampling_steps, clip_denoised=sample.clip_denoised,
    )  # fmt: skip


def _share(progress: Progress) -> None:
    """Give every process what rank 0 has read."""
    own = None if processes.rank() == 0 else 0
    for name, array in dataclasses.asdict(progress).items():
        setattr(progress, name, processes.gather(torch.from_numpy(array)[:own]).numpy())


def _rounds(done: np.ndarray, steps: int, batch_size: int, world: int) -> list[list[range]]:
    """The batches still to be measured, as many at a time as there are processes; those of a round are equally far."""
    edges = [0, *(np.flatnonzero(np.diff(done)) + 1).tolist(), len(done)]
    rounds = []
    for a, b in zip(edges, edges[1:]):
        if done[a] < steps:
            batches = [range(k, min(k + batch_size, b)) for k in range(a, b, batch_size)]
            rounds += [batches[k : k + world] for k in range(0, len(batches), world)]
    return rounds


def _batch(config: Config, data: Images, indices: np.ndarray, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """The images (B, C, H, W) in [-1, 1], and what else the network sees of them: class, and small image without noise."""
    m, cond = config.model, {}
    x0 = torch.from_numpy(data.batch(indices)).to(device).float() / 127.5 - 1
    if m.class_cond and data.labels is not None:
        cond["y"] = torch.from_numpy(data.labels[indices]).to(device)
    if m.network == "super_res" and len(x0):
        cond["low_res"] = shrink(x0, small_size(m))
    if m.low_res_noise:
        cond["low_res_level"] = x0.new_zeros(len(x0))
    return x0, cond


def _terms(
    denoiser: Denoiser, x0: Tensor, cond: Cond, noise: Callable[[int], Tensor], first: int, pool: ThreadPoolExecutor
) -> Iterator[Term]:
    """The bound's terms but the first ones; the noise of each is drawn while the device works on the one before."""
    rest = copy(denoiser.chain)
    rest.steps -= first  # the terms that are left are those of a chain that ends nearer to the data
    coming = pool.submit(noise, first)

    def draw(k: int) -> Tensor:
        nonlocal coming
        now = coming
        if k + 1 < rest.steps:
            coming = pool.submit(noise, first + k + 1)
        return now.result().to(x0.device)

    yield from bound_terms(dataclasses.replace(denoiser, chain=rest), x0, draw, cond)


def _rows(terms: Iterator[Term], count: int, mine: range) -> Tensor:
    """The next `count` terms of a batch, (b, 3, count) on the CPU; of no images, none."""
    if not mine:
        return torch.zeros(0, len(TABLES), count)
    return torch.stack([torch.stack(term[1:], dim=1) for term in islice(terms, count)], dim=2).cpu()


def _time(denoiser: Denoiser, x0: Tensor, cond: Cond, noise: Callable[[int], Tensor]) -> float:
    """Seconds that one term of a batch takes."""
    at, began = torch.zeros(len(x0), dtype=torch.int64, device=x0.device), 0.0
    for _ in range(2):  # the first call also warms up
        began = time.monotonic()
        denoiser(noise(0).to(x0.device), at, cond).x0.sum().item()
    return max(time.monotonic() - began, 1e-6)


def _require_finite(total: np.ndarray, data: Images, indices: np.ndarray) -> None:
    if not np.isfinite(total).all():
        file = data.files[indices[np.flatnonzero(~np.isfinite(total))[0]]]
        raise UserError(f"the bound of {file} is not finite: these weights diverged, or need --precision fp32")


def _bound(progress: Progress, chosen: np.ndarray, kept: np.ndarray, schedule_steps: int, seed: int) -> Bound:
    n = len(chosen)
    mean = progress.sums[0] / n
    error = np.sqrt(np.maximum(progress.sums[1] / n - mean**2, 0) / (n - 1)) if n > 1 else np.full_like(mean, np.nan)
    tables = [dict(zip(TABLES, rows)) for rows in (mean, error)]
    each = progress.total, progress.prior, progress.decoder
    return Bound(chosen, *each, kept, schedule_steps, seed, tables[0], tables[1], float(progress.seconds[0]))


def mean_and_error(values: np.ndarray) -> tuple[float, float | None]:
    """The mean of values (n,) and its standard error; none for a single one."""
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


# ---- what is kept of it


def parts(bound: Bound) -> dict[str, tuple[float, float | None]]:
    """The bound and what it is made of, in bits/dim: the mean over images and its standard error of each."""
    values = {"total": bound.total, "prior": bound.prior, "decoder": bound.decoder, "rest": bound.rest}
    return {name: mean_and_error(v) for name, v in values.items()}


def scalars(bound: Bound) -> dict[str, Any]:
    """The numbers of a bound without its tables, as JSON holds them."""
    (total, total_error), *others = parts(bound).values()
    named = zip(("prior", "decoder", "rest"), others)
    return {
        "bits_per_dim": total,
        "standard_error": total_error,
        **{key: value for name, pair in named for key, value in zip((name, f"{name}_error"), pair)},
        "images": len(bound.total),
        "steps": len(bound.kept),
        "chain_steps": bound.schedule_steps,
        "respaced": len(bound.kept) < bound.schedule_steps,
        "seed": bound.seed,
    }


def summary(bound: Bound) -> dict[str, Any]:
    """The numbers of a bound, as JSON holds them; tables from step 0 upwards."""
    several = len(bound.total) > 1
    tables = {name: bound.mean[name].tolist() for name in TABLES}
    errors = {f"{name}_error": bound.error[name].tolist() if several else None for name in TABLES}
    return {
        **scalars(bound),
        "order": "entry i of each table is step kept_steps[i] of the schedule: from the data (0) to the noise",
        "kept_steps": bound.kept.tolist(),
        **tables,
        **errors,
    }


def write_tables(bound: Bound, folder: Path, prefix: str = "") -> list[Path]:
    """A file for each table, PREFIXvb_terms.npz and so on: arrays t (ascending), mean and standard_error, all (K,)."""
    paths = []
    for name, file_name in ORIGINAL.items():
        arrays: dict[str, Any] = dict(t=bound.kept, mean=bound.mean[name], standard_error=bound.error[name])
        paths.append(folder / (prefix + file_name))
        replace(paths[-1], lambda file: np.savez(file, **arrays))  # noqa: B023
    return paths


def write_original_tables(bound: Bound, folder: Path) -> list[Path]:
    """The original command's three files: each one array, arr_0 (K,) float32, from the noisiest step down to 0."""
    for name, file_name in ORIGINAL.items():
        replace(folder / file_name, lambda file: np.savez(file, bound.mean[name][::-1].astype(np.float32)))  # noqa: B023
    return [folder / file_name for file_name in ORIGINAL.values()]


def write_per_image(path: Path, bound: Bound, data: Images, root: Path, against: Bound | None = None) -> None:
    """One row for each image, by name: a .csv, or an .npz of the same columns; label is empty (-1) where there is none.

    Names are paths from `root`, the data's folder. With `against`, also that run's bits/dim and the difference to it.
    """
    order = np.argsort(bound.indices)
    indices = bound.indices[order]
    base = root if root.is_dir() else root.parent
    relative = (lambda file: file.relative_to(base).as_posix()) if remote(base) else (lambda file: os.path.relpath(file, base))
    names = np.array([relative(data.files[k]) for k in indices])
    columns = {"bits_per_dim": bound.total[order], "prior": bound.prior[order], "decoder": bound.decoder[order]}
    if against:
        columns |= {"against": against.total[order], "difference": (bound.total - against.total)[order]}
    labels = data.labels[indices] if data.labels is not None else np.full(len(indices), -1)
    if path.suffix == ".npz":
        arrays: dict[str, Any] = dict(name=names, label=labels, classes=np.array(data.classes, dtype=np.str_), **columns)
        replace(path, lambda file: np.savez(file, **arrays))
        return
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["name", "label", *columns])
    for k, name in enumerate(names):
        label = data.classes[labels[k]] if labels[k] >= 0 else ""
        rows.writerow([name, label, *(repr(float(column[k])) for column in columns.values())])
    replace(path, lambda file: file.write(text.getvalue().encode()))
