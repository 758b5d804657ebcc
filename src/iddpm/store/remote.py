"""Where data, runs and results lie: a folder of this machine, or an address of any storage that fsspec knows.

place("runs/a") is a pathlib.Path, and so is place("file:///runs/a"); place("s3://bucket/runs/a") is a Remote, which has the
methods of a Path that this project uses. Code that takes a Path takes both; `remote` tells them apart where the difference
matters: a remote object is written whole or not at all, is never appended to, renamed or mapped into memory.

What fails for a moment (5xx, a connection reset, a timeout) is tried again, with growing waits, for PATIENCE seconds on top
of what the driver does by itself; then it is one line, as is at once what will not mend (access denied, no such bucket).
"""

import atexit
import contextlib
import errno
import fcntl
import fnmatch
import hashlib
import io
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, TypeGuard, TypeVar, cast

from iddpm.errors import UserError

PATIENCE = float(os.environ.get("IDDPM_PATIENCE", "60"))  # seconds for which what fails is tried again
DRIVERS = set("adlfs aiobotocore aiohttp azure botocore fsspec gcsfs google http requests s3fs urllib3".split())
FATAL = {errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ENAMETOOLONG}
LOCAL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # of this machine's disk
T = TypeVar("T")


class Unreachable(UserError):
    """A storage that refuses, or gives no answer: never to be taken for something that is absent or damaged."""


def place(name: str | Path) -> Path:
    """The place of a local name or of an address; UserError for an unknown kind of address, or one whose driver is missing."""
    if isinstance(name, PurePath):
        return name
    if "://" not in name:
        return _home(Path(name)) if name.startswith("~") else Path(name)
    scheme, _, rest = name.partition("://")
    if scheme in ("file", "local"):
        return Path(rest)
    path = Remote(name)
    if len(path.parts) < 2:
        raise UserError(f"{name} names no place: give an address such as {scheme}://BUCKET/FOLDER")
    _system(path)
    return path


def _home(path: Path) -> Path:
    """A path that begins with ~, which a shell leaves alone behind "--run="."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise UserError(f"{path}: the home of that name is not known here; write the path out") from None


def remote(path: PurePath) -> "TypeGuard[Remote]":
    """Whether a place is on a remote storage."""
    return isinstance(path, Remote)


class Remote(Path if TYPE_CHECKING else PurePosixPath):  # type: ignore[misc]
    """An address as a path, with what this project uses of Path. It keeps no state: the storage is found by its text."""

    __slots__ = ()

    def __str__(self) -> str:
        head, *rest = self.parts or (".",)
        return f"{head}//{'/'.join(rest)}" if head.endswith(":") else super().__str__()

    def __fspath__(self) -> str:
        raise TypeError(f"{self} is not on this machine")  # rather than a local file of an odd name

    # ---- what is there

    def info(self) -> dict[str, Any]:
        """What the storage knows of it; nothing where there is nothing."""
        try:
            return cast(dict[str, Any], self.ask(lambda fs, key: fs.info(key)))
        except FileNotFoundError:
            return {}

    def exists(self) -> bool:
        return bool(self.info())

    def is_file(self) -> bool:
        return self.info().get("type") == "file"

    def is_dir(self) -> bool:
        return self.info().get("type") == "directory"

    def modified(self) -> float | None:
        """When it was written, by the storage's clock, in seconds; None where there is nothing."""
        try:
            return float(self.ask(lambda fs, key: fs.modified(key)).timestamp())
        except FileNotFoundError:
            return None

    def iterdir(self) -> Iterator["Remote"]:
        names = self.ask(lambda fs, key: [n for n in fs.ls(key, detail=False) if n.rstrip("/") != key.rstrip("/")])
        return (self / name.rstrip("/").rpartition("/")[2] for name in sorted(names))

    def glob(self, pattern: str) -> Iterator["Remote"]:
        """What lies right below it, by name."""
        try:
            yield from (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))
        except FileNotFoundError:
            return

    def rglob(self, pattern: str) -> Iterator["Remote"]:
        """The files at any depth, by name."""
        names = self.ask(lambda fs, key: [name[len(key) :].lstrip("/") for name in fs.find(key)])
        return (self / name for name in sorted(names) if fnmatch.fnmatchcase(name.rpartition("/")[2], pattern))

    def resolve(self) -> "Remote":
        return self

    # ---- reading and writing

    def read_bytes(self, start: int | None = None, end: int | None = None) -> bytes:
        return cast(bytes, self.ask(lambda fs, key: fs.cat_file(key, start=start, end=end)))

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, content: bytes) -> int:
        self.put(lambda fs, key: fs.pipe_file(key, content))
        return len(content)

    def write_text(self, text: str) -> int:
        return self.write_bytes(text.encode())

    def create(self, content: bytes) -> bool:
        """Write it if there is nothing; of several that do so at once one succeeds, where the storage can tell (S3 can)."""

        def write(fs: Any, key: str) -> bool:
            try:
                fs.pipe_file(key, content, mode="create")
            except FileExistsError:
                return False
            return True

        return self.put(write)

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a folder is there as soon as something lies in it."""

    def unlink(self, missing_ok: bool = False) -> None:
        forget(self)
        try:
            self.ask(lambda fs, key: fs.rm_file(key))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rmtree(self) -> None:
        """Delete all that lies below it."""
        forget(self)
        with contextlib.suppress(FileNotFoundError):
            self.ask(lambda fs, key: fs.rm(key, recursive=True))

    def stream(self, blocks: Callable[[], Iterator[memoryview | bytes]]) -> None:
        """Write it in pieces. `blocks` is called anew for each try; what a failed one has sent is withdrawn."""

        def write(fs: Any, key: str) -> None:
            file = fs.open(key, "wb")
            try:
                for block in blocks():
                    file.write(block)
                file.close()
            except BaseException:
                with contextlib.suppress(Exception):
                    file.discard()
                with contextlib.suppress(AttributeError):
                    file.closed = True  # or the garbage collector would send the rest
                raise

        self.put(write)

    # ---- patience

    def put(self, work: Callable[[Any, str], T]) -> T:
        """As `ask`, where nothing needs to be there but the bucket."""
        try:
            return self.ask(work)
        except FileNotFoundError as e:
            raise Unreachable(f"{self} cannot be written: {_reason(e)}") from e

    def ask(self, work: Callable[[Any, str], T]) -> T:
        """work(fs, key), again and again while it fails for a moment.

        FileNotFoundError where there is nothing; Unreachable where there is no answer, or a refusal.
        """
        began, wait = time.monotonic(), 0.5
        while True:
            try:
                fs = _system(self)
                return work(fs, fs._strip_protocol(str(self)))
            except Exception as e:
                lasting = _lasting(e)
                if lasting is None:
                    raise
                if lasting:
                    raise Unreachable(f"{self}: {_reason(e)}: check the address and the credentials") from e
                spent = time.monotonic() - began
                if spent + wait > PATIENCE:
                    raise Unreachable(f"{self} cannot be reached, tried for {spent:.0f} s: {_reason(e)}") from e
            time.sleep(wait * random.uniform(0.5, 1))
            wait = min(2 * wait, 15)


def _lasting(error: Exception) -> bool | None:
    """Whether an error of a storage will stay however often one asks; None where it is no error of the storage's."""
    kind = type(error)
    if isinstance(error, PermissionError) or "Credential" in kind.__name__:
        return True
    if isinstance(error, (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, UserError)):
        return None
    if isinstance(error, OSError):
        return None if error.errno in LOCAL else error.errno in FATAL
    if kind.__module__.partition(".")[0] in DRIVERS:
        return any(word in kind.__name__ for word in ("Validation", "Region", "Profile", "Invalid"))
    return False if isinstance(error, TimeoutError) or kind.__name__ == "TimeoutError" else None


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return f"access denied ({text})" if isinstance(error, PermissionError) else text


_systems: dict[tuple[int, tuple[str, ...]], Any] = {}
_guard = threading.RLock()


def _system(path: Remote) -> Any:
    """fsspec's file system of an address, one for all threads, with listings that are never out of date."""
    with _guard:
        key = (os.getpid(), path.parts[:2])
        if key not in _systems:
            import fsspec

            scheme = path.parts[0][:-1]
            try:
                _systems[key] = fsspec.core.url_to_fs(str(path), use_listings_cache=False)[0]
            except ImportError as e:
                hint = "pip install 'iddpm[s3]'" if scheme in ("s3", "s3a") else " ".join(str(e).split())
                raise UserError(f"{path}: the driver of {scheme}:// is not installed: {hint}") from None
            except ValueError as e:
                why = f"{scheme}:// is unknown to fsspec: give a folder, s3://BUCKET/..., gs://..."
                why = " ".join(str(e).split()) if scheme in fsspec.available_protocols() else why
                raise UserError(f"{path}: {why}") from None
        return _systems[key]


# ---- writing in one step, here or there


def replace(path: Path, write: Callable[[Any], Any], lasting: bool = True) -> None:
    """Write a file in one step: write(file) fills it aside; a reader sees the old one or the new one.

    A `lasting` one is there after a power cut; that takes milliseconds, too long for one of many pictures.
    """
    if remote(path):
        file = io.BytesIO()
        write(file)
        path.write_bytes(file.getvalue())
        return
    aside = path.with_name("." + path.name)
    try:
        with open(aside, "wb") as local:
            write(local)
            if lasting:
                local.flush()
                os.fsync(local.fileno())
        os.replace(aside, path)
        if lasting:
            flush(path.parent)
    except OSError as e:  # a full disk names no file, and numpy not even the error
        aside.unlink(missing_ok=True)
        code = e.errno or errno.ENOSPC
        raise OSError(code, e.strerror or os.strerror(code), e.filename or str(path)) from e


def write_file(path: Path, text: str | bytes) -> None:
    """Write a text in one step; names of files in other encodings stand in it as they are on the disk."""
    content = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
    replace(path, lambda file: file.write(content))


def flush(path: Path) -> None:
    """Make a file's or a folder's content outlast a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lock(handle: int) -> bool:
    """Whether an open local file or folder is now this process's alone, until it is closed; True where there are no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # its file system knows none
        pass
    return True


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder, if it is on this machine, while others wait."""
    if remote(folder):
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        while not lock(handle):
            time.sleep(0.05)
        yield
    finally:
        os.close(handle)


def size(path: Path) -> int | None:
    """In bytes; None where there is nothing."""
    if remote(path):
        found = path.info()
        return int(found["size"] or 0) if found else None
    return path.stat().st_size if path.exists() else None


def opened(path: Path) -> BinaryIO:
    """A file to read and seek in; a remote one is read at once."""
    return io.BytesIO(path.read_bytes()) if remote(path) else open(path, "rb")


# ---- this machine's copies


_scratch: list[Path] = []
_copies: dict[Path, tuple[str, Path]] = {}  # of a remote file: the digest it was checked against, and its copy


def scratch() -> Path:
    """A folder of this process alone, deleted when it ends; one left by a process that was killed is deleted by the next."""
    with _guard:
        if not _scratch:
            for left in Path(tempfile.gettempdir()).glob("iddpm-scratch-*"):
                with contextlib.suppress(OSError), open(left / ".holder", "rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its process lives
                    shutil.rmtree(left, ignore_errors=True)
            folder = Path(tempfile.mkdtemp(prefix="iddpm-scratch-"))
            lock(os.open(folder / ".holder", os.O_CREAT | os.O_RDWR, 0o600))
            _scratch.append(folder)
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return _scratch[0]


def fetch(path: Path, digest: str = "") -> Path | None:
    """A copy of a file on this machine; a local file itself. None where the content has another sha256 than `digest`.

    A copy once checked serves until `forget`; without a digest, others are made anew.
    """
    if not remote(path):
        return path
    with _guard:
        if path in _copies and digest in ("", _copies[path][0]):
            return _copies[path][1]
    handle, name = tempfile.mkstemp(dir=scratch(), suffix=path.suffix)
    os.close(handle)
    copy = Path(name)
    for _ in range(2):  # a file that comes damaged may be whole where it lies
        path.ask(lambda fs, key: fs.get_file(key, name))
        if not digest:
            return copy
        if sha256(copy) == digest:
            with _guard:
                _copies[path] = (digest, copy)
            return copy
    copy.unlink()
    return None


def forget(path: Path) -> None:
    """Delete the copies of a file, or of all below a folder."""
    with _guard:
        for held in [p for p in _copies if p == path or path in p.parents]:
            _copies.pop(held)[1].unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """The digest of a local file."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
