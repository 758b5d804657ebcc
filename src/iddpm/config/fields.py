"""Fields of settings: each says its help, its range or choices, and under which other settings it has an effect."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import field
from functools import cache
from typing import Any, NamedTuple, get_type_hints

from iddpm.config.choices import Number, choices
from iddpm.config.tasks import TASK_OF
from iddpm.errors import UserError

LARGEST = 2**63 - 1  # of whole numbers, as torch and numpy count
WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}  # what a value of a type is called


class Field(NamedTuple):
    """A field of a group of settings, as flags and checks see it."""

    type: type
    default: Any
    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()  # with a kind: names allowed beside its rows
    kind: str = ""  # the kind of choice whose rows are allowed
    many: bool = False  # several of them, comma-separated
    fixed: bool = False  # a resumed run cannot change it
    flag: bool = True  # a user may set it
    only: str = ""  # conditions under which it has an effect, see `unmet`

    def allowed(self) -> tuple[str, ...]:
        """The values it may have; none listed: any."""
        return (*self.choices, *choices(self.kind)) if self.kind else self.choices


def opt(default: Any, help: str, **settings: Any) -> Any:
    """A field of a group, with the settings of `Field`."""
    return field(default=default, metadata=dict(help=help, **settings))


@cache
def _fields(group: type) -> dict[str, Field]:
    hints = get_type_hints(group)
    return {f.name: Field(hints[f.name], f.default, **f.metadata) for f in dataclasses.fields(group) if f.name != "own"}


def fields_of(group: Any) -> dict[str, Field]:
    """The fields of a group, or of an instance of one, by name."""
    return _fields(group if isinstance(group, type) else type(group))


class Own(NamedTuple):
    """A number of rows that a group chooses, and these rows by the field that chooses among them: several fields may share it."""

    number: Number
    rows: dict[str, list[str]]

    def is_read(self, group: Any) -> bool:
        """Whether a row that the group chooses has it."""
        return any(set(_chosen(group, name)) & set(rows) for name, rows in self.rows.items())


def own_numbers(group: Any) -> dict[str, Own]:
    """The numbers of the rows that the fields of a group choose, by name."""
    found: dict[str, Own] = {}
    for name, f in fields_of(group).items():
        for row, choice in choices(f.kind).items() if f.kind else ():
            for number, about in choice.numbers.items():
                found.setdefault(number, Own(about, {})).rows.setdefault(name, []).append(row)
    return found


def _chosen(group: Any, name: str) -> list[str]:
    """The rows that a field chooses; where it takes several and has none, all of them."""
    f, now = fields_of(group)[name], getattr(group, name)
    if not f.many:
        return [now]
    return [part.strip() for part in now.split(",") if part.strip()] or list(choices(f.kind))


def settings_of(*groups: Any) -> set[str]:
    """The names of all that a user may set in these groups: their fields, and the numbers of the rows they choose."""
    return {name for group in groups for name in (*fields_of(group), *own_numbers(group))}


def check_fields(group: Any) -> None:
    """Raise UserError for the first value out of its range or choices, saying what is allowed."""
    for name, f in fields_of(group).items():
        value = getattr(group, name)
        check_range(name, value, f)
        parts = [part.strip() for part in value.split(",") if part.strip()] if f.many else [value]
        if allowed := f.allowed():
            for part in parts:
                if part not in allowed:
                    hint = f" (that is now --task {TASK_OF[part]})" if name == "network" and part in TASK_OF else ""
                    raise UserError(f"--{name} {part!r} is not one of: {', '.join(allowed)}{hint}")


def check_range(name: str, value: Any, f: Field | Number) -> None:
    """Raise UserError where a number is not finite, or out of its range."""
    if f.type not in (int, float):
        return
    high = f.high if f.high is not None else LARGEST if f.type is int else math.inf
    if not math.isfinite(value) or (f.low is not None and value < f.low) or value > high:
        low = "" if f.low is None else f"{f.low:g} or more"
        limits = f"from {f.low:g} to {high:g}" if high < math.inf and f.low is not None else low or "finite"
        raise UserError(f"--{name} {value} is out of range: {limits}")


def unmet(only: str, now: Mapping[str, Any]) -> Iterator[str]:
    """The conditions of a field that other settings do not meet, each as the end of a sentence: "has no effect ...".

    Conditions are separated by spaces: "name" (is set), "name=a|b" (is one of these), "name:part" (its row has that part: a
    method, or something it is called with).
    """
    for condition in only.split():
        name, _, part = condition.partition(":")
        key, _, values = name.partition("=")
        value = now[key]
        if part and value not in (able := _able(key, part, (*choices(key), value))):
            yield f"with --{key} {value}: it belongs to {', '.join(able)}"
        elif values and str(value) not in values.split("|"):
            yield f"with --{key} {value}: it belongs to --{key} {' or '.join(values.split('|'))}"
        elif not part and not values and not value:
            yield f"without --{key}"


def _able(kind: str, part: str, values: Iterable[str]) -> list[str]:
    """Those of the values that have a part; one that is no row (auto) stands for a row that has it."""
    rows = choices(kind)
    return list(dict.fromkeys(value for value in values if value not in rows or part in rows[value].knows))


def conditions(f: Field, fields: Mapping[str, Field]) -> str:
    """What `only` of a field asks for, in short, as "task enlarge"; not what every value of the other field meets."""
    told = []
    for condition in f.only.split():
        name, _, part = condition.partition(":")
        key, _, values = name.partition("=")
        asked = values.split("|") if values else _able(key, part, fields[key].allowed()) if part else []
        if not asked or len(asked) < len(fields[key].allowed() or ("True", "False")):
            told.append(f"{key} {'|'.join(asked)}" if asked else f"with {key}")
    return ", ".join(told)


def make(group: type, given: Mapping[str, Any]) -> Any:
    """A group of settings from the flags given, checked; the numbers given of rows that it chooses go to its field `own`."""
    made = group(**{k: v for k, v in given.items() if k in fields_of(group)})
    check_fields(made)
    if own := {k: v for k, v in given.items() if k in own_numbers(group) and k not in fields_of(group)}:
        made = dataclasses.replace(made, own=tuple(own.items()))
        check_own(made, own)
    return made


def check_own(group: Any, own: Mapping[str, Any]) -> None:
    """Raise UserError for a number that no chosen row has, or that is out of its range."""
    for name, about in own_numbers(group).items():
        if name not in own:
            continue
        if not about.is_read(group) and own[name] != about.number.default:
            now = " and ".join(f"--{chooser} {getattr(group, chooser)}" for chooser in about.rows)
            able = dict.fromkeys(row for rows in about.rows.values() for row in rows)
            raise UserError(f"--{name} has no effect with {now}: it belongs to {', '.join(able)}")
        check_range(name, own[name], about.number)
