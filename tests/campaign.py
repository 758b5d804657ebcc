"""Kills of training runs with SIGKILL, counted by what is on the disk once the process is dead, and what a run then ends in."""

import hashlib
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from safetensors.numpy import load_file

from conftest import TINY, flags
from iddpm.store.log import read_rows
from launcher import Launcher, Started

RUN = dict(TINY, class_cond=True, random_flip=True, sampling_steps="2", steps=24, save_interval=4)  # 6 saves
SETTINGS = {
    "dropout, law of t": dict(dropout=0.2, schedule_sampler="loss-second-moment", objective="vlb", diffusion_steps=2),
    "the newest checkpoint alone": dict(keep=1, grad_clip=1),
    "three kept, half precision": dict(keep=3, precision="bf16", microbatch=4, schedule_sampler="stratified"),
    "saves that training waits for": dict(async_save=False, dropout=0.1),
    "fp16, every save kept": dict(precision="fp16", keep=0, dropout=0.1),
}


def fingerprint(run: Path) -> dict[str, str]:
    """sha256 of each tensor of the newest checkpoint, read by the safetensors library alone, and all numbers but the time."""
    folder, out = max((run / "checkpoints").glob("step_*")), {}
    for file in folder.rglob("*.safetensors"):
        for name, array in load_file(file).items():
            content = f"{array.dtype} {array.shape} ".encode() + array.tobytes()
            out[f"{file.relative_to(folder)}: {name}"] = hashlib.sha256(content).hexdigest()
    numbers = json.loads((folder / "state" / "state.json").read_text())
    return out | {f"state.json: {name}": json.dumps(value) for name, value in numbers.items() if name != "seconds"}


def losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_rows(run) if "loss" in row]


def differing(run: Path, other: Path) -> list[str]:
    """The tensors and numbers, of the last checkpoint and of the log, in which two runs differ."""
    a, b = fingerprint(run), fingerprint(other)
    assert len(a) > 100 and a["state.json: step"] == b["state.json: step"]
    return [name for name in a.keys() | b.keys() if a.get(name) != b.get(name)] + ["log"] * (losses(run) != losses(other))


class Kill(NamedTuple):
    after: float  # seconds since the process began
    where: str


class Undisturbed(NamedTuple):
    run: Path
    seconds: float


def command(run: Path, pictures: Path, settings: dict) -> tuple[object, ...]:
    return ("train", pictures, "--run", run, *flags(**RUN | settings))


def undisturbed(launcher: Launcher, pictures: Path, run: Path, settings: dict, processes: int = 1) -> Undisturbed:
    began = time.monotonic()
    said = launcher.start(*command(run, pictures, settings), said=run.with_suffix(".out"), processes=processes).succeed()
    assert said.count("saved ") == 6
    return Undisturbed(run, time.monotonic() - began)


def killed(
    launcher: Launcher, pictures: Path, run: Path, settings: dict, delays: list[float | None], processes: int = 1, rank: int = 0
) -> list[Kill]:
    """Start a run and kill it after each delay, or, where that is None, once a save has begun; then let it end.

    Returns the kills; fewer than asked for where the run ended before.
    """
    kills, said = [], run.with_suffix(".out")
    for delay in delays:
        before, began = asides(run), time.monotonic()
        started = launcher.start(*command(run, pictures, settings), said=said, processes=processes)
        while started.running() and not (asides(run) - before if delay is None else time.monotonic() - began >= delay):
            time.sleep(0.002)
        if not started.running():
            started.succeed()
            return kills
        started.kill(rank)
        after = time.monotonic() - began
        started.wait()
        kills.append(Kill(after, where(run, before, started)))
    launcher.start(*command(run, pictures, settings), said=said, processes=processes).succeed()
    return kills


def until_all(
    launcher: Launcher, pictures: Path, quiet: Undisturbed, settings: dict, moments: list[float | None]
) -> Iterator[tuple[Path, list[Kill], list[str]]]:
    """Kill at all these moments, in as many runs as it takes; yields each when it has ended: its kills, and how it differs."""
    left, number = list(moments), 0
    while left:
        run = quiet.run.with_name(f"killed{number}")
        kills = killed(launcher, pictures, run, settings, left)
        yield run, kills, differing(run, quiet.run)
        left, number = left[len(kills) :], number + 1
        if not kills and left[0] is not None:  # the machine has become faster
            left[0] /= 2


def asides(run: Path) -> set[tuple[str, int]]:
    """The saves that were not finished, each with when it was begun."""
    out = set()
    for folder in (run / "checkpoints").glob(".step_*"):
        try:
            out.add((folder.name, folder.stat().st_ino))
        except FileNotFoundError:
            continue
    return out


def where(run: Path, before: set[tuple[str, int]], started: Started) -> str:
    """What a process was at when it was killed: nothing on the disk has changed since."""
    if asides(run) - before:
        return "inside a save"
    if any(not (folder / "manifest.json").exists() for folder in (run / "checkpoints").glob("step_*")):
        return "deleting an old checkpoint"
    if "step " not in started.said.read_text():
        return "starting"
    return "ending" if f"step {RUN['steps']}/" in started.said.read_text() else "training"


def report(kills: list[Kill]) -> str:
    places = ", ".join(f"{n} {place}" for place, n in Counter(kill.where for kill in kills).most_common())
    return f"{len(kills)} kills: {places}"


def delays(rng: random.Random, window: float, random_kills: int, aimed: int) -> list[float | None]:
    """Moments to kill at: uniform up to `window` seconds, and once a save has begun, in random order."""
    moments = [rng.uniform(0, window) for _ in range(random_kills)] + [None] * aimed
    rng.shuffle(moments)
    return moments
