"""The command line: one table of verbs, and what becomes of their errors."""

import difflib
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import iddpm
from iddpm.cli import (
    completion,
    convert,
    data,
    diagnose,
    edit,
    ema,
    evaluate,
    nll,
    original,
    plan,
    report,
    sample,
    serve,
    studio,
    threads,
    train,
)
from iddpm.cli.flags import Parser, Verb
from iddpm.errors import UserError
from iddpm.saying import say, speaking

VERBS: dict[str, Verb] = {
    "train": train.VERB,
    "sample": sample.VERB,
    "edit": edit.VERB,
    "nll": nll.VERB,
    "evaluate": evaluate.VERB,
    "report": report.VERB,
    "diagnose": diagnose.VERB,
    "ema": ema.VERB,
    "data": data.VERB,
    "studio": studio.VERB,
    "serve": serve.VERB,
    "plan": plan.VERB,
    "import": convert.IMPORT,
    "export": convert.EXPORT,
    "completion": completion.verb(lambda: {name: parser_of(name) for name in VERBS}),
    **original.VERBS,
}


CODES = (
    "exit codes: 0 done; 2 one line says what to mend; 75 stopped (Ctrl-C, SIGTERM, SIGHUP), the same command goes on;\n"
    "130, 143 or 129 stopped where nothing is kept to go on from"
)
STOPPED = 75  # EX_TEMPFAIL: "preempted, start me again"
MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc", "can't start new thread")


class Signalled(KeyboardInterrupt):
    """SIGTERM or SIGHUP, treated as Ctrl-C is; its argument is the signal's number."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code, one of `CODES`, after one line on what to mend."""
    argv = sys.argv[1:] if argv is None else list(argv)
    threads.settle()
    if len(argv) == 2 and argv[0] == "help":
        argv = [argv[1], "--help"]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print("iddpm: train, sample and measure diffusion models of images\n")
        print("usage: iddpm VERB ... (iddpm VERB --help says more)\n")
        print("\n".join(f"  {name:18} {verb.help}" for name, verb in VERBS.items()))
        print(f"\n{CODES}")
        return 0
    if argv[0] in ("-V", "--version"):
        print(iddpm.__version__)
        return 0
    fault = partial(_fault, "--json" in argv)
    try:
        if argv[0] not in VERBS:
            near = difflib.get_close_matches(argv[0], VERBS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(VERBS)}"
            raise UserError(f"unknown verb {argv[0]!r}: {hint}")
        parser = parser_of(argv[0])
        given = parser.read(argv[1:])
        json, quiet = given.pop("json", False), given.pop("quiet", False)
        if "threads" in given:
            threads.take(given.pop("threads"))
        if json and quiet:
            raise UserError("--json and --quiet: give one")
        with speaking(json, quiet), _signals():
            VERBS[argv[0]].run(**given)
    except UserError as e:
        return fault(str(e), getattr(e, "code", 2))
    except KeyboardInterrupt as e:
        if VERBS[argv[0]].resumes:
            return fault("interrupted; the same command goes on from here", STOPPED)
        return fault("interrupted", 128 + (e.args[0] if isinstance(e, Signalled) else signal.SIGINT))
    except OSError as e:
        return fault(f"{e.strerror or e}{f': {e.filename}' if e.filename else ''}")
    except (RuntimeError, MemoryError) as e:
        if not isinstance(e, MemoryError) and not any(words in str(e) for words in MEMORY):
            raise
        return fault(
            "out of memory: train with a smaller --microbatch, --batch_size or --cache_gb, or with --use_checkpoint True; sample "
            "with a smaller --batch_size"
        )
    return 0


def parser_of(name: str) -> Parser:
    """What reads the flags of a verb."""
    verb = VERBS[name]
    parser = Parser(prog=f"iddpm {name}", description=verb.help, usage=f"iddpm {name} {verb.usage} [--flag value ...]")
    verb.parser(parser)
    parser.epilog = f"{parser.epilog}\n\n{CODES}" if parser.epilog else CODES
    if name not in original.VERBS:
        for flag, text in (("json", "say all as JSON, an object a line"), ("quiet", "say nothing but errors and warnings")):
            parser.add_flag(flag, bool, text, "How it speaks and computes", default=False)
        count = "threads that compute, of each process [one a core, in a container as many as its limit allows]"
        parser.add_flag("threads", int, count, "How it speaks and computes")
    return parser


@contextmanager
def _signals() -> Iterator[None]:
    """In here SIGTERM and SIGHUP interrupt as Ctrl-C does; what is ignored, as SIGHUP under nohup, stays so."""

    def interrupt(number: int, frame: Any) -> None:
        raise Signalled(number)

    before = {}
    with suppress(ValueError):  # not in the main thread, as where a program calls `main`
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fault(json: bool, line: str, code: int = 2) -> int:
    """Say what went wrong, for a program as well; returns the exit code."""
    line = " ".join(line.split())
    print(f"iddpm: {line}", file=sys.stderr)
    if json:
        with speaking(json=True, quiet=False):
            say(line, "error", code=code)
    return code


class _Stream:
    """A standard stream whose reader may go away (`iddpm train ... | head`), which is no reason to stop."""

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            return int(self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError):
            self.stream = open(os.devnull, "w")  # noqa: SIM115  # or what it holds would fail again and again

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _streams() -> None:
    """Make the standard streams last, and take any text: names of files need not be in the terminal's encoding."""
    for number in (0, 1, 2):  # a closed one's number would be given to the next file opened, and be printed into
        with suppress(OSError):
            os.fstat(number)
            continue
        os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115
        with suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, _Stream(stream))


def _warn(message: Any, *where: Any, **more: Any) -> None:
    print(f"note: {message}", file=sys.stderr)


def entry() -> None:
    """Run the process's command line and end it."""
    _streams()
    warnings.showwarning = _warn
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if "RANK" in os.environ:  # gloo's threads abort an interpreter that takes its time to end, after all is done
        os._exit(code)
    sys.exit(code)
