"""Names the process that keeps the others waiting, by signs of life in the key-value store through which they met."""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from iddpm.parallel import processes

Tell = Callable[[int, str], None]
Sign = dict[str, Any]  # of life: how many there were, and what the process was at


@contextmanager
def watch(timeout: float) -> Iterator[Tell]:
    """Yields tell(step, doing), for each process to call as it goes; free with one process.

    Once this process has waited `timeout` seconds without a call, it says on stderr which process is to blame and ends at
    once, with code 1: one that gives no sign at all, else the one that has made the fewest calls. Nothing milder ends a
    collective operation that waits for a process in vain.
    """
    if processes.world() == 1:
        yield lambda step, doing: None
        return
    watcher = _Watcher(timeout)
    watcher.start()
    try:
        yield watcher.tell
    finally:
        watcher.ended.set()
        watcher.join()


class _Watcher(threading.Thread):
    def __init__(self, timeout: float):
        super().__init__(name="watch", daemon=True)
        self.store: Any = dist.distributed_c10d._get_default_store()
        self.timeout, self.ended, self.told = timeout, threading.Event(), time.monotonic()
        self.sign: Sign = dict(beats=0, calls=0, step=0, doing="starting", host=socket.gethostname(), pid=os.getpid())

    def tell(self, step: int, doing: str) -> None:
        self.told = time.monotonic()
        self.sign |= dict(calls=self.sign["calls"] + 1, step=step, doing=doing)

    def run(self) -> None:
        pause = min(2.0, self.timeout / 8)
        with contextlib.suppress(Exception):  # the store went with its process, and the collectives fail by themselves
            while True:
                self._beat()  # the first at once: who hangs soon after the start has been seen
                if time.monotonic() - self.told > self.timeout:
                    self._blame(pause)
                if self.ended.wait(pause):
                    return

    def _beat(self) -> None:
        self.sign["beats"] += 1
        self.store.set(f"watch/{processes.rank()}", json.dumps(self.sign))

    def _signs(self) -> dict[int, Sign]:
        keys = [f"watch/{k}" for k in range(processes.world())]
        return {k: json.loads(self.store.get(key)) for k, key in enumerate(keys) if self.store.check([key])}

    def _blame(self, pause: float) -> None:
        before = self._signs()
        for _ in range(3):
            if self.ended.wait(pause):
                return
            self._beat()
        guilty, why = _guilty(before, self._signs(), processes.world())
        if time.monotonic() - self.told <= self.timeout:
            return  # it went on meanwhile
        if processes.rank() == min(set(range(processes.world())) - guilty.keys(), default=0):
            who = "; ".join(f"rank {k} ({text})" for k, text in guilty.items())
            print(f"iddpm: waited {self.timeout:g} s (--timeout) for {who}, {why}: ending", file=sys.stderr, flush=True)
        os._exit(1)


def _guilty(before: dict[int, Sign], now: dict[int, Sign], world: int) -> tuple[dict[int, str], str]:
    """The processes to blame, what is known of each, and what they did, from two looks at the signs."""
    known = {k: "process {pid} on {host}, at step {step}, {doing}".format_map(sign) for k, sign in now.items()}
    silent = [k for k in range(world) if k not in now or now[k]["beats"] == before.get(k, {}).get("beats")]
    if silent:
        return {k: known.get(k, "never seen") for k in silent}, "which gives no sign of life"
    fewest = min(sign["calls"] for sign in now.values())
    behind = {k: known[k] for k in now if now[k]["calls"] == fewest}
    return behind, "which does not go on" if len(behind) < world else "which all wait in the same place"
