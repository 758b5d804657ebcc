"""One trainer per run folder: a lock that does not outlive its holder, or not for long.

On this machine it is flock on RUN/.lock, which ends with its process. Where that does not reach, as between hosts or on file
systems that know none, the file's record of its holder counts, and its time of change: the holder's last sign of life.

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
from typing import Any, TypedDict

from iddpm.errors import UserError
from iddpm.parallel import processes
from iddpm.records import decode
from iddpm.store import remote as places

STALE, BEAT = 120.0, 20.0  # seconds: without a sign, the holder on another host is taken for dead; between two signs
SETTLE = 1.0  # seconds after which one that overwrote a remote lock looks whether it is still its own


class Holder(TypedDict, total=False):
    """What .lock tells of who holds it."""

    host: str
    pid: int
    began: str | None
    boot: str
    token: str
    inode: int


Record = dict[str, Any]
Say = Callable[[str], None]


@contextmanager
def held(run: Path, say: Say = print) -> Iterator[None]:
    """Hold RUN/.lock, of all processes the first does; UserError on each where another trainer holds it.

    That of a process that is gone from this host, or of one on another host that gave no sign for two minutes, is taken
    over, and `say` says so.
    """
    path, mine, fault = run / ".lock", _me(), ""
    with contextlib.ExitStack() as stack:
        if processes.rank() == 0:
            run.mkdir(parents=True, exist_ok=True)
            try:
                if places.remote(path):
                    mine |= {"boot": _boot(), "token": secrets.token_hex(8)}  # machines share a storage, and some their names
                    _take_remote(path, mine, say)
                else:
                    stack.callback(os.close, _take_local(path, mine, say))
            except UserError as e:
                fault = str(e)
        if fault := processes.same(fault):
            raise UserError(fault)
        if processes.rank() == 0:
            stack.callback(_release, path, mine)
            ended = threading.Event()
            stack.callback(ended.set)
            threading.Thread(target=_beat, args=(path, mine, ended), name="lock", daemon=True).start()
        yield


def _take_local(path: Path, mine: Record, say: Say) -> int:
    """The handle of RUN/.lock with this process's record in it, locked while it is open."""
    with places.alone(path.parent):  # while another start looks, or a holder gives it back
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        holder, found = _read(path) or {}, os.fstat(handle)
        mine["inode"] = found.st_ino
        if holder.get("host") == mine["host"] and holder.get("inode", found.st_ino) != found.st_ino:
            holder = {}  # of a run that was copied while it was trained
        if not places.lock(handle) or (holder and not _dead(holder, mine, _silent(handle))):
            os.close(handle)
            raise _busy(path, holder)
        os.truncate(handle, 0)
        os.pwrite(handle, json.dumps(mine).encode(), 0)
    if holder:
        say(f"took over {path.parent} from {_name(holder)}, which is gone")
    return handle


def _silent(handle: int) -> float:
    """Seconds since the last sign of a file's holder; of a time in the future, which no clock makes wrong by so much, a look."""
    then = os.fstat(handle).st_mtime
    if time.time() - then > -STALE:
        return time.time() - then
    time.sleep(1.5 * BEAT)
    return 2 * STALE if os.fstat(handle).st_mtime == then else 0.0


def _take_remote(path: places.Remote, mine: Record, say: Say) -> None:
    ours = json.dumps(mine).encode()
    for _ in range(5):
        if path.create(ours):
            return
        holder, silent = _read(path), _silence(path, mine)
        if holder is None or silent is None:  # gone this moment
            continue
        if holder == mine:  # it was created, and the answer was lost
            return
        if not _dead(holder, mine, silent):
            raise _busy(path, holder)
        path.write_bytes(ours)
        time.sleep(SETTLE)
        if _read(path) == mine:
            say(f"took over {path.parent} from {_name(holder)}, which is gone")
            return
    raise UserError(f"{path} cannot be taken: is another trainer starting on this run?")


def _beat(path: Path, mine: Record, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with contextlib.suppress(OSError, UserError):
            if (holder := _read(path)) not in (mine, None):
                print(f"{path.parent} is now also trained by {_name(holder or {})}: stop one of the two", file=sys.stderr)
                return
            if not ended.is_set():
                path.write_text(json.dumps(mine)) if places.remote(path) else os.utime(path)


def _release(path: Path, mine: Record) -> None:
    with contextlib.suppress(OSError, places.Unreachable), places.alone(path.parent):  # the run may have been renamed
        if _read(path) == mine:
            path.unlink(missing_ok=True)


def _busy(path: Path, holder: Record) -> UserError:
    return UserError(f"{path.parent} is being trained by {_name(holder)}: stop it first, or give another --run")


def _name(holder: Record) -> str:
    return f"process {holder.get('pid')} on {holder.get('host')}"


def _dead(holder: Record, mine: Record, silent: float) -> bool:
    if any(holder.get(k) != mine.get(k) for k in ("host", "boot")):
        return silent > STALE
    began = _began(holder.get("pid", -1))
    return began is None or began != holder.get("began")  # a number given anew is another process


def _me() -> Record:
    return {"host": socket.gethostname(), "pid": os.getpid(), "began": _began(os.getpid())}


def _began(pid: int) -> str | None:
    """When a process of this host began, in ticks since boot where /proc tells; None where there is no such process."""
    with contextlib.suppress(PermissionError):
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, OverflowError):
            return None
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


def _read(path: Path) -> Record | None:
    try:
        return dict(decode(path.read_bytes(), Holder, path))
    except FileNotFoundError:
        return None
    except places.Unreachable:
        raise
    except (OSError, UserError):
        return {}


def _silence(path: places.Remote, mine: Record) -> float | None:
    """Seconds since it was written, by the storage's own clock: that of a file written now."""
    probe = path.with_name(f".lock.{mine['host']}.{mine['pid']}")
    probe.write_bytes(b"")
    then, now = path.modified(), probe.modified()
    probe.unlink(missing_ok=True)
    return None if then is None or now is None else now - then
