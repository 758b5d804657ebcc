"""Whose images and whose run: what a run remembers, says and refuses when it is gone on with."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import TINY, flags
from iddpm.cli.main import main
from iddpm.config import Config
from iddpm.store.log import read_rows
from iddpm.store.weights import read_weights

SMALL = {k: v for k, v in TINY.items() if k not in ("steps", "learn_sigma")} | dict(num_channels=8, num_heads=1, batch_size=4)


def pictures(folder: Path, count: int, seed: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for k in range(count):
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(folder / f"{k:03d}.png")
    return folder


def train(capsys: pytest.CaptureFixture[str], *args: object, **settings: object) -> tuple[int, str]:
    """Run the verb; settings given twice count as the last."""
    code = main(["train", *map(str, args), *flags(**settings)])
    told = capsys.readouterr()
    return code, told.out + told.err


def stored(run: Path) -> Config:
    return Config.from_json((run / "config.json").read_text())


@pytest.fixture
def begun(tmp_path, monkeypatch, capsys):
    """A run on DATA, of 3 steps, begun with a relative path; and its first command."""
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "d", 12, 0)
    assert train(capsys, "d", "--run", "r", **SMALL, steps=3)[0] == 0
    return tmp_path


def test_the_same_images_are_no_news(begun, capsys):
    code, said = train(capsys, "--run", "r", steps=5)
    assert code == 0 and "images are not those" not in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: pictures(d, 15, 0), "12 before, 15 now; other names, sizes, contents"),
        (lambda d: pictures(d, 12, 7), "other contents"),
        (lambda d: (d / "003.png").unlink(), "12 before, 11 now"),
        (lambda d: (d / "labels.csv").write_text("".join(f"{k:03d}.png,{'ab'[k % 2]}\n" for k in range(12))), "other labels"),
    ],
    ids=["more", "others", "fewer", "labelled"],
)
def test_other_images_are_told_and_logged(begun, capsys, change, said):
    change(begun / "d")
    code, out = train(capsys, "--run", "r", steps=5)
    (line,) = [line for line in out.splitlines() if "the images are not those of before" in line]
    assert code == 0 and said in line
    assert line in [row.get("event") for row in read_rows(begun / "r")]
    assert "not those of before" not in train(capsys, "--run", "r", steps=6)[1]  # once


def test_a_run_that_is_a_file_is_refused_and_a_rate_of_nothing_is_told(begun, capsys):
    (begun / "file").write_text("x")
    code, said = train(capsys, "d", "--run", "file")
    assert code == 2 and "is a file: give a folder" in said
    assert "--lr 0: nothing is learned" in train(capsys, "--run", "r", steps=4, lr=0)[1]


def test_a_run_finds_its_images_from_any_folder(begun, capsys, monkeypatch):
    pictures(begun / "else" / "d", 5, 9)
    monkeypatch.chdir(begun / "else")
    code, said = train(capsys, "--run", "../r", steps=5)
    assert code == 0 and said.startswith("12 images")
    assert stored(begun / "r").data.path == str(begun / "d")


def test_without_run_every_command_and_every_set_of_images_has_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for k, name in enumerate(("one", "two")):
        pictures(tmp_path / name / "data" / "train", 8, k)
    first = ("one/data/train", *flags(**SMALL, steps=2))
    assert train(capsys, *first)[0] == train(capsys, "two/data/train", **SMALL, steps=2)[0] == 0
    assert sorted(os.listdir("runs")) == ["data-train", "data-train-2"]
    code, said = train(capsys, "one/data/train", **{**SMALL, "lr": 0.5}, steps=2)
    assert code == 0 and "to go on with that: --run runs/data-train" in said
    assert sorted(os.listdir("runs")) == ["data-train", "data-train-2", "data-train-3"]
    assert "is at step 2 of 2 already" in train(capsys, *first)[1]  # the same command is the same run


def test_a_config_in_the_folder_is_used_and_changes_are_told(begun, capsys):
    (begun / "new").mkdir()
    shutil.copy(begun / "r" / "config.json", begun / "new")
    code, said = train(capsys, "d", "--run", "new", steps=2)
    assert code == 0 and "changed on resume: steps 3 -> 2" in said
    assert stored(begun / "new").model == stored(begun / "r").model
    assert train(capsys, "d", "--run", "new", image_size="16")[0] == 2  # as of any run


def test_a_run_begins_as_another_did(begun, capsys):
    other = pictures(begun / "other", 9, 3)
    code, said = train(capsys, other, "--run", "b", "--config", "r/config.json", steps=2)
    assert code == 0 and said.startswith("9 images")
    made, source = stored(begun / "b"), stored(begun / "r")
    assert (made.model, made.diffusion, made.sample) == (source.model, source.diffusion, source.sample)
    assert (made.data.path, made.train.steps) == (str(other), 2)


@pytest.mark.parametrize(("batch", "steps"), [(8, 8), (2, 15), (3, 12)])
def test_images_are_counted_whatever_the_batch_becomes(begun, capsys, batch, steps):
    assert train(capsys, "--run", "r", images=20, steps=0)[0] == 0  # 5 steps of 4
    assert train(capsys, "--run", "r", images=40, batch_size=batch)[0] == 0
    last = [row for row in read_rows(begun / "r") if "images" in row][-1]
    assert 40 <= last["images"] < 40 + batch and last["step"] == steps


def test_a_lengthened_schedule_says_how_the_rate_changes(begun, capsys):
    assert train(capsys, "d", "--run", "a", **{**SMALL, "lr": 1e-3}, steps=4, lr_anneal_steps=-1)[0] == 0
    said = train(capsys, "--run", "a", steps=8)[1]
    assert "learning rate from step 4 on: 0.0005, and 0 by the settings before" in said
    assert "learning rate" not in train(capsys, "--run", "a", keep=5)[1]


@pytest.mark.parametrize("path", ["d", "d/", "./d", "../{here}/d", "link"])
def test_held_out_images_must_not_be_trained_on(begun, capsys, path):
    (begun / "link").symlink_to("d")
    code, said = train(capsys, "d", "--run", "v", "--validation", path.format(here=begun.name), **SMALL, steps=2)
    assert code == 2 and ("also trained on" in said or "what the run is trained on" in said)
    assert not (begun / "v").exists()


def test_held_out_images_inside_of_the_trained_ones_and_copies_are_found(begun, capsys):
    pictures(begun / "d" / "val", 4, 1)
    shutil.copytree(begun / "d", begun / "copy")
    for path, count in (("d/val", 4), ("copy", 16)):
        code, said = train(capsys, "d", "--run", "v", "--validation", path, **SMALL, steps=2)
        assert code == 2 and f"{count} of the held-out images are also trained on" in said


def test_a_tilde_is_the_home(begun, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(begun / "home"))
    assert train(capsys, "d", "--run=~/x", **SMALL, steps=1)[0] == 0
    assert (begun / "home" / "x" / "config.json").exists() and not Path("~").exists()


def test_a_refused_flag_leaves_no_folder_and_is_not_stored(begun, capsys):
    assert train(capsys, "d", "--run", "n", **SMALL, steps=1, validation="nowhere")[0] == 2
    assert not (begun / "n").exists()
    before = (begun / "r" / "config.json").read_text()
    assert train(capsys, "--run", "r", steps=9, validation="nowhere")[0] == 2
    assert (begun / "r" / "config.json").read_text() == before


# ---- weights that are worth nothing


def test_diverged_weights_do_not_take_the_place_of_good_ones(begun, capsys):
    assert train(capsys, "--run", "r", steps=12, save_interval=2, keep=2)[0] == 0
    code, said = train(capsys, "--run", "r", steps=200, lr=1e3)
    assert code == 2 and "not saved: no finite gradient in the last" in said
    assert "the checkpoint of step 12 is whole" in said.splitlines()[-1]
    code, said = train(capsys, "--run", "r", steps=20, lr=1e-6, grad_clip=1)
    assert code == 0, said


def test_nothing_is_called_whole_where_nothing_is_saved(begun, capsys):
    code, said = train(capsys, "d", "--run", "n", **{**SMALL, "lr": 1e3}, steps=200)
    assert code == 2 and "no checkpoint is saved yet" in said


def test_a_loss_far_above_the_first_is_not_saved(begun, capsys, monkeypatch):
    from iddpm.training import state

    monkeypatch.setattr(state, "DIVERGED", 1e-3)
    code, said = train(capsys, "d", "--run", "n", **SMALL, steps=6)
    assert code == 2 and "at the beginning: lower --lr" in said


@pytest.mark.parametrize("kill_at", [6, 9])
def test_the_losses_after_a_kill_between_two_lines_are_those_of_the_run_left_alone(begun, capsys, kill_at):
    settings = SMALL | dict(save_interval=3, log_interval=5, keep=0, steps=20)
    assert train(capsys, "d", "--run", "a", **settings)[0] == 0
    shutil.copytree("a", "b")
    for folder in (begun / "b" / "checkpoints").glob("step_*"):
        if int(folder.name[5:]) > kill_at:
            shutil.rmtree(folder)
    assert train(capsys, "--run", "b")[0] == 0
    first, again = ({r["step"]: r["loss"] for r in read_rows(begun / run) if "loss" in r} for run in "ab")
    assert first == again


def test_the_log_is_strict_json_and_names_what_is_not_finite(begun, capsys):
    train(capsys, "d", "--run", "n", **{**SMALL, "lr": 1e3}, steps=200)
    lines = (begun / "n" / "log.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in lines]
    bad = [row for row in rows if "not_finite" in row]
    assert bad and all(row[name] is None for row in bad for name in row["not_finite"])


# ---- fine-tuning on other classes


@pytest.mark.parametrize(
    ("names", "kept", "anew"), [("ab", "ab", ""), ("abcd", "ab", "c, d"), ("bx", "b", "x"), ("xy", "", "x, y"), ("ba", "ab", "")]
)
def test_the_rows_of_classes_go_by_their_names(tmp_path, monkeypatch, capsys, names, kept, anew):
    monkeypatch.chdir(tmp_path)

    def folder(name: str, classes: str) -> Path:
        for k, c in enumerate(classes):
            pictures(tmp_path / name / c, 3, k)
        return tmp_path / name

    assert train(capsys, folder("first", "ab"), "--class_cond", "--run", "a", **SMALL, steps=3)[0] == 0
    code, said = train(
        capsys, folder("second", names), "--class_cond", "--run", "b", "--init_from", "a", **{**SMALL, "lr": 0}, steps=1
    )
    assert code == 0 and (f"anew: the classes {anew}" in said) == bool(anew), said
    first, second = read_weights(tmp_path / "a"), read_weights(tmp_path / "b", ema_rate=0)
    rows, old = second.tensors["label_emb.weight"], first.tensors["label_emb.weight"]
    for c in kept:
        assert torch.equal(rows[second.config.data.classes.index(c)], old[first.config.data.classes.index(c)])
    for c in names:
        if c not in kept:
            assert not any(torch.equal(rows[second.config.data.classes.index(c)], row) for row in old)
