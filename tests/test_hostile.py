"""Whatever is in a file that a verb reads: it works, or it is refused in one line; it never hangs, and touches nothing else."""

import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostile import Room, furnished, outcome, spoil

MANY = settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module")
def whole(run: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return furnished(tmp_path_factory.mktemp("whole"), run, pictures).root


def attempt(whole: Path, at: Path, seed: int) -> str:
    """Damage one file of a copy, use it; returns what went wrong."""
    rng = np.random.default_rng(seed)
    shutil.rmtree(at, ignore_errors=True)
    shutil.copytree(whole, at)
    room = Room(at)
    files = room.files()
    path = files[int(rng.integers(len(files)))]
    how = spoil(path, rng)
    before = room.precious()
    name, argv = list(room.verbs().items())[int(rng.integers(len(room.verbs())))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # broken images are told
        fault = outcome(argv)
    if not fault and room.precious() != before:
        fault = "changed what lies beside the run"
    return f"{name}, {path.relative_to(at)} by {how}: {fault}" if fault else ""


def test_every_verb_takes_whole_files(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "room")
    for name, argv in Room(tmp_path / "room").verbs().items():
        assert outcome(argv) == "", name


@MANY
@given(seeds)
def test_damaged_files_are_taken_or_refused_in_one_line(whole: Path, tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    assert attempt(whole, tmp_path_factory.getbasetemp() / "spoilt", seed) == ""


@pytest.mark.slow
def test_two_thousand_damaged_files(whole: Path, tmp_path: Path) -> None:
    tries = range(int(os.environ.get("TRIES", "2000")))
    faults = [fault for seed in tries if (fault := attempt(whole, tmp_path / "spoilt", seed))]
    print(f"\n{len(tries)} damaged files: {len(faults)} neither taken nor refused in one line", *faults, sep="\n")
    assert faults == []
