"""Tables of choices that several files share: each file of a folder ends in its own rows."""

import dataclasses
from collections.abc import Iterable, Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any


def rows_of(package: str, path: Iterable[str], table: str) -> dict[str, Any]:
    """The rows of every file's table in the order of the files' names: a new row is an edit of one file."""
    found: dict[str, Any] = {}
    for name in sorted(module.name for module in iter_modules(path)):
        found |= getattr(import_module(f"{package}.{name}"), table, {})  # files that only help have none
    return found


def made(row: Any, own: Mapping[str, Any]) -> Any:
    """A function row as it is; of a dataclass row an instance, with those values of `own` that are its numbers."""
    if not isinstance(row, type):
        return row
    return row(**{field.name: own[field.name] for field in dataclasses.fields(row) if field.name in own})
