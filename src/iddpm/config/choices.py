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
from typing import Any, NamedTuple, get_type_hints

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
    "log_to": ("store.sinks", "SINKS"),
}
TYPES = {"int": int, "float": float, "bool": bool, "str": str}
ADDED: dict[tuple[str, str], Any] = {}  # (kind, name): rows of the program that imports us; they win over ours of the same name


class Field(NamedTuple):
    """A setting, as flags and checks see it: a field of a group, or a number of a row, offered only where that row is chosen."""

    type: type
    default: Any
    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()  # with a kind: names allowed beside its rows
    kind: str = ""  # the kind of choice whose rows are allowed
    begins: tuple[str, ...] = ()  # with which a value may begin that is none of the choices
    many: bool = False  # several of them, comma-separated
    fixed: bool = False  # a resumed run cannot change it
    flag: bool = True  # a user may set it
    only: str = ""  # conditions under which it has an effect, see `fields.unmet`
    rows: Mapping[str, list[str]] = {}  # of a number: the rows that have it, by the field that chooses among them

    def allowed(self) -> tuple[str, ...]:
        """The values it may have; none listed: any."""
        return (*self.choices, *choices(self.kind)) if self.kind else self.choices

    def chosen(self, value: Any) -> list[Any]:
        """What a value names: itself, or the parts of a list; an empty list stands for all that is allowed."""
        if not self.many:
            return [value]
        return [part.strip() for part in value.split(",") if part.strip()] or list(self.allowed())


class Choice(NamedTuple):
    """What is known of a row without importing it."""

    help: str
    numbers: Mapping[str, Field]
    knows: frozenset[str]  # its methods, and what it can be called with: what `only` of a field may ask for


def choices(kind: str) -> dict[str, Choice]:
    """The rows of a kind by name, ours in the order of their files, then the program's."""
    ours = {name: choice for name, (_, choice) in _ours(kind).items()}
    return ours | {name: _described(row) for (k, name), row in ADDED.items() if k == kind}


def row(kind: str, name: str) -> Any:
    """The row itself: the first use that imports its file."""
    if (kind, name) in ADDED:
        return ADDED[kind, name]
    if name not in _ours(kind):
        raise UserError(f"--{kind} {name!r} is not one of: {', '.join(choices(kind))}")
    return getattr(import_module(_ours(kind)[name][0]), KINDS[kind][1])[name]


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


@cache
def _ours(kind: str) -> dict[str, tuple[str, Choice]]:
    """Our rows of a kind: the module in which each stands, and what its text says of it."""
    module, table = KINDS[kind]
    place, found = ROOT.joinpath(*module.split(".")), dict[str, tuple[str, Choice]]()
    for path in sorted(place.glob("*.py")) or [place.with_suffix(".py")]:
        text = path.read_text(encoding="utf-8")
        if table not in text:  # most files of a package hold none; parsing costs milliseconds
            continue
        body = ast.parse(text).body
        named = {node.name: node for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        name = ".".join(("iddpm", *path.relative_to(ROOT).with_suffix("").parts))
        for node in body:
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == table and isinstance(node.value, ast.Dict):
                rows = zip(node.value.keys, node.value.values)
                found |= {ast.literal_eval(key): (name, _read(named[ast.unparse(value)])) for key, value in rows if key}
    return found


def _read(node: Any) -> Choice:
    """What the text of a function or of a class says of it."""
    if isinstance(node, ast.FunctionDef):
        knows = {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}
        return Choice(_first_line(ast.get_docstring(node)), {}, frozenset(knows))
    numbers = {}
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and ast.unparse(part.annotation).startswith("Annotated["):
            kind, *about = part.annotation.slice.elts  # type: ignore[attr-defined]
            numbers[ast.unparse(part.target)] = Field(TYPES[kind.id], *map(ast.literal_eval, (part.value, *about)))
    methods = frozenset(part.name for part in node.body if isinstance(part, ast.FunctionDef))
    return Choice(_first_line(ast.get_docstring(node)), numbers, methods)


def _described(row: Any) -> Choice:
    """The same of a program's row, which is at hand."""
    if not isinstance(row, type):
        return Choice(_first_line(inspect.getdoc(row)), {}, frozenset(inspect.signature(row).parameters))
    hints = {name: hint for name, hint in get_type_hints(row, include_extras=True).items() if hasattr(hint, "__metadata__")}
    numbers = {name: Field(hint.__origin__, getattr(row, name), *hint.__metadata__) for name, hint in hints.items()}
    methods = frozenset(name for name in dir(row) if callable(getattr(row, name)))
    return Choice(_first_line(inspect.getdoc(row)), numbers, methods)


def _first_line(text: str | None) -> str:
    return (text or "").partition("\n")[0].rstrip(".")
