"""One trainer per run folder: a lock that a crash cannot leave behind for long.

On a remote storage it is an object, written anew every BEAT seconds. Of trainers that find none, one gets it (where the
storage can create exclusively, as S3 can). That of a silent holder is overwritten, and believed after a second look: two that
take it over in the same moment can both believe it, and the one that lost says so at its next beat and no more. A holder that
cannot reach the storage for two minutes looks dead to others. So it keeps two starts by mistake apart, and no more than that.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from iddpm.errors import UserError
from iddpm.parallel import processes
from iddpm.store import remote as places

STALE, BEAT = 120.0, 20.0  # seconds: without a sign, the holder on another host is taken for dead; between two signs
SETTLE = 1.0  # seconds after which one that overwrote a remote lock looks whether it is still its own


@contextmanager
def held(run: Path, say: Callable[[str], None] = print) -> Iterator[None]:
    """Hold RUN/.lock, of all processes the first does; UserError on each where another trainer holds it.

    The file names its holder, and its time of change is the holder's last sign of life. That of a process that is gone from
    this host, or of one on another host that gave no sign for two minutes, is taken over, and `say` says so.
    """
    path, mine, fault = run / ".lock", _me(), None
    if places.remote(path):  # many machines share a storage, and some their names
        mine |= {"boot": _boot(), "token": secrets.token_hex(8)}
    if processes.rank() == 0:
        run.mkdir(parents=True, exist_ok=True)
        fault = _take_remote(path, mine, say) if places.remote(path) else _take(path, mine, say)
    if fault := processes.same(fault):
        raise UserError(fault)
    ended = threading.Event()
    if processes.rank() == 0:
        beat, args = (_beat_remote, (path, mine, ended)) if places.remote(path) else (_beat, (path, ended))
        threading.Thread(target=beat, args=args, name="lock", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        if processes.rank() == 0:
            with contextlib.suppress(places.Unreachable):
                if _read(path) == mine:
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
        who = _name(holder)
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


def _take_remote(path: places.Remote, mine: dict[str, Any], say: Callable[[str], None]) -> str | None:
    """As `_take`, on a remote storage."""
    ours = json.dumps(mine).encode()
    for _ in range(5):
        if path.create(ours):
            return None
        holder, silent = _read(path), _silence_remote(path, mine)
        if holder is None or silent is None:
            continue
        if holder == mine:  # it was created, and the answer was lost
            return None
        if not _dead(holder, mine, silent):
            return f"{path.parent} is being trained by {_name(holder)}: stop it first, or give another --run"
        path.write_bytes(ours)
        time.sleep(SETTLE)
        if _read(path) == mine:
            say(f"took over {path.parent} from {_name(holder)}, which is gone")
            return None
    return f"{path} cannot be taken: is another trainer starting on this run?"


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid')} on {holder.get('host')}"


def _dead(holder: dict[str, Any], mine: dict[str, Any], silent: float) -> bool:
    if any(holder.get(k) != mine.get(k) for k in ("host", "boot")):
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


def _boot() -> str:
    """What tells this machine, since it was started, from others of its name; nothing where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
        return found if isinstance(found, dict) else {}
    except FileNotFoundError:
        return None
    except UserError:
        raise
    except (OSError, ValueError):
        return {}


def _silence(path: Path) -> float | None:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return None


def _silence_remote(path: places.Remote, mine: dict[str, Any]) -> float | None:
    """Seconds since a lock was written, by the storage's own clock: that of a file written now."""
    probe = path.with_name(f".lock.{mine['host']}.{mine['pid']}")
    probe.write_bytes(b"")
    then, now = path.modified(), probe.modified()
    probe.unlink(missing_ok=True)
    return None if then is None or now is None else now - then


def _beat_remote(path: places.Remote, mine: dict[str, Any], ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with contextlib.suppress(OSError, UserError):
            if (holder := _read(path)) not in (mine, None):
                print(f"{path.parent} is now also trained by {_name(holder or {})}: stop one of the two", file=sys.stderr)
                return
            if not ended.is_set():
                path.write_text(json.dumps(mine))


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(path)
