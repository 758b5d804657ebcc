"""Command-line flags made from dataclass fields, with their help, ranges and choices; an error is one line."""

import argparse
import difflib
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from iddpm.config import every_field, fields_of, own_numbers
from iddpm.config.choices import choices
from iddpm.config.fields import conditions
from iddpm.errors import UserError
from iddpm.store.remote import place, remote

TRUE, FALSE = ("true", "yes", "t", "y", "1"), ("false", "no", "f", "n", "0")
WIDTH = 118  # of the help


class Verb(NamedTuple):
    """A command: what runs it, what adds its flags, and how the help shows it."""

    run: Callable[..., None]
    parser: Callable[["Parser"], None]
    usage: str
    help: str
    resumes: bool = False  # whether the same command goes on with what an interrupted one has done


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are a UserError, with flags made from dataclass fields."""

    def __init__(self, **settings: Any):
        help_of = partial(argparse.RawDescriptionHelpFormatter, max_help_position=34, width=WIDTH)
        super().__init__(allow_abbrev=False, formatter_class=help_of, **settings)
        self.booleans: set[str] = set()
        self.shown: dict[str, str] = {}  # kinds of choice, and what their rows are
        self.sections: dict[str, Any] = {}  # of the help, by title

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see iddpm {self.prog.split()[-1]} --help)")

    def add_fields(self, group: type, title: str = "", inherited: bool = False, only: Sequence[str] = ()) -> None:
        """A flag for each field a user may set, or for `only` these, that has none yet; what is not given is not in the result.

        Groups of the same title share a section of the help.
        """
        title, numbers, fields = title or (group.__doc__ or "").rstrip("."), own_numbers(group), every_field()
        for name, f in fields_of(group).items():
            if not f.flag or (only and name not in only):
                continue
            own = {number: about for number, about in numbers.items() if name in about.rows}
            for flag, about in ({name: f} | own).items():
                if not self.has(flag):
                    shown = "the run's" if inherited else "none" if about.default == "" else about.default
                    owners = f" ({told})" if (told := conditions(about, fields)) else ""
                    metavar = ("," if about.many else "|").join(about.allowed())
                    self.add_flag(flag, about.type, f"{about.help}{owners} [{shown}]".replace("%", "%%"), title, metavar)
            if f.kind and len(rows := choices(f.kind)) > 1:
                self.shown[f.kind] = listed({row: choice.help for row, choice in rows.items()})

    def has(self, flag: str) -> bool:
        return f"--{flag}" in self._option_string_actions

    def add_flag(
        self, name: str, kind: type, help: str = "", title: str = "", metavar: str = "", default: Any = argparse.SUPPRESS
    ) -> None:
        """A flag, in a section of the help where it has a title; without a default it is absent from the result if not given."""
        if kind is bool:
            self.booleans.add(name)
        if title and title not in self.sections:
            self.sections[title] = self.add_argument_group(title)
        metavar = metavar or {bool: "BOOL", int: "N", float: "X"}.get(kind, "TEXT")
        self.sections.get(title, self).add_argument(
            f"--{name}", type=boolean if kind is bool else kind, metavar=metavar, default=default, help=help
        )

    def format_help(self) -> str:
        """The help, with a line on each row of the choices at its end."""
        return super().format_help() + "".join(f"\n--{kind}:\n{rows}\n" for kind, rows in self.shown.items())

    def words(self) -> dict[str, list[str]]:
        """Its flags, with the choices of those that have some."""
        found = {}
        for action in self._actions:
            if flags := [name for name in action.option_strings if name.startswith("--")]:
                shown = action.metavar if isinstance(action.metavar, str) else ""
                of_rows = shown.split("|") if "|" in shown else ["True", "False"] if shown == "BOOL" else []
                found[flags[0][2:]] = [str(choice) for choice in action.choices or of_rows]
        return found

    def read(self, argv: Sequence[str]) -> dict[str, Any]:
        """The arguments given, by name. Underscores and hyphens are alike; --flag and --no-flag mean True and False."""
        tokens: list[str] = []
        for token, following in zip(argv, [*argv[1:], ""]):
            flag, equals, value = token.removeprefix("--").partition("=")
            flag = flag.replace("-", "_")
            if not token.startswith("--") or token == "--":
                tokens.append(token)
            elif flag.startswith("no_") and flag.removeprefix("no_") in self.booleans:
                tokens.append(f"--{flag.removeprefix('no_')}=False")
            elif flag in self.booleans and not equals and following.lower() not in TRUE + FALSE:
                tokens.append(f"--{flag}=True")
            else:
                tokens.append(f"--{flag}{equals}{value}")
        known, extra = self.parse_known_intermixed_args(tokens)  # images may stand after flags, too
        if extra:
            wrong, flags = extra[0].partition("=")[0], self._option_string_actions
            shorter = [flag for flag in flags if wrong.startswith(f"{flag}_")]  # --guidance of --guidance_scale
            near = shorter or difflib.get_close_matches(wrong, flags, n=1, cutoff=0.75)
            hint = f": did you mean {near[0]}?" if near else f" (see {self.prog} --help)"
            raise UserError(f"unknown argument {extra[0]}{hint}")
        return vars(known)


def listed(rows: Mapping[str, str]) -> str:
    """Names and what they are, in two columns."""
    wide = max(map(len, rows)) + 4
    lines = (textwrap.wrap(f"  {name:{wide - 2}}{text}", WIDTH, subsequent_indent=" " * wide) for name, text in rows.items())
    return "\n".join(line for parts in lines for line in parts)


def boolean(text: str) -> bool:
    if text.lower() not in TRUE + FALSE:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() in TRUE


def file_to_write(name: str | Path, flag: str, *endings: str) -> Path:
    """The place of a file that is to be written, whose folder is made; UserError where it cannot be, or has another ending."""
    path = place(name)
    if path.is_dir():
        raise UserError(f"{flag} {path} is a folder, and what is written one file: give a name that ends in {endings[0]}")
    if path.suffix not in endings:
        raise UserError(f"{flag} {path}: give a name that ends in {' or '.join(filter(None, endings))}")
    if remote(path):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{path} cannot be written ({e.strerror}): give another {flag}") from None
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path} cannot be written (its folder is read-only): give another {flag}")
    return path
