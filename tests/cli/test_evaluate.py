"""`iddpm evaluate` as a user meets it, on a small extractor of pixels that stands where the networks do."""

import csv
import json
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import SLOW, flags
from iddpm.cli.main import main
from iddpm.config.choices import ADDED
from iddpm.measure import features, figures
from iddpm.measure.extractors import Extractor
from iddpm.measure.figures import Figure
from iddpm.measure.image_sets import ImageSet

WIDTH = 12
PROJECTION = torch.from_numpy(np.random.default_rng(5).standard_normal((3 * 4 * 4, WIDTH)))


def pixels(device: torch.device) -> Extractor:
    """Random projections of the image shrunk to 4x4."""

    def network(images):
        small = torch.nn.functional.adaptive_avg_pool2d(images.double() / 255, 4).flatten(1)
        return {"pool": (small @ PROJECTION).float()}

    return Extractor("pixels", "pixels 1", {"pool": WIDTH}, network, device, lambda rows: rows.double().softmax(1))


@pytest.fixture(autouse=True)
def small_extractor(monkeypatch):
    monkeypatch.setitem(ADDED, ("extractor", "pixels"), pixels)


def evaluate(samples, reference, **settings) -> int:
    chosen = {"extractor": "pixels", "device": "cpu"} | settings
    return main(["evaluate", str(samples), "--reference", str(reference), *flags(**chosen)])


def values(path) -> dict[str, float]:
    return {row["name"]: row["value"] for row in json.loads(path.read_text())["figures"]}


def images(n: int, seed: int, spread: int = 256) -> np.ndarray:
    rng = np.random.default_rng(seed)
    base = rng.integers(0, spread, (n, 4, 4, 3), dtype=np.uint8)
    return base.repeat(2, axis=1).repeat(2, axis=2)


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, Path]:
    """Eighty samples and a hundred real images of three classes, of which one set is all alike."""
    root = tmp_path_factory.mktemp("sets")
    np.savez(root / "samples.npz", images(80, 1), np.arange(80) % 3)
    np.savez(root / "real.npz", images(100, 2), np.arange(100) % 3)
    np.savez(root / "grey.npz", images(30, 3)[..., :1])
    return {path.stem: path for path in root.iterdir()}


def test_every_metric_is_computed_and_carries_what_decides_it(sets, tmp_path, capsys):
    out = tmp_path / "m.json"
    assert evaluate(sets["samples"], sets["real"], out=out, seed=3) == 0
    rows = json.loads(out.read_text())["figures"]
    assert [row["name"] for row in rows] == [
        "FD-pixels", "IS-pixels", "IS-pixels of all at once", "KD-pixels", "near copies (1 % expected)", "nearest distance ratio",
        "precision", "recall", "density", "coverage", "label consistency",
    ]  # fmt: skip
    for row in rows:
        against = None if row["name"].startswith("IS") else 100
        assert (row["n"], row["reference_n"], row["extractor"], row["seed"]) == (80, against, "pixels", 3)
        assert row["reference"] == str(sets["real"]) and row["samples"] == str(sets["samples"])
        assert {"solver", "steps", "checkpoint_step", "ema_rate", "weights", "time", "machine", "iddpm", "floor"} <= row.keys()
        assert np.isfinite(row["value"])
        if row["error"] is not None:
            assert row["interval"] == pytest.approx([row["value"] - 1.96 * row["error"], row["value"] + 1.96 * row["error"]])
    floors = {row["name"]: row["floor"] for row in rows}
    assert (floors["FD-pixels"]["n"], floors["FD-pixels"]["reference_n"]) == (50, 50)
    said = capsys.readouterr().out
    assert (
        "warning: a Frechet distance of 80 samples is too large" in said and "50 of the reference against its 50 others" in said
    )
    assert "without sfd: pixels has no spatial features" in said


def test_the_figures_are_those_of_the_arithmetic_on_all_features_at_once(sets, tmp_path):
    from prdc import compute_prdc
    from torchmetrics.image.fid import FrechetInceptionDistance

    def rows(path):
        with np.load(path) as file:
            return pixels(torch.device("cpu")).network(torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2))["pool"]

    ours, theirs = rows(sets["samples"]), rows(sets["real"])
    identity = torch.nn.Identity()
    identity.num_features = WIDTH
    fid = FrechetInceptionDistance(identity).set_dtype(torch.float64)
    fid.update(theirs.double(), real=True)
    fid.update(ours.double(), real=False)
    prdc = compute_prdc(theirs.double().numpy(), ours.double().numpy(), 5)
    assert evaluate(sets["samples"], sets["real"], out=tmp_path / "m.json") == 0
    found = values(tmp_path / "m.json")
    assert found["FD-pixels"] == pytest.approx(float(fid.compute()), rel=1e-6)
    assert {k: found[k] for k in prdc} == pytest.approx(prdc, rel=1e-6)


def test_each_sample_is_named_with_its_nearest_real_image(sets, tmp_path):
    copy = tmp_path / "copy.npz"
    with np.load(sets["samples"]) as ours, np.load(sets["real"]) as theirs:
        np.savez(copy, np.concatenate([ours["arr_0"][:9], theirs["arr_0"][[41]]]))
    assert evaluate(copy, sets["real"], metrics="memorisation", out=tmp_path / "m.json") == 0
    with open(tmp_path / "m.neighbours.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[1] == ["9", "41", "0"] and len(rows) == 11
    assert values(tmp_path / "m.json")["near copies (1 % expected)"] >= 0.1
    with Image.open(tmp_path / "m.neighbours.png") as picture:
        assert picture.width > 300


# ---- features on the disk


def test_a_second_evaluation_reads_what_the_first_one_computed(sets, tmp_path, monkeypatch):
    assert evaluate(sets["samples"], sets["real"], out=tmp_path / "a.json") == 0

    def never(device):
        def network(images):
            raise AssertionError("the features are there")

        return pixels(device)._replace(network=network)

    monkeypatch.setitem(ADDED, ("extractor", "pixels"), never)
    assert evaluate(sets["samples"], sets["real"], out=tmp_path / "b.json") == 0
    assert values(tmp_path / "a.json") == values(tmp_path / "b.json")


def test_other_images_under_the_same_name_are_measured_anew(tmp_path):
    for seed, out in ((1, "a.json"), (2, "b.json")):
        np.savez(tmp_path / "s.npz", images(40, seed))
        np.savez(tmp_path / "r.npz", images(40, 7))
        assert evaluate(tmp_path / "s.npz", tmp_path / "r.npz", out=tmp_path / out, metrics="fd") == 0
    assert values(tmp_path / "a.json") != values(tmp_path / "b.json")


def test_data_that_cannot_be_written_beside_is_cached_in_the_users_cache(sets, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(features.os, "access", lambda path, mode: ".iddpm" not in str(path))
    assert evaluate(sets["samples"], sets["real"], out=tmp_path / "m.json", metrics="fd") == 0
    assert len(list((tmp_path / "cache" / "iddpm").iterdir())) == 2
    told = capsys.readouterr()
    assert (told.out + told.err).count("cannot keep features: they are kept in") == 2


def test_an_extraction_that_is_cut_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    np.savez(tmp_path / "s.npz", images(50, 1))
    np.savez(tmp_path / "r.npz", images(40, 2))
    settings = dict(batch_size=8, metrics="fd,kd")
    monkeypatch.setattr(features, "SAVE_EVERY", 0.0)
    calls = []

    def cut(device):
        whole = pixels(device)

        def network(images):
            calls.append(len(images))
            if len(calls) == 5:
                raise KeyboardInterrupt
            return whole.network(images)

        return whole._replace(network=network)

    monkeypatch.setitem(ADDED, ("extractor", "pixels"), cut)
    assert evaluate(tmp_path / "s.npz", tmp_path / "r.npz", out=tmp_path / "a.json", **settings) == 75
    monkeypatch.setitem(ADDED, ("extractor", "pixels"), pixels)
    capsys.readouterr()
    assert evaluate(tmp_path / "s.npz", tmp_path / "r.npz", out=tmp_path / "a.json", **settings) == 0
    told = capsys.readouterr()
    assert "going on: the features of" in told.out + told.err
    for folder in tmp_path.glob(".iddpm/*"):
        for file in folder.iterdir():
            file.unlink()
    assert evaluate(tmp_path / "s.npz", tmp_path / "r.npz", out=tmp_path / "b.json", **settings) == 0
    assert values(tmp_path / "a.json") == values(tmp_path / "b.json")


def test_memory_does_not_grow_with_the_images_where_only_frechet_distances_are_asked_for(tmp_path):
    def synthetic(n: int) -> ImageSet:
        def take(numbers):
            at = np.asarray(numbers)[:, None, None, None]
            return ((at * 2654435761 >> 3) + np.arange(3 * 8 * 8).reshape(3, 8, 8) * (at % 97) & 255).astype(np.uint8)

        return ImageSet("synthetic", n, (8, 8), 3, take, lambda numbers: f"synthetic {n}", tmp_path)

    def peak(n: int) -> int:
        tracemalloc.start()
        held = features.extract(synthetic(n), np.arange(n), pixels(torch.device("cpu")), block=500)
        held.gaussian("pool")
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most - 8 * n  # of which numbers

    peak(1000)
    assert peak(40_000) < peak(4000) + 2**18


# ---- runs


def test_a_run_is_measured_as_the_npz_of_its_samples(run, pictures, tmp_path):
    assert evaluate(run, pictures, num_samples=24, batch_size=8, out=tmp_path / "run.json") == 0
    assert main(["sample", str(run), *flags(num_samples=24, batch_size=8, out=tmp_path / "s.npz", device="cpu")]) == 0
    assert evaluate(tmp_path / "s.npz", pictures, out=tmp_path / "npz.json") == 0
    ours, theirs = values(tmp_path / "run.json"), values(tmp_path / "npz.json")
    assert ours.keys() == theirs.keys()
    for name in ("precision", "recall", "density", "coverage", "label consistency", "KD-pixels"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-6), name  # of FD, the order of the sum may change the last digits
    assert ours["FD-pixels"] == pytest.approx(theirs["FD-pixels"], rel=1e-6)
    row = json.loads((tmp_path / "run.json").read_text())["figures"][0]
    assert (row["solver"], row["steps"], row["checkpoint_step"], row["ema_rate"], row["seeds"]) == (
        "ancestral",
        3,
        4,
        0.9,
        "0-23",
    )


def test_several_draws_tell_their_mean_and_spread(run, pictures, tmp_path, capsys):
    assert evaluate(run, pictures, num_samples=12, draws=3, metrics="kd", out=tmp_path / "m.json") == 0
    rows = json.loads((tmp_path / "m.json").read_text())["figures"]
    each, mean = [row["value"] for row in rows[:3]], rows[3]
    assert [row["seeds"] for row in rows] == ["0-11", "12-23", "24-35", None]
    assert len(set(each)) == 3 and mean["draws"] == 3
    assert mean["value"] == pytest.approx(np.mean(each)) and mean["error"] == pytest.approx(np.std(each, ddof=1) / 3**0.5)
    assert "draws " in capsys.readouterr().out


REAL = dict(num_samples=20, batch_size=4, sampling_steps=3, metrics="fd,is,kd,prdc,memorisation,labels", device="cpu")


def real_extractor() -> Extractor:
    """Of which only the widths matter."""
    return pixels(torch.device("cpu"))._replace(widths={"pool": 1280})


def real_command(run, pictures, out) -> list[str]:
    return ["evaluate", str(run), "--reference", str(pictures), *flags(**REAL, out=out)]


@pytest.fixture(scope="module")
def whole(run, pictures, tmp_path_factory) -> dict[str, float]:
    """What one process finds, with the real extractor, of a run that no other test measures with it."""
    import shutil

    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(run, folder / "run", ignore=shutil.ignore_patterns(".iddpm"))
    shutil.copytree(pictures, folder / "pictures", ignore=shutil.ignore_patterns(".iddpm"))
    assert main(real_command(folder / "run", folder / "pictures", folder / "m.json")) == 0
    return values(folder / "m.json")


@pytest.mark.parametrize("processes", [2, SLOW(3)])
def test_any_number_of_processes_finds_the_figures_of_one(launcher, run, pictures, tmp_path, whole, processes):
    import shutil

    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns(".iddpm"))
    shutil.copytree(pictures, tmp_path / "pictures", ignore=shutil.ignore_patterns(".iddpm"))
    line = real_command(tmp_path / "run", tmp_path / "pictures", tmp_path / "m.json")
    launcher.start(*line, said=tmp_path / "said", processes=processes).succeed()
    assert values(tmp_path / "m.json") == pytest.approx(whole, rel=1e-6)


def test_a_killed_evaluation_goes_on_to_the_same_figures(launcher, run, pictures, tmp_path, whole):
    import shutil

    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns(".iddpm"))
    shutil.copytree(pictures, tmp_path / "pictures", ignore=shutil.ignore_patterns(".iddpm"))
    line = real_command(tmp_path / "run", tmp_path / "pictures", tmp_path / "m.json")
    slowly = "g = f.features_of; f.features_of = lambda *a: (time.sleep(0.3), g(*a))[1]"  # so that there is a midst
    program = f"import time, iddpm.measure.features as f; {slowly}; f.SAVE_EVERY = 0; entry()"
    began = time.monotonic()

    def done() -> int:
        return sum(features._done(folder, real_extractor())[0] for folder in (tmp_path / "run").glob(".iddpm/*"))

    process = launcher.start(*line, said=tmp_path / "said", program=program)
    while not 4 <= done() < 20 and process.running() and time.monotonic() - began < 60:
        time.sleep(0.01)
    process.kill()
    assert 4 <= done() < 20
    assert main(line) == 0
    assert values(tmp_path / "m.json") == pytest.approx(whole, rel=1e-6)


# ---- references of statistics


def test_statistics_that_were_saved_give_the_figure_of_the_images(sets, tmp_path):
    saved = tmp_path / "real.npz"
    assert evaluate(sets["samples"], sets["real"], metrics="fd", out=tmp_path / "a.json", save_statistics=saved) == 0
    assert evaluate(sets["samples"], saved, metrics="fd", out=tmp_path / "b.json") == 0
    assert values(tmp_path / "a.json") == pytest.approx(values(tmp_path / "b.json"), rel=1e-12)
    row = json.loads((tmp_path / "b.json").read_text())["figures"][0]
    assert row["reference_n"] == 100 and row["floor"] is None  # the file says how many


def test_statistics_of_other_tools_are_read(sets, tmp_path, capsys):
    saved = tmp_path / "real.npz"
    assert evaluate(sets["samples"], sets["real"], metrics="fd", out=tmp_path / "a.json", save_statistics=saved) == 0
    with np.load(saved) as file:
        mu, sigma = file["mu"], file["sigma"]
    np.savez(tmp_path / "pytorch_fid.npz", mu=mu, sigma=sigma)
    torch.save({"mu": mu, "sigma": sigma}, tmp_path / "torch_fidelity.pt")
    with np.load(sets["real"]) as file:  # as guided-diffusion's reference batches
        np.savez(tmp_path / "guided.npz", arr_0=file["arr_0"], mu=mu + 1, sigma=sigma, mu_s=np.zeros(3), sigma_s=np.eye(3))
    wanted = values(tmp_path / "a.json")["FD-pixels"]
    for name in ("pytorch_fid.npz", "torch_fidelity.pt"):
        assert evaluate(sets["samples"], tmp_path / name, out=tmp_path / f"{name}.json") == 0
        assert values(tmp_path / f"{name}.json")["FD-pixels"] == pytest.approx(wanted, rel=1e-12)
        assert "without kd: the reference is a file of statistics" in capsys.readouterr().out
    assert evaluate(sets["samples"], tmp_path / "guided.npz", out=tmp_path / "g.json", metrics="fd,prdc") == 0
    found = values(tmp_path / "g.json")
    assert (
        found["FD-pixels"] > wanted + 1 and 0 < found["precision"] <= 1
    )  # the statistics from the file, the rest from the images


def test_statistics_of_a_file_are_told_with_their_own_number_of_images(sets, tmp_path):
    saved = tmp_path / "real.npz"
    assert evaluate(sets["samples"], sets["real"], metrics="fd", out=tmp_path / "a.json", save_statistics=saved) == 0
    with np.load(saved) as file, np.load(sets["real"]) as images:
        np.savez(tmp_path / "both.npz", **dict(file), arr_0=images["arr_0"])
    assert evaluate(sets["samples"], tmp_path / "both.npz", num_reference=30, metrics="fd,prdc", out=tmp_path / "b.json") == 0
    rows = {row["name"]: row["reference_n"] for row in json.loads((tmp_path / "b.json").read_text())["figures"]}
    assert rows["FD-pixels"] == 100 and rows["precision"] == 30
    assert evaluate(sets["samples"], saved, num_reference=30) == 2


# ---- figures


@pytest.mark.parametrize(
    "changed",
    [
        dict(clip_denoised=False), dict(precision="bf16"), dict(solver="ddim"), dict(sampling_steps=2), dict(ema_rate=0),
        dict(num_samples=10), dict(num_reference=15), dict(neighbours=3), dict(seed=1), dict(labels="disc"),
    ],
)  # fmt: skip
def test_a_figure_of_other_conditions_stands_beside_the_first(run, pictures, tmp_path, changed):
    settings = dict(num_samples=8, metrics="prdc", out=tmp_path / "m.json")
    assert evaluate(run, pictures, **settings) == 0
    first = figures.read(tmp_path / "m.json")
    assert evaluate(run, pictures, **settings) == 0
    assert len(figures.read(tmp_path / "m.json")) == len(first) == 4
    assert evaluate(run, pictures, **settings | changed) == 0
    rows = figures.read(tmp_path / "m.json")
    assert len(rows) == 8 and [row["value"] for row in rows[:4]] == [row["value"] for row in first]


def test_a_figure_without_a_value_loses_no_other(sets, tmp_path):
    """Doubles in the reference: the distance of most real images to their nearest is 0."""
    with np.load(sets["real"]) as file:
        np.savez(tmp_path / "doubles.npz", np.concatenate([file["arr_0"][:30]] * 2))
    assert evaluate(sets["samples"], tmp_path / "doubles.npz", out=tmp_path / "m.json") == 0
    assert "FD-pixels" in values(tmp_path / "m.json") and "nearest distance ratio" not in values(tmp_path / "m.json")
    figures.record(tmp_path / "m.json", [Figure("odd", float("inf"), 1.0, {})])
    assert figures.read(tmp_path / "m.json")[-1] == {
        "name": "odd",
        "value": None,
        "error": None,
        "interval": None,
        "note": "the value is inf",
    }


def test_a_reference_with_too_few_of_each_class_costs_label_consistency_alone(sets, tmp_path, capsys):
    with np.load(sets["real"]) as file:
        np.savez(tmp_path / "few.npz", file["arr_0"][:20], np.arange(20))
        np.savez(tmp_path / "samples.npz", file["arr_0"][40:80], np.arange(40) % 10)
    assert evaluate(tmp_path / "samples.npz", tmp_path / "few.npz", out=tmp_path / "m.json") == 0
    assert "FD-pixels" in values(tmp_path / "m.json")
    assert "without labels: " in capsys.readouterr().out


def test_two_evaluations_at_once_make_the_features_of_a_reference_once(launcher, sets, tmp_path):
    import shutil

    shutil.copy(sets["real"], tmp_path / "real.npz")
    both = []
    for k in range(2):
        np.savez(tmp_path / f"{k}.npz", images(30, 20 + k))
        line = ["evaluate", tmp_path / f"{k}.npz", "--reference", tmp_path / "real.npz", "--metrics", "fd,kd", "--device", "cpu"]
        both.append(launcher.start(*line, said=tmp_path / f"{k}.said"))
    for process in both:
        process.succeed()
    kept = [folder for folder in (tmp_path / ".iddpm").iterdir() if (folder / "pool.f32").stat().st_size == 4 * 1280 * 100]
    assert len(kept) == 1
    assert all(len(values(tmp_path / f"{k}.npz.metrics.json")) == 2 for k in range(2))


def test_a_file_system_without_locks_is_no_obstacle(sets, tmp_path, monkeypatch):
    import errno

    def refuses(handle, how):
        raise OSError(errno.ENOSYS, "no locks")

    monkeypatch.setattr("iddpm.store.remote.fcntl.flock", refuses)
    assert evaluate(sets["samples"], sets["real"], metrics="fd", out=tmp_path / "m.json") == 0


def test_damaged_features_are_made_anew(sets, tmp_path):
    import shutil

    for name in ("samples", "real"):
        shutil.copy(sets[name], tmp_path / f"{name}.npz")
    settings = dict(metrics="fd", out=tmp_path / "m.json")
    assert evaluate(tmp_path / "samples.npz", tmp_path / "real.npz", **settings) == 0
    first = values(tmp_path / "m.json")
    for k, folder in enumerate(sorted((tmp_path / ".iddpm").iterdir())):
        (folder / "pool.moments.npz").unlink()
        if k:
            (folder / "about.json").write_text("{")
        else:
            with open(folder / "pool.f32", "r+b") as file:
                file.truncate(100)
    assert evaluate(tmp_path / "samples.npz", tmp_path / "real.npz", **settings) == 0
    assert values(tmp_path / "m.json") == first


# ---- what cannot work


def test_figures_of_the_same_conditions_replace_each_other(tmp_path):
    path = tmp_path / "metrics.json"
    figures.record(path, [Figure("a", 1.0, None, dict(n=5, time="x")), Figure("a", 2.0, 0.5, dict(n=6, time="x"))])
    figures.record(path, [Figure("a", 3.0, float("nan"), dict(n=5, time="y"))])
    rows = figures.read(path)
    assert [(row["value"], row["n"], row["time"]) for row in rows] == [(3.0, 5, "y"), (2.0, 6, "x")]
    assert rows[1]["interval"] == pytest.approx([1.02, 2.98]) and rows[0]["interval"] is None


def line(capsys) -> str:
    said = capsys.readouterr().err.splitlines()
    return next(text for text in said if text.startswith("iddpm: "))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(extractor="pixel"), "--extractor 'pixel' is not one of: .*, pixels"),
        (dict(metrics="fid"), "--metrics 'fid' is not one of: fd, sfd, is"),
        (dict(metrics="sfd"), "--metrics sfd: pixels has no spatial features"),
        (dict(solver="ddim"), "--solver has no effect: .* holds images that are drawn already"),
        (dict(draws=2), "--draws has no effect"),
        (dict(num_samples=500), "holds 80 images: 500 cannot be compared"),
        (dict(num_reference=500), "holds 100 images: 500 cannot be compared"),
        (dict(num_samples=1), "metrics need at least 2 images a side"),
        (dict(inception_weights="x.pth"), "--inception_weights has no effect with --extractor pixels"),
        (dict(out="figures.txt"), "--out figures.txt: give a name that ends in .json"),
        (dict(save_statistics="x.pt"), "--save_statistics x.pt: give a name that ends in .npz"),
        (dict(extractor="inception", inception_weights="absent.pth"), "absent.pth"),
    ],
)
def test_settings_that_cannot_work_are_one_line(sets, capsys, settings, said):
    import re

    assert evaluate(sets["samples"], sets["real"], **settings) == 2
    assert re.search(said, line(capsys))


def test_a_single_image_is_refused(sets, tmp_path, capsys):
    np.savez(tmp_path / "one.npz", images(1, 0))
    assert evaluate(tmp_path / "one.npz", sets["real"]) == 2
    assert "holds 1 image: metrics need at least 2" in line(capsys)
    assert evaluate(sets["samples"], tmp_path / "one.npz") == 2
    assert "holds 1 image: metrics need at least 2" in line(capsys)


def test_features_that_are_not_finite_are_one_line_and_leave_nothing_wrong(sets, tmp_path, capsys, monkeypatch):
    np.savez(tmp_path / "s.npz", images(40, 1))

    def broken(device):
        def network(images):
            found = pixels(device).network(images)
            found["pool"][5] = torch.nan
            return found

        return pixels(device)._replace(network=network)

    monkeypatch.setitem(ADDED, ("extractor", "pixels"), broken)
    assert evaluate(tmp_path / "s.npz", sets["real"]) == 2
    assert "are not finite" in line(capsys)


def test_statistics_of_another_extractor_are_refused(sets, tmp_path, capsys):
    np.savez(tmp_path / "other.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    assert evaluate(sets["samples"], tmp_path / "other.npz") == 2
    assert "holds statistics of 2048 features, and pixels has 12" in line(capsys)
    about = json.dumps({"extractor": "elsewhere"})
    np.savez(tmp_path / "same.npz", mu=np.zeros(WIDTH), sigma=np.eye(WIDTH), iddpm=np.array(about))
    assert evaluate(sets["samples"], tmp_path / "same.npz") == 2
    assert "holds statistics of elsewhere" in line(capsys)


def test_grey_against_colour_is_said(sets, pictures, tmp_path, capsys):
    assert evaluate(sets["grey"], sets["real"], metrics="fd", out=tmp_path / "m.json") == 0
    assert "the samples are grey, and the images of" in capsys.readouterr().out
    assert evaluate(sets["samples"], pictures, metrics="fd", out=tmp_path / "m.json") == 0
    assert "which are grey, are read as colour" in capsys.readouterr().out


def test_fewer_images_than_features_are_warned_of(sets, tmp_path, capsys):
    np.savez(tmp_path / "few.npz", images(10, 1))
    assert evaluate(tmp_path / "few.npz", sets["real"], metrics="fd", out=tmp_path / "m.json") == 0
    said = capsys.readouterr().out
    assert "warning: 10 images for 12 features" in said and "real images" in said


def test_a_run_that_draws_no_images_by_itself_is_refused(tmp_path, config, pictures, capsys):
    from cli.test_nll import untrained

    judge = untrained(config, tmp_path / "judge", task="classify", learn_sigma=False, objective="auto")
    assert evaluate(judge, pictures) == 2
    assert "is a classifier, which draws nothing" in line(capsys)


def test_the_command_runs_as_a_process(launcher, sets, tmp_path):
    command = ("evaluate", sets["samples"], "--reference", sets["real"], "--metrics", "kd", "--out", tmp_path / "m.json")
    assert "KD-lite0-128" in launcher.start(*command, said=tmp_path / "said").succeed()
