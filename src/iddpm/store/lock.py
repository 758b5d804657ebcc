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
from typing import Any

from iddpm.errors import UserError
from iddpm.parallel import processes
from iddpm.store import remote as places

STALE, BEAT = 120.0, 20.0  # seconds: without a sign, the holder on another host is taken for dead; between two signs
SETTLE = 1.0  # seconds after which one that overwrote a remote lock looks whether it is still its own
TRIES = 5  # of taking a lock that changes hands meanwhile
CHANGING = "cannot be taken: is another trainer starting on this run?"

Record = dict[str, Any]
Say = Callable[[str], None]


@contextmanager
def held(run: Path, say: Say = print) -> Iterator[None]:
    """Hold RUN/.lock, of all processes the first does; UserError on each where another trainer holds it.

    That of a process that is gone from this host, or of one on another host that gave no sign for two minutes, is taken
    over, and `say` says so.
    """
    fault = ""
    with contextlib.ExitStack() as stack:
        if processes.rank() == 0:
            run.mkdir(parents=True, exist_ok=True)
            path = run / ".lock"
            try:
                stack.enter_context(_remote(path, say) if places.remote(path) else _local(path, say))
            except UserError as e:
                fault = str(e)
        if fault := processes.same(fault):
            raise UserError(fault)
        yield


@contextmanager
def _local(path: Path, say: Say) -> Iterator[None]:
    handle = _take_local(path, say)
    try:
        with _beating(lambda ended: os.utime(handle)):
            yield
    finally:
        if _is(path, handle):
            path.unlink()
        os.truncate(handle, 0)  # of a run that was renamed, whose lock now lies elsewhere
        os.close(handle)


def _take_local(path: Path, say: Say) -> int:
    """The handle of RUN/.lock with this process's record in it, locked while it is open."""
    for _ in range(TRIES):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        free, found, holder = places.lock(handle), os.fstat(handle), _read(path) or {}
        mine = _me() | {"inode": found.st_ino}
        if holder.get("host") == mine["host"] and holder.get("inode", mine["inode"]) != mine["inode"]:
            holder = {}  # the copy of a run that was being trained
        here = _is(path, handle)  # not where its holder has just deleted it
        if here and free and (not holder or _dead(holder, mine, time.time() - found.st_mtime)):
            os.truncate(handle, 0)
            os.pwrite(handle, json.dumps(mine).encode(), 0)
            if holder:
                say(f"took over {path.parent} from {_name(holder)}, which is gone")
            return handle
        os.close(handle)
        if here and holder:
            raise _busy(path, holder)
        time.sleep(0.05)  # whoever has just locked it is about to write its name
    raise UserError(f"{path} {CHANGING}")


def _is(path: Path, handle: int) -> bool:
    """Whether an open file is still the one of that name: the run may have been renamed meanwhile, or the lock given back."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except OSError:
        return False


@contextmanager
def _remote(path: places.Remote, say: Say) -> Iterator[None]:
    mine = _me() | {"boot": _boot(), "token": secrets.token_hex(8)}  # many machines share a storage, and some their names
    _take_remote(path, mine, say)

    def sign(ended: threading.Event) -> None:
        if (holder := _read(path)) not in (mine, None):
            print(f"{path.parent} is now also trained by {_name(holder or {})}: stop one of the two", file=sys.stderr)
            ended.set()
        if not ended.is_set():
            path.write_text(json.dumps(mine))

    try:
        with _beating(sign):
            yield
    finally:
        with contextlib.suppress(places.Unreachable):
            if _read(path) == mine:
                path.unlink(missing_ok=True)


def _take_remote(path: places.Remote, mine: Record, say: Say) -> None:
    ours = json.dumps(mine).encode()
    for _ in range(TRIES):
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
    raise UserError(f"{path} {CHANGING}")


@contextmanager
def _beating(sign: Callable[[threading.Event], None]) -> Iterator[None]:
    """Give a sign of life every BEAT seconds, until the end, or until `sign` sets the event it is given."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT):
            with contextlib.suppress(OSError, UserError):
                sign(ended)

    threading.Thread(target=beat, name="lock", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


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
        found = json.loads(path.read_text())
        return found if isinstance(found, dict) else {}
    except FileNotFoundError:
        return None
    except UserError:
        raise
    except (OSError, ValueError):
        return {}


def _silence(path: places.Remote, mine: Record) -> float | None:
    """Seconds since it was written, by the storage's own clock: that of a file written now."""
    probe = path.with_name(f".lock.{mine['host']}.{mine['pid']}")
    probe.write_bytes(b"")
    then, now = path.modified(), probe.modified()
    probe.unlink(missing_ok=True)
    return None if then is None or now is None else now - then
