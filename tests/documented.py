"""What README and docs show to be typed: command lines and Python programs, which of them no test runs, and why."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

# What begins a block of lines that is shown and not typed.
SHOWN = {
    "runs/NAME/  config.json": "the files of a run",
    "model010000.pt does not fit": "what a command answers",
}

# The beginning of a line: why no test runs it as it stands.
EXCLUDED = {
    "make demo": "minutes: tests/slow/test_demo.py runs its commands and judges the digits",
    "make test": "is what runs these tests",
    "make bench": "installs other projects; tests/test_benchmarks.py tries its contestants",
    "pip install": "would change the environment of the tests; tests/test_wheel.py installs the package",
    "git clone": "needs the network",
    "python benchmarks/quality.py": "hours, and the original's code; tests/test_benchmarks.py tries its parts",
    "python benchmarks/loading.py": "minutes, and gigabytes; tests/test_benchmarks.py imports it",
    "python benchmarks/serving.py": "minutes, and a browser; tests/look/test_serving.py serves, test_studio_browser.py visits",
    "iddpm data cifar10": "fetches 170 MB; tests/data/test_fetch.py reads archives of its form",
    "iddpm data emoji": "fetches packages; tests/data/test_fetch.py reads such",
    "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1": "a setting of the next line",
    "torchrun --nnodes 4": "four machines",
}

RUN = ("iddpm", "torchrun", "curl", "open", "python")  # the programs that tests/slow/test_commands.py starts

# Pages whose Python programs another test runs, and how many there are; all others tests/slow/test_commands.py runs.
ELSEWHERE = {
    "README.md": (1, "tests/test_library.py"),
    "docs/guides/library.md": (7, "tests/test_library.py"),
    "docs/guides/translate.md": (1, "tests/test_library.py"),
}


class Shown(NamedTuple):
    """One command, with the lines it goes on over, or one Python program."""

    page: str
    line: int
    text: str
    python: bool = False

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"

    @property
    def program(self) -> str:
        """What is started, after settings of the environment; of settings alone an empty word."""
        return re.sub(r"^(\w+=(\"[^\"]*\"|\S*)\s*)+", "", self.text).partition(" ")[0]

    @property
    def excluded(self) -> str:
        """Why it is not run, if it is not."""
        return next((why for begin, why in EXCLUDED.items() if self.text.startswith(begin)), "")


def blocks(page: Path) -> list[tuple[int, str, list[str]]]:
    """Fenced and indented blocks: the first one's line, its language, its lines."""
    found: list[tuple[int, str, list[str]]] = []
    fence, indented = False, False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.startswith("```"):
            fence = not fence
            if fence:
                found.append((number + 1, line[3:].strip(), []))
        elif fence:
            found[-1][2].append(line)
        elif line.startswith("    ") or (indented and not line.strip()):
            if not indented:
                found.append((number, "", []))
            indented = True
            found[-1][2].append(line[4:])
            continue
        indented = False
    return found


def shown(page: Path) -> list[Shown]:
    """What a page shows to be typed, from its top to its end."""
    name, found = page.relative_to(ROOT).as_posix(), []
    for first, language, lines in blocks(page):
        text = "\n".join(lines)
        if language == "python" or text.startswith(("import ", "from ")):
            found.append(Shown(name, first, text.strip() + "\n", python=True))
        elif not text.startswith(tuple(SHOWN)):
            for number, line in enumerate(lines):
                if number and lines[number - 1].endswith("\\"):
                    continue
                more = number
                while line.endswith("\\"):
                    more += 1
                    line = f"{line[:-1].rstrip()} {lines[more].strip()}"
                if line := re.sub(r"\s+#\s.*$", "", line).strip():
                    found.append(Shown(name, first + number, line))
    return [row for row in found if row.python or not row.text.startswith("#")]
