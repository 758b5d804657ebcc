"""Work of several visitors at once: each in a thread of its own, a step at a time in turn, and stopped when its visitor goes."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
from torch import Tensor

from iddpm.errors import UserError, reason
from iddpm.look.serving.desk import Full
from iddpm.look.studio.play import address, uint8

MOST = 8  # works at a time
PATIENCE = 5.0  # seconds for a step, at the end
AHEAD = 4  # pictures that wait for a visitor who is slow to read
PAUSE = 0.12  # seconds between two pictures of one: more than this, nobody sees


class Stopped(Exception):
    """The visitor went away."""


class Turns:
    """A lock that is handed on in the order in which it was asked for."""

    def __init__(self) -> None:
        self.line: deque[object] = deque()
        self.changed = threading.Condition()

    def take(self, me: object) -> None:
        with self.changed:
            self.line.append(me)
            while self.line[0] is not me:
                self.changed.wait()

    def leave(self, me: object) -> None:
        with self.changed:
            self.line.remove(me)
            self.changed.notify_all()

    def next(self, me: object) -> None:
        """Let all others that wait do a step before the next of mine."""
        if len(self.line) > 1:
            self.leave(me)
            self.take(me)


class Works:
    """The works under way."""

    def __init__(self) -> None:
        self.turns, self.threads, self.closing = Turns(), set[threading.Thread](), threading.Event()

    def close(self) -> None:
        """Stop all, each after the step that it is at."""
        self.closing.set()
        for thread in tuple(self.threads):
            thread.join(PATIENCE)

    def start(self, steps: int, work: Callable[[Callable[[Tensor, Tensor], None]], Iterator[np.ndarray]]) -> AsyncIterator[Any]:
        """Do a work of about so many solver steps; an object for the page whenever there is something to see. `Full`: not now."""
        if len(self.threads) >= MOST:
            raise Full
        return self._events(steps, work)

    async def _events(self, steps: int, work: Any) -> AsyncIterator[Any]:
        events, loop, gone = asyncio.Queue[Any](), asyncio.get_running_loop(), threading.Event()

        def tell(event: Any) -> None:
            if event and "of" in event and events.qsize() >= AHEAD:
                return  # who does not read what was shown needs not see what comes
            loop.call_soon_threadsafe(events.put_nowait, event)

        thread = threading.Thread(target=self._work, args=(steps, work, tell, gone), name="play", daemon=True)
        self.threads.add(thread)
        thread.start()
        try:
            while (event := await events.get()) is not None:
                yield event
        finally:
            gone.set()

    def _work(self, steps: int, work: Any, tell: Callable[[Any], None], gone: threading.Event) -> None:
        me, done, shown, began = object(), 0, 0.0, time.monotonic()

        def watch(x: Tensor, x0: Tensor) -> None:
            nonlocal done, shown
            if gone.is_set() or self.closing.is_set():
                raise Stopped
            done += 1
            if time.monotonic() - shown > PAUSE or done == 1:
                shown = time.monotonic()
                tell(dict(done=done, of=max(done, steps), x=address(uint8(x)), x0=address(uint8(x0))))
            self.turns.next(me)

        try:
            if self.turns.line:
                tell(dict(waiting=len(self.turns.line)))
            self.turns.take(me)
            try:
                frames = []
                for images in work(watch):
                    frames.append(images)
                    if len(frames) > 1:  # an image after another: all so far
                        tell(dict(done=done, of=max(done, steps), frames=address(np.concatenate(frames), len(frames))))
            finally:
                self.turns.leave(me)
            found = np.concatenate(frames)
            each = [address(image[None]) for image in found]
            tell(dict(images=each, sheet=address(found), steps=done, seconds=time.monotonic() - began))
        except Stopped:
            pass
        except Exception as e:  # of this work alone
            tell(dict(error=str(e) if isinstance(e, UserError) else f"it cannot be drawn: {reason(e)}"))
        finally:
            self.threads.discard(threading.current_thread())
            with suppress(RuntimeError):  # the studio has ended
                tell(None)
