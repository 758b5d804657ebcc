"""Saving in the background: complete or absent, one at a time, and an error is told."""

import json
import threading

import pytest
import torch

from conftest import TINY, flags
from iddpm.errors import UserError
from iddpm.store import checkpoint, shards
from iddpm.store import files as storage
from iddpm.store.log import read_rows
from iddpm.training.loop import train
from iddpm.training.state import TrainState

CPU = torch.device("cpu")


@pytest.fixture
def state(config):
    state = TrainState(config, CPU)
    for p in state.params.values():
        p.grad = torch.full_like(p, 0.1)
    state.optimizer.step()
    return state


@pytest.fixture
def gate(monkeypatch):
    """Files are written only once it is set."""
    opened, write = threading.Event(), storage.write_tensors

    def waits(*args):
        assert opened.wait(30)
        return write(*args)

    monkeypatch.setattr(storage, "write_tensors", waits)
    yield opened
    opened.set()


def begin(folder, config, state, step):
    state.step = step
    return folder.begin(config, state.tensors(), state.numbers())


def test_a_save_keeps_the_state_of_its_moment_whatever_training_does_meanwhile(state, config, tmp_path, gate):
    folder = checkpoint.Folder(tmp_path, background=True)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    assert begin(folder, config, state, 1) is None
    state.optimizer.step()
    state.ema.update()
    assert folder.settle() is None and not storage.step_dirs(tmp_path)
    gate.set()
    assert folder.settle(wait=True) == tmp_path / "checkpoints" / "step_00000001"
    kept = checkpoint.load(storage.step_dir(tmp_path, 1)).tensors()
    assert kept.keys() == before.keys()
    assert all(torch.equal(kept[name], before[name]) for name in before)
    assert not all(torch.equal(kept[name], tensor) for name, tensor in state.tensors().items())


def test_a_save_waits_for_the_one_before_it(state, config, tmp_path, gate):
    folder = checkpoint.Folder(tmp_path, background=True)
    begin(folder, config, state, 1)
    threading.Timer(0.3, gate.set).start()
    assert begin(folder, config, state, 2) == storage.step_dir(tmp_path, 1)
    assert checkpoint.verify(storage.step_dir(tmp_path, 1)) is None
    assert folder.settle(wait=True) == storage.step_dir(tmp_path, 2)


def test_an_error_in_the_background_is_one_line_and_leaves_the_checkpoint_before_it(state, config, tmp_path, monkeypatch):
    folder = checkpoint.Folder(tmp_path, keep=1, background=True)
    begin(folder, config, state, 1)
    folder.settle(wait=True)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "commit", full)
    begin(folder, config, state, 2)
    with pytest.raises(UserError, match="step_00000002 could not be written: No space left on device; the checkpoint before it"):
        folder.settle(wait=True)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    assert checkpoint.newest(tmp_path) == (storage.step_dir(tmp_path, 1), [])


def test_training_is_the_same_with_and_without_background_saves(config, data, tmp_path):
    flat = dict(steps=6, save_interval=2, dropout=0.1)
    one, other = (train(config.updated(flat | dict(async_save=b)), data, tmp_path / str(b)) for b in (True, False))
    a, b = checkpoint.load(one), checkpoint.load(other)
    assert dict(a.state, seconds=0) == dict(b.state, seconds=0)
    assert all(torch.equal(t, b.tensors()[name]) for name, t in a.tensors().items())
    assert [p.name for p in storage.step_dirs(tmp_path / "True")] == [f"step_{k:08d}" for k in (2, 4, 6)]


def test_a_file_that_reads_back_differently_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "sha256", lambda path: "another")
    with pytest.raises(OSError, match="reads back differently"):
        storage.write_text(tmp_path / "a", "content")


def test_what_is_written_is_what_the_safetensors_library_reads(tmp_path):
    from safetensors.torch import load_file

    made = {
        "a": torch.linspace(-1, 1, 15).reshape(3, 5), "number": torch.tensor(7.0), "none": torch.zeros(0, 4),
        "half": torch.arange(5).bfloat16(), "wide": torch.arange(3), "odd": torch.tensor([True, False, True]),
        "steps": torch.arange(12.0).double().reshape(3, 4).T,
    }  # fmt: skip
    entry = storage.write_tensors(tmp_path / "a.safetensors", made, {"who": "me"})
    assert entry == storage.Entry((tmp_path / "a.safetensors").stat().st_size, storage.sha256(tmp_path / "a.safetensors"))
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == made.keys()
    assert all(read[k].dtype == t.dtype and torch.equal(read[k], t) for k, t in made.items())
    assert storage.metadata(tmp_path / "a.safetensors") == {"who": "me"}


def test_parts_in_any_layout_are_read_as_the_whole_and_as_other_parts(tmp_path):
    whole, entries = torch.arange(35.0).reshape(7, 5), {}
    for rank, (a, b) in enumerate([(0, 3), (3, 3), (3, 7)]):  # one is empty
        parts = {"state/x": {"w": shards.Part(whole[a:b], (a, 0), (7, 5))}}
        entries |= shards.write(tmp_path, parts, rank, lambda group: {})
    held = shards.tensors(tmp_path, entries)["state/x:w"]
    assert torch.equal(held[()], whole) and torch.equal(held[2:5, 1:3], whole[2:5, 1:3])
    made = shards.assemble(tmp_path, entries, "state/x", {})
    assert list(made) == ["state/x.safetensors"] == [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.safetensors")]
    assert torch.equal(shards.tensors(tmp_path, made)["state/x:w"], whole)
    entries = shards.write(tmp_path, parts, 2, lambda group: {})
    with pytest.raises(UserError, match="holds but a part of state/x:w"):
        shards.tensors(tmp_path, entries)


def test_what_is_not_there_or_has_another_shape_is_named():
    held = checkpoint.Saved.of({"weights:w": torch.zeros(2)}, {"step": 1})
    with pytest.raises(UserError, match="step 1 holds no v in weights"):
        held.fill({"weights:v": torch.zeros(2)})
    with pytest.raises(UserError, match=r"w in weights has the shape \(2,\), not \(3,\)"):
        held.fill({"weights:w": torch.zeros(3)})


def test_every_nth_checkpoint_and_the_best_are_kept(config, data, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best.json").write_text(json.dumps({"step": 2}))
    train(config.updated(dict(steps=8, save_interval=1, keep=2, keep_every=3)), data, tmp_path)
    assert [storage.step_of(p) for p in storage.step_dirs(tmp_path)] == [2, 3, 6, 7, 8]


def test_a_checkpoint_in_the_layout_before_this_one_is_read(run, config, tmp_path):
    """Without parts, one file state/optimizer.safetensors: written here by the library, as it was then."""
    from safetensors.torch import save_file

    held = checkpoint.load(checkpoint.newest(run)[0])
    folder = storage.step_dir(tmp_path, 4)
    (folder / "state").mkdir(parents=True)
    save_file(held.weights, folder / "weights.safetensors")
    save_file(held.averages[0.9], folder / "weights-ema-0.9.safetensors")
    save_file(held.averages[0.99], folder / "weights-ema-0.99.safetensors")
    save_file(held.optimizer, folder / "state" / "optimizer.safetensors")
    (folder / "state" / "state.json").write_text(json.dumps(held.state))
    files = {p.relative_to(folder).as_posix(): [p.stat().st_size, storage.sha256(p)] for p in folder.rglob("*") if p.is_file()}
    (folder / "manifest.json").write_text(json.dumps(files))
    state = TrainState(config, CPU)
    state.restore(checkpoint.Folder(tmp_path).newest()[0], config)
    assert all(torch.equal(t, held.tensors()[name]) for name, t in state.to_saved().tensors().items())


def test_weights_alone_are_nothing_to_go_on_from(config, run):
    held = checkpoint.load(checkpoint.newest(run)[0])
    alone = held._replace(optimizer={}, averages={}, state=dict(step=4, images=0, weights_only=True))
    with pytest.raises(UserError, match="--init_from"):
        TrainState(config, CPU).restore(alone, config)


# ---- real processes


def test_a_run_killed_while_it_saves_goes_on_from_the_checkpoint_before(launcher, pictures, tmp_path):
    """The kill comes once the folder of step 4 is there, aside."""
    command = ("train", pictures, "--run", tmp_path / "r", *flags(**dict(TINY, steps=1000, save_interval=2, keep=0)))
    process = launcher.start(*command, said=tmp_path / "said")
    aside = storage.aside(storage.step_dir(tmp_path / "r", 4))
    while not aside.exists():
        assert process.running()
    process.kill()
    assert process.wait() == [-9]
    found, _ = checkpoint.newest(tmp_path / "r")
    out = launcher.start("train", "--run", tmp_path / "r", "--steps", 6, said=tmp_path / "said").succeed()
    assert f"resuming {tmp_path / 'r'} at step {storage.step_of(found)}" in out
    assert f"took over {tmp_path / 'r'} from process {process.pids[0]}" in out
    assert not list((tmp_path / "r" / "checkpoints").glob(".step*"))
    rows = [r for r in read_rows(tmp_path / "r") if "event" not in r]
    assert [r["step"] for r in rows] == list(range(1, 7))
