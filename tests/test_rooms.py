"""Imports point one way: the mathematics and the networks know nothing above them, and nothing imports the command line."""

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "iddpm"
BELOW = {  # room: the only parts of the package it may import
    "diffusion": {"diffusion"},
    "nn": {"nn"},
    "data": {"data", "errors", "places", "rng"},
    "config": {"errors"},
    "presets": set(),
    "rng": set(),
    "ema": set(),
    "errors": set(),
    "distributed": {"errors"},
    "flags": {"config", "errors"},
    "log": {"errors", "mirror"},
    "places": {"errors"},
    "mirror": {"errors", "places"},
    "build": {"config", "diffusion", "nn", "errors"},
    "checkpoint": {"config", "dcp", "distributed", "errors", "places", "storage"},
    "dcp": {"errors", "storage"},
    "storage": {"errors", "mirror", "places"},
    "lock": {"distributed", "errors", "places"},
    "watch": {"distributed"},
    "plan": {"batches", "build", "config", "distributed", "errors", "live", "nn"},
    "live": set(),
    "pictures": set(),
    "plot": set(),
    "super_res": set(),
    "sample": {"build", "checkpoint", "config", "diffusion", "distributed", "errors", "pictures", "places", "rng", "super_res"},
    "evaluate/nll": {"build", "config", "data", "diffusion", "distributed", "errors", "log", "places", "rng", "super_res"},
    "evaluate/figures": {"distributed", "errors", "places"},
    "evaluate/statistics": {"errors", "extractors", "metrics", "places"},
    "evaluate/image_sets": {"build", "checkpoint", "config", "data", "diffusion", "errors", "places", "sample"},
    "evaluate/features": {"distributed", "errors", "evaluate/image_sets", "extractors", "metrics", "places"},
    "evaluate/sides": {"evaluate/features", "evaluate/statistics", "metrics"},
    "evaluate/comparison": {"errors", "evaluate/sides", "extractors", "metrics"},
    "evaluate/neighbours": {"evaluate/features", "pictures", "places"},
    "evaluate/quality": {
        "build", "config", "data", "diffusion", "distributed", "errors", "evaluate/features", "evaluate/figures",
        "evaluate/image_sets", "extractors", "metrics", "sample", "storage",
    },
    "saves": {"checkpoint", "config", "distributed", "state", "storage"},
    "metrics": {"metrics", "errors"},
    "extractors": {"extractors", "errors", "places"},
}  # fmt: skip


def imports(file: Path) -> set[str]:
    """The parts of iddpm that a file imports, by first name; of `evaluate`, whose files are programs of their own, each."""
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module in ("iddpm", "iddpm.evaluate"):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    parts = [name.split(".") for name in names if name.startswith("iddpm.")]
    return {"/".join(part[1 : 3 if part[1] == "evaluate" else 2]) for part in parts}


def test_each_room_imports_only_what_lies_below_it():
    for room, allowed in BELOW.items():
        files = sorted((SOURCE / room).glob("*.py")) or [SOURCE / f"{room}.py"]
        assert all(file.exists() for file in files), room
        for file in files:
            assert imports(file) <= allowed, file.relative_to(SOURCE)


def test_nothing_imports_the_command_line():
    files = [f for f in SOURCE.rglob("*.py") if f.name not in ("__main__.py", "cli.py")]
    assert not [f for f in files if "cli" in imports(f)]
    assert not [f for f in files if f.parent.name != "verbs" and "verbs" in imports(f)]


def test_the_mathematics_and_networks_import_torch_alone():
    allowed = {"torch", "iddpm", "math", "collections", "dataclasses", "functools", "typing", "zlib", "itertools"}
    for file in [*(SOURCE / "diffusion").glob("*.py"), *(SOURCE / "nn").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in getattr(node, "names", [])]
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert {str(n).split(".")[0] for n in names} <= allowed, file
