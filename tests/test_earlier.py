"""Runs that earlier code made (earlier/make.py) go on, draw and are measured as they were by that code."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from earlier.make import (
    BOUNDS,
    EVERY,
    HERE,
    IMAGES,
    NUMBERS,
    RUNS,
    SAMPLES,
    has_gradient,
    kernels,
    pictures,
    resume,
    sha256,
    trained,
)
from iddpm.cli.main import main
from iddpm.diffusion import grid

EXPECTED = json.loads((HERE / "expected.json").read_text())
CHECKPOINT = "checkpoints/step_00000040"


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    with np.load(HERE / "expected.npz") as file:
        return dict(file)


def set_up(folder: Path) -> None:
    """Copies of the runs, and the images they were trained on."""
    for run in RUNS:
        shutil.copytree(HERE / run, folder / run)
    pictures(folder / IMAGES)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder of its own, in which the commands are given: the runs remember their images by a relative path."""
    set_up(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def is_refused(capsys, *argv: str) -> str:
    """Assert that a command ends with exit code 2 and one line, and return the line."""
    capsys.readouterr()
    assert main([*argv]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("iddpm: ")
    return line


# ---- as before


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> dict[str, np.ndarray]:
    """The weights and averages of each run after further steps, as vectors by RUN:FILE."""
    folder = tmp_path_factory.mktemp("resumed")
    set_up(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        # AdamW was not fused then: its sums are the same, rounded in another order.
        made = torch.optim.AdamW.__init__
        patch.setattr(torch.optim.AdamW, "__init__", lambda self, params, fused, **own: made(self, params, **own))
        for run in RUNS:
            assert main(resume(run)) == 0
    return {f"{run}:{name}": vector for run in RUNS for name, vector in trained(folder / run).items()}


@pytest.mark.parametrize("name", EXPECTED["weights"])
def test_an_earlier_run_goes_on_as_it_would_have_then(name, resumed, arrays):
    """On any CPU. Other kernels of torch add the same numbers in another order: measured, that moves a weight by up to 9e-8.

    A few weights (a bias before a norm of one channel per group, the bias of attention's keys) change nothing, so their gradient
    is nothing but rounding errors, and Adam makes steps of full length of these: such a weight is only held near its place.
    """
    difference = np.abs(resumed[name][::EVERY] - arrays[name])
    matters = has_gradient(HERE / name.partition(":")[0] / CHECKPOINT)[::EVERY]
    assert matters.mean() > 0.9
    assert difference[matters].max() <= 1e-6
    assert difference.max() <= 1e-2


@pytest.mark.parametrize("name", EXPECTED["weights"])
def test_an_earlier_run_goes_on_to_the_bit_where_the_arithmetic_is_the_same(name, resumed):
    """CPUs, and versions of torch, differ in their last bits. Whether these do is seen in layers of torch alone (`kernels`),
    so that it excuses nothing that this project's own code changes."""
    if kernels() != EXPECTED["kernels"]:
        pytest.skip("this machine's kernels round unlike those of the one where the runs were made (the test above holds here)")
    assert sha256(resumed[name]) == EXPECTED["weights"][name]


@pytest.mark.parametrize("name", SAMPLES)
def test_an_earlier_run_draws_the_images_it_drew_then(name, arrays, place, monkeypatch):
    monkeypatch.setattr(grid, "SEEN", 1.0)  # few steps began below noise then
    assert main([*SAMPLES[name], "--out", f"{name}.npz"]) == 0
    with np.load(place / f"{name}.npz") as file:
        assert file["arr_0"].dtype == np.uint8 and file["arr_0"].shape == arrays[name].shape
        assert np.abs(file["arr_0"].astype(int) - arrays[name]).max() <= 1


@pytest.mark.parametrize("name", BOUNDS)
def test_an_earlier_run_has_the_bits_per_dim_it_had_then(name, place):
    assert main([*BOUNDS[name], "--out", f"{name}.json"]) == 0
    measured = json.loads((place / f"{name}.json").read_text())
    for key in NUMBERS:
        assert measured[key] == pytest.approx(EXPECTED["nll"][name][key], abs=1e-4), key


# ---- what cannot be read


USES = [resume("classes"), SAMPLES["classes-ancestral"], BOUNDS["classes"]]
each_use = pytest.mark.parametrize("argv", USES, ids=lambda argv: argv[0])


def rewrite_configs(run: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change a run's config everywhere: in config.json, and in the head of each file of weights. The checkpoint stays whole."""
    stored = run / "config.json"
    stored.write_text(json.dumps(change(json.loads(stored.read_text()))))
    checkpoint = run / CHECKPOINT
    for path in checkpoint.glob("weights*.safetensors"):
        with safe_open(path, "pt") as file:
            head = file.metadata()
        save_file(load_file(path), path, head | {"config": json.dumps(change(json.loads(head["config"])))})
    manifest = checkpoint / "manifest.json"
    contents = {name: (checkpoint / name).read_bytes() for name in json.loads(manifest.read_text())}
    manifest.write_text(json.dumps({name: [len(b), hashlib.sha256(b).hexdigest()] for name, b in contents.items()}))


@each_use
def test_a_config_written_anew_as_it_was_is_read(argv, place):
    """Otherwise the next tests would only show that the copies are broken."""
    rewrite_configs(place / "classes", lambda raw: raw)
    assert main([*argv]) == 0


@each_use
def test_a_field_of_a_newer_version_is_named(argv, place, capsys):
    rewrite_configs(place / "classes", lambda raw: raw | {"model": raw["model"] | {"warp_factor": 9}})
    line = is_refused(capsys, *argv)
    assert "warp_factor" in line and "newer iddpm" in line


@each_use
def test_a_config_of_a_newer_version_is_refused(argv, place, capsys):
    rewrite_configs(place / "classes", lambda raw: raw | {"version": 999})
    line = is_refused(capsys, *argv)
    assert "999" in line and "newer iddpm" in line


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_config_that_is_none_is_one_line(text, place, capsys):
    (place / "classes" / "config.json").write_text(text)
    assert "config.json" in is_refused(capsys, *resume("classes"))
    assert main(SAMPLES["classes-ancestral"]) == 0  # weights bring their config along


def damage(path: Path) -> None:
    """Change one bit in the midst of a file, where only the sum in the manifest tells."""
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    path.write_bytes(content)


each_file = pytest.mark.parametrize(
    "file", ["weights.safetensors", "weights-ema-0.9.safetensors", "state/optimizer.safetensors", "state/state.json"]
)


@each_file
@pytest.mark.parametrize("argv", USES[1:], ids=lambda argv: argv[0])
def test_one_damaged_byte_is_one_line(argv, file, place, capsys):
    """The run has no other checkpoint to go back to."""
    damage(place / "classes" / CHECKPOINT / file)
    assert f"{file} is damaged" in is_refused(capsys, *argv)


@each_file
def test_a_run_with_one_damaged_byte_is_not_begun_anew(file, place, capsys):
    damage(place / "classes" / CHECKPOINT / file)
    assert f"{file} is damaged" in is_refused(capsys, *resume("classes"))
    assert [path.name for path in (place / "classes" / "checkpoints").iterdir()] == ["step_00000040"]
