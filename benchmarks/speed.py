"""How fast this project and its peers are: one network, all by turns in one run on one machine. `make bench` runs it.

    make bench ORIGINAL=improved-diffusion        # a checkout of openai/improved-diffusion; without it, the peers alone
    python benchmarks/speed.py [--original DIR] [--peers PYTHON] [--network small|paper] [--what step,sample,...] [--only NAMES]

Measured are a step of training and its share of the machine's best convolution, a call of the network in sampling, a step of the
bound in likelihood, reading a folder of 32-pixel PNGs, saving and restoring all of a run, the time from a process's start to the
end of its first step, and its memory at the most. Each contestant works in a process of its own, started once; in each round they
take turns, and who waits uses no processor. Ratios are by the medians, with the least and most of any round. `--original` and the
peers' Python (`make .venv/peers/ready`) may be left out, and their rows with them. What each does: `contestants.py`.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from common import HERE, Worker, environment, first_line, interleaved, machine, ratio, seconds_of, table
from contestants import CONTESTANTS, Size, command
from PIL import Image
from torch.nn import functional as F

NETWORKS = {"small": Size(), "paper": Size(channels=128, blocks=3, dropout=0.3)}  # 9.9 and 52.5 million weights
HALF = " bf16"  # after a contestant's name
NAMES = ("original", "ours", "ours bf16", "diffusers", "diffusers bf16", "denoising-diffusion-pytorch",
         "denoising-diffusion-pytorch bf16")  # fmt: skip
CALLS, IMAGES = 4, 1920  # of the network in sampling and likelihood; that are read
Times = Mapping[str, list[float]]


# ---- the machine's best


def convolution_peak(rounds: int = 3) -> dict[str, float]:
    """The most GFLOP/s of any 3x3 convolution, forward, by precision: of these sizes, in either memory format.

    A precision with less than a tenth of another's, as bf16 where no instruction has it, is measured no further.
    """
    best = {"fp32": 0.0, "bf16": 0.0}
    shapes = [(16, 64, 32), (16, 128, 32), (16, 256, 32), (16, 128, 16), (16, 256, 16), (16, 512, 16), (16, 512, 8)]
    with torch.inference_mode():
        for batch, channels, side in shapes * rounds:
            for layout in (torch.contiguous_format, torch.channels_last):
                for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
                    if 0 < best[name] < max(best.values()) / 10:
                        continue
                    x = torch.randn(batch, channels, side, side, dtype=dtype).contiguous(memory_format=layout)
                    weight = torch.randn(channels, channels, 3, 3, dtype=dtype).contiguous(memory_format=layout)
                    F.conv2d(x, weight, padding=1)
                    seconds = min(seconds_of(lambda: F.conv2d(x, weight, padding=1)) for _ in range(3))  # noqa: B023
                    best[name] = max(best[name], 2 * 9 * batch * channels**2 * side**2 / seconds / 1e9)
    return best


# ---- contestants


def contestants(args: argparse.Namespace) -> dict[str, list[str]]:
    """The command of each one's worker, of those that can be run here and are asked for."""
    found = {}
    for name in args.only.split(",") if args.only else NAMES:
        bare = name.removesuffix(HALF)
        if bare not in CONTESTANTS:
            sys.exit(f"--only {name!r} is not one of: {', '.join(NAMES)}")
        size = replace(NETWORKS[args.network], batch=args.batch, original=args.original)
        size = replace(size, channels=args.channels or size.channels, precision="bf16" if name.endswith(HALF) else "fp32")
        needs = {"ours": "", "original": "" if args.original else "--original DIR"}.get(
            bare, "" if os.path.exists(args.peers) else "make .venv/peers/ready"
        )
        if needs:
            print(f"{name} is left out: it needs {needs}", file=sys.stderr)
            continue
        own = bare in ("ours", "original")  # the original needs nothing but torch
        found[name] = command(bare, size, sys.executable if own else args.peers)
    return found


def pictures(folder: Path, images: int) -> Path:
    """Of noise, 32 pixels, as PNG files in ten folders."""
    rng = np.random.default_rng(0)
    for k in range(images):
        path = folder / "pictures" / f"{k % 10}" / f"{k % 10}_{k:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    return folder / "pictures"


# ---- what is measured, each a table


def show(title: str, times: Times, unit: str, shown: Callable[[float], str], more: Mapping[str, list[str]] = {}) -> None:
    """The medians, how many times as fast as the first contestant each is, and further columns."""
    base = next(iter(times.values()))
    rows = [
        [name, shown(statistics.median(own)), ratio(base, own), *(column[k] for column in more.values())]
        for k, (name, own) in enumerate(times.items())
    ]
    print(f"\n{title}\n\n{table(['', unit, f'times as fast as {next(iter(times))}', *more], rows)}", flush=True)


def steps(workers: Mapping[str, Worker], args: argparse.Namespace) -> None:
    peak, about = convolution_peak(), {name: worker.ask(do="facts") for name, worker in workers.items()}
    times = interleaved({name: (lambda w=worker: w.ask(do="step")) for name, worker in workers.items()}, args.rounds, warm=2)
    speeds = {name: about[name]["flops"] / statistics.median(own) / 1e9 for name, own in times.items()}
    more = {
        "weights": [f"{fact['weights'] / 1e6:.2f} M" for fact in about.values()],
        "GFLOP a step": [f"{fact['flops'] / 1e9:.0f}" for fact in about.values()],
        "GFLOP/s": [f"{speed:.0f}" for speed in speeds.values()],
        "of the best peak": [f"{speed / max(peak.values()):.0%}" for speed in speeds.values()],
    }
    show("A step of training", times, "ms", lambda s: f"{1000 * s:.0f}", more)
    said = ", ".join(f"{value:.0f} in {name}" for name, value in peak.items())
    print(f"\nThe best 3x3 convolution of this machine, GFLOP/s: {said}")


def asked(title: str, per: int, digits: int = 0, **what: Any) -> Callable[[Mapping[str, Worker], argparse.Namespace], None]:
    """A table of what each worker that knows it is asked, in ms a part of it."""

    def measure(workers: Mapping[str, Worker], args: argparse.Namespace) -> None:
        able = {name: worker for name, worker in workers.items() if what["do"] in args.knows[name]}
        times = interleaved({name: (lambda w=worker: w.ask(**what) / per) for name, worker in able.items()}, args.rounds)
        show(title, times, "ms", lambda s: f"{1000 * s:.{digits}f}")

    return measure


def reading(workers: Mapping[str, Worker], args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = str(pictures(Path(place), args.images))
        for title, again in (("opened and read once", False), ("read once more", True)):
            calls = {
                name: (lambda w=worker: w.ask(do="epoch", folder=folder, images=args.images, again=again) / args.images)  # noqa: B023
                for name, worker in workers.items()
            }
            show(
                f"A folder of {args.images:,} PNGs, {title}",
                interleaved(calls, args.rounds),
                "images/s",
                lambda s: f"{1 / s:,.0f}",
            )


def storing(workers: Mapping[str, Worker], args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as place:
        fresh = count()
        folders: dict[str, str] = {}

        def save(name: str) -> float:
            shutil.rmtree(folders.get(name, ""), ignore_errors=True)
            folders[name] = f"{place}/{next(fresh)}"
            return workers[name].ask(do="save", folder=folders[name])

        times = interleaved({name: (lambda n=name: save(n)) for name in workers}, args.rounds)
        sizes = [sum(f.stat().st_size for f in Path(folders[name]).rglob("*") if f.is_file()) for name in workers]
        title = "Saving weights, average and optimizer (ours also checks what it wrote, and has it on the disk)"
        show(title, times, "ms", lambda s: f"{1000 * s:.0f}", {"MiB": [f"{size / 2**20:.0f}" for size in sizes]})
        calls = {name: (lambda n=name: workers[n].ask(do="restore", folder=folders[n])) for name in workers}
        show("Restoring it (ours also checks its sha256)", interleaved(calls, args.rounds), "ms", lambda s: f"{1000 * s:.0f}")


def starting(commands: Mapping[str, list[str]], args: argparse.Namespace) -> None:
    """From a process's start to the end of its first step, and its memory after three."""
    memory: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}  # beyond the libraries, and theirs

    def start(name: str) -> float:
        began = time.time()
        worker = Worker(commands[name])
        ready = worker.answer()
        for _ in range(2):
            worker.ask(do="step")
        memory[name].append((worker.ask(do="facts")["peak"] - ready["imported"], ready["imported"]))
        worker.end()
        return ready["ready"] - began

    times = interleaved({name: (lambda n=name: start(n)) for name in commands}, min(3, args.rounds), warm=1)
    peaks = {name: statistics.median(used for used, _ in own) for name, own in memory.items()}
    base = next(iter(peaks.values()))
    more = {
        "memory at the most, MiB": [f"{(peaks[name] + memory[name][-1][1]) / 2**20:.0f}" for name in peaks],
        "beyond Python and torch": [f"{peak / 2**20:.0f}" for peak in peaks.values()],
        f"to that of {next(iter(peaks))}": [f"{peak / base:.2f}" for peak in peaks.values()],
    }
    show("From start to the end of the first step, and memory", times, "s", lambda s: f"{s:.1f}", more)
    if "ours" in commands:
        with tempfile.TemporaryDirectory() as place:
            size, folder = replace(NETWORKS[args.network], batch=args.batch), pictures(Path(place), 320)
            flags = dict(image_size=32, num_channels=args.channels or size.channels, num_res_blocks=size.blocks, learn_sigma=True)
            flags |= dict(batch_size=size.batch, steps=1000, log_interval=1, sample_interval=0, device="cpu")
            line = [sys.executable, "-m", "iddpm", "train", str(folder)]
            line += [str(token) for k, v in flags.items() for token in (f"--{k}", v)]
            runs = [first_line([*line, "--run", f"{place}/{k}"], "step ", environment()) for k in range(min(3, args.rounds))]
        print(f"\nThe command `iddpm train`, which chooses a precision: {statistics.median(runs):.1f} s to its first step's line")


WITH_WORKERS: dict[str, Callable[[Mapping[str, Worker], argparse.Namespace], None]] = {
    "step": steps,
    "sample": asked(f"Sampling, a call of the network (of {CALLS}) for a batch", CALLS, do="sample", calls=CALLS),
    "nll": asked(f"Likelihood, a step of the bound (of {CALLS}) for a batch", CALLS, do="nll", steps=CALLS),
    "load": reading,
    "store": storing,
}
WHAT = (*WITH_WORKERS, "start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", default="", metavar="DIR", help="a checkout of openai/improved-diffusion")
    parser.add_argument("--peers", default=str(HERE.parent / ".venv/peers/bin/python"), metavar="PYTHON")
    parser.add_argument("--network", choices=NETWORKS, default="small", help="the paper's has 128 channels and 3 blocks")
    parser.add_argument("--channels", type=int, default=0, help="another width")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=IMAGES, help="that are read")
    parser.add_argument("--what", default=",".join(WHAT))
    parser.add_argument("--only", default="", metavar="NAME,...", help=", ".join(NAMES))
    args = parser.parse_args()
    if unknown := set(args.what.split(",")) - set(WHAT):
        sys.exit(f"--what {min(unknown)!r} is not one of: {', '.join(WHAT)}")
    commands = contestants(args)
    print(f"{machine()}\n{args.network} network, 32 pixels, batch {args.batch}, {args.rounds} rounds", flush=True)
    if chosen := [name for name in args.what.split(",") if name in WITH_WORKERS]:
        workers = {name: Worker(line) for name, line in commands.items()}
        try:
            args.knows = {name: worker.answer()["knows"] for name, worker in workers.items()}
            for name in chosen:
                WITH_WORKERS[name](workers, args)
        finally:
            for worker in workers.values():
                worker.end()
    if "start" in args.what.split(","):
        starting(commands, args)
    print(f"\nload average at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
