"""The documents as they are laid out for the site: every one has its place, every link its file."""

import importlib.util
import re
from pathlib import Path

import pytest

import iddpm
from iddpm.cli.main import VERBS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Path:
    spec = importlib.util.spec_from_file_location("site_of_docs", ROOT / "docs" / "site.py")
    site = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(site)
    folder = tmp_path_factory.mktemp("site")
    site.lay_out(folder)
    return folder


def test_the_navigation_names_every_page_and_no_other(pages):
    named = re.findall(r"^ +- .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert len(named) == len(set(named))
    assert set(named) == {str(path.relative_to(pages)) for path in pages.rglob("*.md")}


def test_every_link_leads_to_a_file_that_is_there(pages):
    for page in pages.rglob("*.md"):
        for link in re.findall(r"\]\((?!\w+:)([^)#\s]+)[^)]*\)", page.read_text()):
            assert (page.parent / link).exists(), (page, link)


def test_every_verb_and_every_public_name_has_its_entry(pages):
    text = (pages / "docs" / "verbs.md").read_text()
    assert [name for name in VERBS if f"### iddpm {name}\n" not in text] == []
    text = (pages / "docs" / "api.md").read_text()
    assert [name for name in iddpm.__all__ if callable(getattr(iddpm, name)) and f"## {name}\n" not in text] == []
