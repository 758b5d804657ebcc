"""Checkpoints: complete or absent, never trusted blindly, never executable."""

import json
import pickle
import shutil

import pytest
import torch

from iddpm.errors import UserError
from iddpm.store import checkpoint
from iddpm.store import files as storage
from iddpm.store.weights import read_weights
from iddpm.training.loop import train


@pytest.fixture(scope="module")
def trained(config, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept") / "r"
    train(config.updated(dict(steps=6, save_interval=2, keep=2)), data, folder)
    return folder


@pytest.fixture
def saved(trained, tmp_path):
    """A run of its own for each test."""
    return shutil.copytree(trained, tmp_path, dirs_exist_ok=True)


def test_old_checkpoints_are_pruned(saved):
    assert [p.name for p in sorted((saved / "checkpoints").iterdir())] == ["step_00000004", "step_00000006"]


@pytest.mark.parametrize("file", ["weights.safetensors", "state/optimizer.safetensors", "state/state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_checkpoint_is_passed_over_and_named(saved, file, damage):
    path = saved / "checkpoints" / "step_00000006" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"cut": content[: len(content) // 2], "flip": content, "gone": b""}[damage])
    if damage == "gone":
        path.unlink()
    found, skipped = checkpoint.newest(saved)
    if (file, damage) == ("manifest.json", "flip") and not skipped:
        pytest.skip("the flipped bit lies in white space")
    assert found.name == "step_00000004"
    assert skipped[0].startswith("passed over step_00000006")


@pytest.mark.parametrize("name", ["/dev/zero", "state/../../step_00000004/weights.safetensors"])
def test_a_manifest_that_names_files_elsewhere_is_no_way_to_them(saved, name):
    path = saved / "checkpoints" / "step_00000006" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: [0, "0" * 64]}))
    found, skipped = checkpoint.newest(saved)
    assert found.name == "step_00000004" and "not to be trusted" in skipped[0]


def test_weights_carry_their_config_and_where_they_come_from(run, config):
    weights = read_weights(run)
    assert weights.path.name == "weights-ema-0.9.safetensors"
    assert weights.config.model == config.model
    assert weights.about["step"] == 4
    assert weights.about["ema_rate"] == 0.9


@pytest.mark.parametrize(("rate", "file"), [(0.99, "weights-ema-0.99"), (0, "weights")])
def test_the_average_asked_for_is_read(run, rate, file):
    assert read_weights(run, ema_rate=rate).path.stem == file


def test_what_is_missing_is_said_with_what_there_is(run, tmp_path):
    with pytest.raises(UserError, match="it has: 4"):
        read_weights(run, step=3)
    with pytest.raises(UserError, match=r"0\.9, 0\.99"):
        read_weights(run, ema_rate=0.5)
    with pytest.raises(UserError, match="no complete checkpoint"):
        read_weights(tmp_path)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def test_a_pickle_in_place_of_weights_is_refused_and_not_executed(tmp_path):
    file = tmp_path / "weights.safetensors"
    file.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="damaged or no"):
        read_weights(file)


def test_a_foreign_safetensors_file_is_named(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="not written by iddpm"):
        read_weights(tmp_path / "w.safetensors")


def test_a_save_that_fails_leaves_nothing_behind(saved, config, monkeypatch):
    before = sorted(p.name for p in (saved / "checkpoints").iterdir())

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "sha256", full)
    held = checkpoint.load(saved / "checkpoints" / "step_00000006")
    with pytest.raises(UserError, match="No space"):
        checkpoint.save(saved, config, held._replace(step=8, state=held.state | dict(step=8)))
    assert sorted(p.name for p in (saved / "checkpoints").iterdir()) == before


def test_deleting_a_checkpoint_that_is_a_link_leaves_what_it_leads_to(tmp_path):
    from iddpm.store.files import discard

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "manifest.json").write_text("years of work")
    (tmp_path / "step_00000001").symlink_to("mine")
    discard(tmp_path / "step_00000001")
    assert not (tmp_path / "step_00000001").is_symlink()
    assert (tmp_path / "mine" / "manifest.json").read_text() == "years of work"


def test_a_run_is_read_while_its_trainer_deletes_the_checkpoint_that_is_being_read(run, tmp_path, monkeypatch):
    import shutil

    from iddpm.store import weights

    folder = next((run / "checkpoints").glob("step_*"))
    for step in (4, 5):
        shutil.copytree(folder, tmp_path / "r" / "checkpoints" / f"step_{step:08d}")
    checked = weights.verify

    def verify(found, *only):
        fault = checked(found, *only)
        if found.name == "step_00000005":
            shutil.rmtree(found)
            shutil.copytree(folder, found.with_name("step_00000006"))
        return fault

    monkeypatch.setattr(weights, "verify", verify)
    assert weights.read_weights(tmp_path / "r").path.parent.name == "step_00000006"
