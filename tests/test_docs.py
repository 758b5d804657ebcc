"""What the documents say: tables are those of the code, links lead somewhere, flags are understood.

`python tests/test_docs.py` writes the tables anew.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

import documented
from iddpm import fit
from iddpm.cli.flags import Parser
from iddpm.cli.main import VERBS, parser_of
from iddpm.config import Config, check
from iddpm.config.choices import KINDS, Field, choices
from iddpm.config.presets import PRESETS
from iddpm.config.tasks import TASKS
from iddpm.errors import UserError

ROOT = Path(__file__).parents[1]
METHODS = ROOT / "docs" / "methods.md"
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted((ROOT / "docs").rglob("*.md"))

TITLES = {  # in the order in which a method is read
    "noise_schedule": "Noise schedules",
    "parametrization": "What the network predicts",
    "objective": "Losses",
    "weighting": "Weights of the squared error",
    "schedule_sampler": "Laws of t: which noise levels are trained on",
    "solver": "Solvers",
    "grid": "Where a solver's levels lie",
    "guidance_kind": "Guidance: how `--guidance` goes beyond the class",
    "network": "Networks",
    "extractor": "Networks whose features are compared",
    "metrics": "Metrics",
    "log_to": "Programs that are told the numbers of a run",
}


# ---- the tables of docs/methods.md


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def number(name: str, about: Field) -> str:
    """A number of a row: its flag, default, range and meaning."""
    default = "empty" if about.default == "" else about.default
    ends = f", {about.low:g} to {about.high:g}" if about.low is not None and about.high is not None else ""
    return f"`--{name}` {default}{ends}: {about.help}"


def rows() -> str:
    """The tables of every kind, and of tasks and presets."""
    parts = []
    for kind in (*TITLES, *(kind for kind in KINDS if kind not in TITLES)):
        found = choices(kind)
        cells = [
            [f"`{name}`", choice.help, "<br>".join(number(*pair) for pair in choice.numbers.items())]
            for name, choice in found.items()
        ]
        has_numbers = any(choice.numbers for choice in found.values())
        wide = 3 if has_numbers else 2
        head = [f"`--{kind}`", "what it is", "its numbers"]
        parts.append(f"### {TITLES.get(kind, kind)}\n\n{table(head[:wide], (line[:wide] for line in cells))}")
    tasks = table(["`--task`", "what it trains"], ([f"`{name}`", task.help] for name, task in TASKS.items()))
    presets = table(["`--preset`", "what it is for"], ([f"`{name}`", text] for name, (text, _) in PRESETS.items()))
    return "\n\n".join((*parts, f"### Tasks\n\n{tasks}", f"### Presets\n\n{presets}"))


def fits(schedule: str, parametrization: str) -> bool:
    config = Config().updated(dict(noise_schedule=schedule, parametrization=parametrization, sampling_steps="50"))
    try:
        fit.require_fit(check(config))
    except UserError:
        return False
    return True


def pairs() -> str:
    """Which parametrization goes with which schedule."""
    schedules = list(choices("noise_schedule"))
    head = ["`--parametrization`", *(f"`{name}`" for name in schedules)]
    return table(head, ([f"`{p}`", *("yes" if fits(s, p) else "" for s in schedules)] for p in choices("parametrization")))


def written(text: str) -> str:
    """A document, with what stands between its marks as the code has it."""
    for mark, content in (("pairs", pairs()), ("rows", rows())):
        before, begin, rest = text.partition(f"<!-- {mark} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        assert begin and end
        text = f"{before}{begin}{content}\n{end}{after}"
    return text


def test_the_tables_of_methods_are_those_of_the_code():
    assert METHODS.read_text() == written(METHODS.read_text()), "python tests/test_docs.py writes them anew"


def test_every_kind_of_choice_has_a_title():
    assert set(TITLES) == set(KINDS)


# ---- flags and links


def read(flags: str) -> dict[str, Any]:
    parser = Parser(prog="iddpm train")
    VERBS["train"].parser(parser)
    return parser.read(flags.split())


@pytest.mark.parametrize("flags", re.findall(r"^\| [^`|]* \| `(--[^`]*)`", METHODS.read_text(), re.MULTILINE))
def test_a_method_is_a_config_that_works(flags):
    given = {k: v for k, v in read(flags).items() if k not in ("data", "preset", "config", "run", "dry_run")}
    fit.require_fit(check(Config().updated(given)))


def flags_of(verb: str) -> set[str]:
    return {option for action in parser_of(verb)._actions for option in action.option_strings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_flag_in_a_command_is_one(document):
    """In indented lines that call iddpm, and in code that begins with it."""
    text = document.read_text()
    lines = [line for line in text.splitlines() if line.startswith("    ")] + re.findall(r"`([^`\n]*)`", text)
    for line in lines:
        for verb, rest in re.findall(r"(?<![\w./])iddpm (\w+)([^#|;(]*)", line):
            if verb in VERBS:
                wrong = {f.replace("-", "_")[2:] for f in re.findall(r"(?<!\S)--[a-zA-Z][\w-]*", rest)}
                known = {option.lstrip("-") for option in flags_of(verb)}
                assert {f for f in wrong if f.removeprefix("no_") not in known} == set(), line


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_to_a_file_leads_to_one(document):
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text()):
        assert link.startswith("http") or (document.parent / link).exists(), link


# ---- what is shown to be typed


SHOWN = [row for page in documented.PAGES for row in documented.shown(page)]
COMMANDS = [row for row in SHOWN if not row.python]


def test_every_command_is_run_by_a_test_or_has_a_reason():
    """What is left out here, tests/slow/test_commands.py runs."""
    assert [str(row) for row in COMMANDS if row.program not in documented.RUN and not row.excluded and row.program] == []
    assert len(COMMANDS) > 90 and sum(not row.excluded for row in COMMANDS) > 70


def test_every_reason_belongs_to_a_command():
    assert [begin for begin in documented.EXCLUDED if not any(row.text.startswith(begin) for row in COMMANDS)] == []
    text = "\n".join(page.read_text() for page in documented.PAGES)
    assert [begin for begin in documented.SHOWN if begin not in text] == []


def test_every_program_is_run_by_the_test_that_is_said_to():
    """A page's programs are all run by one test; their number is looked at, so that a new one is noticed."""
    for page, (count, test) in documented.ELSEWHERE.items():
        assert (sum(row.page == page and row.python for row in SHOWN), page) == (count, page)
        assert page.removeprefix("docs/") in (ROOT / test).read_text()


def test_every_extra_and_every_target_that_a_command_names_is_there():
    extras = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("[project.")[0]
    targets = (ROOT / "Makefile").read_text()
    for document in DOCUMENTS:
        for extra in re.findall(r"pip install (?:-e )?'(?:\.|iddpm)\[(\w+)\]'", document.read_text()):
            assert re.search(rf"^{extra} = ", extras, re.M), (document, extra)
    for row in COMMANDS:
        if row.program == "make":
            assert re.search(rf"^{row.text.split()[1]}:", targets, re.M), str(row)


if __name__ == "__main__":
    METHODS.write_text(written(METHODS.read_text()))
