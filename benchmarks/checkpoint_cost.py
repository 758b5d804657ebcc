"""What a checkpoint costs a training run: the steps it holds up, and those it slows down, per 5 minutes.

    python benchmarks/checkpoint_cost.py [--rounds 5] [--batch 2] [--device cpu]

A 52 M-parameter network (the preset cifar10: AdamW, one average) trains; a round is some steps without a save and as many steps
from the start of one, begun as `iddpm train` begins it and looked after between steps, until it is on the disk. A save's cost is
the time its steps took beyond the median of the steps without: what blocks (copying the state to memory) and what contends (the
thread that hashes, writes, flushes and reads back). "CPU seconds" are that thread's, which other programs do not stretch.
"""

import argparse
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path

import torch
from common import machine

from iddpm import build
from iddpm.config import Config
from iddpm.config.presets import PRESETS
from iddpm.store import files as storage
from iddpm.store.checkpoint import Folder
from iddpm.store.log import Meter
from iddpm.training.state import TrainState
from iddpm.training.step import method_of, train_step
from iddpm.training.trial import example

EVERY = 300.0  # seconds between saves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="the disk to write to [a temporary folder]")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = build.device(args.device)
    config = Config().updated(PRESETS["cifar10"][1] | dict(batch_size=args.batch, device=args.device))
    state, meter, batch = TrainState(config, device), Meter(), example(config, args.batch)
    method = method_of(config, state.net)

    def step() -> float:
        began = time.perf_counter()
        train_step(state, config, method, batch, meter)  # ends by waiting for the device
        return time.perf_counter() - began

    with tempfile.TemporaryDirectory(dir=args.out) as place:
        folder = Folder(Path(place), keep=1, background=True)
        for _ in range(2):
            step()
        quiet, blocked, losses, steps, cpu = [], [], [], [], []
        for k in range(args.rounds + 1):
            before = [step() for _ in range(3)]
            spent, began = writer_cpu(), time.perf_counter()
            folder.begin(config, state.tensors(), state.numbers())
            blocking, slowed = time.perf_counter() - began, []
            while not slowed or folder.settle() is None:
                slowed.append(step())
            if not k:
                continue  # the first: memory is new, and modules are imported
            quiet += before
            blocked.append(blocking)
            losses.append((blocking + sum(slowed), len(slowed)))
            steps.append(len(slowed))
            cpu.append(writer_cpu() - spent)
        size = sum(f.stat().st_size for f in storage.step_dirs(Path(place))[-1].rglob("*") if f.is_file())
    typical = statistics.median(quiet)
    cost = statistics.median(total - n * typical for total, n in losses)
    weights = sum(p.numel() for p in state.params.values())
    hold, thread, median_steps = map(statistics.median, (blocked, cpu, steps))
    print(f"{weights:,} parameters, a checkpoint of {size / 2**20:,.0f} MiB, {args.device}, {args.threads} threads")
    print(f"a step without a save {typical:.2f} s (median of {len(quiet)}, from {min(quiet):.2f} to {max(quiet):.2f})")
    print(f"a save holds training up for {hold:.2f} s and is on the disk {median_steps:g} steps later; {thread:.2f} CPU seconds")
    print(f"lost to a save {cost:.2f} s (rounds: {', '.join(f'{total - n * typical:.2f}' for total, n in losses)})")
    print(f"at one save in 5 minutes {100 * cost / EVERY:.2f} % of training, of which {100 * hold / EVERY:.2f} % blocking")
    print(machine())


def writer_cpu() -> float:
    """CPU seconds that the threads of checkpoints have taken."""
    total, tick = 0.0, os.sysconf("SC_CLK_TCK")
    for thread in threading.enumerate():
        if thread.name.startswith("checkpoint") and thread.native_id:
            fields = Path(f"/proc/self/task/{thread.native_id}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / tick
    return total


if __name__ == "__main__":
    main()
