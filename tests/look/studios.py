"""A studio in a process of its own, as its tests ask it."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ENV = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src"), "OMP_NUM_THREADS": "1"}


@contextmanager
def studio(*argv: object) -> Iterator[str]:
    """The address of `iddpm studio ARGV` while it runs; it must end by SIGTERM, and without a fault."""
    command = [sys.executable, "-u", "-m", "iddpm", "studio", *map(str, argv), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    found = re.search(r"http://\S+:\d+", process.stdout.readline())
    assert found, process.communicate()
    try:
        yield found[0].replace("0.0.0.0", "127.0.0.1")
    finally:
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in said[1], said


def ask(address: str, path: str, body: object = None, **headers: str) -> tuple[int, bytes]:
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(address + path, data, headers), timeout=120) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as e:
        return e.code, e.read()


def events(content: bytes) -> list[dict]:
    return [json.loads(line) for line in content.decode().splitlines()]
