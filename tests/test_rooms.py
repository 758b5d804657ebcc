"""Imports point one way: every room names the rooms that it may know, all of which lie below it."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "iddpm"
KNOWS = {  # a room, and the others that it may import; from the bottom up, so that nothing points up or in a circle
    "errors": set(),
    "records": {"errors"},
    "words": set(),
    "saying": {"records"},
    "rng": set(),
    "diffusion": set(),
    "nn": set(),
    "config": {"errors", "records", "words"},
    "parallel": {"errors", "records"},
    "store": {"config", "errors", "parallel", "records"},
    "data": {"config", "errors", "parallel", "records", "rng", "store", "words"},
    "build": {"config", "diffusion", "errors", "nn"},
    "fit": {"build", "config", "diffusion", "errors"},
    "sampling": {
        "build", "config", "data", "diffusion", "errors", "fit", "parallel", "records", "rng", "saying", "store", "words",
    },
    "measure": {
        "build", "config", "data", "diffusion", "errors", "fit", "parallel", "records", "rng", "sampling", "saying", "store",
        "words",
    },
    "training": {
        "build", "config", "data", "diffusion", "errors", "fit", "measure", "nn", "parallel", "records", "rng", "sampling",
        "saying", "store", "words",
    },
    "look": {"build", "config", "data", "errors", "fit", "measure", "records", "sampling", "saying", "store", "words"},
    "interop": {
        "build", "config", "data", "diffusion", "errors", "fit", "measure", "nn", "parallel", "records", "rng", "sampling",
        "store", "training", "words",
    },
    "library": {"build", "config", "diffusion", "errors", "fit", "look", "measure", "rng", "sampling", "store", "training"},
    "cli": {
        "build", "config", "data", "errors", "fit", "interop", "look", "measure", "parallel", "sampling", "saying", "store",
        "training", "words",
    },
    "__init__": {"config", "errors", "library"},
    "__main__": {"cli"},
}  # fmt: skip


def files(room: str) -> list[Path]:
    return sorted((SOURCE / room).rglob("*.py")) or [SOURCE / f"{room}.py"]


def rooms_of(file: Path) -> set[str]:
    """The rooms that a file imports, here or in a function."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "iddpm":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("iddpm."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("iddpm.")}
    return found - {"__version__"}


def test_every_room_is_here():
    assert {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()} == set(KNOWS)


@pytest.mark.parametrize("room", KNOWS)
def test_a_room_imports_only_what_lies_below_it(room):
    below = list(KNOWS)[: list(KNOWS).index(room)]
    assert KNOWS[room] <= set(below)
    for file in files(room):
        assert rooms_of(file) - {room} <= KNOWS[room], file.relative_to(SOURCE)


@pytest.mark.parametrize("room", ["diffusion", "nn"])
def test_the_mathematics_and_networks_import_torch_alone(room):
    allowed = {"torch", "iddpm", "math", "collections", "dataclasses", "functools", "typing", "itertools"}
    for file in files(room):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in getattr(node, "names", [])]
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert {str(n).split(".")[0] for n in names} <= allowed, file
