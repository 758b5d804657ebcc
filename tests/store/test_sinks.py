"""What other programs are told is what the run's own log has, and they can do it no harm."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest

import iddpm
from conftest import TINY, flags
from iddpm.cli.main import main
from iddpm.config import Config
from iddpm.store import sinks
from iddpm.store.log import read_rows

ROOT = Path(__file__).parents[2]


class Kept:
    """Keeps what it is told."""

    told: ClassVar[list] = []

    def __init__(self, folder, run, step, config):
        type(self).told = [("opened", step, config["image_size"])]

    def row(self, step, values):
        self.told.append((step, values["loss"]))

    def close(self):
        self.told.append("closed")


class Slow(Kept):
    """Takes its time."""

    def row(self, step, values):
        time.sleep(0.4)
        super().row(step, values)


class Breaks(Kept):
    """Fails at its second row."""

    def row(self, step, values):
        super().row(step, values)
        if len(self.told) > 2:
            raise ConnectionError("the server went away")


@pytest.fixture(autouse=True)
def own(monkeypatch):
    from iddpm.config import choices

    monkeypatch.setattr(choices, "ADDED", dict(choices.ADDED))
    for kind in (Kept, Slow, Breaks):
        iddpm.add("log_to", kind, kind.__name__.lower())


def train(pictures, run, **more) -> int:
    return main(["train", str(pictures), "--run", str(run), *flags(**TINY | dict(class_cond=True) | more)])


def test_it_is_told_what_the_log_has_and_goes_on_with_the_run(pictures, tmp_path):
    assert train(pictures, tmp_path / "r", log_to="kept") == 0
    rows = [(row["step"], row["loss"]) for row in read_rows(tmp_path / "r") if "loss" in row]
    assert Kept.told == [("opened", 0, "8"), *rows, "closed"] and len(rows) == 4
    assert train(pictures, tmp_path / "r", log_to="kept", steps=6) == 0
    assert Kept.told[0] == ("opened", 4, "8") and [row[0] for row in Kept.told[1:-1]] == [5, 6]


def test_training_does_not_wait_for_it(pictures, tmp_path, monkeypatch):
    def at(name: str) -> list[float]:
        return [row["time"] for row in read_rows(tmp_path / name) if "loss" in row]

    assert train(pictures, tmp_path / "r", log_to="slow") == 0
    assert max(b - a for a, b in zip(at("r"), at("r")[1:])) < 0.4  # what it takes for one
    assert len(Slow.told) == 6  # and at the end it is waited for
    monkeypatch.setattr(sinks, "PATIENCE", 0.1)
    assert train(pictures, tmp_path / "s", log_to="slow") == 0


def test_one_that_fails_is_named_once_and_the_run_and_the_others_go_on(pictures, tmp_path, capsys):
    assert train(pictures, tmp_path / "r", log_to="breaks, kept") == 0
    assert capsys.readouterr().err.count("--log_to breaks is told nothing more: the server went away") == 1
    assert len(Breaks.told) == 3 and len(Kept.told) == 6


@pytest.mark.parametrize(
    ("name", "module", "says"),
    [
        ("wandb", "wandb", "needs its extra: pip install 'iddpm[wandb]'"),
        ("mlflow", "mlflow", "needs its extra: pip install 'iddpm[mlflow]'"),
        ("tensorboard", "tensorboardX", "needs its extra: pip install 'iddpm[tensorboard]'"),
        ("tensorbord", "", "is not one of: tensorboard, wandb, mlflow"),
    ],
)
def test_what_is_missing_is_one_line_before_the_training(pictures, tmp_path, capsys, monkeypatch, name, module, says):
    monkeypatch.setitem(sys.modules, module, None)
    assert train(pictures, tmp_path / "r", log_to=name) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "r" / "checkpoints").exists()


def test_a_config_of_before_is_read(run):
    stored = json.loads((run / "config.json").read_text())
    stored["train"].pop("log_to")
    stored["train"]["tensorboard"] = True
    assert Config.from_json(json.dumps(stored)).train.log_to == "tensorboard"


def test_a_run_is_known_again_and_none_in_its_place_is_taken_for_it(tmp_path):
    run = tmp_path / "r"
    run.mkdir()
    name = sinks.name_of(run, run)
    assert sinks.name_of(run, run) == name and name.isalnum()
    shutil.copytree(run, tmp_path / "copy")
    assert sinks.name_of(tmp_path / "copy", tmp_path / "copy") != name
    (tmp_path / "aside").mkdir()
    assert sinks.name_of(tmp_path / "aside", run) == name  # as of a remote run, whose log is written elsewhere
    shutil.rmtree(run)
    run.mkdir()
    assert sinks.name_of(run, run) != name


SCAN = """
import sys
from wandb.proto import wandb_internal_pb2

def records(content):  # LevelDB's log: blocks of 32 KiB, in them parts with a head of 7 bytes; 7 bytes before
    at, whole = 7, b""
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = int.from_bytes(content[at + 4:at + 6], "little"), content[at + 6]
        whole, at = whole + content[at + 7:at + 7 + size], at + 7 + size
        if kind in (1, 4):
            yield whole
            whole = b""

for path in sys.argv[1:]:
    for data in records(open(path, "rb").read()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            row = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            print(int(float(row["step"])), float(row["loss"]))
"""
READ = """
import sys
from mlflow import MlflowClient
client = MlflowClient(sys.argv[1])
runs = client.search_runs([client.get_experiment_by_name("iddpm").experiment_id])
assert len(runs) == 1 and runs[0].info.status == "FINISHED" and runs[0].data.params["image_size"] == "8", runs
for metric in client.get_metric_history(runs[0].info.run_id, "loss"):
    print(metric.step, metric.value)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_the_programs_themselves_hold_the_numbers(pictures, tmp_path, name):
    there = ROOT / ".venv" / "sinks"
    if not there.exists():
        pytest.skip("make test-slow installs wandb and mlflow")
    env = os.environ | {
        "PYTHONPATH": f"{ROOT / 'src'}:{there}", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline",
        "MLFLOW_TRACKING_URI": f"file://{tmp_path / 'mlflow'}", "MLFLOW_ALLOW_FILE_STORE": "true",
    }  # fmt: skip

    def python(*argv: object) -> str:
        done = subprocess.run([sys.executable, *map(str, argv)], env=env, text=True, capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    for steps in (3, 5):
        command = ["train", pictures, "--run", tmp_path / "r", *flags(**TINY | dict(class_cond=True, log_to=name, steps=steps))]
        python("-m", "iddpm", *command)
    if name == "wandb":
        told = python("-c", SCAN, *sorted((tmp_path / "r" / "wandb").glob("offline-*/*.wandb")))
    else:
        told = python("-c", READ, f"file://{tmp_path / 'mlflow'}")
    rows = [(row["step"], row["loss"]) for row in read_rows(tmp_path / "r") if "loss" in row]
    assert [(int(a), float(b)) for a, b in map(str.split, told.splitlines())] == rows and len(rows) == 5
