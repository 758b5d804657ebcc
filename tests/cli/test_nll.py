"""`iddpm nll` as a user meets it: what it writes, two runs compared, labels, and one line for whatever cannot work."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import iddpm
from conftest import TINY, flags
from iddpm.cli.main import main
from iddpm.measure.likelihood import open_held_out
from iddpm.store import checkpoint
from iddpm.store.weights import read_weights
from iddpm.training.state import TrainState


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
    from iddpm.measure import bound as measuring

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
    assert nll(run, pictures, out=tmp_path / "n.json", **settings) == 75
    monkeypatch.setattr(measuring.Progress, "add", add)
    capsys.readouterr()
    assert nll(run, pictures, out=tmp_path / "n.json", **settings) == 0
    out = capsys.readouterr().out
    assert "going on: 100% is there already" in out and "going on: 36% is there already" in out
    assert (tmp_path / "n.json").read_text() == (tmp_path / "whole.json").read_text()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
def test_the_odes_likelihood_broken_off_goes_on_to_the_very_same_numbers(monkeypatch, run, pictures, tmp_path, capsys):
    from iddpm.measure import bound, ode

    monkeypatch.setattr(bound, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(bound, "SAVE_COST", 0)
    add, added = ode.Paths.add, []

    def broken(self, images, rows):
        if len(added) == 2:
            raise KeyboardInterrupt
        added.append(images)
        add(self, images, rows)

    settings = dict(ode=True, trace="hutchinson", num_samples=10, batch_size=3)
    assert nll(run, pictures, out=tmp_path / "whole.json", **settings) == 0
    monkeypatch.setattr(ode.Paths, "add", broken)
    assert nll(run, pictures, out=tmp_path / "n.json", **settings) == 75
    assert (tmp_path / "n.json.partial").exists() and not (tmp_path / "n.json").exists()
    kept = (tmp_path / "n.json.partial").read_bytes()
    monkeypatch.setattr(ode.Paths, "add", lambda self, images, rows: (added.append(images), add(self, images, rows)))
    capsys.readouterr()
    assert nll(run, pictures, out=tmp_path / "n.json", **settings) == 0
    assert "going on: 60% is there already" in capsys.readouterr().out
    assert added == [slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 10)]
    assert (tmp_path / "n.json").read_text() == (tmp_path / "whole.json").read_text()
    assert not list(tmp_path.glob("*.partial"))
    figures = json.loads((tmp_path / "metrics.json").read_text())["figures"]
    assert [f["value"] for f in figures] == [json.loads((tmp_path / "n.json").read_text())["bits_per_dim"]]
    # What another question has left is not gone on with.
    for other, name in (
        (dict(trace="exact"), "exact"),
        (dict(dequantization="uniform"), "dequantization"),
        (dict(seed=1), "seed"),
    ):
        (tmp_path / "n.json.partial").write_bytes(kept)
        assert nll(run, pictures, out=tmp_path / "n.json", **settings | other) == 0
        assert name in (said := capsys.readouterr().out) and "starting anew" in said


@pytest.mark.parametrize("how", [{}, dict(ode=True)], ids=["bound", "ode"])
def test_the_figures_of_another_data_set_stay_and_what_is_written_over_is_told(run, pictures, tmp_path, capsys, how):
    shutil.copytree(pictures, tmp_path / "other")
    for data in (pictures, tmp_path / "other"):
        assert nll(run, data, num_samples=2, out=tmp_path / "n.json", **how) == 0
    said = capsys.readouterr().out
    assert said.count("in the place of") == 1 and f"in the place of what it held of {pictures}: --out keeps both" in said
    figures = json.loads((tmp_path / "metrics.json").read_text())["figures"]
    assert {f["reference"] for f in figures if f["name"].startswith("bits/dim")} == {str(pictures), str(tmp_path / "other")}


def curve(*argv, **settings):
    return main(["nll", *map(str, argv), *flags(**dict(device="cpu", curve="3,5,all") | settings)])


SCALARS = ("bits_per_dim", "standard_error", "prior", "prior_error", "decoder", "decoder_error", "rest", "rest_error", "images")


def test_each_point_of_a_curve_is_what_its_chain_alone_gives(run, pictures, tmp_path, capsys):
    assert curve(run, pictures, num_samples=9, seed=4, curve="5, all,ddim10", out=tmp_path / "c.json") == 0
    said = [line for line in capsys.readouterr().out.splitlines() if " bits/dim" in line and "decoder" in line]
    result = json.loads((tmp_path / "c.json").read_text())
    assert [(p["sampling_steps"], p["steps"]) for p in result["points"]] == [("5", 5), ("ddim10", 10), ("all", 20)]
    assert result["model"] == "learned variances, cosine, 20 steps"
    for spec, point in zip(("5", "ddim10", "all"), result["points"]):
        assert nll(run, pictures, num_samples=9, seed=4, sampling_steps=spec, out=tmp_path / "n.json") == 0
        alone = json.loads((tmp_path / "n.json").read_text())
        assert [point[k] for k in SCALARS] == [alone[k] for k in SCALARS]
        assert point["bits_per_dim"] == pytest.approx(point["prior"] + point["decoder"] + point["rest"], rel=1e-12)
        assert point["rest"] == pytest.approx(sum(alone["vb"][1:]), rel=1e-9)
        assert sum(f": {point['bits_per_dim']:.4f} +- {point['standard_error']:.4f}" in line for line in said) == 1
    assert len(said) == 3
    svg = (tmp_path / "c.svg").read_text()
    assert "tiny: learned variances, cosine, 20 steps" in svg and f"{result['points'][1]['bits_per_dim']:.3f}" in svg


def test_a_curve_lies_in_the_run_unless_told_otherwise_and_leaves_no_state(config, pictures, tmp_path):
    run = untrained(config, tmp_path / "r")
    assert curve(run, pictures, num_samples=2, curve="2,3") == 0
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "metrics.json", "nll_curve.json", "nll_curve.svg"]


def test_two_runs_give_two_curves_and_the_paired_difference_at_each_point(run, config, pictures, tmp_path, capsys):
    other = untrained(config, tmp_path / "other", diffusion_steps=30, learn_sigma=False)
    assert curve(run, pictures, out=tmp_path / "c.json", curve="3,all", against=other) == 0
    assert capsys.readouterr().out.count("difference ") == 2
    result = json.loads((tmp_path / "c.json").read_text())
    assert nll(run, pictures, out=tmp_path / "n.json", per_image=tmp_path / "n.npz", sampling_steps="all", against=other) == 0
    alone = json.loads((tmp_path / "n.json").read_text())
    last = result["against"]["points"][1]
    assert [p["steps"] for p in result["against"]["points"]] == [3, 30] and result["points"][1]["steps"] == 20
    assert [last[k] for k in SCALARS] == [alone["against"][k] for k in SCALARS]
    difference = columns(tmp_path / "n.npz")["difference"]
    assert (last["difference"], last["difference_error"]) == pytest.approx((difference.mean(), difference.std(ddof=1) / 22**0.5))
    svg = (tmp_path / "c.svg").read_text()
    assert "learned variances" in svg and "other (step 0, average 0.9): fixed large variances" in svg


def test_a_curve_broken_off_keeps_its_points_and_goes_on_in_the_midst_of_one(
    monkeypatch, run, config, pictures, tmp_path, capsys
):
    from iddpm.measure import bound as measuring

    monkeypatch.setattr(measuring, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(measuring, "SAVE_COST", 0)
    add, seen = measuring.Progress.add, []

    def broken(self, images, rows):
        seen.append(rows.shape[0] * rows.shape[2])
        if sum(seen) > 3 * 22 + 5 * 8:
            raise KeyboardInterrupt
        add(self, images, rows)

    assert curve(run, pictures, out=tmp_path / "whole.json", batch_size=4) == 0
    monkeypatch.setattr(measuring.Progress, "add", broken)
    (tmp_path / "a").mkdir()
    out = tmp_path / "a" / "c.json"
    assert curve(run, pictures, out=out, batch_size=4) == 75
    assert [f["steps"] for f in json.loads((tmp_path / "a" / "metrics.json").read_text())["figures"]] == [3, 3, 3]
    seen.clear()
    counting = lambda self, images, rows: (seen.append(rows.shape[0] * rows.shape[2]), add(self, images, rows))  # noqa: E731
    monkeypatch.setattr(measuring.Progress, "add", counting)
    capsys.readouterr()
    assert curve(run, pictures, out=out, batch_size=4) == 0
    said = capsys.readouterr().out
    assert "going on: 100% is there already" in said and "going on: 36% is there already" in said
    assert sum(seen) == 5 * 14 + 20 * 22
    assert out.read_text() == (tmp_path / "whole.json").read_text()
    assert out.with_suffix(".svg").read_text() == (tmp_path / "whole.svg").read_text()
    assert sorted(p.name for p in out.parent.iterdir()) == ["c.json", "c.svg", "metrics.json"]


def figures(path):
    return json.loads(path.read_text())["figures"]


def test_figures_hold_the_numbers_and_all_that_decides_them(run, config, pictures, tmp_path):
    other = untrained(config, tmp_path / "other")
    assert nll(run, pictures, num_samples=9, seed=4, out=tmp_path / "n.json", against=other) == 0
    rows, result = figures(tmp_path / "metrics.json"), json.loads((tmp_path / "n.json").read_text())
    names = {"bits/dim": "bits_per_dim", "bits/dim prior": "prior", "bits/dim decoder": "decoder"}
    assert [row["name"] for row in rows] == list(names)  # of the run alone, not of the one it is held against
    for row in rows:
        key = names[row["name"]]
        error = result["standard_error" if key == "bits_per_dim" else f"{key}_error"]
        assert (row["value"], row["error"]) == (result[key], error)
        assert row["interval"] == pytest.approx([row["value"] - 1.96 * error, row["value"] + 1.96 * error])
        about = {k: row[k] for k in ("n", "seed", "solver", "steps", "chain_steps", "sampling_steps", "extractor", "reference")}
        assert list(about.values()) == [9, 4, None, 3, 20, "3", None, str(pictures)]
        assert (row["weights"], row["checkpoint_step"], row["ema_rate"]) == (result["weights"], 4, 0.9)
        assert row["iddpm"] == iddpm.__version__ and row["unit"] == "bits/dim" and "threads" in row["machine"]
        assert 0 < row["seconds"] < 60 and row["time"].startswith("20")


def test_a_second_measurement_takes_the_place_of_the_first_and_another_setting_stands_beside_it(run, pictures, tmp_path):
    settings, path = dict(num_samples=4, out=tmp_path / "n.json"), tmp_path / "metrics.json"
    assert nll(run, pictures, **settings) == 0
    first = figures(path)
    assert nll(run, pictures, **settings) == nll(run, pictures, **settings, batch_size=3) == 0
    assert [r["name"] for r in figures(path)] == [r["name"] for r in first]
    assert curve(run, pictures, curve="3,all", **settings) == 0  # 3 again, and 20
    assert nll(run, pictures, sampling_steps=20, **settings) == 0  # all, by another name
    assert [(r["name"], r["steps"]) for r in figures(path)] == [(r["name"], steps) for steps in (3, 20) for r in first]
    for k, changed in enumerate([dict(seed=1), dict(num_samples=5), dict(ema_rate=0), dict(precision="bf16")]):
        assert nll(run, pictures, **settings | changed) == 0
        assert len(figures(path)) == 3 * (3 + k)


def test_classes_are_those_of_the_run_and_the_whole_chain_is_named(run, pictures, tmp_path, capsys):
    one = tmp_path / "subset"
    (one / "down").mkdir(parents=True)
    for file in sorted((pictures / "down").iterdir())[:2]:
        (one / "down" / file.name).write_bytes(file.read_bytes())
    assert nll(run, one, out=tmp_path / "n.json", sampling_steps="all") == 0
    assert " bits/dim (2 images" in capsys.readouterr().out
    assert json.loads((tmp_path / "n.json").read_text())["kept_steps"] == list(range(20))
    alone = open_held_out(read_weights(run).config, one)
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
    images = open_held_out(nameless, tmp_path)
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
    settings = TINY | dict(task="enlarge", small_size=4, low_res_noise=0.1)
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
        (["NAMELESS", "NUMBERED"], "the label 9, and this model knows 0 to 4"),
        (["NAMELESS", "DATA"], "has 3 classes (across ...)"),
        (["CLASSIFIER", "DATA"], "is a classifier"),
        (["RUN", "DATA", "--against", "CLASSIFIER"], "is a classifier"),
        (["RUN", "DATA", "--against", "LARGER"], "16x16 with 1 channels, and the run 8x8"),
        (["RUN", "DATA", "--against", "COLOUR"], "8x8 with 3 channels"),
        (["RUN", "DATA", "--against", "MISSING"], "no such run"),
        (["RUN", "DATA", "--sampling_steps", "21"], "only 20 steps"),
        (["RUN", "DATA", "--curve", "3,21"], "--curve 3,21: --sampling_steps 21: the chain has only 20 steps"),
        (["RUN", "DATA", "--curve", "3,many"], "'many': give a count"),
        (["RUN", "DATA", "--curve", "3,0"], "'0': give a count"),
        (["RUN", "DATA", "--curve", "3,ddim6"], "ddim6: no whole stride takes 6 of 20"),
        (["RUN", "DATA", "--curve", "3,,5"], "has an empty entry"),
        (["RUN", "DATA", "--curve", "20,5,all"], "20 and all are both 20 steps"),
        (["RUN", "DATA", "--curve", "3,5", "--sampling_steps", "5"], "both say how many steps"),
        (["RUN", "DATA", "--curve", "3,5", "--per_image", "a.csv"], "--per_image is of one chain"),
        (
            ["RUN", "DATA", "--curve", "3,15", "--against", "SHORTER"],
            "15: the chain has only 10 steps",
        ),
        (["RUN", "DATA", "--out", "foreign/n.json"], "is not a file of figures"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(capsys, monkeypatch, tmp_path, run, config, pictures, argv, words):
    monkeypatch.chdir(tmp_path)
    places = dict(RUN=run, DATA=pictures, MISSING="missing")
    makers = dict(
        NAMELESS=dict(classes=(), num_classes=5), LARGER=dict(image_size="16"), COLOUR=dict(image_channels=3),
        SHORTER=dict(diffusion_steps=10), CLASSIFIER=dict(task="classify", learn_sigma=False, objective="auto"),
    )  # fmt: skip
    for name in set(argv) & set(makers):
        places[name] = untrained(config, tmp_path / name.lower(), **makers[name])
    for name, path in dict(FLAT="x.png", STRANGE="sideways/x.png", NUMBERED="9/x.png").items():
        if name in argv:
            places[name] = tmp_path / name.lower()
            (tmp_path / name.lower() / path).parent.mkdir(parents=True)
            Image.new("L", (8, 8)).save(tmp_path / name.lower() / path)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "metrics.json").write_text('{"accuracy": 0.5}')
    before = sorted(tmp_path.rglob("*"))
    assert main(["nll", *(str(places.get(a, a)) for a in argv), "--device", "cpu"]) == 2
    err = capsys.readouterr().err.strip()
    assert words in err and len(err.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_broken_image_is_left_out_and_counted_and_the_rest_measured(run, pictures, tmp_path, capsys):
    import shutil

    shutil.copytree(pictures, tmp_path / "d")
    (tmp_path / "d" / "down" / "torn.png").write_bytes(b"\x89PNG and no more")
    with pytest.warns(UserWarning, match=r"1 of 23 files are broken and left out; the first: .*torn\.png"):
        assert nll(run, tmp_path / "d", out=tmp_path / "n.json", sampling_steps=2) == 0
    assert "1 unreadable file, left out" in capsys.readouterr().out
    assert nll(run, pictures, out=tmp_path / "m.json", sampling_steps=2) == 0
    one, other = (json.loads((tmp_path / f"{k}.json").read_text())["bits_per_dim"] for k in "nm")
    assert one == pytest.approx(other, abs=1e-6)


def test_the_images_of_the_training_are_told(run, pictures, tmp_path, capsys):
    assert nll(run, pictures / "down", out=tmp_path / "n.json", sampling_steps=2) in (0, 2)
    assert nll(run, pictures, out=tmp_path / "n.json", sampling_steps=2) == 0
    assert "was trained on these images" in capsys.readouterr().out
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "other" / "down").mkdir(parents=True)
    Image.new("L", (8, 8)).save(tmp_path / "other" / "down" / "a.png")
    assert nll(run, tmp_path / "other", out=tmp_path / "o.json", sampling_steps=2) == 0
    assert "was trained on" not in capsys.readouterr().out
