"""What the benchmarks share: contestants that take turns, each in a process of its own; the machine in a line; tables."""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def machine() -> str:
    """The CPU, its cores and bf16 instructions, torch, and how busy it is."""
    import torch

    about = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    named = (line.partition(": ")[2] for line in about.splitlines() if line.startswith("model name"))
    bf16 = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in about]
    cuda = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{next(named, platform.processor() or platform.machine())}, {os.cpu_count()} cores, "
        f"bf16 by {' and '.join(bf16) or 'no instruction'}{cuda}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"load average {os.getloadavg()[0]:.1f}"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def interleaved(calls: Mapping[str, Callable[[], float]], rounds: int, warm: int = 1) -> dict[str, list[float]]:
    """Seconds of each call in each round, but for the first rounds, which warm up.

    In a round all calls take turns, so that they meet the same machine.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for k in range(warm + rounds):
        for name, call in calls.items():
            seconds = call()
            if k >= warm:
                times[name].append(seconds)
    return times


def ratio(base: Sequence[float], times: Sequence[float]) -> str:
    """How much faster than the base: by the medians, and the least and most of any round."""
    each = sorted(a / b for a, b in zip(base, times))
    return f"{statistics.median(base) / statistics.median(times):.2f} ({each[0]:.2f} to {each[-1]:.2f})"


def seconds_of(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def first_line(command: list[str], start: str, env: Mapping[str, str] | None = None) -> float:
    """Seconds until a process prints a line that starts so; then it is killed. Ends the program if it never does."""
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        for said in process.stdout or ():
            if said.startswith(start):
                seconds = time.perf_counter() - began
                process.kill()
                return seconds
    sys.exit(f"it ended before it said {start!r}: {' '.join(command)}")


class Worker:
    """A process that does what it is asked, a line of JSON each, and answers with one; while it waits it uses no processor.

    What it says on stderr is shown only when it ends before it was told to.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str] = {}):
        self.errors, pipe = tempfile.TemporaryFile("w+"), subprocess.PIPE  # noqa: SIM115
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.errors, text=True, env=environment(**env))

    def tell(self, **what: Any) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()

    def ask(self, **what: Any) -> Any:
        self.tell(**what)
        return self.answer()

    def answer(self) -> Any:
        """The next line that is JSON; libraries may print others. RuntimeError when the process has ended."""
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        self.errors.seek(0)
        said = self.errors.read()[-2000:]
        self.end()
        raise RuntimeError(f"a contestant ended, with exit code {self.process.returncode}:\n{said}")

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()


ANSWER = "answer: "


def reply(answer: Any) -> None:
    """On a worker's side."""
    print(ANSWER + json.dumps(answer), flush=True)


def environment(**more: str) -> dict[str, str]:
    """For processes beside each other: waiting threads do not spin, and benchmarks find this project's source."""
    path = os.pathsep.join(part for part in (str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")) if part)
    return {**os.environ, "OMP_WAIT_POLICY": "passive", "PYTHONPATH": path, **more}


def resident(field: str = "VmRSS") -> int:
    """Bytes of memory that are this process's; field VmHWM: the most there ever were. 0 where Linux does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(field)), 0)
