"""A studio in a process of its own, as its tests ask it."""

import json
import re
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launcher import Launcher


@contextmanager
def serving(launcher: Launcher, said: Path, verb: str, *argv: object, end: int = signal.SIGTERM) -> Iterator[str]:
    """The address of `iddpm VERB ARGV` while it runs; it must end by a signal, and without a fault."""
    process = launcher.start(verb, *argv, "--port", 0, "--device", "cpu", said=said)
    try:
        found = re.search(r"http://\S+:\d+", process.until("http://"))
        assert found, said.read_text()
        yield found[0].replace("0.0.0.0", "127.0.0.1")
    finally:
        process.kill(number=end)
        codes = process.wait()
    assert codes == [0] and "Traceback" not in said.read_text(), said.read_text()


def ask(address: str, path: str, body: object = None, **headers: str) -> tuple[int, bytes]:
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(address + path, data, headers), timeout=120) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as e:
        return e.code, e.read()


def events(content: bytes) -> list[dict]:
    return [json.loads(line) for line in content.decode().splitlines()]
