"""What waits to be drawn, and the thread that draws it: requests of equal settings share a batch."""

import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from iddpm.config import Config
from iddpm.errors import UserError, reason
from iddpm.sampling.draw import painter
from iddpm.sampling.job import Job
from iddpm.sampling.open import Opened

GATHER = 0.05  # seconds that a batch that is not full waits for more


class Full(Exception):
    """As much waits as may: ask again later."""


@dataclass
class Order:
    """Images that somebody asked for; `images` has them all, (n, H, W, C), when they are drawn."""

    opened: Opened
    config: Config
    job: Job
    images: "Future[np.ndarray]" = field(default_factory=Future)
    parts: list[np.ndarray] = field(default_factory=list)
    taken: int = 0  # of its images, those in a batch

    def fits(self, other: "Order") -> bool:
        return self.opened is other.opened and self.config == other.config


class Desk:
    """Takes orders while less than `most` images wait, and draws up to `batch` at a time, the oldest order first."""

    def __init__(self, batch: int, most: int):
        self.batch, self.most, self.drawn, self.seconds = batch, most, 0, 0.0
        self.orders: deque[Order] = deque()
        self.changed, self.open = threading.Condition(), True
        self.thread = threading.Thread(target=self._work, name="drawing", daemon=True)
        self.thread.start()

    @property
    def waiting(self) -> int:
        """Images that are not in a batch yet."""
        return sum(len(order.job.seeds) - order.taken for order in tuple(self.orders))

    def take(self, order: Order) -> "Future[np.ndarray]":
        """Queue an order; `Full` where too much waits."""
        with self.changed:
            if self.waiting + len(order.job.seeds) > self.most or not self.open:
                raise Full
            self.orders.append(order)
            self.changed.notify()
        return order.images

    def close(self) -> None:
        """Draw nothing more after the batch under way."""
        with self.changed:
            self.open = False
            self.changed.notify()
        self.thread.join()
        for order in self.orders:
            order.images.cancel()

    def _work(self) -> None:
        while batch := self._next():
            first, began = batch[0][0], time.monotonic()
            seeds, labels = ([x for order, a, b in batch for x in getattr(order.job, name)[a:b]] for name in ("seeds", "labels"))
            try:
                drawn = painter(first.config, first.opened.net, first.opened.device)(Job(seeds, labels)).cpu().numpy()
            except Exception as e:  # of these orders alone; the next may be drawn
                fault = e if isinstance(e, UserError) else UserError(f"it cannot be drawn: {reason(e)}")
                for order, _, _ in batch:
                    self._drop(order, fault)
                continue
            self.drawn, self.seconds = self.drawn + len(drawn), self.seconds + time.monotonic() - began
            for order, a, b in batch:
                mine, drawn = drawn[: b - a], drawn[b - a :]
                order.parts.append(mine)
                if b == len(order.job.seeds) and not order.images.done():
                    order.images.set_result(np.concatenate(order.parts))

    def _next(self) -> list[tuple[Order, int, int]]:
        """The next batch: orders, and which of their images; empty at the end."""
        with self.changed:
            while self.open and not self.orders:
                self.changed.wait()
            end = time.monotonic() + GATHER  # requests of several clients come one by one, and small batches are slow
            while self.open and self.waiting < self.batch and (left := end - time.monotonic()) > 0:
                self.changed.wait(left)
            if not self.open:
                return []
            batch, room, first = [], self.batch, self.orders[0]
            for order in [o for o in self.orders if o.fits(first)]:
                end = min(len(order.job.seeds), order.taken + room)
                batch.append((order, order.taken, end))
                room, order.taken = room - (end - order.taken), end
                if end == len(order.job.seeds):
                    self.orders.remove(order)
                if not room:
                    break
            return batch

    def _drop(self, order: Order, fault: Exception) -> None:
        with self.changed:
            if order in self.orders:
                self.orders.remove(order)
        if not order.images.done():
            order.images.set_exception(fault)
