"""Task and network are asked through their rows: no code compares their names."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from iddpm.config.choices import choices
from iddpm.config.tasks import TASK_OF, TASKS

SOURCE = Path(__file__).parents[2] / "src" / "iddpm"
NAMES = {*TASKS, *choices("network"), *TASK_OF}
TABLES = ("config/tasks.py", "interop/")  # which may have a row for each task: ours, and what other projects call them


def named(node: ast.AST) -> Iterator[str]:
    """The names in one side of a comparison, alone or in a list."""
    parts = node.elts if isinstance(node, (ast.Tuple, ast.List, ast.Set)) else [node]
    return (part.value for part in parts if isinstance(part, ast.Constant) and part.value in NAMES)


def compared(tree: ast.AST, tables: bool = False) -> list[str]:
    """The names that code compares with, or that a dict has a row for: unless it may have `tables`."""
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            found += [name for side in (node.left, *node.comparators) for name in named(side)]
        elif isinstance(node, ast.MatchValue):
            found += named(node.value)
        elif isinstance(node, ast.Dict) and not tables:
            rows = [key.value for key in node.keys if isinstance(key, ast.Constant) and key.value in TASKS]
            found += rows if len(rows) > 1 else []
    return found


@pytest.mark.parametrize("file", sorted(SOURCE.rglob("*.py")), ids=lambda file: str(file.relative_to(SOURCE)))
def test_no_name_of_a_task_or_a_network_is_compared(file):
    tables = file.relative_to(SOURCE).as_posix().startswith(TABLES)
    assert compared(ast.parse(file.read_text(encoding="utf-8")), tables) == []


def test_a_comparison_would_be_found():
    for code in (
        'x == "enlarge"',
        'x in ("unet", "dit")',
        'y = {"images": 1, "classify": 2}[x]',
        'match x:\n case "classifier": pass',
    ):
        assert compared(ast.parse(code)), code


def test_the_names_are_those_that_users_know():
    assert {
        "images",
        "enlarge",
        "translate",
        "classify",
        "unet",
        "unet_ddpm",
        "ddpmpp",
        "ncsnpp",
        "unet_linear",
        "unet_mapped",
        "unet_mp",
        "dit",
        "hdit",
        "super_res",
        "classifier",
    } == NAMES


@pytest.mark.parametrize("task", TASKS)
def test_a_task_says_what_it_is_and_what_comes_next(task):
    assert TASKS[task].help
    assert "runs/x" in TASKS[task].next.format(run="runs/x", data="photos")
