"""How many threads compute, and how they wait for each other: told to OpenMP by the environment, before torch is imported."""

import math
import os
import sys
from pathlib import Path

from iddpm.errors import UserError

GROUPS = Path("/sys/fs/cgroup")


def settle() -> None:
    """What the user has set stays."""
    if "OMP_WAIT_POLICY" not in os.environ:
        # Threads that wait for each other spin some 30 us, then sleep. Asleep at once, a step takes a third longer on an idle
        # machine; spinning on, up to three times as long on a busy one.
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if (cores := allowed()) < (os.cpu_count() or 1):
        # torch counts the machine's cores: 64 threads that share 2 are many times slower than 2.
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))


def take(count: int) -> None:
    """So many threads compute, whatever else was settled; UserError for none or fewer."""
    if count < 1:
        raise UserError(f"--threads {count}: 1 or more")
    os.environ["OMP_NUM_THREADS"] = str(count)
    if torch := sys.modules.get("torch"):  # of a program that calls `main`, which has read that variable already
        torch.set_num_threads(count)


def allowed(groups: Path = GROUPS) -> int:
    """Cores' worth of time that this process may use, at least 1: those of its mask, or what a container's limit leaves of them.

    From Linux' control groups, version 2 (cpu.max) or 1; a limit of 1.5 cores is 2 threads.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = (float(n) for n in " ".join((groups / file).read_text() for file in files).split())
        except (OSError, ValueError):  # there is none, or "max"
            continue
        if quota > 0 and period > 0:
            cores = min(cores, math.ceil(quota / period))
    return max(1, cores)
