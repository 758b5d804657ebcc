"""The command line: one table of verbs, and what becomes of their errors."""

import difflib
import os
import sys
from collections.abc import Sequence

import iddpm
from iddpm.cli import convert, data, evaluate, nll, original, plan, sample, train
from iddpm.cli.flags import Parser, Verb
from iddpm.errors import UserError

VERBS: dict[str, Verb] = {
    "train": train.VERB,
    "sample": sample.VERB,
    "nll": nll.VERB,
    "evaluate": evaluate.VERB,
    "data": data.VERB,
    "plan": plan.VERB,
    "import": convert.IMPORT,
    "export": convert.EXPORT,
    **original.VERBS,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code: 0, 2 after one line on what to mend, 75 where a run was stopped and saved."""
    argv = sys.argv[1:] if argv is None else list(argv)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: waiting threads that spin cost 3x on a shared machine
    if not argv or argv[0] in ("-h", "--help", "help"):
        print("iddpm: train, sample and measure diffusion models of images\n")
        print("usage: iddpm VERB ... (iddpm VERB --help says more)\n")
        print("\n".join(f"  {name:18} {verb.help}" for name, verb in VERBS.items()))
        return 0
    if argv[0] in ("-V", "--version"):
        print(iddpm.__version__)
        return 0
    try:
        if argv[0] not in VERBS:
            near = difflib.get_close_matches(argv[0], VERBS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(VERBS)}"
            raise UserError(f"unknown verb {argv[0]!r}: {hint}")
        verb = VERBS[argv[0]]
        parser = Parser(prog=f"iddpm {argv[0]}", description=verb.help, usage=f"iddpm {argv[0]} {verb.usage} [--flag value ...]")
        verb.parser(parser)
        verb.run(**parser.read(argv[1:]))
    except UserError as e:
        return _say(str(e), getattr(e, "code", 2))
    except KeyboardInterrupt:
        return _say("interrupted" + ("; the same command goes on from here" if VERBS[argv[0]].resumes else ""))
    except OSError as e:
        return _say(f"{e.strerror or e}{f': {e.filename}' if e.filename else ''}")
    except RuntimeError as e:
        if "out of memory" not in str(e):
            raise
        return _say(
            "out of memory: train with a smaller --microbatch or --use_checkpoint True, sample with a smaller --batch_size"
        )
    return 0


def _say(line: str, code: int = 2) -> int:
    print(f"iddpm: {' '.join(line.split())}", file=sys.stderr)
    return code


def entry() -> None:
    """Run the process's command line and end it."""
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if "RANK" in os.environ:  # gloo's threads abort an interpreter that takes its time to end, after all is done
        os._exit(code)
    sys.exit(code)
