"""A run in the original's files: what it goes on from, what it leaves, and what it says when something is missing."""

import json
import shutil

import pytest
import torch

from iddpm.config import Config
from iddpm.errors import UserError
from iddpm.interop.openai.formats import files, flags
from iddpm.store.checkpoint import Saved
from iddpm.training.loop import train
from iddpm.training.state import TrainState
from interop.written import FLAGS, same, write

CONFIG = flags.to_config("images", FLAGS | {"ema_rate": "0.9,0.99", "batch_size": 8})
CPU = torch.device("cpu")


# ---- the original's files


@pytest.mark.parametrize("fp16", [False, True])
def test_a_run_of_the_originals_goes_on_with_its_optimizer_and_averages(tmp_path, fp16):
    source = write(tmp_path, fp16=fp16)
    saved, stored = files.load_run(source.model, CONFIG)
    assert stored is None
    assert same(saved.weights, source.weights)
    assert all(same(saved.averages[rate], average) for rate, average in source.averages.items())
    state = TrainState(CONFIG, CPU)
    state.restore(saved, CONFIG)
    assert state.step == 11
    assert all(torch.equal(p, source.weights[name]) for name, p in state.params.items())
    mine = torch.cat([state.optimizer.state[p]["exp_avg_sq"].flatten() for p in state.params.values()])
    assert torch.equal(mine, torch.cat([s["exp_avg_sq"].flatten() for s in source.optimizer.state.values()]))


def test_the_true_count_comes_from_the_optimizer_not_from_the_name(tmp_path):
    """The original's modelN holds N + 1 updates, but for a run's last file, which holds N."""
    for number, updates in ((2, 3), (4, 4)):
        source = write(tmp_path, number=number, updates=updates)
        saved, _ = files.load_run(source.model, CONFIG)
        assert (saved.step, saved.state["ema_updates"], saved.state["images"]) == (updates, updates, 8 * updates)


@pytest.mark.parametrize("name", ["latest.pt", "model_best.pt", "my_model.pt"])
def test_a_name_without_a_number_finds_optimizer_and_averages_by_the_only_optimizer(tmp_path, name):
    source = write(tmp_path)
    source.model.rename(tmp_path / name)
    saved, _ = files.load_run(tmp_path / name, CONFIG)
    assert saved.step == 11
    assert same(saved.averages[0.99], source.averages[0.99])


def test_a_name_without_a_number_among_several_optimizers_is_a_question(tmp_path):
    source = write(tmp_path)
    shutil.copy(source.model, tmp_path / "latest.pt")
    shutil.copy(tmp_path / "opt000010.pt", tmp_path / "opt000020.pt")
    with pytest.raises(UserError, match=r"which optimizer belongs to it, opt000010.pt, opt000020.pt\?"):
        files.load_run(tmp_path / "latest.pt", CONFIG)


def test_an_average_given_to_go_on_from_stands_for_its_run(tmp_path):
    source = write(tmp_path)
    saved, _ = files.load_run(tmp_path / "ema_0.99_000010.pt", CONFIG)
    assert same(saved.weights, source.weights)
    assert saved.step == 11


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ("model000010.pt", "opt000010.pt"),
        ("model000010.pt", "ema_0.9_000010.pt"),
        ("model000010.pt", "ema_0.99_000010.pt"),
        ("ema_0.9_000010.pt", "model000010.pt"),
        ("ema_0.9_000010.pt", "opt000010.pt"),
    ],
)
def test_a_missing_sibling_is_named_and_never_replaced(tmp_path, given, missing):
    write(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(UserError, match=f"^{missing} is missing beside"):
        files.load_run(tmp_path / given, CONFIG)


def test_a_rate_that_was_not_kept_is_named(tmp_path):
    source = write(tmp_path)
    with pytest.raises(UserError, match=r"ema_0.9999_000010.pt is missing .* --ema_rate 0.9999"):
        files.load_run(source.model, CONFIG.updated({"ema_rate": "0.9999"}))


def test_an_optimizer_is_no_place_to_go_on_from(tmp_path):
    write(tmp_path)
    with pytest.raises(UserError, match="optimizer's state"):
        files.load_run(tmp_path / "opt000010.pt", CONFIG)


# ---- ours

LAW = dict(schedule_sampler="loss-second-moment", diffusion_steps=6)


def names(folder):
    return sorted(p.name for p in folder.iterdir() if p.is_file())


@pytest.fixture(scope="module")
def whole(config, data, tmp_path_factory):
    """A run of 6 steps, and one of 4 that went on to 6, under the original's file names."""
    root = tmp_path_factory.mktemp("store")
    config = config.updated(dict(LAW, steps=6, save_interval=2))
    train(config, data, root / "once", store=files.Store(root / "once", None, config), say=lambda line: None)
    half = config.updated(dict(steps=4))
    train(half, data, root / "first", store=files.Store(root / "first", None, half), say=lambda line: None)
    resume = root / "first" / "model000004.pt"
    train(config, data, root / "second", store=files.Store(root / "second", resume, config), say=lambda line: None)
    return root, config


def test_a_run_leaves_the_originals_names_and_two_of_ours(whole):
    root, _ = whole
    at = [name for name in names(root / "once") if "000006" in name]
    assert at == sorted(
        [
            "model000006.pt",
            "ema_0.9_000006.pt",
            "ema_0.99_000006.pt",
            "opt000006.pt",
            "iddpm000006.json",
            "iddpm000006.safetensors",
        ]
    )


def test_the_files_hold_what_the_original_expects_of_them(whole, config):
    """Plain torch reads them into the network and its AdamW."""
    root, config = whole
    state = TrainState(config, CPU)
    weights = torch.load(root / "once" / "model000006.pt", weights_only=True)
    assert list(weights) == list(state.net.state_dict())
    state.net.load_state_dict(weights)
    optimizer = torch.optim.AdamW(state.net.parameters())
    optimizer.load_state_dict(torch.load(root / "once" / "opt000006.pt", weights_only=True))
    assert {int(s["step"]) for s in optimizer.state.values()} == {6}


def test_a_resumed_run_is_the_same_run_bit_for_bit(whole):
    root, _ = whole
    for name in ("model000006.pt", "ema_0.9_000006.pt", "ema_0.99_000006.pt"):
        assert same(files.read(root / "once" / name), files.read(root / "second" / name)), name
    ours = [json.loads((root / part / "iddpm000006.json").read_text())["state"] for part in ("once", "second")]
    assert dict(ours[0], seconds=0) == dict(ours[1], seconds=0)  # the time that each has taken
    assert ours[0]["images"] == 36
    once, second = (files.load_run(root / part / "model000006.pt")[0].optimizer for part in ("once", "second"))
    assert same(once, second)  # AdamW's moments, and the law's history


def test_the_record_brings_config_classes_scale_and_law_back(whole):
    root, config = whole
    saved, stored = files.load_run(root / "once" / "model000006.pt")
    assert stored == config
    assert stored.data.classes == ("across", "disc", "down")
    assert saved.optimizer["law.counts"].sum() > 0
    assert saved.state["law"] == ["losses", "counts"]
    scaled = saved._replace(step=7, state=saved.state | dict(lg_loss_scale=13.25, skipped=2))
    path = files.save_run(root / "more", config.updated({"precision": "fp16"}), scaled)
    back, _ = files.load_run(path)
    assert (back.state["lg_loss_scale"], back.state["skipped"]) == (13.25, 2)
    assert all(torch.equal(back.optimizer[k], v) for k, v in saved.optimizer.items())  # by way of one flat parameter
    assert len(torch.load(root / "more" / "opt000007.pt", weights_only=True)["state"]) == 1


@pytest.fixture
def copied(whole, tmp_path):
    root, config = whole
    shutil.copytree(root / "once", tmp_path / "copied")
    return tmp_path / "copied", config


@pytest.mark.parametrize("file", ["model000006.pt", "opt000006.pt", "ema_0.9_000006.pt", "iddpm000006.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_family_is_named(copied, file, damage):
    folder, config = copied
    content = bytearray((folder / file).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / file).write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    if damage == "gone":
        (folder / file).unlink()
    with pytest.raises(UserError, match=file):
        files.Store(folder, folder / "model000006.pt", config).newest()


def test_a_damaged_record_is_named(copied):
    folder, config = copied
    (folder / "iddpm000006.json").write_text("{")
    with pytest.raises(UserError, match=r"iddpm000006\.json is damaged"):
        files.Store(folder, folder / "model000006.pt", config).newest()


def test_a_model_of_the_originals_that_is_cut_short_is_named(tmp_path):
    source = write(tmp_path)
    source.model.write_bytes(source.model.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"model000010\.pt is cut short"):
        files.Store(tmp_path, source.model, CONFIG).newest()


def test_a_run_begins_where_no_file_is_named(tmp_path):
    write(tmp_path)
    assert files.Store(tmp_path, None, CONFIG).newest() == (None, [])


def test_a_failed_write_leaves_what_was_there(copied, monkeypatch):
    folder, config = copied
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    saved, _ = files.load_run(folder / "model000006.pt")

    def full(*args):
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="cannot write"):
        files.save_run(folder, config, saved._replace(step=8))
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before


def test_files_of_another_run_in_the_same_folder_lose_their_record_first(copied):
    """A record vouches for files by their digest: it must not outlive them, even for a moment."""
    folder, config = copied
    saved, _ = files.load_run(folder / "model000006.pt")
    changed = saved._replace(weights={k: v + 1 for k, v in saved.weights.items()})
    files.save_run(folder, config, changed)
    again, _ = files.load_run(folder / "model000006.pt")
    assert same(again.weights, {k: v + 1 for k, v in saved.weights.items()})


def test_the_start_of_a_run_is_saved_as_number_0(config, data, tmp_path):
    state = TrainState(config, CPU)
    files.Store(tmp_path, None, config).begin(config, state.tensors(), state.numbers())
    assert "model000000.pt" in names(tmp_path)
    saved, _ = files.load_run(tmp_path / "model000000.pt", config)
    assert isinstance(saved, Saved)
    assert saved.step == 0
    state.restore(saved, config)


def test_a_models_file_comes_with_the_classes_beside_it(whole):
    root, config = whole
    asked = config.updated({"classes": ()})
    weights = files.read_model(root / "once" / "ema_0.9_000006.pt", asked)
    assert weights.config.data.classes == ("across", "disc", "down")
    assert weights.about == {"step": 6, "ema_rate": 0.9}
    with pytest.raises(UserError, match="needs --learn_sigma True"):
        files.read_model(root / "once" / "model000006.pt", asked.updated({"learn_sigma": False}))


def test_weights_alone_get_no_optimizers_file(tmp_path, config):
    net = TrainState(config, CPU)
    saved = Saved(3, dict(net.params), {}, {}, dict(step=3, images=0, weights_only=True))
    files.save_run(tmp_path, Config.from_json(config.to_json()), saved)
    assert names(tmp_path) == ["iddpm000003.json", "model000003.pt"]
