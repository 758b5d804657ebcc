"""Lays out what `make docs` builds: the documents of this repository as they are, the help of every verb, and the library.

    python docs/site.py FOLDER

A document keeps its place, so a link means the same here and there; what a document links to is copied, too.
"""

import inspect
import re
import shutil
import sys
from pathlib import Path

import iddpm
from iddpm.cli import flags, original
from iddpm.cli.main import VERBS, parser_of

ROOT = Path(__file__).resolve().parents[1]

WIDTH = 82  # letters of a line of help that a page shows without scrolling


def verbs() -> str:
    """A page of the help of every verb."""
    parts = ["# Every verb\n\n`iddpm VERB --help` says the same.\n"]
    flags.WIDTH = WIDTH
    for title, ours in (("Its own verbs", True), ("The commands of the original", False)):
        parts.append(f"\n## {title}\n")
        for name in VERBS:
            if (name not in original.VERBS) == ours:
                parts.append(f"\n### iddpm {name}\n\n```text\n{parser_of(name).format_help().rstrip()}\n```\n")
    return "".join(parts)


def library() -> str:
    """A page of the public names of the library, by their docstrings."""
    parts = [
        "# The library\n\n`import iddpm` costs nothing: torch is imported by the first use. [With examples](guides/library.md).\n"
    ]
    for name in sorted(iddpm.__all__):
        found = getattr(iddpm, name)
        if not callable(found):
            continue
        parts.append(_entry(name, found, "##"))
        if inspect.isclass(found):
            members = {key: m for key, m in vars(found).items() if not key.startswith("_") and inspect.isfunction(m)}
            parts += [_entry(f"{name}.{key}", m, "###") for key, m in members.items()]
    return "".join(parts)


def _entry(name: str, found: object, level: str) -> str:
    signature = str(inspect.signature(found)) if callable(found) and not inspect.isclass(found) else ""  # a class tells by itself
    return f"\n{level} {name}\n\n```python\n{name}{signature}\n```\n\n{inspect.getdoc(found) or ''}\n"


def documents() -> list[Path]:
    """The documents, from the root of the repository."""
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
    return sorted(path.relative_to(ROOT) for path in found)


def lay_out(folder: Path) -> None:
    """Write everything into a folder, which is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    for document in documents():
        text = (ROOT / document).read_text()
        linked = (ROOT / document.parent / link for link in re.findall(r"\]\((?!\w+:)([^)#\s]+)[^)]*\)", text))
        for path in (ROOT / document, *linked):
            target = folder / path.resolve().relative_to(ROOT)
            if path.is_file() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
    (folder / "docs" / "verbs.md").write_text(verbs())
    (folder / "docs" / "api.md").write_text(library())


if __name__ == "__main__":
    lay_out(Path(sys.argv[1]))
