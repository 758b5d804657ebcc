"""Trainings that are started from the page: `iddpm train` in processes of its own, by the command that a terminal would take."""

import json
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iddpm.config import every_field, seconds_of, share
from iddpm.config.presets import PRESETS
from iddpm.errors import UserError, reason
from iddpm.look.serving.asked import checked
from iddpm.look.studio.shelf import by_name

# The flags that the page offers; none of them names a file.
FLAGS = (
    "time", "steps", "image_size", "class_cond", "class_dropout", "random_flip", "validation", "batch_size", "lr", "num_channels",
    "precision", "sample_interval",
)  # fmt: skip
NAME = re.compile(r"[\w][\w.-]{0,63}")  # of a run: no folder above, no flag
MOST, LINES = 4, 200  # trainings at a time; lines of each that are kept
PATIENCE = 30.0  # seconds that one has to save itself at the end of the studio


@dataclass
class Training:
    """One process, what it said last, and what is to follow it."""

    name: str
    command: list[str]
    process: subprocess.Popen[str]
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=LINES))
    row: dict[str, Any] = field(default_factory=dict)  # of its newest step
    error: str = ""
    then: list[str] = field(default_factory=list)

    @property
    def state(self) -> str:
        code = self.process.poll()
        return "running" if code is None else {0: "done", 75: "stopped"}.get(code, "failed")


class Trainings:
    """Those of this studio: their runs in `home`, their images among the `data` given to it."""

    def __init__(self, home: Path, data: Sequence[Path], device: str):
        self.home, self.device = home, device
        self.data = by_name(data)
        self.all: dict[str, Training] = {}
        self.changing, self.closed = threading.Lock(), False

    def offered(self) -> dict[str, Any]:
        """What the page's form holds."""
        fields = every_field()
        kinds = {bool: "bool", int: "number", float: "number"}
        rows = [
            dict(name=name, help=fields[name].help, kind=kinds.get(fields[name].type, "text"), choices=fields[name].allowed())
            for name in FLAGS
        ]
        presets = {name: text for name, (text, _) in PRESETS.items()}
        return dict(data=list(self.data), presets=presets, flags=rows, home=str(self.home))

    def listing(self) -> list[dict[str, Any]]:
        return [
            dict(
                name=name, state=t.state, command=shlex.join(["iddpm", *t.command]), lines=list(t.lines), row=t.row,
                error=t.error, then=bool(t.then),
            )
            for name, t in self.all.items()
        ]  # fmt: skip

    def begin(self, asked: Mapping[str, Any]) -> str:
        """Start a new run; returns its name. UserError where the request is wrong; what the command refuses is in its `error`."""
        fields = every_field()
        known = {"data": str, "run": str, "preset": str} | {name: fields[name].type for name in FLAGS}
        given = checked(asked, known)
        name, data = given.pop("run", ""), given.pop("data", "")
        if not NAME.fullmatch(name):
            raise UserError("a run's name is of letters, digits, dots and dashes, as cats-64")
        if data not in self.data:
            offered = ", ".join(self.data) or "none: start it as iddpm studio RUNS --data FOLDER"
            raise UserError(f"images {data!r} are not among those given to the studio ({offered})")
        if given.get("validation") and not share(given["validation"]):
            raise UserError("validation: a share of the images, as 5%; the page reads no images but those given to the studio")
        run = self.home / name
        if run.exists():
            raise UserError(f"there is something called {name} already: give another name")
        return self._start(name, [str(self.data[data]), *_flags(given), "--run", str(run), "--device", self.device])

    def resume(self, name: str, run: Path) -> str:
        """Go on with a run that has stopped."""
        return self._start(name, ["--run", str(run), "--device", self.device])

    def stop(self, name: str) -> None:
        """Have it save itself and end."""
        training = self._running(name)
        training.then = []
        training.process.send_signal(signal.SIGTERM)

    def finish(self, name: str, run: Path, time: str) -> str:
        """End a run well within so much time: its learning rate falls to 0 and it stops."""
        seconds_of(time, "finish")
        command = ["--run", str(run), "--finish", time, "--device", self.device]
        with self.changing:
            training = self.all.get(name)
            if training and training.state == "running":
                training.then = command  # as soon as it has saved itself
                training.process.send_signal(signal.SIGTERM)
                return name
        return self._start(name, command)

    def close(self) -> list[str]:
        """Stop all, which saves them; returns the names of those that ran."""
        with self.changing:
            self.closed = True
            running = [t for t in self.all.values() if t.state == "running"]
        for training in running:
            training.then = []
            training.process.send_signal(signal.SIGTERM)
        for training in running:
            try:
                training.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:  # it still saves, and ends by itself
                continue
        return [training.name for training in running]

    def _running(self, name: str) -> Training:
        if name not in self.all or self.all[name].state != "running":
            raise UserError(f"no training of {name} was started here")
        return self.all[name]

    def _start(self, name: str, arguments: list[str]) -> str:
        with self.changing:
            if self.closed or (name in self.all and self.all[name].state == "running"):
                raise UserError("the studio ends" if self.closed else f"{name} is being trained")
            if sum(t.state == "running" for t in self.all.values()) >= MOST:
                raise UserError(f"{MOST} trainings run already: stop one first")
            command = ["train", *arguments]
            # In a session of its own: Ctrl-C at the studio is not also theirs, for it stops them itself, once.
            process = subprocess.Popen(
                [sys.executable, "-m", "iddpm", *command, "--json"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
            )  # fmt: skip
            self.all[name] = training = Training(name, command, process)
        threading.Thread(target=self._read, args=(training,), name=f"training {name}", daemon=True).start()
        return name

    def _read(self, training: Training) -> None:
        assert training.process.stdout
        for line in training.process.stdout:
            event = _event(line)
            if event["event"] in ("step", "progress"):
                training.row = {k: v for k, v in event.items() if isinstance(v, (int, float))}
            if event["event"] == "error":
                training.error = event["text"]
            training.lines.append(event["text"])
        training.process.wait()
        if training.then:
            then, training.then = training.then, []
            try:
                self._start(training.name, then)
            except (UserError, OSError) as e:
                training.error = f"it is saved, but does not finish: {reason(e)}"


def _event(line: str) -> dict[str, Any]:
    """What a training says with --json, or a line that something in it printed: whoever reads them must never stop."""
    with suppress(ValueError, RecursionError):
        found = json.loads(line)
        if isinstance(found, dict) and isinstance(found.get("event"), str) and isinstance(found.get("text"), str):
            return found
    return {"event": "line", "text": line.strip()}


def _flags(given: Mapping[str, Any]) -> list[str]:
    return [token for name, value in given.items() for token in (f"--{name}", str(value))]
