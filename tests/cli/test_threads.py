"""Threads are as many as a container may use, whatever the machine has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from iddpm.cli import threads

CORES = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, CORES),
        ({"cpu.max": "max 100000\n"}, CORES),
        ({"cpu.max": "100000 100000\n"}, 1),
        ({"cpu.max": "20000 100000\n"}, 1),
        ({"cpu.max": f"{CORES * 100000 - 50000} 100000\n"}, CORES),
        ({"cpu.max": "9999900000 100000\n"}, CORES),
        ({"cpu.max": "what is this"}, CORES),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, CORES),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
    ],
)
def test_a_limit_of_the_container_is_kept(tmp_path, files, cores):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert threads.allowed(tmp_path) == cores


@pytest.mark.parametrize(("given", "expected"), [({}, "1 1"), ({"OMP_NUM_THREADS": "2"}, "2 ")])
def test_torch_takes_it_unless_the_user_has_said_otherwise(given, expected):
    code = "from iddpm.cli import threads; threads.allowed = lambda: 1; threads.os.cpu_count = lambda: 64; threads.settle()"
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP", "GOMP"))} | given
    env["PYTHONPATH"] = str(Path(__file__).parents[2] / "src")
    line = [sys.executable, "-c", f"{code}; import torch; print(threads.os.environ['OMP_NUM_THREADS'], torch.get_num_threads())"]
    assert subprocess.run(line, env=env, check=True, capture_output=True, text=True).stdout.startswith(expected)


def test_a_flag_wins_on_every_verb(launcher, tmp_path):
    code = "import torch; torch.set_num_threads(2)\ntry: entry()\nfinally: print(torch.get_num_threads())"
    command = ("data", "digits", tmp_path / "d", "--threads", "1")
    told = launcher.start(*command, said=tmp_path / "said", env={"OMP_NUM_THREADS": "2"}, program=code).succeed()
    assert told.splitlines()[-1:] == ["1"]


def test_no_threads_are_refused(capsys):
    from iddpm.cli.main import main

    assert main(["data", "digits", "nowhere", "--threads", "0"]) == 2
    assert "--threads 0: 1 or more" in capsys.readouterr().err
