"""The studio's parts among odd runs, odd lines and visitors who do not read."""

import asyncio
import io
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from iddpm.errors import UserError
from iddpm.look.studio import play, shelf, turns
from iddpm.look.studio.app import Answer
from iddpm.look.studio.trainings import Training, Trainings
from iddpm.store.files import step_dirs


def strict(content: object) -> object:
    def refused(name: str) -> None:
        raise AssertionError(name)

    return json.loads(Answer(content).body, parse_constant=refused)


def test_an_answer_is_strict_json_whatever_lies_in_a_run():
    assert strict({"a": [float("nan"), {"b": -float("inf")}, 1.5]}) == {"a": [None, {"b": None}, 1.5]}
    assert strict({"NaN": os.fsdecode(b"odd \xff")}) == {"NaN": "odd \udcff"}


def test_runs_of_odd_names_are_told_apart_and_listed(run, tmp_path):
    folders = [tmp_path / a / b for a in "xy" for b in ("same/cats", 'a"b<i>&#?', os.fsdecode(b"odd\xff"))]
    for folder in folders:
        shutil.copytree(run, folder)
    listed = shelf.Shelf(folders)
    rows = strict(listed.listing())
    assert len({row["name"] for row in rows}) == len(folders) and "x/same/cats" in {row["name"] for row in rows}
    assert {listed.path(row["name"].encode().decode()) for row in rows} == set(folders)


def test_one_run_that_cannot_be_shown_hides_no_other_and_one_that_is_gone_is_forgotten(run, tmp_path, monkeypatch):
    for name in ("bad", "good"):
        shutil.copytree(run, tmp_path / name)
    real = shelf.read_run
    monkeypatch.setattr(shelf, "read_run", lambda path: real(path) if path.name == "good" else 1 / 0)
    listed = shelf.Shelf([tmp_path])
    assert {row["name"]: row.get("fault") for row in listed.listing()} == {"bad": "division by zero", "good": None}
    shutil.rmtree(tmp_path / "good")
    listed.listing()
    assert not listed.read


def test_a_run_begun_beside_the_one_that_is_looked_at_is_on_the_shelf_once_it_is_there(run, tmp_path, monkeypatch):
    for name in ("a", "b", "c"):
        shutil.copytree(run, tmp_path / name)
        os.utime(tmp_path / name / "log.jsonl", (1e9, 1e9 + ord(name)))
        os.utime(tmp_path / name / "config.json", (1e9, 1e9))
    listed = shelf.Shelf([tmp_path / "a"])
    listed.begun += [tmp_path / "b", tmp_path / "yet to come"]
    assert list(listed.runs()) == ["a", "b"]
    monkeypatch.setattr(shelf, "MOST", 2)
    assert set(shelf.Shelf([tmp_path]).runs()) == {"b", "c"}  # the newest


def test_another_run_in_the_place_of_one_is_what_is_drawn(run, tmp_path):
    home = tmp_path / "run"
    shutil.copytree(run, home)
    before = play.newest(home, "cpu")
    assert play.newest(home, "cpu") is before
    shutil.rmtree(home)
    shutil.copytree(run, home)
    newest = int(step_dirs(home)[-1].name[5:])
    assert play.newest(home, "cpu") is not before and play.newest(home, "cpu", newest) is not before


def test_a_chain_of_few_steps_has_solvers(run):
    config = play.newest(run, "cpu").config
    assert "ddim" in play._solvers(config.updated(dict(diffusion_steps=8, sampling_steps="4")))


def test_whatever_a_training_prints_is_read_to_its_end(tmp_path):
    lines = ["5", "null", "[1]", '{"a": 1}', '{"event": [], "text": "x"}', "[" * 100_000, '{"event": "line", "text": "last"}']
    process = SimpleNamespace(stdout=io.StringIO("\n".join(lines)), wait=lambda: 0, poll=lambda: 0)
    training = Training("t", [], process, then=["--run", "t"])
    trainings = Trainings(tmp_path, [], "cpu")
    trainings.close()
    trainings._read(training)
    assert len(training.lines) == len(lines) and training.lines[-1] == "last"
    assert "the studio ends" in training.error  # what was to follow cannot, and is told


def test_nothing_is_trained_once_the_studio_ends(tmp_path):
    trainings = Trainings(tmp_path, [], "cpu")
    trainings.close()
    with pytest.raises(UserError, match="the studio ends"):
        trainings.resume("a", Path("a"))
    assert not trainings.all


def test_pictures_do_not_pile_up_before_who_does_not_read(monkeypatch):
    monkeypatch.setattr(turns, "PAUSE", 0)

    def work(watch):
        for _ in range(50):
            watch(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
        yield np.zeros((1, 8, 8, 3), np.uint8)

    async def visit() -> list[dict]:
        works = turns.Works()
        events = works.start(50, work)
        found = [await anext(events)]
        while works.threads:
            await asyncio.sleep(0.01)
        return found + [event async for event in events]

    found = asyncio.run(visit())
    assert "images" in found[-1] and len(found) < 30, len(found)
