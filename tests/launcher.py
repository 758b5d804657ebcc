"""Real processes of `iddpm ARGS` that start at once: forks of one that has imported torch, and done nothing with it yet.

Or of a program, the text of Python in which `entry()` is `iddpm ARGS`.

A program to the operating system in all that matters here: its own process number, memory and files, and a SIGKILL ends it.
Of several processes each finds in its environment what torchrun would have put there.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__)


class Started:
    """Processes that do one thing together, and the file that holds what they said."""

    def __init__(self, launcher: "Launcher", pids: list[int], said: Path):
        self.launcher, self.pids, self.said = launcher, pids, said

    def kill(self, rank: int = 0, number: int = signal.SIGKILL) -> None:
        os.kill(self.pids[rank], number)

    def running(self) -> bool:
        """Whether any has not ended."""
        return None in [self.launcher.ask(poll=pid) for pid in self.pids]

    def wait(self, seconds: float = 120) -> list[int]:
        """Their exit codes, once all have ended; -9 where it was killed."""
        limit = time.monotonic() + seconds
        while self.running():
            assert time.monotonic() < limit, f"still running after {seconds} s: {self.said.read_text()}"
            time.sleep(0.02)
        return [self.launcher.ask(poll=pid) for pid in self.pids]

    def until(self, text: str, seconds: float = 120) -> str:
        """What they have said once that is among it."""
        limit = time.monotonic() + seconds
        while True:
            running, said = self.running(), self.said.read_text()
            if text in said:
                return said
            assert running and time.monotonic() < limit, f"no {text!r}: {said}"
            time.sleep(0.02)

    def succeed(self, seconds: float = 120) -> str:
        """What they said, once all have ended well."""
        codes, text = self.wait(seconds), self.said.read_text()
        assert not any(codes), (codes, text)
        return text


class Launcher:
    """The process that forks; a context that ends with all it started."""

    def __enter__(self) -> "Launcher":
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parents[1] / 'src'}:{HERE.parent}"}
        command = [sys.executable, str(HERE)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.read()
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()

    def read(self) -> Any:
        line = self.process.stdout.readline()
        assert line, "the launcher has ended"
        return json.loads(line)

    def ask(self, **question: Any) -> Any:
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self.read()

    def start(
        self, *args: object, said: Path, err: Path | None = None, processes: int = 1, cwd: Path | None = None,
        env: dict[str, str] | None = None, program: str = "entry()",
    ) -> Started:  # fmt: skip
        """`iddpm ARGS` on so many processes, in a folder and with variables of the environment beside the launcher's own.

        What they say as an error goes to `err`, if that is given.
        """
        environments: list[dict[str, str]] = [env or {}]
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                common = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE=str(processes))
            environments = [(env or {}) | common | {"RANK": str(k), "LOCAL_RANK": str(k)} for k in range(processes)]
        for file in (said, err or said):
            file.write_text("")
        asked = dict(args=list(map(str, args)), said=str(said), err=str(err or said), cwd=str(cwd or ""), program=program)
        return Started(self, [self.ask(**asked, env=e) for e in environments], said)


# ---- the launcher's own side


def main() -> None:
    import torch._dynamo  # noqa: F401  # which the first optimizer imports

    import iddpm.look.report
    import iddpm.measure.likelihood
    import iddpm.sampling.open
    import iddpm.training.start  # noqa: F401  # what verbs import when they are called, torch first of all
    from iddpm.cli import main as cli

    assert len(os.listdir("/proc/self/task")) == 1, "a fork has but the thread that forked"
    codes: dict[int, int | None] = {}
    reply("ready")
    for line in sys.stdin:
        question = json.loads(line)
        if "args" in question:
            pid = os.fork()
            if not pid:
                child(cli.entry, **question)
            codes[pid] = None
            reply(pid)
        else:
            pid = question["poll"]
            if codes[pid] is None:
                ended, status = os.waitpid(pid, os.WNOHANG)
                codes[pid] = os.waitstatus_to_exitcode(status) if ended else None
            reply(codes[pid])
    for pid, code in codes.items():
        if code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def child(entry: Any, args: list[str], env: dict[str, str], said: str, err: str, cwd: str, program: str) -> None:
    code = 1
    try:
        files = [os.open(path, os.O_WRONLY | os.O_APPEND) for path in (said, err)]
        os.chdir(cwd or ".")
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(files[0], 1)
        os.dup2(files[1], 2)
        os.environ.update(env)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which the tests may have been told to ignore
        sys.argv = ["iddpm", *args]
        exec(program, {"__name__": "__main__", "entry": entry})
        code = 0
    except SystemExit as e:
        code = int(e.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def reply(value: Any) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    main()
