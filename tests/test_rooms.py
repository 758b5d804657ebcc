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
    "plan": {"batches", "build", "config", "distributed", "errors", "nn"},
    "pictures": set(),
    "plot": set(),
    "super_res": set(),
    "sample": {"build", "checkpoint", "config", "diffusion", "distributed", "errors", "pictures", "places", "rng", "super_res"},
    "nll": {"build", "config", "data", "diffusion", "distributed", "errors", "log", "places", "rng", "super_res"},
    "figures": {"distributed", "errors", "places"},
    "statistics": {"errors", "metrics", "places"},
    "image_sets": {"build", "checkpoint", "config", "data", "diffusion", "errors", "places", "sample"},
    "features": {"distributed", "errors", "extractors", "image_sets", "metrics", "places"},
    "evaluate": {"errors", "extractors", "features", "metrics"},
    "neighbours": {"features", "metrics", "pictures", "places"},
    "saves": {"checkpoint", "config", "distributed", "quality", "state", "storage"},
    "quality": {
        "config",
        "data",
        "diffusion",
        "distributed",
        "extractors",
        "features",
        "image_sets",
        "metrics",
        "places",
        "sample",
    },
    "metrics": {"metrics", "errors"},
    "extractors": {"extractors", "errors", "places"},
}


def imports(file: Path) -> set[str]:
    """The parts of iddpm that a file imports, by first name."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            if parts == ["iddpm"]:
                found |= {alias.name for alias in node.names}
            elif parts[0] == "iddpm":
                found.add(parts[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("iddpm.")}
    return found


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
