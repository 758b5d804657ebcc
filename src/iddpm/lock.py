"""One trainer per run folder: a lock that a crash cannot leave behind for long."""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from iddpm import distributed
from iddpm.errors import UserError

STALE, BEAT = 120.0, 20.0  # seconds: without a sign, the holder on another host is taken for dead; between two signs


@contextmanager
def held(run: Path, say: Callable[[str], None] = print) -> Iterator[None]:
    """Hold RUN/.lock, of all processes the first does; UserError on each where another trainer holds it.

    The file names its holder, and its time of change is the holder's last sign of life. That of a process that is gone from
    this host, or of one on another host that gave no sign for two minutes, is taken over, and `say` says so.
    """
    path, mine, fault = run / ".lock", _me(), None
    if distributed.rank() == 0:
        run.mkdir(parents=True, exist_ok=True)
        fault = _take(path, mine, say)
    if fault := distributed.same(fault):
        raise UserError(fault)
    ended = threading.Event()
    if distributed.rank() == 0:
        threading.Thread(target=_beat, args=(path, ended), name="lock", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        if distributed.rank() == 0 and _read(path) == mine:
            path.unlink(missing_ok=True)


def _take(path: Path, mine: dict[str, Any], say: Callable[[str], None]) -> str | None:
    """Become the holder, or say who is."""
    for _ in range(5):
        aside = path.with_name(f".lock.{mine['host']}.{mine['pid']}")
        aside.write_text(json.dumps(mine))
        try:
            os.link(aside, path)  # fails where there is one: of two at once, one wins, and nobody reads half a file
            return None
        except FileExistsError:
            pass
        finally:
            aside.unlink()
        holder, silent = _read(path), _silence(path)
        if holder is None or silent is None:
            continue  # gone this moment
        who = f"process {holder.get('pid')} on {holder.get('host')}"
        if not _dead(holder, mine, silent):
            return f"{path.parent} is being trained by {who}: stop it first, or give another --run"
        grave = path.with_name(f".lock.stale.{mine['host']}.{mine['pid']}")
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, grave)
            if _read(grave) == holder:
                say(f"took over {path.parent} from {who}, which is gone")
            else:  # another was quicker: give it back what is now its lock
                with contextlib.suppress(FileExistsError):
                    os.link(grave, path)
            grave.unlink()
    return f"{path} cannot be taken: is another trainer starting on this run?"


def _dead(holder: dict[str, Any], mine: dict[str, Any], silent: float) -> bool:
    if holder.get("host") != mine["host"]:
        return silent > STALE
    began = _began(holder.get("pid", -1))
    return began is None or began != holder.get("began")  # a number given anew is another process


def _me() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "began": _began(os.getpid())}


def _began(pid: int) -> str | None:
    """When a process of this host began, in ticks since boot where /proc tells; None where there is no such process."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except PermissionError:
        pass
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "unknown"
    return None if fields[0] in "ZX" else fields[19]  # a zombie trains nothing


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
        return found if isinstance(found, dict) else {}
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}


def _silence(path: Path) -> float | None:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return None


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(path)
