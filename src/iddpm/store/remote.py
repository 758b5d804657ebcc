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
import functools
import hashlib
import io
import os
import random
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, TypeGuard, TypeVar, cast

from iddpm.errors import UserError, reason

PATIENCE = float(os.environ.get("IDDPM_PATIENCE", "60"))  # seconds for which what fails is tried again
DRIVERS = set("adlfs aiobotocore aiohttp azure botocore fsspec gcsfs google http requests s3fs urllib3".split())
FATAL = {errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ENAMETOOLONG}
REFUSALS = ("Invalid", "Profile", "Region", "Validation")  # in the names of drivers' errors that will not mend
LOCAL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # of this machine's disk
T = TypeVar("T")


class Unreachable(UserError):
    """A storage that refuses, or gives no answer: never to be taken for something that is absent or damaged."""


class Damaged(UserError):
    """A file whose content is not what was written."""


def place(name: str | Path) -> Path:
    """The place of a local name or of an address; UserError for an empty one, an unknown kind, or a driver that is missing."""
    if isinstance(name, PurePath):
        return name
    if not name:  # a variable of a shell that is not set, which would be the folder one is in
        raise UserError('a place is named by "", an empty text: give its name, or . for the folder that you are in')
    if "://" not in name:
        try:
            return Path(name).expanduser()  # for a shell leaves a ~ alone behind "--run="
        except RuntimeError:
            raise UserError(f"{name}: the home of that name is not known here; write the path out") from None
    scheme, _, rest = name.partition("://")
    if scheme in ("file", "local"):
        return Path(rest)
    path = Remote(name)
    if len(path.parts) < 2:
        raise UserError(f"{name} names no place: give an address such as {scheme}://BUCKET/FOLDER")
    try:
        _system(*path.parts[:2], os.getpid())
    except ImportError as e:
        hint = "pip install 'iddpm[s3]'" if scheme in ("s3", "s3a") else " ".join(str(e).split())
        raise UserError(f"{path}: the driver of {scheme}:// is not installed: {hint}") from None
    except ValueError as e:  # fsspec's, of a kind that it does not know, or the driver's
        why = " ".join(str(e).split())
        if "Protocol not known" in why:
            why = f"{scheme}:// is unknown to fsspec: give a folder, s3://BUCKET/..., gs://..."
        raise UserError(f"{path}: {why}") from None
    return path


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

    def modified(self) -> float:
        """When it was written, by the storage's clock, in seconds."""
        return float(self.ask(lambda fs, key: fs.modified(key)).timestamp())

    def iterdir(self) -> Iterator["Remote"]:
        names = self.ask(lambda fs, key: [n for n in fs.ls(key, detail=False) if n.rstrip("/") != key.rstrip("/")])
        return (self / name.rstrip("/").rpartition("/")[2] for name in sorted(names))

    def glob(self, pattern: str) -> Iterator["Remote"]:
        """What lies right below it, by name."""
        with contextlib.suppress(FileNotFoundError):
            yield from (path for path in self.iterdir() if path.match(pattern))

    def rglob(self, pattern: str) -> Iterator["Remote"]:
        """The files at any depth, by name."""
        names = self.ask(lambda fs, key: [name[len(key) :].lstrip("/") for name in fs.find(key)])
        return (path for path in map(self.joinpath, sorted(names)) if path.match(pattern))

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
        try:
            self.put(lambda fs, key: fs.pipe_file(key, content, mode="create"))
        except FileExistsError:
            return False
        return True

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a folder is there as soon as something lies in it."""

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            self.ask(lambda fs, key: fs.rm_file(key))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rmtree(self) -> None:
        """Delete all that lies below it."""
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

    def put(self, work: Callable[[Any, str], object]) -> None:
        """As `ask`, where nothing needs to be there but the bucket."""
        try:
            self.ask(work)
        except FileNotFoundError as e:
            raise Unreachable(f"{self} cannot be written: {_reason(e)}") from e

    def ask(self, work: Callable[[Any, str], T]) -> T:
        """work(fs, key), again and again while it fails for a moment.

        FileNotFoundError where there is nothing; Unreachable where there is no answer, or a refusal.
        """
        began, wait = time.monotonic(), 0.5
        while True:
            try:
                fs = _system(*self.parts[:2], os.getpid())
                return work(fs, fs._strip_protocol(str(self)))
            except Exception as e:
                lasting, spent = _lasting(e), time.monotonic() - began
                if lasting is None:
                    raise
                if lasting:
                    raise Unreachable(f"{self}: {_reason(e)}: check the address and the credentials") from e
                if spent + wait > PATIENCE:
                    raise Unreachable(f"{self} cannot be reached, tried for {spent:.0f} s: {_reason(e)}") from e
            time.sleep(wait * random.uniform(0.5, 1))
            wait = min(2 * wait, 15)


def _lasting(error: Exception) -> bool | None:
    """Whether an error of a storage will stay however often one asks; None where it is no error of the storage's."""
    kind, number = type(error), getattr(error, "errno", None)
    driver = kind.__module__.partition(".")[0] in DRIVERS
    if isinstance(error, PermissionError) or "Credential" in kind.__name__:
        return True
    if isinstance(error, (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)) or number in LOCAL:
        return None
    if isinstance(error, OSError) or driver:
        return number in FATAL or (driver and any(word in kind.__name__ for word in REFUSALS))
    return False if kind.__name__ == "TimeoutError" else None  # asyncio's, which is an OSError only since Python 3.11


def _reason(error: Exception) -> str:
    return f"access denied ({reason(error)})" if isinstance(error, PermissionError) else reason(error)


@functools.cache
def _system(scheme: str, bucket: str, process: int) -> Any:
    """fsspec's file system of a bucket, one for all threads of a process, with listings that are never out of date."""
    import fsspec

    return fsspec.core.url_to_fs(f"{scheme}//{bucket}", use_listings_cache=False)[0]


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
            flush(aside)
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
    except OSError as e:
        return not isinstance(e, BlockingIOError)  # or else its file system knows none
    return True


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder, if it is on this machine and its file system knows locks, while others wait."""
    with contextlib.ExitStack() as stack:
        if not remote(folder):
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield


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


@functools.cache
def scratch() -> Path:
    """A folder of this process alone, deleted when it ends; one left by a process that was killed is deleted by the next."""
    for left in Path(tempfile.gettempdir()).glob("iddpm-scratch-*"):
        with contextlib.suppress(OSError), open(left / ".holder", "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its process lives
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix="iddpm-scratch-"))
    lock(os.open(folder / ".holder", os.O_CREAT | os.O_RDWR, 0o600))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def fetch(path: Path, digest: str = "") -> Path:
    """A file on this machine: a local one itself, of a remote one a copy. One of a known `digest`, a sha256, is made once.

    Damaged where the content has another.
    """
    if not remote(path):
        return path
    known = scratch() / f"{digest}{path.suffix}"
    if digest and known.exists():
        return known
    copy = known.with_name(f"{secrets.token_hex(16)}{path.suffix}")
    for _ in range(2):  # a file that comes damaged may be whole where it lies
        path.ask(lambda fs, key: fs.get_file(key, str(copy)))
        if not digest:
            return copy
        if sha256(copy) == digest:
            return copy.rename(known)
    copy.unlink()
    raise Damaged(f"{path} is damaged")


def sha256(path: Path) -> str:
    """The digest of a local file."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
        return digest.hexdigest()
