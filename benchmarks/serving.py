"""Serving beside `iddpm sample`: images a second of 8 clients at once, and what an open page of the studio costs a training.

    python benchmarks/serving.py RUN DATA [--rounds 8]

Contestants take turns; tables are medians over the rounds.
"""

import argparse
import io
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from common import machine, table

CLIENTS, EACH = 8, 16  # clients at once, and images of each


@contextmanager
def started(*argv: object) -> Iterator[str]:
    """The address of `iddpm ARGV`, a server, while it runs."""
    command = [sys.executable, "-u", "-m", "iddpm", *map(str, argv), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    found = re.search(r"http://\S+:\d+", process.stdout.readline())
    assert found, "it did not start"
    try:
        yield found[0]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def ask(address: str, body: object = None) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(address, data), timeout=600) as answer:
        return bytes(answer.read())


def served(address: str) -> float:
    """Images a second of all clients, from the first request to the last answer."""

    def client(k: int) -> int:
        content = ask(f"{address}/samples", {"seeds": f"{k * EACH}-{k * EACH + EACH - 1}", "format": "npz"})
        return len(np.load(io.BytesIO(content))["arr_0"])

    began = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        n = sum(pool.map(client, range(CLIENTS)))
    return n / (time.perf_counter() - began)


def sampled(run: Path) -> float:
    """Images a second of `iddpm sample`, without its start: from what a program that has it open takes."""
    from iddpm.cli import threads

    threads.settle()  # as the command does, before torch is imported
    import iddpm

    model = iddpm.load(run)
    model.sample(2, seed=0)
    began = time.perf_counter()
    n = CLIENTS * EACH
    model.sample(n, seed=0)
    return n / (time.perf_counter() - began)


def serving(run: Path, rounds: int) -> str:
    pairs = []
    with started("serve", run) as address:
        ask(f"{address}/samples", {"num_samples": 2})
        for k in range(rounds):
            turns = (partial(sampled, run), partial(served, address))
            found = {turn: turns[turn]() for turn in ((0, 1) if k % 2 else (1, 0))}
            pairs.append((found[0], found[1]))
    ratios = sorted(theirs / own for own, theirs in pairs)
    names = ("iddpm sample", f"iddpm serve, {CLIENTS} clients")
    medians = [f"{statistics.median(column):.2f}" for column in zip(*pairs)]
    told = ["1", f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"]  # of the two of a round
    return table(["images a second", "median", "ratio"], [list(row) for row in zip(names, medians, told)])


def trained(data: Path, address: str, steps: int) -> float:
    """Seconds of a training of so many steps; with an address, while a page of the studio there looks at it every 2 seconds."""
    with tempfile.TemporaryDirectory() as folder:
        run, ended = Path(folder) / "run", threading.Event()

        def page() -> None:
            while address and not ended.wait(2):  # as often as the page asks at most
                try:
                    ask(f"{address}/api/listing")
                    ask(f"{address}/api/curves?run=watched")
                except OSError:
                    continue

        thread = threading.Thread(target=page)
        thread.start()
        command = [sys.executable, "-m", "iddpm", "train", data, "--preset", "cifar10-tiny", "--run", run, "--steps", steps,
                   "--sample_interval", 0, "--log_interval", 5, "--precision", "fp32"]  # fmt: skip
        if address:
            link = Path(os.environ["WATCHED"])
            link.unlink(missing_ok=True)
            link.symlink_to(run)
        subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL)
        ended.set()
        thread.join()
        rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        times = [row["time"] for row in rows if "loss" in row]
        return float(times[-1] - times[0])


def watching(data: Path, rounds: int, steps: int) -> str:
    rows: dict[str, list[float]] = {"nobody looks": [], "a page of the studio is open": []}
    with tempfile.TemporaryDirectory() as home:
        os.environ["WATCHED"] = str(Path(home) / "watched")
        with started("studio", home) as address:
            for _ in range(rounds):
                rows["nobody looks"].append(trained(data, "", steps))
                rows["a page of the studio is open"].append(trained(data, address, steps))
    first = statistics.median(rows["nobody looks"])
    body = [[name, f"{statistics.median(v):.1f}", f"{statistics.median(v) / first:.3f}"] for name, v in rows.items()]
    return table(["seconds of a training", "median", "ratio"], body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run that is drawn with")
    parser.add_argument("data", type=Path, help="images of 32 pixels to train on")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60, help="of a training")
    args = parser.parse_args()
    print(machine())
    print(serving(args.run, args.rounds))
    print(watching(args.data, args.rounds, args.steps))


if __name__ == "__main__":
    main()
