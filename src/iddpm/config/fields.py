"""Fields of settings: each says its help, its range or choices, and under which other settings it has an effect."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, get_type_hints

from iddpm.config.choices import Field, choices
from iddpm.config.tasks import TASK_OF
from iddpm.errors import UserError

LARGEST = 2**63 - 1  # of whole numbers, as torch and numpy count


def opt(default: Any, help: str, low: float | None = None, high: float | None = None, **settings: Any) -> Any:
    """A field of a group, with the settings of `Field`."""
    return dataclasses.field(default=default, metadata=dict(help=help, low=low, high=high, **settings))


@cache
def _fields(group: type) -> dict[str, Field]:
    hints = get_type_hints(group)
    return {f.name: Field(hints[f.name], f.default, **f.metadata) for f in dataclasses.fields(group) if f.name != "own"}


def fields_of(*groups: Any) -> dict[str, Field]:
    """The fields of groups, or of instances of them, by name."""
    kinds = (group if isinstance(group, type) else type(group) for group in groups)
    return {name: f for kind in kinds for name, f in _fields(kind).items()}


def values_of(*groups: Any) -> dict[str, Any]:
    """The values of all fields of groups, by name."""
    return {name: getattr(group, name) for group in groups for name in fields_of(group)}


def own_numbers(*groups: Any) -> dict[str, Field]:
    """The numbers of the rows that the fields of groups choose, by name; several rows, of several fields, may share one.

    A resumed run cannot change a number where it cannot change the choice.
    """
    found: dict[str, Field] = {}
    for chooser, f in fields_of(*groups).items():
        for row, choice in choices(f.kind).items() if f.kind else ():
            for name, number in choice.numbers.items():
                known = found.get(name, number)
                rows = {**known.rows, chooser: [*known.rows.get(chooser, ()), row]}
                found[name] = known._replace(rows=rows, fixed=known.fixed or f.fixed)
    return found


def settings_of(*groups: Any) -> dict[str, Field]:
    """All that a user may set in these groups: their fields, and the numbers of the rows they choose."""
    return own_numbers(*groups) | fields_of(*groups)


def is_read(number: Field, fields: Mapping[str, Field], now: Mapping[str, Any]) -> bool:
    """Whether a row that is chosen now has a number."""
    return any(set(fields[chooser].chosen(now[chooser])) & set(rows) for chooser, rows in number.rows.items())


def make(group: type, given: Mapping[str, Any]) -> Any:
    """A group of settings from the flags given, checked; the numbers given of rows that it chooses go to its field `own`.

    UserError for a value that is not allowed, and for a flag without effect beside the others.
    """
    made = group(**{k: v for k, v in given.items() if k in fields_of(group)})
    own = {k: v for k, v in given.items() if k in own_numbers(group) and k not in fields_of(group)}
    check_groups([made], own)
    for name, f in fields_of(group).items():
        if name in given and (why := next(unmet(f.only, values_of(made)), "")):
            raise UserError(f"--{name} has no effect {why}")
    return dataclasses.replace(made, own=tuple(own.items())) if own else made


# ---- checks


def check_groups(groups: Sequence[Any], own: Mapping[str, Any]) -> None:
    """Raise UserError for the first value that is not allowed, and for a number, of those of `own`, that no chosen row has."""
    fields, now = fields_of(*groups), values_of(*groups)
    for name, f in fields.items():
        _check(name, now[name], f)
    for name, f in own_numbers(*groups).items():
        if name not in own:
            continue
        if own[name] != f.default and not is_read(f, fields, now):
            chosen = " and ".join(f"--{chooser} {now[chooser]}" for chooser in f.rows)
            able = dict.fromkeys(row for rows in f.rows.values() for row in rows)
            raise UserError(f"--{name} has no effect with {chosen}: it belongs to {', '.join(able)}")
        _check(name, own[name], f)


def check_range(name: str, value: Any, f: Field) -> None:
    """Raise UserError where a number is not finite, or out of its range."""
    if f.type not in (int, float):
        return
    low = -math.inf if f.low is None else f.low
    high = f.high if f.high is not None else LARGEST if f.type is int else math.inf
    if not (math.isfinite(value) and low <= value <= high):
        limits = "finite" if low == -math.inf else f"{low:g} or more" if high == math.inf else f"from {low:g} to {high:g}"
        raise UserError(f"--{name} {value} is out of range: {limits}")


def _check(name: str, value: Any, f: Field) -> None:
    """Raise UserError where a value is out of its range or choices, saying what is allowed."""
    check_range(name, value, f)
    if allowed := f.allowed():
        for part in f.chosen(value):
            if part not in allowed and not (f.begins and part.startswith(f.begins)):
                hint = f" (that is now --task {TASK_OF[part]})" if name == "network" and part in TASK_OF else ""
                raise UserError(f"--{name} {part!r} is not one of: {', '.join(allowed)}{hint}")


# ---- conditions, separated by spaces: "name" (is set), "name=a|b" (is one of these), "name:part" (its row has that part: a
# method, or something it is called with)


def _asked(condition: str) -> tuple[str, list[str]]:
    """The setting that a condition is about, and the values that meet it; none: any that is set."""
    name, _, part = condition.partition(":")
    key, _, values = name.partition("=")
    if part:
        return key, [row for row, choice in choices(key).items() if part in choice.knows]
    return key, values.split("|") if values else []


def unmet(only: str, now: Mapping[str, Any]) -> Iterator[str]:
    """The conditions of a field that other settings do not meet, each as the end of a sentence: "has no effect ..."."""
    for condition in only.split():
        key, asked = _asked(condition)
        value = str(now[key])
        if not asked and not now[key]:
            yield f"without --{key}"
        elif asked and value not in (*asked, "auto"):  # auto stands for a row that fits
            able = ", ".join(asked) if ":" in condition else f"--{key} {' or '.join(asked)}"
            yield f"with --{key} {value}: it belongs to {able}"


def conditions(f: Field, fields: Mapping[str, Field]) -> str:
    """When a field has an effect, in short, as "task enlarge"; not what every value of the other field meets."""
    told = [f"{chooser} {'|'.join(rows)}" for chooser, rows in f.rows.items()]
    for key, asked in map(_asked, f.only.split()):
        if not asked:
            told.append(f"with {key}")
            continue
        beside = fields[key].choices if fields[key].kind else ()  # auto
        if len(beside) + len(asked) < len(fields[key].allowed() or ("True", "False")):
            told.append(f"{key} {'|'.join((*beside, *asked))}")
    return (" or " if f.rows else ", ").join(told)
