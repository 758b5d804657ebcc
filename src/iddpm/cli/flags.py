"""Command-line flags made from dataclass fields, with their help, ranges and choices; an error is one line."""

import argparse
import difflib
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from iddpm.config import every_field, fields_of, own_numbers
from iddpm.config.choices import Field, choices
from iddpm.config.fields import conditions
from iddpm.errors import UserError

TRUE, FALSE = ("true", "yes", "t", "y", "1"), ("false", "no", "f", "n", "0")


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are a UserError, with flags made from dataclass fields."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, formatter_class=_Help, **settings)
        self.booleans: set[str] = set()
        self.known: set[str] = set()  # names of the flags added
        self.shown: dict[str, str] = {}  # kinds of choice, and what their rows are
        self.sections: dict[str, Any] = {}  # of the help, by title

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see iddpm {self.prog.split()[-1]} --help)")

    def add_fields(
        self, group: type, title: str = "", inherited: bool = False, only: Sequence[str] = (), without: Sequence[str] = ()
    ) -> None:
        """A flag for each field a user may set, or for `only` these; what is not given is absent from the result.

        Groups of the same title share a section of the help.
        """
        title = title or (group.__doc__ or "").rstrip(".")
        section = self.sections.setdefault(title, self.add_argument_group(title))
        for name, f in fields_of(group).items():
            if not f.flag or (only and name not in only) or name in without:
                continue
            self._add(section, name, f, inherited)
            for number, own in own_numbers(group).items():
                if name in own.rows and number not in self.known:
                    self._add(section, number, own, inherited)
            if f.kind and f.kind not in self.shown:
                self.shown[f.kind] = listed({row: choice.help for row, choice in choices(f.kind).items()})

    def _add(self, section: Any, name: str, f: Field, inherited: bool) -> None:
        """A flag; its help ends in what it belongs to, if it is not everybody's, and in its default."""
        self.known.add(name)
        owners = conditions(f, every_field())
        shown = "the run's" if inherited else "none" if f.default == "" else f.default
        text = f"{f.help}{f' ({owners})' if owners else ''} [{shown}]".replace("%", "%%")
        if f.type is bool:
            self.booleans.add(name)
            section.add_argument(f"--{name}", type=boolean, metavar="BOOL", default=argparse.SUPPRESS, help=text)
        else:
            metavar = ",".join(f.allowed()) if f.many else "|".join(f.allowed())
            metavar = metavar or {int: "N", float: "X"}.get(f.type, "TEXT")
            section.add_argument(f"--{name}", type=f.type, metavar=metavar, default=argparse.SUPPRESS, help=text)

    def format_help(self) -> str:
        """The help, with a line on each row of the choices at its end."""
        parts = [f"--{kind}:\n{rows}" for kind, rows in self.shown.items() if len(choices(kind)) > 1]
        return super().format_help() + ("\n" + "\n\n".join(parts) + "\n" if parts else "")

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


WIDTH = 118  # of the help


def listed(rows: Mapping[str, str]) -> str:
    """Names and what they are, in two columns."""
    wide = max(map(len, rows)) + 4
    lines = (textwrap.wrap(f"  {name:{wide - 2}}{text}", WIDTH, subsequent_indent=" " * wide) for name, text in rows.items())
    return "\n".join(line for parts in lines for line in parts)


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=WIDTH)


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
