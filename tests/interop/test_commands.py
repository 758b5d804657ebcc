"""The original's commands: its flags, its files, its environment variables; and what was mended."""

import csv
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import flags
from iddpm.cli.flags import Parser
from iddpm.cli.main import VERBS, main
from iddpm.interop.openai.formats import flags as original

MODEL = dict(image_size=32, num_channels=32, num_res_blocks=1, learn_sigma=True, class_cond=True, diffusion_steps=20,
             noise_schedule="cosine")  # fmt: skip
TRAIN = dict(batch_size=4, lr=1e-3, save_interval=2, log_interval=1, ema_rate="0.9,0.99", lr_anneal_steps=5, device="cpu")
SMALL = {k: v for k, v in MODEL.items() if k != "image_size"} | dict(large_size=64, small_size=32)
JUDGE = dict(image_size=64, classifier_width=64, classifier_depth=1, classifier_attention_resolutions="16", diffusion_steps=20,
             noise_schedule="cosine", device="cpu")  # fmt: skip


def rows(folder: Path) -> list[dict[str, str]]:
    """progress.csv."""
    return list(csv.DictReader((folder / "progress.csv").read_text().splitlines()))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """14 colour images named CLASS_NUMBER.png, of three classes."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for k in range(14):
        pixels = rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{('ant', 'bee', 'cow')[k % 3]}_{k:02d}.png")
    return root


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, command: str, **settings: object) -> int:
    monkeypatch.setenv("OPENAI_LOGDIR", str(folder))
    return main([command, *flags(**settings)])


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory) -> Path:
    """The log folder of five steps of image_train. Read it; do not change it."""
    folder = tmp_path_factory.mktemp("log") / "log"
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, folder, "image_train", data_dir=images, **MODEL, **TRAIN) == 0
    return folder


@pytest.mark.parametrize("name", original.COMMANDS["guided"])
def test_every_flag_of_the_original_has_its_name_and_default(name):
    program = "guided" if name.startswith("classifier") else "improved"
    parser = Parser(prog=f"iddpm {name}")
    VERBS[name].parser(parser)
    given = parser.read([])
    assert {k: given[k] for k in original.COMMANDS[program][name]} == original.COMMANDS[program][name]


def test_training_leaves_the_originals_files(trained):
    numbers = ("000000", "000002", "000004", "000005")
    names = {f"{kind}{n}.pt" for n in numbers for kind in ("model", "opt", "ema_0.9_", "ema_0.99_")}
    assert {p.name for p in trained.glob("*.pt")} == names
    assert "samples" not in os.listdir(trained)
    table = rows(trained)
    assert [int(r["step"]) for r in table] == [1, 2, 3, 4, 5]
    assert [int(r["samples"]) for r in table] == [4, 8, 12, 16, 20]
    pattern = re.compile(r"grad_norm|(loss|mse|vb)(_q[0-3])?|samples|step")
    assert all(pattern.fullmatch(name) for name in table[0]), list(table[0])
    assert "3 classes (ant, bee, cow)" in (trained / "log.txt").read_text()
    state = torch.load(trained / "model000005.pt", weights_only=True)
    assert state["label_emb.weight"].shape == (1000, 128)
    assert torch.load(trained / "opt000005.pt", weights_only=True)["state"][0]["step"] == 5


def test_a_folder_with_checkpoints_is_not_overwritten(trained, images, monkeypatch, capsys):
    before = {p.name: p.stat().st_mtime_ns for p in trained.iterdir()}
    assert run(monkeypatch, trained, "image_train", data_dir=images, **MODEL, **TRAIN) == 2
    assert "--resume_checkpoint" in capsys.readouterr().err
    after = {p.name: p.stat().st_mtime_ns for p in trained.glob("*.pt")}
    assert after == {name: time for name, time in before.items() if name.endswith(".pt")}


def test_resuming_goes_on_bit_for_bit(trained, images, monkeypatch, tmp_path):
    for path in trained.iterdir():
        if "000002" in path.name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    settings = TRAIN | dict(resume_checkpoint=tmp_path / "model000002.pt")
    assert run(monkeypatch, tmp_path, "image_train", data_dir=images, **MODEL, **settings) == 0
    for name in ("model000005.pt", "ema_0.9_000005.pt", "ema_0.99_000005.pt"):
        one, two = (torch.load(folder / name, weights_only=True) for folder in (trained, tmp_path))
        assert all(torch.equal(one[k], two[k]) for k in one), name


def test_without_an_end_it_says_so_and_steps_may_be_given(images, monkeypatch, tmp_path):
    settings = TRAIN | dict(lr_anneal_steps=0, steps=1)
    assert run(monkeypatch, tmp_path / "a", "image_train", data_dir=images, **MODEL, **settings) == 0
    assert (tmp_path / "a" / "model000001.pt").exists()
    monkeypatch.setenv("DIFFUSION_TRAINING_TEST", "1")
    monkeypatch.setenv("DIFFUSION_BLOB_LOGDIR", str(tmp_path / "blobs"))
    assert run(monkeypatch, tmp_path / "b", "image_train", data_dir=images, **MODEL, **TRAIN | dict(lr_anneal_steps=0)) == 0
    assert {p.name for p in (tmp_path / "blobs").glob("model*.pt")} == {"model000000.pt", "model000002.pt"}
    assert "until it is stopped" not in (tmp_path / "b" / "log.txt").read_text()  # the test variable ends it


def test_samples_and_labels_are_the_trained_classes_alone(trained, monkeypatch, tmp_path):
    """Of 1000 rows of the embedding, three were trained: no other is drawn, and every run of the command draws the same."""
    arrays = []
    for folder, size in (("a", 3), ("b", 5)):
        settings = dict(model_path=trained / "ema_0.9_000005.pt", num_samples=7, batch_size=size, timestep_respacing=4)
        assert run(monkeypatch, tmp_path / folder, "image_sample", **MODEL, **settings, device="cpu") == 0
        with np.load(tmp_path / folder / "samples_7x32x32x3.npz") as file:
            arrays.append(file["arr_0"].astype(int))
            assert file["arr_0"].dtype == np.uint8 and file["arr_1"].dtype == np.int64
            assert set(file["arr_1"].tolist()) <= {0, 1, 2}
    assert abs(arrays[0] - arrays[1]).max() <= 1
    settings |= dict(use_ddim=True, timestep_respacing="ddim4", seed=3)
    assert run(monkeypatch, tmp_path / "c", "image_sample", **MODEL, **settings, device="cpu") == 0


def test_nll_measures_each_image_once_and_writes_the_originals_tables(trained, images, monkeypatch, tmp_path):
    settings = dict(model_path=trained / "model000005.pt", data_dir=images, batch_size=5, timestep_respacing=4, device="cpu")
    assert run(monkeypatch, tmp_path, "image_nll", **MODEL, **settings) == 0
    result = json.loads((tmp_path / "nll.json").read_text())
    assert result["images"] == 14
    with np.load(tmp_path / "vb_terms.npz") as file:
        vb = file["arr_0"]
    assert vb.shape == (4,) and vb[-1] == pytest.approx(result["decoder"], rel=1e-5)  # t = 0 comes last
    assert vb.sum() + result["prior"] == pytest.approx(result["bits_per_dim"], rel=1e-5)
    assert {"mse_terms.npz", "xstart_mse_terms.npz"} <= set(os.listdir(tmp_path))


def test_super_resolution_keeps_labels_and_enlarges_each_image_once(images, monkeypatch, tmp_path, capsys):
    settings = TRAIN | dict(lr_anneal_steps=1, batch_size=2)
    assert run(monkeypatch, tmp_path, "super_res_train", data_dir=images, **SMALL, **settings) == 0
    base = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "base.npz", base, np.array([2, 0, 1]))
    settings = dict(model_path=tmp_path / "model000001.pt", base_samples=tmp_path / "base.npz", timestep_respacing=2)
    assert run(monkeypatch, tmp_path, "super_res_sample", **SMALL, **settings, use_ddim=True, device="cpu") == 0
    assert "holds 3 images: each is enlarged once" in capsys.readouterr().out
    with np.load(tmp_path / "samples_3x64x64x3.npz") as file:
        assert file["arr_0"].shape == (3, 64, 64, 3) and file["arr_1"].tolist() == [2, 0, 1]


def test_a_classifier_is_trained_and_guides(images, monkeypatch, tmp_path):
    settings = dict(iterations=2, batch_size=2, log_interval=1, save_interval=1, eval_interval=1, val_data_dir=tmp_path / "val")
    (tmp_path / "val").mkdir()
    for path in sorted(images.iterdir())[::4]:
        (tmp_path / "val" / path.name).write_bytes(path.read_bytes())
    judge, model = tmp_path / "judge", tmp_path / "model"
    assert run(monkeypatch, judge, "classifier_train", data_dir=images, **JUDGE, **settings) == 0
    assert {p.name for p in judge.glob("*.pt")} == {
        f"{k}{n}.pt" for k in ("model", "opt") for n in ("000000", "000001", "000002")
    }
    assert {"train_loss", "train_acc@1", "train_acc@5", "val_loss", "val_acc@1"} <= set(rows(judge)[0])
    guided = MODEL | dict(image_size=64, rescale_timesteps=False, rescale_learned_sigmas=False, class_cond=False)
    assert run(monkeypatch, model, "image_train", data_dir=images, **guided, **TRAIN | dict(lr_anneal_steps=1)) == 0
    settings = dict(model_path=model / "model000001.pt", classifier_path=judge / "model000002.pt", timestep_respacing=2)
    assert run(monkeypatch, tmp_path, "classifier_sample", **guided | JUDGE | settings, num_samples=2) == 0
    with np.load(tmp_path / "samples_2x64x64x3.npz") as file:
        assert set(file["arr_1"].tolist()) <= {0, 1, 2}


def test_two_processes_train_the_run_of_one_with_batches_of_their_own(launcher, images, trained, tmp_path):
    """batch_size is each process's: two of 2 are one of 4."""
    line = ("image_train", *flags(data_dir=images, **MODEL, **TRAIN | dict(batch_size=2)))
    env = {"OPENAI_LOGDIR": str(tmp_path / "log")}
    launcher.start(*line, said=tmp_path / "said", processes=2, env=env).succeed()
    losses = [[float(r["loss"]) for r in rows(folder)] for folder in (trained, tmp_path / "log")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert (tmp_path / "log" / "log-rank001.txt").exists()


@pytest.mark.parametrize(
    ("command", "settings", "words"),
    [
        ("image_train", dict(MODEL), "--data_dir FOLDER"),
        ("image_sample", dict(MODEL), "--model_path FILE"),
        ("image_sample", dict(MODEL, model_path="TRAINED/opt000005.pt"), "give model000005.pt"),
        ("image_sample", dict(MODEL, model_path="TRAINED/model000005.pt", num_channels=64), "--num_channels 32"),
        ("image_sample", dict(MODEL, model_path="TRAINED/model000005.pt", learn_sigma=False), "--learn_sigma True"),
        ("image_sample", dict(MODEL, model_path="TRAINED/progress.csv"), "no file of torch.save"),
        ("image_sample", dict(MODEL, model_path="TRAINED/model000009.pt"), "no such file"),
        ("image_train", dict(MODEL, data_dir="IMAGES", resume_checkpoint="TRAINED/model000009.pt", **TRAIN), "no such file"),
        ("super_res_sample", dict(SMALL, model_path="TRAINED/model000005.pt"), "not a super-resolution model"),
        ("image_sample", dict(MODEL, modelpath="x"), "--model_path"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_clear_line(command, settings, words, trained, images, monkeypatch, tmp_path, capsys):
    places = {"TRAINED": str(trained), "IMAGES": str(images)}
    for name, value in settings.items():
        for short, place in places.items():
            if isinstance(value, str):
                settings = settings | {name: (value := value.replace(short, place))}
    assert run(monkeypatch, tmp_path / "log", command, **settings) == 2
    err = capsys.readouterr().err.strip()
    assert words in err and len(err.splitlines()) == 1
