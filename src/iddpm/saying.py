"""How verbs speak: lines for a person; with --json an object of JSON a line, for a program; with --quiet errors alone."""

import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO

from iddpm.records import encode


def say(text: str, event: str = "line", **fields: Any) -> None:
    """Print a line, if there is one; for a program instead an object of the event, its fields and the text."""
    put = getattr(sys.stdout, "put", None)
    if put:
        put({"event": event, **fields, "text": text})
        return
    if not text:
        return
    from tqdm import tqdm

    with tqdm.external_write_mode(sys.stdout):  # past the bars of a terminal
        print(text, flush=True)


def by_text(tell: Callable[[str], None]) -> Callable[..., None]:
    """A way to say things to what takes their text alone."""
    return lambda text, event="line", **fields: tell(text)


class Objects(io.TextIOBase):
    """A stream of JSON Lines: what is printed on it becomes {"event": "line", "text": ...}, and `say` puts what it says."""

    def __init__(self, stream: TextIO):
        self.stream, self.rest = stream, ""

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            if line.strip():
                self.put({"event": "line", "text": line.strip()})
        return len(text)

    def put(self, found: Mapping[str, Any]) -> None:
        self.stream.write(encode(found, default=str).decode() + "\n")
        self.stream.flush()

    def flush(self) -> None:
        self.stream.flush()


@contextmanager
def speaking(json: bool, quiet: bool) -> Iterator[None]:
    """In here what is said on the standard output is objects of JSON, or nothing, instead of lines; bars are left out."""
    if not (json or quiet):
        yield
        return
    os.environ["TQDM_DISABLE"] = "1"  # read where tqdm is imported, which is later
    with open(os.devnull, "w") as nothing, redirect_stdout(nothing if quiet else Objects(sys.stdout)):
        yield


EVERY = 5.0  # seconds between two objects on the progress of a long job


class Progress:
    """How far a job of `total` units is: on a terminal a bar, for a program objects of the event "progress", else nothing."""

    def __init__(self, total: int, unit: str, what: str = "", shown: bool = True, scale: bool = False):
        from tqdm import tqdm

        self.total, self.what, self.done, self.began, self.told = total, what, 0, time.monotonic(), 0.0
        self.put = getattr(sys.stdout, "put", None) if shown else None
        self.bar = tqdm(total=total, unit=unit, desc=what or None, unit_scale=scale, disable=None if shown else True)

    def update(self, units: int = 1) -> None:
        """So many units more are done."""
        self.done += units
        self.bar.update(units)
        now = time.monotonic()
        if self.put and self.done and (now - self.told > EVERY or self.done >= self.total):
            self.told = now
            left = (now - self.began) / self.done * (self.total - self.done)
            text = f"{self.what or 'done'}: {self.done} of {self.total}"
            self.put({"event": "progress", "done": self.done, "of": self.total, "seconds_left": round(left, 1), "text": text})

    def write(self, line: str) -> None:
        """Print a line past the bar."""
        self.bar.write(line)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()


class Bar:
    """A line at the foot of a terminal: how far a long job is. Nothing where the standard output is no terminal."""

    def __init__(self, shown: bool):
        from tqdm import tqdm

        self.bar = tqdm(
            total=1.0, disable=not (shown and sys.stdout.isatty()), file=sys.stdout, leave=False, dynamic_ncols=True, miniters=0,
            mininterval=0.5, bar_format="{percentage:3.0f}% |{bar:20}|{postfix}",
        )  # fmt: skip

    def show(self, share: float, text: str) -> None:
        """The share that is done, in [0, 1], and what to say beside it."""
        if not self.bar.disable:
            self.bar.n = min(1.0, share)
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(0)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()
