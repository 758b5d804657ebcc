"""`iddpm nll` as a user meets it: what it writes, two runs compared, labels, and one line for whatever cannot work."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import TINY, flags
from iddpm import checkpoint
from iddpm.cli import main
from iddpm.state import TrainState
from iddpm.verbs.nll import _open_images


def nll(*argv, **settings):
    return main(["nll", *map(str, argv), *flags(**dict(device="cpu", sampling_steps=3) | settings)])


def untrained(config, folder, **flat):
    """A run's folder with weights that were never trained, and not zero either."""
    config = config.updated(flat)
    state = TrainState(config, torch.device("cpu"))
    torch.manual_seed(0)
    for p in state.params.values():
        torch.nn.init.normal_(p, std=0.05)
    checkpoint.save(folder, config, state.to_saved())
    return folder


def columns(path):
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def test_the_numbers_of_each_image_are_there_with_its_name_and_class(run, pictures, tmp_path, capsys):
    for name in ("a.csv", "a.npz"):
        assert nll(run, pictures, num_samples=9, seed=4, out=tmp_path / "n.json", per_image=tmp_path / name) == 0
    result, arrays = json.loads((tmp_path / "n.json").read_text()), columns(tmp_path / "a.npz")
    with open(tmp_path / "a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["name", "label", "bits_per_dim", "prior", "decoder"]
    assert [r["name"] for r in rows] == arrays["name"].tolist() == sorted(arrays["name"])
    for k, row in enumerate(rows):
        assert (pictures / row["name"]).is_file()
        assert row["label"] == row["name"].split("/")[0] == arrays["classes"][arrays["label"][k]]
        assert float(row["bits_per_dim"]) == arrays["bits_per_dim"][k]
    assert len(set(arrays["name"])) == 9
    for column, mean, error in (
        ("bits_per_dim", "bits_per_dim", "standard_error"),
        ("prior", "prior", "prior_error"),
        ("decoder", "decoder", "decoder_error"),
    ):
        assert arrays[column].mean() == pytest.approx(result[mean], rel=1e-12)
        assert arrays[column].std(ddof=1) / 3 == pytest.approx(result[error], rel=1e-9)
    assert result["decoder"] == pytest.approx(result["vb"][0], rel=1e-12)
    assert result["bits_per_dim"] == pytest.approx(result["prior"] + sum(result["vb"]), rel=1e-9)
    assert result["kept_steps"] == [0, 10, 19] and result["respaced"] is True
    assert "respaced to 3 steps (9 images; prior" in capsys.readouterr().out


def test_two_runs_are_compared_image_by_image(run, config, pictures, tmp_path, capsys):
    other = untrained(config, tmp_path / "other", class_cond=False, sampling_steps="4")
    assert nll(run, pictures, out=tmp_path / "b.json", per_image=tmp_path / "b.npz", against=other) == 0
    assert "difference " in capsys.readouterr().out
    for name, source in (("one", run), ("two", other)):
        assert nll(source, pictures, out=tmp_path / f"{name}.json", per_image=tmp_path / f"{name}.npz") == 0
    one, two, both = (columns(tmp_path / f"{name}.npz") for name in ("one", "two", "b"))
    assert np.array_equal(one["name"], two["name"]) and np.array_equal(one["name"], both["name"])
    assert np.array_equal(both["bits_per_dim"], one["bits_per_dim"]) and np.array_equal(both["against"], two["bits_per_dim"])
    difference = one["bits_per_dim"] - two["bits_per_dim"]
    assert np.array_equal(both["difference"], difference)
    result = json.loads((tmp_path / "b.json").read_text())
    assert result["against"]["bits_per_dim"] == json.loads((tmp_path / "two.json").read_text())["bits_per_dim"]
    assert result["against"]["difference"] == pytest.approx(difference.mean(), rel=1e-12)
    assert result["against"]["difference_error"] == pytest.approx(difference.std(ddof=1) / 22**0.5, rel=1e-12)


def test_a_run_against_itself_differs_by_nothing_with_no_error(run, pictures, tmp_path):
    assert nll(run, pictures, out=tmp_path / "n.json", against=run) == 0
    against = json.loads((tmp_path / "n.json").read_text())["against"]
    assert (against["difference"], against["difference_error"]) == (0, 0)


def test_paired_differences_are_surer_than_the_runs_themselves(run, pictures, tmp_path):
    raw = checkpoint.newest(run)[0] / "weights.safetensors"
    assert nll(run, pictures, out=tmp_path / "n.json", against=raw) == 0
    result = json.loads((tmp_path / "n.json").read_text())
    assert 0 < result["against"]["difference_error"] < 0.2 * result["standard_error"]
    assert (result["ema_rate"], result["against"]["ema_rate"]) == (0.9, 0)


def test_the_second_of_two_runs_goes_on_where_it_was_too(monkeypatch, run, config, pictures, tmp_path, capsys):
    from iddpm import nll as measuring

    monkeypatch.setattr(measuring, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(measuring, "SAVE_COST", 0)
    other, terms = untrained(config, tmp_path / "other"), 3 * 22 + 3 * 8
    add, seen = measuring.Progress.add, []

    def broken(self, images, rows):
        seen.append(rows.shape[0] * rows.shape[2])
        if sum(seen) > terms:
            raise KeyboardInterrupt
        add(self, images, rows)

    settings = dict(against=other, batch_size=4)
    assert nll(run, pictures, out=tmp_path / "whole.json", **settings) == 0
    monkeypatch.setattr(measuring.Progress, "add", broken)
    assert nll(run, pictures, out=tmp_path / "n.json", **settings) == 2
    monkeypatch.setattr(measuring.Progress, "add", add)
    capsys.readouterr()
    assert nll(run, pictures, out=tmp_path / "n.json", **settings) == 0
    out = capsys.readouterr().out
    assert "going on: 100% is there already" in out and "going on: 36% is there already" in out
    assert (tmp_path / "n.json").read_text() == (tmp_path / "whole.json").read_text()
    assert not list(tmp_path.glob("*.partial"))


def test_classes_are_those_of_the_run_and_the_whole_chain_is_named(run, pictures, tmp_path, capsys):
    one = tmp_path / "subset"
    (one / "down").mkdir(parents=True)
    for file in sorted((pictures / "down").iterdir())[:2]:
        (one / "down" / file.name).write_bytes(file.read_bytes())
    assert nll(run, one, out=tmp_path / "n.json", sampling_steps="all") == 0
    assert " bits/dim (2 images" in capsys.readouterr().out
    assert json.loads((tmp_path / "n.json").read_text())["kept_steps"] == list(range(20))
    alone = _open_images(checkpoint.read_weights(run).config, str(one), False, True)
    assert alone.labels.tolist() == [2, 2]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [(["5", "3", "5"], [5, 3, 5]), ([f"n{k}" for k in range(7)], list(range(7)))],
    ids=["numbers are taken as they are", "all the classes, by rank"],
)
def test_a_model_whose_classes_have_no_names_takes_numbers_or_ranks(config, tmp_path, labels, expected):
    for k, label in enumerate(labels):
        (tmp_path / label).mkdir(exist_ok=True)
        Image.new("L", (8, 8), 40 * k).save(tmp_path / label / f"{k}.png")
    nameless = config.updated(dict(classes=(), num_classes=7))
    images = _open_images(nameless, str(tmp_path), False, True)
    by_file = dict(zip((f.name for f in images.files), images.labels.tolist()))
    assert [by_file[f"{k}.png"] for k in range(len(labels))] == expected


def test_a_model_without_classes_still_names_those_of_the_data_for_each_image(config, pictures, tmp_path):
    run = untrained(config, tmp_path / "r", class_cond=False, num_classes=0, classes=())
    assert nll(run, pictures, num_samples=5, out=tmp_path / "n.json", per_image=tmp_path / "a.csv") == 0
    rows = (tmp_path / "a.csv").read_text().splitlines()[1:]
    assert all(row.split(",")[1] == row.split("/")[0] for row in rows)
    shutil.copytree(pictures, tmp_path / "odd")
    (tmp_path / "odd" / "labels.csv").write_text("path,label\nacross/000.png,1\n")
    assert nll(run, tmp_path / "odd", num_samples=5, out=tmp_path / "n.json", per_image=tmp_path / "a.csv") == 0
    assert all(row.split(",")[1] == "" for row in (tmp_path / "a.csv").read_text().splitlines()[1:])


def test_an_upsampler_is_measured_like_any_other(config, pictures, tmp_path, capsys):
    settings = TINY | dict(network="super_res", small_size=4, low_res_noise=0.1)
    assert main(["train", str(pictures), "--run", str(tmp_path / "r"), *flags(**settings)]) == 0
    assert nll(tmp_path / "r", pictures, out=tmp_path / "n.json") == 0
    assert json.loads((tmp_path / "n.json").read_text())["images"] == 22


def test_images_of_another_size_are_scaled_and_it_says_so(run, pictures, tmp_path, capsys):
    for file in pictures.rglob("*.png"):
        (tmp_path / "big" / file.parent.name).mkdir(parents=True, exist_ok=True)
        Image.open(file).resize((24, 16)).save(tmp_path / "big" / file.parent.name / file.name)
    assert nll(run, tmp_path / "big", out=tmp_path / "n.json") == 0
    assert "16x24 pixels" in capsys.readouterr().out
    assert nll(run, pictures, out=tmp_path / "n.json") == 0
    assert "pixels" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["RUN", "DATA", "--out", "n.csv"], "ends in .json"),
        (["RUN", "DATA", "--out", "."], "one file"),
        (["RUN", "DATA", "--per_image", "each.txt"], ".csv or .npz"),
        (["RUN", "FLAT"], "no classes"),
        (["RUN", "STRANGE"], "'sideways' is not among"),
        (["RUN", "BROKEN"], "torn.png"),
        (["NAMELESS", "NUMBERED"], "the label 9, and this model knows 0 to 4"),
        (["NAMELESS", "DATA"], "has 3 classes (across ...)"),
        (["CLASSIFIER", "DATA"], "is a classifier"),
        (["RUN", "DATA", "--against", "CLASSIFIER"], "is a classifier"),
        (["RUN", "DATA", "--against", "LARGER"], "16x16 with 1 channels, and the run 8x8"),
        (["RUN", "DATA", "--against", "COLOUR"], "8x8 with 3 channels"),
        (["RUN", "DATA", "--against", "MISSING"], "no such run"),
        (["RUN", "DATA", "--sampling_steps", "21"], "only 20 steps"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(capsys, monkeypatch, tmp_path, run, config, pictures, argv, words):
    monkeypatch.chdir(tmp_path)
    places = dict(RUN=run, DATA=pictures, MISSING="missing")
    makers = dict(
        NAMELESS=dict(classes=(), num_classes=5), LARGER=dict(image_size="16"), COLOUR=dict(image_channels=3),
        CLASSIFIER=dict(network="classifier", learn_sigma=False, objective="auto"),
    )  # fmt: skip
    for name in set(argv) & set(makers):
        places[name] = untrained(config, tmp_path / name.lower(), **makers[name])
    for name, path in dict(FLAT="x.png", STRANGE="sideways/x.png", NUMBERED="9/x.png", BROKEN="down/good.png").items():
        if name in argv:
            places[name] = tmp_path / name.lower()
            (tmp_path / name.lower() / path).parent.mkdir(parents=True)
            Image.new("L", (8, 8)).save(tmp_path / name.lower() / path)
    if "BROKEN" in argv:
        (tmp_path / "broken" / "down" / "torn.png").write_bytes(b"\x89PNG and no more")
    before = sorted(tmp_path.rglob("*"))
    assert main(["nll", *(str(places.get(a, a)) for a in argv), "--device", "cpu"]) == 2
    err = capsys.readouterr().err.strip()
    assert words in err and len(err.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before
