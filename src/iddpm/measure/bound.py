"""Measuring a model: the bound on -log2 p of each image, in bits/dim, term by term. A killed measurement goes on where it was."""

import csv
import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from iddpm import build, fit, rng
from iddpm.config import Config, half_bin
from iddpm.data import DataSet, Order
from iddpm.data.given import shown
from iddpm.data.preparation import signed
from iddpm.diffusion.bound import Term, bound_terms, prior_term
from iddpm.diffusion.denoiser import Denoise, Network
from iddpm.diffusion.grid import Chain, Grid
from iddpm.errors import UserError
from iddpm.measure.ahead import ahead
from iddpm.measure.metrics.rows import Estimate
from iddpm.parallel import processes
from iddpm.records import decode
from iddpm.store.remote import Unreachable, opened, remote, replace, write_file
from iddpm.words import duration, many

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


class Resumable:
    """A measurement's arrays, those named in KEPT, in a file that a killed one goes on from; the file is the first process's."""

    KEPT: tuple[str, ...]

    def __init__(self, path: Path | None, job: str):
        self.seconds = np.zeros(1)  # what this took
        self.path, self.job, self.seen = path, job, time.monotonic()
        self.due = self.seen + SAVE_EVERY

    def share(self) -> float:
        """How much is there already, from 0 to 1."""
        raise NotImplementedError

    def keep(self, at_once: bool = False) -> float:
        """Write the file now and then; returns the seconds since the last call."""
        now = time.monotonic()
        spent, self.seen = max(now - self.seen, 1e-6), now
        self.seconds += spent
        if self.path and (at_once or now > self.due):
            self.save(self.path)
            ended = time.monotonic()
            self.due = ended + max(SAVE_EVERY, SAVE_COST * (ended - now))
        return spent

    def save(self, path: Path) -> None:
        arrays: dict[str, Any] = {name: getattr(self, name) for name in self.KEPT}
        replace(path, lambda file: np.savez(file, identity=np.array(self.job), **arrays))

    def resume(self, say: Callable[[str], None]) -> None:
        """Become, on every process, what the file holds of the same job, if anything; `say` hears of it."""
        if note := self._read():
            say(note)
        leads = processes.rank() == 0
        for name in self.KEPT:
            held = torch.from_numpy(getattr(self, name))
            setattr(self, name, processes.gather(held[: None if leads else 0]).numpy())

    def _read(self) -> str:
        """Take what the file holds of the same job, if anything; returns what there is to say."""
        if not self.path:
            return ""
        try:
            with opened(self.path) as raw, np.load(raw) as file:
                if (found := str(file["identity"])) != self.job:
                    theirs, ours = (decode(text, dict[str, Any], self.path) for text in (found, self.job))
                    names = ", ".join(k for k in ours if theirs.get(k) != ours[k])
                    return f"{self.path} is of another measurement (other {names}): starting anew"
                kept = {name: file[name] for name in self.KEPT}
                if any(kept[name].shape != getattr(self, name).shape for name in self.KEPT):
                    raise ValueError("of another shape")
                for name in self.KEPT:
                    setattr(self, name, kept[name])
        except FileNotFoundError:
            return ""
        except Unreachable:
            raise
        except Exception:  # numpy raises almost anything for a damaged file
            return f"{self.path} is damaged: starting anew"
        return f"going on: {self.share():.0%} is there already"


class Progress(Resumable):
    """Which terms of which images are in, and their sums: all that a killed job needs to go on, kept in a file.

    Sums take in the images one by one in their order, so the batches and processes change nothing but the networks' rounding.
    """

    KEPT = ("done", "total", "prior", "decoder", "sums", "seconds")

    def __init__(self, n: int, steps: int, path: Path | None = None, job: str = ""):
        self.done = np.zeros(n, np.int64)  # how many of each image's K terms, from the noisiest step down
        self.total, self.prior, self.decoder = np.zeros((3, n))  # bits/dim; the total is the prior's and the terms so far
        self.sums = np.zeros((2, len(TABLES), steps))  # over images, of each step's vb, x0_mse and eps_mse, and of their squares
        super().__init__(path, job)

    def share(self) -> float:
        return float(self.done.mean() / self.sums.shape[2])

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


@torch.inference_mode()
def bits_per_dim(
    config: Config,
    net: Network,
    data: DataSet,
    device: torch.device,
    *,
    grid: Grid | None = None,
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
    same `identity` (anything JSON holds) and settings goes on from there. The processes share the batches. `grid` is the
    config's, from who has it at hand. UserError where an image's bound is not finite.
    """
    fit.require_density(config, "bits per dimension")
    grid, denoiser = grid or build.grid(config), build.bound_denoiser(config, net)
    if chosen is None:
        chosen = Order(len(data), seed).indices(0, min(num_samples or len(data), len(data)))
    job, leads = job_of(config, chosen, seed, identity), processes.rank() == 0
    progress = Progress(len(chosen), grid.steps, state if leads else None, job)
    progress.resume(say)
    tick(int(progress.done.sum()))
    stride, looks = 1, 0  # terms between two looks at all processes: as many as take SAVE_EVERY
    for r in rounds_left(progress.done, grid.steps, batch_size):
        images, first = slice(r.every.start, r.every.stop), int(progress.done[r.every.start])
        x0, cond = batch_of(config, data, chosen[r.call.start : r.call.stop], device)
        noise = partial(rng.normal, seed, rng.LIKELIHOOD, indices=r.call, shape=x0.shape[1:])
        if first == 0:
            prior = processes.gather(prior_term(grid, x0)[: len(r.mine)].cpu()).double().numpy()
            progress.prior[images] = progress.total[images] = prior
        terms = _terms(partial(denoiser, cond=cond), x0, grid, noise, first, half_bin(config.model))
        while columns := [torch.stack(term[1:], dim=1) for term in islice(terms, stride)]:
            progress.add(images, processes.gather(torch.stack(columns, dim=2)[: len(r.mine)].cpu()).numpy())
            _require_finite(progress.total[images], data, chosen[images])
            tick(len(r.every) * len(columns))
            once, looks = processes.same(progress.keep()) / len(columns), looks + 1
            stride = min(max(1, int(SAVE_EVERY / once)), grid.steps)
            if leads and looks == 2:  # the first one also warmed up
                left = (grid.steps - progress.done).sum() / len(r.every)
                say(f"{many(len(chosen), 'image')}, {grid.steps} steps each: about {duration(once * left)}")
    progress.keep(at_once=True)
    return _bound(progress, chosen, grid, seed)


def job_of(config: Config, chosen: np.ndarray, seed: int, identity: Mapping[str, Any]) -> str:
    """All that makes the numbers what they are, as JSON."""
    images = hashlib.sha256(np.ascontiguousarray(chosen, np.int64).tobytes()).hexdigest()
    sample, model = config.sample, {k: v for k, v in json.loads(config.to_json()).items() if k in ("model", "diffusion", "own")}
    chain = dict(sampling_steps=sample.sampling_steps, clip_denoised=sample.clip_denoised)
    chain |= dict(grid=sample.grid, found=sample.found)
    return json.dumps({**identity, "images": images, "seed": seed, **model, **chain})


def rounds_left(done: np.ndarray, steps: int, batch_size: int) -> Iterator[processes.Round]:
    """The images still to be measured; those of a round are equally far."""
    edges = [0, *(np.flatnonzero(np.diff(done)) + 1).tolist(), len(done)]
    for a, b in zip(edges, edges[1:]):
        if done[a] < steps:
            for r in processes.rounds(b - a, batch_size):
                yield processes.Round(*(range(a + part.start, a + part.stop) for part in r))


def batch_of(config: Config, data: DataSet, indices: np.ndarray, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """The images (B, C, H, W) in [-1, 1], and what else the network sees of them: class, and the image given, without noise."""
    m, cond = config.model, {}
    x0, given = shown(config, signed(data.batch(indices), device))
    if m.class_cond and data.labels is not None:
        cond["y"] = torch.from_numpy(data.labels[indices]).to(device)
    if given is not None:
        cond["given"] = given
    if m.low_res_noise:
        cond["low_res_level"] = x0.new_zeros(len(x0))
    return x0, cond


def _terms(
    denoise: Denoise, x0: Tensor, grid: Grid, noise: Callable[[int], Tensor], first: int, half_bin: float
) -> Iterator[Term]:
    """The bound's terms but the first ones; the noise of each is drawn while the device works on the one before."""
    nearer = grid.only(slice(grid.steps - first))  # the steps that are left
    drawn = ahead(noise, range(first, grid.steps))
    return bound_terms(denoise, x0, nearer, lambda k: next(drawn).to(x0.device), half_bin)


def _require_finite(total: np.ndarray, data: DataSet, indices: np.ndarray) -> None:
    if not np.isfinite(total).all():
        file = data.files[indices[np.flatnonzero(~np.isfinite(total))[0]]]
        raise UserError(f"the bound of {file} is not finite: these weights diverged, or need --precision fp32")


def _bound(progress: Progress, chosen: np.ndarray, grid: Grid, seed: int) -> Bound:
    n = len(chosen)
    mean = progress.sums[0] / n
    error = np.sqrt(np.maximum(progress.sums[1] / n - mean**2, 0) / (n - 1)) if n > 1 else np.full_like(mean, np.nan)
    tables = [dict(zip(TABLES, rows)) for rows in (mean, error)]
    each = progress.total, progress.prior, progress.decoder
    kept, of = (grid.kept, grid.schedule_steps) if isinstance(grid, Chain) else (range(grid.steps), grid.steps)
    return Bound(chosen, *each, np.array(kept), of, seed, tables[0], tables[1], float(progress.seconds[0]))


# ---- what is kept of it


def parts(bound: Bound) -> dict[str, Estimate]:
    """The bound and what it is made of, in bits/dim: the mean over images and its standard error of each."""
    return {name: Estimate.mean(getattr(bound, name)) for name in ("total", "prior", "decoder", "rest")}


def scalars(bound: Bound) -> dict[str, Any]:
    """The numbers of a bound without its tables, as JSON holds them."""
    found: dict[str, Any] = {}
    for name, (mean, error) in parts(bound).items():
        found |= {"bits_per_dim": mean, "standard_error": error} if name == "total" else {name: mean, f"{name}_error": error}
    steps, of = len(bound.kept), bound.schedule_steps
    return found | dict(images=len(bound.total), steps=steps, chain_steps=of, respaced=steps < of, seed=bound.seed)


def summary(bound: Bound) -> dict[str, Any]:
    """The numbers of a bound, as JSON holds them; tables from step 0 upwards."""
    several = len(bound.total) > 1
    order = "entry i of each table is step kept_steps[i] of the schedule: from the data (0) to the noise"
    tables = {name: bound.mean[name].tolist() for name in TABLES}
    errors = {f"{name}_error": bound.error[name].tolist() if several else None for name in TABLES}
    return {**scalars(bound), "order": order, "kept_steps": bound.kept.tolist(), **tables, **errors}


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


def write_per_image(path: Path, bound: Bound, data: DataSet, root: Path, against: Bound | None = None) -> None:
    """One row for each image, by name: a .csv, or an .npz of the same columns; label is empty (-1) where there is none.

    Names are paths from `root`, the data's folder. With `against`, also that run's bits/dim and the difference to it.
    """
    order = np.argsort(bound.indices)
    indices, base = bound.indices[order], root if root.is_dir() else root.parent
    files = (data.files[k] for k in indices)
    names = [file.relative_to(base).as_posix() if remote(base) else os.path.relpath(file, base) for file in files]
    labels = data.labels[indices] if data.labels is not None else np.full(len(indices), -1)
    columns = {"bits_per_dim": bound.total[order], "prior": bound.prior[order], "decoder": bound.decoder[order]}
    if against:
        columns |= {"against": against.total[order], "difference": (bound.total - against.total)[order]}
    if path.suffix == ".npz":
        arrays: dict[str, Any] = dict(
            name=np.array(names), label=labels, classes=np.array(data.classes, dtype=np.str_), **columns
        )
        replace(path, lambda file: np.savez(file, **arrays))
        return
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["name", "label", *columns])
    for name, label, *numbers in zip(names, labels, *columns.values()):
        rows.writerow([name, data.classes[label] if label >= 0 else "", *(repr(float(number)) for number in numbers)])
    write_file(path, text.getvalue())
