"""Files that grow, as logs do, on a remote storage: written on this machine, and copied there now and then."""

import contextlib
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from iddpm.errors import UserError
from iddpm.store import remote as places

EVERY = 30.0  # seconds between two uploads: what a kill may cost of a log


class _Mirror:
    """A local folder whose changed files are uploaded every EVERY seconds, and at `sync`."""

    def __init__(self, target: places.Remote):
        self.target, self.folder = target, Path(tempfile.mkdtemp(dir=places.scratch()))
        self._sent: dict[Path, tuple[int, int]] = {}
        self._lock, self._ended, self._told = threading.Lock(), threading.Event(), False
        threading.Thread(target=self._watch, name="mirror", daemon=True).start()

    def sync(self) -> None:
        with self._lock:
            for file in sorted(p for p in self.folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
                stamp = (file.stat().st_size, file.stat().st_mtime_ns)
                if self._sent.get(file) != stamp:
                    (self.target / file.relative_to(self.folder).as_posix()).write_bytes(file.read_bytes())
                    self._sent[file] = stamp

    def close(self) -> None:
        self._ended.set()
        self.sync()

    def _watch(self) -> None:
        while not self._ended.wait(EVERY):
            try:
                self.sync()
            except (OSError, UserError) as e:  # the next time, or the next save, which says it loudly
                if not self._told and not self._ended.is_set():
                    print(f"the log waits on this machine: {e}", file=sys.stderr)
                self._told = True


_mirrors: list[_Mirror] = []


def mirror(folder: Path) -> Path:
    """Where to write files that grow: a local folder itself; for a remote one a local folder that is copied there.

    Copied are changed files, every EVERY (30) seconds, at `sync`, which a save calls before it commits, and at the end. So
    the log of a killed process lacks at most the lines of its last 30 seconds, and never those before its last checkpoint.
    """
    if not places.remote(folder):
        return folder
    _mirrors.append(_Mirror(folder))
    return _mirrors[-1].folder


def sync() -> None:
    """Copy what the mirrors have not yet."""
    for one in list(_mirrors):
        one.sync()


@contextmanager
def mirrored() -> Iterator[None]:
    """At its end no mirror is left, and all that was in them is copied."""
    before = list(_mirrors)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError, UserError):
            _close(before)
        raise
    _close(before)


def _close(before: list[_Mirror]) -> None:
    for one in [m for m in _mirrors if m not in before]:
        _mirrors.remove(one)
        one.close()
