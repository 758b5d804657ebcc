"""The original's logger: its calls, its files (log.txt, progress.csv ...) and its table. Existing files are continued."""

import atexit
import csv
import functools
import json
import os
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from time import time
from typing import Any, ClassVar, TextIO

from iddpm.store.sinks import summary_writer

DEBUG, INFO, WARN, ERROR, DISABLED = 10, 20, 30, 40, 50
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK")

# ---- where it is written


class KVWriter:
    """Writes a row of named values."""

    def writekvs(self, kvs: dict[str, Any]) -> None:
        raise NotImplementedError


class SeqWriter:
    """Writes a line of words."""

    def writeseq(self, seq: Iterable[str]) -> None:
        raise NotImplementedError


class HumanOutputFormat(KVWriter, SeqWriter):
    """Lines and tables for people, to a file by name or an open one."""

    def __init__(self, filename_or_file: str | TextIO):
        self.own_file = isinstance(filename_or_file, str)
        self.file: TextIO = open(filename_or_file, "a") if isinstance(filename_or_file, str) else filename_or_file  # noqa: SIM115

    def writekvs(self, kvs: dict[str, Any]) -> None:
        cells = {_cut(k): _cut(f"{float(v):<8.3g}" if hasattr(v, "__float__") else str(v)) for k, v in kvs.items()}
        if not cells:
            return
        wide, high = (max(map(len, column)) for column in (cells, cells.values()))
        rule = "-" * (wide + high + 7)
        rows = [f"| {key:<{wide}} | {cells[key]:<{high}} |" for key in sorted(cells, key=str.lower)]
        self.writeseq(["\n".join([rule, *rows, rule])])

    def writeseq(self, seq: Iterable[str]) -> None:
        self.file.write(" ".join(seq) + "\n")
        self.file.flush()

    def close(self) -> None:
        if self.own_file:
            self.file.close()


def _cut(text: str) -> str:
    return text if len(text) <= 30 else text[:27] + "..."


class _File(KVWriter):
    """Rows in a file, which stays open and is continued where it exists."""

    def __init__(self, filename: str):
        self.file = open(filename, "a+", newline="")  # noqa: SIM115

    def close(self) -> None:
        self.file.close()


class JSONOutputFormat(_File):
    """A JSON object per line."""

    def writekvs(self, kvs: dict[str, Any]) -> None:
        self.file.write(json.dumps({k: float(v) if hasattr(v, "dtype") else v for k, v in sorted(kvs.items())}) + "\n")
        self.file.flush()


class CSVOutputFormat(_File):
    """A table, which is written anew when a column comes in."""

    def __init__(self, filename: str):
        super().__init__(filename)
        self.file.seek(0)
        self.keys = list(csv.DictReader(self.file).fieldnames or [])

    def writekvs(self, kvs: dict[str, Any]) -> None:
        new = sorted(kvs.keys() - set(self.keys))
        self.keys += new
        table = csv.DictWriter(self.file, self.keys, lineterminator="\n")
        if new:  # rare: once a column has come, rows are appended
            self.file.seek(0)
            rows = list(csv.DictReader(self.file))
            self.file.truncate(0)
            table.writeheader()
            table.writerows(rows)
        table.writerow(kvs)
        self.file.flush()


class TensorBoardOutputFormat(KVWriter):
    """TensorBoard events, at the row's "step" if it has one."""

    def __init__(self, dir: str):
        self.dir, self.step, self.writer = dir, 0, summary_writer(Path(dir), "the tensorboard log")

    def writekvs(self, kvs: dict[str, Any]) -> None:
        self.step = int(kvs.get("step", self.step + 1))
        for name, value in kvs.items():
            self.writer.add_scalar(name, float(value), self.step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


FORMATS: dict[str, Callable[[str, str], Any]] = {
    "stdout": lambda dir, suffix: HumanOutputFormat(sys.stdout),
    "log": lambda dir, suffix: HumanOutputFormat(f"{dir}/log{suffix}.txt"),
    "json": lambda dir, suffix: JSONOutputFormat(f"{dir}/progress{suffix}.json"),
    "csv": lambda dir, suffix: CSVOutputFormat(f"{dir}/progress{suffix}.csv"),
    "tensorboard": lambda dir, suffix: TensorBoardOutputFormat(f"{dir}/tb{suffix}"),
}


def make_output_format(format: str, ev_dir: str, log_suffix: str = "") -> Any:
    """A writer of FORMATS in a folder; ValueError for an unknown one."""
    if format not in FORMATS:
        raise ValueError(f"Unknown format specified: {format}; there are {', '.join(FORMATS)}")
    os.makedirs(ev_dir, exist_ok=True)
    return FORMATS[format](ev_dir, log_suffix)


# ---- the row in the making


class Logger:
    """The row in the making, and where rows and lines go."""

    DEFAULT: ClassVar["Logger | None"] = None
    CURRENT: ClassVar["Logger | None"] = None

    def __init__(self, dir: str, output_formats: Sequence[Any], comm: Any = None):
        self.name2val: dict[str, Any] = defaultdict(float)
        self.name2cnt: dict[str, int] = defaultdict(int)
        self.level, self.dir, self.output_formats, self.comm = INFO, dir, output_formats, comm

    def logkv(self, key: str, val: Any) -> None:
        """Set a value of the row to come."""
        self.name2val[key] = val

    def logkv_mean(self, key: str, val: Any) -> None:
        """Add a value to a mean of the row to come."""
        self.name2cnt[key] += 1  # a running mean: no list of values is kept
        self.name2val[key] += (val - self.name2val[key]) / self.name2cnt[key]

    def counted(self) -> dict[str, tuple[Any, int]]:
        """Each value of the row and how many it is the mean of."""
        return {name: (val, self.name2cnt.get(name, 1)) for name, val in self.name2val.items()}

    def dumpkvs(self) -> dict[str, Any]:
        """Write the row, return it, and start the next."""
        row = dict(self.name2val) if self.comm is None else mpi_weighted_mean(self.comm, self.counted())
        for writer in self.output_formats:
            if isinstance(writer, KVWriter):
                writer.writekvs(dict(row))
        self.name2val.clear()
        self.name2cnt.clear()
        return row

    def log(self, *args: Any, level: int = INFO) -> None:
        """Write a line."""
        if self.level <= level:
            for writer in self.output_formats:
                if isinstance(writer, SeqWriter):
                    writer.writeseq(map(str, args))

    def set_level(self, level: int) -> None:
        """Leave out lines below a level."""
        self.level = level

    def set_comm(self, comm: Any) -> None:
        """Average the rows over the processes of a communicator that has `rank` and `gather`."""
        self.comm = comm

    def get_dir(self) -> str:
        """The folder that is written to."""
        return self.dir

    def close(self) -> None:
        for writer in self.output_formats:
            writer.close()


def get_current() -> Logger:
    """The logger in use; the first call makes one where configure() was not called."""
    if Logger.CURRENT is None:
        configure()
        Logger.DEFAULT = Logger.CURRENT
    assert Logger.CURRENT is not None
    return Logger.CURRENT


def _of_current(name: str) -> Callable[..., Any]:
    """The function that calls this method of the logger in use."""

    def call(*args: Any, **settings: Any) -> Any:
        return getattr(get_current(), name)(*args, **settings)

    call.__name__, call.__doc__ = name, getattr(Logger, name).__doc__
    return call


logkv, logkv_mean, dumpkvs, log = map(_of_current, ("logkv", "logkv_mean", "dumpkvs", "log"))
set_level, set_comm, get_dir = map(_of_current, ("set_level", "set_comm", "get_dir"))
debug, info, warn, error = (functools.partial(log, level=level) for level in (DEBUG, INFO, WARN, ERROR))
record_tabular, dump_tabular = logkv, dumpkvs


def logkvs(d: Mapping[str, Any]) -> None:
    """Set several values of the row to come."""
    for k, v in d.items():
        logkv(k, v)


def getkvs() -> dict[str, Any]:
    """The row so far."""
    return get_current().name2val


@contextmanager
def profile_kv(scopename: str) -> Iterator[None]:
    """Add the seconds inside to wait_SCOPENAME of the row to come."""
    start = time()
    try:
        yield
    finally:
        get_current().name2val["wait_" + scopename] += time() - start


def profile(n: str) -> Any:
    """A decorator: profile_kv(n) around every call."""
    return profile_kv(n)


# ---- many processes, and which logger is in use


def get_rank_without_mpi_import() -> int:
    """This process's number, from the launcher's variables."""
    return next((int(os.environ[name]) for name in RANKS if name in os.environ), 0)


def mpi_weighted_mean(comm: Any, local_name2valcount: dict[str, tuple[Any, int]]) -> dict[str, float]:
    """The means over all processes of name -> (value, count), on rank 0; {} elsewhere."""
    gathered = comm.gather(local_name2valcount)
    return weighted_mean(gathered) if comm.rank == 0 else {}


def weighted_mean(parts: Iterable[Mapping[str, tuple[Any, int]]]) -> dict[str, float]:
    """The means of several name -> (value, count); a value that is no number is left out with a warning."""
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for part in parts:
        for name, (value, count) in part.items():
            try:
                sums[name] += float(value) * count
                counts[name] += count
            except ValueError:
                warnings.warn(f"{name}={value!r} is no number, so it has no mean over the processes")
    return {name: sums[name] / counts[name] for name in counts}


def configure(dir: str | None = None, format_strs: Sequence[str] | None = None, comm: Any = None, log_suffix: str = "") -> None:
    """Write to a folder: `dir`, OPENAI_LOGDIR or /tmp/openai-DATE-TIME; in FORMATS given, or of OPENAI_LOG_FORMAT[_MPI]."""
    dir = os.path.expanduser(dir or os.getenv("OPENAI_LOGDIR") or f"{tempfile.gettempdir()}/openai-{_started()}")
    os.makedirs(dir, exist_ok=True)
    rank = get_rank_without_mpi_import()
    if rank > 0:
        log_suffix += f"-rank{rank:03d}"
    if format_strs is None:
        chosen = os.getenv("OPENAI_LOG_FORMAT_MPI", "log") if rank else os.getenv("OPENAI_LOG_FORMAT", "stdout,log,csv")
        format_strs = chosen.split(",")
    writers = [make_output_format(name, dir, log_suffix) for name in format_strs if name]
    Logger.CURRENT = Logger(dir, writers, comm)
    atexit.register(Logger.CURRENT.close)
    if writers:
        log(f"Logging to {dir}")


def _started() -> str:
    """The time; under torchrun that of the launcher, so that its processes share one folder without talking."""
    launcher, then = Path("/proc", str(os.getppid()), "stat"), time()
    if "RANK" in os.environ and launcher.exists():  # not the entry's own time, which is that of somebody's first look at it
        booted = next(int(line.split()[1]) for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
        then = booted + int(launcher.read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return datetime.fromtimestamp(then).strftime("%Y-%m-%d-%H-%M-%S-%f")


def reset() -> None:
    """Go back to the logger of before configure()."""
    if Logger.CURRENT is not None and Logger.CURRENT is not Logger.DEFAULT:
        Logger.CURRENT.close()
        Logger.CURRENT = Logger.DEFAULT
        if Logger.CURRENT is not None:  # else log() would configure one, with a folder and a stdout that nobody asked for
            log("Reset logger")


@contextmanager
def scoped_configure(dir: str | None = None, format_strs: Sequence[str] | None = None, comm: Any = None) -> Iterator[None]:
    """Log elsewhere inside the block."""
    before = Logger.CURRENT
    configure(dir=dir, format_strs=format_strs, comm=comm)
    try:
        yield
    finally:
        get_current().close()
        Logger.CURRENT = before
