"""The choices a run is made of, read from where each stands: a solver, a schedule, a metric is one row in one source file.

The tables are read from the source text, so that help and checks cost no import of torch. A row is a function, or a frozen
dataclass whose numbers are declared as `eta: Annotated[float, "share of fresh noise", 0, 1] = 0.0`: its help, lowest and highest
value. The first line of a row's docstring is its help. A program adds a row of its own with `add`.
"""

import ast
import inspect
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

from iddpm.errors import UserError

ROOT = Path(__file__).parents[1]
KINDS = {  # the flag that chooses: the module, or the package of modules, where its rows stand, and the name of their table
    "solver": ("diffusion.solvers", "SOLVERS"),
    "noise_schedule": ("diffusion.schedule", "SCHEDULES"),
    "parametrization": ("diffusion.parametrization", "PARAMETRIZATIONS"),
    "weighting": ("diffusion.weighting", "WEIGHTINGS"),
    "schedule_sampler": ("diffusion.law", "LAWS"),
    "objective": ("diffusion.objective", "OBJECTIVES"),
    "grid": ("diffusion.grid", "GRIDS"),
    "guidance_kind": ("diffusion.guidance", "GUIDANCES"),
    "network": ("nn", "NETWORKS"),
    "extractor": ("measure.extractors", "EXTRACTORS"),
    "metrics": ("measure.metrics", "METRICS"),
}
TYPES = {"int": int, "float": float, "bool": bool, "str": str}
ADDED: dict[tuple[str, str], Any] = {}  # (kind, name): rows of the program that imports us; they win over ours of the same name


class Number(NamedTuple):
    """A setting that belongs to a row: it becomes a flag, offered only where such a row is chosen."""

    type: type
    default: Any
    help: str
    low: float | None = None
    high: float | None = None


class Choice(NamedTuple):
    """What is known of a row without importing it."""

    help: str
    numbers: Mapping[str, Number]
    knows: frozenset[str]  # its methods, and what it can be called with: what `only` of a field may ask for


def choices(kind: str) -> dict[str, Choice]:
    """The rows of a kind by name, ours in the order of their files, then the program's."""
    return _ours(kind) | {name: _described(row) for (k, name), row in ADDED.items() if k == kind}


def row(kind: str, name: str) -> Any:
    """The row itself: the first use that imports its file."""
    if (kind, name) in ADDED:
        return ADDED[kind, name]
    module, table = KINDS[kind]
    for path in _files(module):
        if name in _table(path, table):
            return getattr(import_module(".".join(("iddpm", *path.relative_to(ROOT).with_suffix("").parts))), table)[name]
    raise UserError(f"--{kind} {name!r} is not one of: {', '.join(choices(kind))}")


def make(kind: str, name: str, numbers: Mapping[str, Any] = {}) -> Any:
    """A function row as it is; of a dataclass row, an instance with those of the numbers that it has.

    UserError where the row refuses the numbers.
    """
    made = row(kind, name)
    if not isinstance(made, type):
        return made
    own = choices(kind)[name].numbers
    try:
        return made(**{k: v for k, v in numbers.items() if k in own})
    except ValueError as e:
        raise UserError(f"--{kind} {name}: {e}") from None


def add(kind: str, row: Any, name: str = "") -> str:
    """Offer a row of the program's own, as `--KIND NAME` and in `iddpm.train(KIND=NAME)`; returns its name.

    The program that resumes or samples such a run must add it again. UserError for an unknown kind.
    """
    if kind not in KINDS:
        raise UserError(f"no choice is called {kind!r}: there are {', '.join(KINDS)}")
    name = name or getattr(row, "__name__", type(row).__name__)
    ADDED[kind, name] = row
    return name


def _files(module: str) -> list[Path]:
    path = ROOT.joinpath(*module.split("."))
    return sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


@cache
def _ours(kind: str) -> dict[str, Choice]:
    module, table = KINDS[kind]
    return {name: choice for path in _files(module) for name, choice in _table(path, table).items()}


@cache
def _table(path: Path, table: str) -> dict[str, Choice]:
    """The rows of a table that stands in a file: of a dict literal, whose values are names of that file."""
    text = path.read_text(encoding="utf-8")
    if table not in text:  # most files of a package hold none; parsing costs milliseconds
        return {}
    body = ast.parse(text).body
    named = {node.name: node for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for node in body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == table:
            assert isinstance(node.value, ast.Dict)
            rows = zip(node.value.keys, node.value.values)
            return {ast.literal_eval(key): _read(named.get(ast.unparse(value))) for key, value in rows if key}
    return {}


def _read(node: ast.FunctionDef | ast.ClassDef | None) -> Choice:
    if node is None:
        return Choice("", {}, frozenset())
    numbers, knows = {}, set()
    if isinstance(node, ast.FunctionDef):
        knows = {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}
    for field in node.body if isinstance(node, ast.ClassDef) else ():
        if isinstance(field, ast.FunctionDef):
            knows.add(field.name)
        elif isinstance(field, ast.AnnAssign) and ast.unparse(field.annotation).startswith("Annotated["):
            assert isinstance(field.annotation, ast.Subscript) and isinstance(field.annotation.slice, ast.Tuple) and field.value
            kind, *about = field.annotation.slice.elts
            values = [ast.literal_eval(part) for part in about]
            numbers[ast.unparse(field.target)] = Number(TYPES[ast.unparse(kind)], ast.literal_eval(field.value), *values)
    return Choice(_first_line(ast.get_docstring(node)), numbers, frozenset(knows))


def _described(row: Any) -> Choice:
    """The same of a program's row, which is at hand."""
    numbers = {}
    if isinstance(row, type):
        for name, hint in get_type_hints(row, include_extras=True).items():
            if get_origin(hint) is Annotated:
                kind, *about = get_args(hint)
                numbers[name] = Number(kind, getattr(row, name), *about)
        knows = frozenset(name for name in dir(row) if callable(getattr(row, name)))
    else:
        knows = frozenset(inspect.signature(row).parameters)
    return Choice(_first_line(inspect.getdoc(row)), numbers, knows)


def _first_line(text: str | None) -> str:
    return (text or "").partition("\n")[0].rstrip(".")
