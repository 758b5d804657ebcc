"""What `iddpm plan` says of memory against what training really allocates, on a CPU.

    python benchmarks/plan_memory.py [NAME ...] [--out benchmarks/plan_memory.md]

Each row plans a config, then trains it on zeros in a process of its own. "Allocated" is the most bytes that torch's CPU
allocator had given out at once, by its own events in torch.profiler, from before the network was made until after the second
step: every tensor, and what kernels ask it for in passing. "Process" is by how much the process's resident memory grew at the
most in two steps without the profiler: on top come pages that the allocator keeps, and what oneDNN and gloo take elsewhere.

Rows with several processes measure the first. "pretended": it trains real tensors in a process group whose others never come,
so that the bytes are the same every time; gloo's own threads let go of what they sent when they get to it.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import machine, resident
from torch.profiler import ProfilerActivity, profile

from iddpm.config import Config
from iddpm.config.presets import PRESETS
from iddpm.parallel import processes
from iddpm.store.log import Meter
from iddpm.training.plan import plan, pretended
from iddpm.training.state import TrainState
from iddpm.training.step import method_of, train_step
from iddpm.training.trial import example


class Row(NamedTuple):
    preset: str
    flags: dict[str, Any]
    processes: int = 1
    pretended: bool = False  # all but the first


ROWS = {
    "digits": Row("digits", dict(num_classes=10)),
    "cifar10-tiny": Row("cifar10-tiny", {}),
    "cifar10-up": Row("cifar10-up", {}),
    "cifar10-up-checkpoint": Row(
        "cifar10-up",
        dict(image_size="64", small_size="32", batch_size=16, use_checkpoint=True, low_res_noise=0.1, precision="fp32"),
    ),
    "classifier-64": Row(
        "digits-classifier",
        dict(image_size="64", image_channels=3, num_classes=100, num_channels=64, num_head_channels=32, channel_mult="1,2,3,4",
             attention_resolutions="16,8", resblock_updown=True, num_res_blocks=2, batch_size=8),
    ),
    "cifar10": Row("cifar10", dict(batch_size=8)),
    "cifar10-micro": Row("cifar10", dict(batch_size=16, microbatch=4, precision="bf16", ema_rate="0.999,0.9999")),
    "imagenet64": Row("imagenet64", dict(batch_size=4)),
    "imagenet64-bf16": Row("imagenet64", dict(batch_size=8, precision="bf16")),
    "imagenet64-checkpoint": Row("imagenet64", dict(batch_size=12, use_checkpoint=True)),
    "128px-vlb": Row(
        "imagenet64", dict(image_size="128", num_channels=64, num_res_blocks=1, batch_size=4, objective="vlb", dropout=0.1)
    ),
    "cifar10-ddp": Row("cifar10", dict(batch_size=8), 2),
    "cifar10-ddp-micro": Row("cifar10", dict(batch_size=16, microbatch=2), 2),
    "cifar10-fsdp-8": Row("cifar10", dict(batch_size=32, shard=8), 8, pretended=True),
    "cifar10-fsdp-8-micro": Row("cifar10", dict(batch_size=32, shard=8, microbatch=2, precision="bf16"), 8, pretended=True),
    "cifar10-hsdp-4x8": Row("cifar10", dict(batch_size=128, shard=8, use_checkpoint=True), 32, pretended=True),
    "cifar10-fsdp": Row("cifar10", dict(batch_size=8, shard=2), 2),
    "cifar10-fsdp-micro": Row("cifar10", dict(batch_size=16, microbatch=2, shard=2), 2),
    "cifar10-fsdp-checkpoint": Row("cifar10", dict(batch_size=8, use_checkpoint=True, shard=2), 2),
}  # fmt: skip


def config_of(row: Row) -> Config:
    return Config().updated({**PRESETS[row.preset][1], **row.flags, "device": "cpu"})


# ---- one row, really


def worker(name: str) -> None:
    """Train two steps, twice: for the process's memory, then for the allocator's."""
    row, device = ROWS[name], torch.device("cpu")
    config = config_of(row)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with pretended(row.processes) if row.pretended else processes.session(device):
        # the threads and libraries that the first step starts are not the network's
        small = Config().updated(
            dict(image_size="8", num_channels=8, num_heads=1, batch_size=row.processes, shard=config.train.shard)
        )
        trainer(small)()
        before = resident()
        step = trainer(config)
        peak = max(watched(step) for _ in range(2))
        del step
        gc.collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            step = trainer(config)
            for _ in range(2):
                step()
        events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
        events.sort(key=lambda e: e.start_ns())
        allocated = int(np.cumsum([e.nbytes() for e in events]).max())
        if processes.rank() == 0:
            print(json.dumps({"allocated": allocated, "resident": peak - before}))
        sys.stdout.flush()
        processes.barrier()
    os._exit(0)  # gloo's threads may abort an interpreter that takes its time to end


def trainer(config: Config) -> Callable[[], None]:
    """A step of training, on zeros."""
    cpu = torch.device("cpu")
    state, meter, batch = TrainState(config, cpu), Meter(), example(config, len(processes.share(config.train.batch_size)))
    method = method_of(config, state.parallel)
    return lambda: train_step(state, config, method, batch, meter)


def watched(step: Callable[[], None]) -> int:
    Path("/proc/self/clear_refs").write_text("5")  # begin VmHWM anew
    step()
    return resident("VmHWM")


# ---- all rows


def measure(name: str) -> dict[str, int]:
    command = [sys.executable]
    if (n := ROWS[name].processes) > 1 and not ROWS[name].pretended:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    done = subprocess.run([*command, __file__, "--worker", name], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ROWS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker)
    lines = [
        "| row | flags | weights | planned MiB | allocated MiB | planned / allocated | process MiB | plan s |",
        "|" + "---|" * 8,
    ]
    print("\n".join(lines), flush=True)
    for name in args.names or ROWS:
        row, began = ROWS[name], time.process_time()
        planned = plan(config_of(row), row.processes, cuda=False)
        peak, seconds = planned.need[config_of(row).model.use_checkpoint].peak(planned.micro), time.process_time() - began
        real = measure(name)
        flags = " ".join([f"--preset {row.preset}", *(f"--{k} {v}" for k, v in row.flags.items())])
        if row.processes > 1:
            kind = "FSDP2" if planned.layout.shard > 1 else "DDP"
            flags += f"; {row.processes} processes, {kind}" + (", pretended" if row.pretended else "")
        numbers = [peak / 2**20, real["allocated"] / 2**20, peak / real["allocated"], real["resident"] / 2**20, seconds]
        shown = [f"{v:,.{d}f}" for v, d in zip(numbers, (0, 0, 3, 0, 1))]
        lines.append("| " + " | ".join([name, flags, f"{planned.parameters:,}", *shown]) + " |")
        print(lines[-1], flush=True)
    if args.out:
        head = "Made by `python benchmarks/plan_memory.py`, which says what is measured."
        title = "# Memory: planned by `iddpm plan`, allocated in training"
        args.out.write_text("\n".join([title, "", head, f"Machine: {machine()}; one thread a process.", "", *lines, ""]))


if __name__ == "__main__":
    main()
