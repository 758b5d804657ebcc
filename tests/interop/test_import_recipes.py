"""The recipe of each published file says what it should give, and is made of commands that exist."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from iddpm.cli.flags import Parser
from iddpm.cli.main import VERBS
from iddpm.interop.openai.formats.published import PUBLISHED

FOLDER = Path(__file__).parents[2] / "recipes" / "published"


def test_there_is_one_for_each_file():
    assert {path.stem for path in FOLDER.glob("*")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_imports_its_file_and_says_what_it_should_give(name):
    path, row = FOLDER / f"{name}.sh", PUBLISHED[name]
    text = path.read_text()
    assert path.stat().st_mode & 0o111
    assert f"# {name}.pt of {row.program}-diffusion." in text
    assert row.number[1:] in text
    subprocess.run(["bash", "-n", path], check=True)
    commands = [shlex.split(found) for found in re.findall(r"iddpm ([^#\n]+)", text.replace("\\\n", "")) if "runs/" in found]
    for verb, *words in commands:
        parser = Parser(prog=f"iddpm {verb}")
        VERBS[verb].parser(parser)
        given = parser.read([re.sub(r"\$\{?\w+.*", "file.pt", word) for word in words])
        assert verb != "import" or given["published"] in PUBLISHED
    assert ["import", "$file", "--published", name, "--run", f"runs/{name}"] in [c[:6] for c in commands]
    assert commands[-1][0] == "sample"
