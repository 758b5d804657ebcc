"""Command-line flags made from dataclass fields: their help, ranges and choices come from config.py; an error is one line."""

import argparse
import difflib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from iddpm.config import fields_of
from iddpm.errors import UserError

TRUE, FALSE = ("true", "yes", "t", "y", "1"), ("false", "no", "f", "n", "0")


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are a UserError, with flags made from dataclass fields."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, formatter_class=_Help, **settings)
        self.booleans: set[str] = set()

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see iddpm {self.prog.split()[-1]} --help)")

    def add_fields(self, group: type, title: str = "", inherited: bool = False) -> None:
        """A flag for each field a user may set; what is not given is absent from the result."""
        section = self.add_argument_group(title or (group.__doc__ or "").rstrip("."))
        for name, (kind, default, meta) in fields_of(group).items():
            if not meta.get("flag", True):
                continue
            shown = "the run's" if inherited else "none" if default == "" else default
            text = f"{meta['help']} [{shown}]".replace("%", "%%")
            if kind is bool:
                self.booleans.add(name)
                section.add_argument(f"--{name}", type=boolean, metavar="BOOL", default=argparse.SUPPRESS, help=text)
            else:
                metavar = "|".join(meta["choices"]) or {int: "N", float: "X"}.get(kind, "TEXT")
                section.add_argument(f"--{name}", type=kind, metavar=metavar, default=argparse.SUPPRESS, help=text)

    def read(self, argv: Sequence[str]) -> dict[str, Any]:
        """The arguments given, by name. Underscores and hyphens are alike; --flag and --no-flag mean True and False."""
        tokens: list[str] = []
        for k, token in enumerate(argv):
            if not token.startswith("--") or token == "--":
                tokens.append(token)
                continue
            flag, equals, value = token[2:].partition("=")
            flag = flag.replace("-", "_")
            if flag.removeprefix("no_") in self.booleans and flag.startswith("no_"):
                tokens += [f"--{flag.removeprefix('no_')}", "False"]
            elif flag in self.booleans and not equals and (k + 1 == len(argv) or argv[k + 1].lower() not in TRUE + FALSE):
                tokens += [f"--{flag}", "True"]
            else:
                tokens.append(f"--{flag}{equals}{value}")
        known, extra = self.parse_known_args(tokens)
        if extra:
            flags = [s for action in self._actions for s in action.option_strings]
            near = difflib.get_close_matches(extra[0].partition("=")[0], flags, n=1)
            raise UserError(
                f"unknown argument {extra[0]}" + (f": did you mean {near[0]}?" if near else f" (see {self.prog} --help)")
            )
        return vars(known)


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=118)


def boolean(text: str) -> bool:
    if text.lower() not in TRUE + FALSE:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() in TRUE


class Verb(NamedTuple):
    """A command: what runs it, what adds its flags, and how the help shows it."""

    run: Callable[..., None]
    parser: Callable[[Parser], None]
    usage: str
    help: str
    resumes: bool = False  # whether the same command goes on with what an interrupted one has done
