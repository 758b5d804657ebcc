"""The page of a run: complete in itself, true to the run's files, and whole whatever these hold."""

import csv
import json
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import TINY, flags
from iddpm.cli.main import main
from iddpm.config import Config
from iddpm.errors import UserError
from iddpm.look import dataset, report
from iddpm.look.runs import read_run
from iddpm.sampling import sheets
from iddpm.training import loop
from look.pages import Page

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&\x07"


def made(run: Path, config: Config, rows: list[dict], **files: str) -> Path:
    """A run's folder by its files."""
    (run / "samples").mkdir(parents=True)
    (run / "config.json").write_text(config.to_json())
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in files.items():
        (run / name.replace("_", ".")).write_text(text)
    return run


def rows(n: int, every: int = 1, **columns) -> list[dict]:
    steps = [every * (k + 1) for k in range(n)]
    base = {"loss": lambda s: 1 / s, "lr": lambda s: 1e-3, "images_per_second": lambda s: 100.0, "skipped": lambda s: 0}
    return [{"step": s, "time": float(s)} | {k: f(s) for k, f in (base | columns).items()} for s in steps]


def page(*runs: Path, **more) -> Page:
    out = runs[0].parent / "out.html"
    report.write(runs, out, **more)
    found = Page(out.read_text())
    assert list(found.outside()) == []
    return found


# ---- what it shows


def test_the_page_of_a_run_tells_what_its_files_hold(run, tmp_path):
    shutil.copytree(run, tmp_path / "tiny")
    found = page(tmp_path / "tiny")
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    group = next(group for group in found.data["runs"][0] if "loss" in group["y"])
    assert group["x"]["step"] == [row["step"] for row in log]
    assert group["y"]["loss"] == pytest.approx([row["loss"] for row in log], rel=1e-4)
    assert group["x"]["images"] == [6 * row["step"] for row in log]
    titles = {chart["title"] for chart in found.data["charts"]}
    assert {"Loss", "Terms of the loss", "Loss by noise level", "Gradient norm", "Learning rate", "Images a second"} <= titles
    for words in ("8 × 8 pixels, grey, 3 classes", "of 4 steps", "22 images of", "7 to 8 images", "Model card", "iddpm train"):
        assert words in found.text
    alts = [attributes["alt"] for tag, attributes in found.elements if tag == "img"]
    assert alts == ["samples at step 4", "some of the training images"]


def test_every_logged_number_has_a_chart_or_a_curve_in_one(tmp_path, config):
    own = dict.fromkeys(("mse", "mse_q0", "odd number", "kd_lite0_128"), lambda s: 1.0)
    found = page(made(tmp_path / "a", config, rows(3, **own)))
    drawn = {line["name"] for chart in found.data["charts"] for line in chart["lines"]}
    assert {"loss", "lr", "images_per_second", "odd number", "kd_lite0_128"} <= drawn
    assert "skipped" not in drawn  # as long as it is 0


def test_hours_do_not_count_the_time_between_a_stop_and_its_resuming(tmp_path, config):
    half = rows(10)
    late = [row | {"time": row["time"] + 1e6} for row in rows(20)[10:]]
    run = read_run(made(tmp_path / "a", config, half + late))
    assert run.hours(np.array([20])) == pytest.approx(20 * config.train.batch_size / 100 / 3600)


def test_images_are_those_that_the_log_counts_where_batches_changed(tmp_path, config):
    log = [row | {"images": 6 * row["step"] if row["step"] <= 10 else 60 + 12 * (row["step"] - 10)} for row in rows(20)]
    run = read_run(made(tmp_path / "a", config, log))
    assert run.images == 180
    assert run.hours(np.array([20])) == pytest.approx(180 / 100 / 3600)


def test_figures_stand_with_their_n_error_and_that_of_real_images(tmp_path, config):
    figure = dict(name="KD-lite0-128", value=0.25, error=0.0125, n=256, floor=dict(value=0.001, n=128, reference_n=100),
                  reference="photos", reference_n=500, checkpoint_step=4, ema_rate=0.99, solver="ddim", steps=10)  # fmt: skip
    text = page(made(tmp_path / "a", config, rows(2), metrics_json=json.dumps({"figures": [figure]}))).text
    assert "KD-lite0-128 0.25 ± 0.013 0.001 (n 128) 256 photos (500) step 4, average 0.99 ddim, 10 steps" in text


def test_bits_per_dim_by_step_are_drawn_where_nll_left_them(tmp_path, config):
    bound = dict(kept_steps=[0, 5, 9], vb=[1.5, 0.25, 0.0])
    charts = page(made(tmp_path / "a", config, rows(2), nll_json=json.dumps(bound))).data["charts"]
    (line,) = next(chart for chart in charts if chart["title"].startswith("Bits/dim"))["lines"]
    assert (line["x"], line["y"]) == ([1, 6], [1.5, 0.25])  # 0 has no logarithm


def test_several_runs_are_compared_by_their_differences_and_outcomes(tmp_path, config):
    rates = {"low": 1e-4, "mid": 3e-4, "high": 1e-3}
    runs = [made(tmp_path / name, config.updated({"lr": lr}), rows(30)) for name, lr in rates.items()]
    table = tmp_path / "t.csv"
    found = page(*runs, table=table)
    head, *body = csv.reader(table.read_text().splitlines())
    assert head == ["run", "lr", "step", "images seen", "hours", "loss"]
    assert [(row[0], float(row[1]), int(row[2])) for row in body] == [(name, lr, 30) for name, lr in rates.items()]
    assert float(body[0][5]) == pytest.approx(np.mean([1 / 28, 1 / 29, 1 / 30]))
    assert [line["label"] for line in found.data["charts"][0]["lines"]] == list(rates)
    assert "3 runs compared" in found.text


def test_figures_measured_in_other_ways_do_not_share_a_column(tmp_path, config):
    one = dict(name="KD-lite0-128", value=0.25, n=256, reference=config.data.path, solver="ddim", steps=10)
    others = [
        one | {"steps": 50, "value": 0.125},
        one | {"ema_rate": 0, "value": 0.5},
        one | {"reference": "cats", "value": 0.75},
    ]
    table = tmp_path / "t.csv"
    page(made(tmp_path / "a", config, rows(2), metrics_json=json.dumps({"figures": [one, *others]})),
         made(tmp_path / "b", config, rows(2)), table=table)  # fmt: skip
    (found, _) = csv.DictReader(table.read_text().splitlines())
    usual = "KD-lite0-128, n 256, solver ddim, steps"
    columns = [f"{usual} 10", f"{usual} 50", f"{usual} 10, raw weights", f"{usual} 10, against cats"]
    assert [float(found[name]) for name in columns] == [0.25, 0.125, 0.5, 0.75]


# ---- whatever the files hold


def test_hostile_names_are_text_and_nothing_else(tmp_path, config):
    hostile = config.updated(dict(classes=(HOSTILE, "b", "c"), path=f"/nowhere/{HOSTILE}", preset=HOSTILE))
    odd = [{"step": 3, "event": HOSTILE}]
    figures = json.dumps(
        {"figures": [{"name": HOSTILE, "value": HOSTILE, "n": HOSTILE, "floor": {"value": [HOSTILE]}, "reference": HOSTILE}]}
    )
    run = made(tmp_path / HOSTILE.replace("/", "-"), hostile, rows(2, **{HOSTILE: lambda s: 1.0}) + odd, metrics_json=figures)
    (run / "samples" / f"step_{HOSTILE.replace('/', '-')}.png").write_bytes(b"no picture")
    found, good = page(run), page(made(tmp_path / "b", config, rows(2)))
    assert {tag for tag, _ in found.elements} <= {tag for tag, _ in good.elements} | {
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "details",
        "summary",
        "ul",
        "li",
        "b",
    }
    assert sum(tag == "script" for tag, _ in found.elements) == sum(tag == "script" for tag, _ in good.elements)
    assert HOSTILE.replace("\x07", "�") in found.text
    nul = made(tmp_path / "c", config.updated(dict(path="a\0b", asked="[1]", validation="c")), rows(20))
    assert "Not shown:" in page(nul).text


def test_a_run_whose_page_cannot_be_made_is_named_and_the_rest_is_shown(tmp_path, config, monkeypatch):
    runs = [made(tmp_path / name, config, rows(3)) for name in "abc"]
    real = report.page

    def unforeseen(of, *faults):
        if "b" in (run.name for run in of):
            raise ZeroDivisionError("of b")
        return real(of, *faults)

    monkeypatch.setattr(report, "page", unforeseen)
    found = page(*runs)
    assert "2 runs compared" in found.text
    assert f"{tmp_path / 'b'} is left out: of b" in found.text
    with pytest.raises(ZeroDivisionError):
        report.write([tmp_path / "b"], tmp_path / "x.html")


def test_a_damaged_run_among_good_ones_is_named_and_the_rest_is_shown(tmp_path, config):
    good = [made(tmp_path / name, config, rows(3)) for name in "ab"]
    newer = made(tmp_path / "newer", config, rows(3))
    (newer / "config.json").write_text(json.dumps(json.loads(config.to_json()) | {"version": 99}))
    cut = made(tmp_path / "cut", config, rows(3))
    (cut / "config.json").write_bytes(b'\xff\xfe{"version": 2, ')
    (tmp_path / "nothing").mkdir()
    found = page(*good, newer, cut, tmp_path / "nothing")
    assert "2 runs compared" in found.text
    for words in ("needs a newer iddpm", "cut is left out", "nothing is left out: is no run: it has no config.json"):
        assert words in found.text
    with pytest.raises(UserError, match="is no run"):
        report.write([tmp_path / "nothing"], tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_a_file_of_weights_is_no_run_and_is_told_so(tmp_path, capsys):
    (tmp_path / "a.safetensors").write_bytes(b"")
    for verb in ("report", "diagnose"):
        assert main([verb, str(tmp_path / "a.safetensors")]) == 2
        assert "is a file: give the folder of a run" in capsys.readouterr().err


def test_an_empty_run_one_being_written_and_damaged_files_are_said_to_be_so(tmp_path, config):
    empty = made(tmp_path / "empty", config, [])
    assert "No step is logged yet" in page(empty).text
    torn = made(tmp_path / "torn", config, rows(3))
    with open(torn / "log.jsonl", "ab") as file:
        file.write(b'{"step": 4, "lo')
    assert "cannot be read" not in page(torn).text
    bad = made(tmp_path / "bad", config, rows(3), metrics_json="{", nll_json="[1]")
    (bad / "log.jsonl").write_bytes(b"\0\xff rot\n[]\n" + (bad / "log.jsonl").read_bytes())
    (bad / "samples" / "step_00000003.png").write_bytes(b"\x89PNG cut short")
    (bad / "neighbours.png").write_bytes(b"")
    text = page(bad).text
    for words in (
        "2 of 5 lines of log.jsonl cannot be read",
        "is not a file of figures",
        "nll.json",
        "step_00000003.png",
        "neighbours.png",
    ):
        assert words in text
    assert "Model card" in text


def test_values_of_any_kind_in_the_log_are_passed_over(tmp_path, config):
    odd = rows(3, loss=lambda s: [None, "x", [1], 1e400, True][s]) + [
        {"step": 4, "loss": 2.0, "images_per_second": -1},
        {"step": -3},
    ]
    group = page(made(tmp_path / "a", config, odd)).data["runs"][0]
    assert [g["y"]["loss"] for g in group if "loss" in g["y"]] == [[2.0]]


# ---- what it costs


def test_a_long_log_and_large_sheets_make_a_page_below_5_megabytes_in_seconds(tmp_path, config):
    terms = {f"mse_q{q}": lambda s: s**-0.5 for q in range(4)}
    run = made(tmp_path / "a", config, rows(20_000, every=75, **terms))
    noise = np.random.default_rng(0).integers(0, 256, (768, 768, 3), np.uint8)
    for step in range(8):
        Image.fromarray(np.roll(noise, step)).save(run / "samples" / f"step_{step:08d}.png", compress_level=0)
    began = time.process_time()
    found = page(run)
    assert time.process_time() - began < 10
    assert (tmp_path / "out.html").stat().st_size < 5e6
    (group,) = (g for g in found.data["runs"][0] if "mse_q0" in g["y"])
    assert len(group["x"]["step"]) == len(group["y"]["mse_q0"]) == report.CURVES // 4
    assert group["x"]["step"][-1] == 1_500_000
    assert group["y"]["mse_q0"][-1] == pytest.approx(1_500_000**-0.5, rel=1e-2)
    assert sum(tag == "img" for tag, _ in found.elements) == 9  # with the training images


# ---- what is seen of the data


def test_the_data_set_is_counted_and_doubles_are_found_by_their_bytes(pictures, config, tmp_path):
    shutil.copytree(pictures, tmp_path / "data")
    for k, file in enumerate(sorted((tmp_path / "data" / "disc").iterdir())[:3]):
        shutil.copy(file, tmp_path / "data" / "down" / f"again{k}.png")
    seen = dataset.see(config.updated({"path": str(tmp_path / "data")}))
    assert seen.counts == {kind: len(list((tmp_path / "data" / kind).iterdir())) for kind in ("across", "disc", "down")}
    assert (seen.n, seen.compared, seen.doubles) == (25, 25, 3)
    assert len(seen.some) == 25
    assert seen.some.mean() == pytest.approx(np.mean([np.asarray(Image.open(p)) for p in (tmp_path / "data").rglob("*.png")]))
    with pytest.raises(UserError, match="does not exist"):
        dataset.see(config.updated({"path": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match="only images on this machine"):
        dataset.see(config.updated({"path": "s3://bucket/images"}))


@pytest.mark.parametrize("classes", [True, False])
def test_the_images_of_a_sheet_are_cut_out_of_it_as_they_were(config, classes):
    own = config if classes else config.updated(dict(class_cond=False, image_size="12x8", image_channels=3))
    job = sheets.preview(own)
    size = (12, 8, 3) if not classes else (8, 8, 1)
    drawn = np.random.default_rng(0).integers(0, 256, (len(job.seeds), *size), np.uint8)
    for told in ("", sheets.caption(own, job, 12_000)):
        sheet = sheets.grid(drawn, job.labels, own.data.classes, told)
        assert (sheets.cells(sheet, own) == drawn).all()
    assert sheets.cells(sheet.crop((0, 0, 50, 50)), own) is None


# ---- when it is made


def test_training_leaves_a_page_also_when_it_is_stopped(pictures, tmp_path, capsys, monkeypatch):
    command = ["train", str(pictures), *flags(**TINY | dict(num_channels=8, run=tmp_path / "a", sample_interval=2))]
    seen = []
    monkeypatch.setattr(report, "write", lambda paths, out: seen.append(read_run(paths[0]).step) or [])
    assert main(command) == 0
    assert seen == [2, 4]  # with the samples of step 2, and at the end
    monkeypatch.undo()

    def stopped(config, data, run, **more):
        raise loop.Stopped(4)

    monkeypatch.setattr(loop, "train", stopped)
    assert main(command) == 75
    assert "step 4 of 4, finished" in Page((tmp_path / "a" / "report.html").read_text()).text


def test_an_error_in_the_page_is_a_line_and_no_reason_to_fail(tmp_path, config, capsys, monkeypatch):
    run = made(tmp_path / "a", config, rows(2))
    monkeypatch.setattr(report, "page", lambda *what: 1 / 0)
    report.keep(run)
    assert "report.html is not made: division by zero" in capsys.readouterr().out
    report.keep(tmp_path)  # no run: nothing to make
    assert capsys.readouterr().out == ""


def test_the_verb_says_what_it_wrote_and_refuses_what_is_no_run(tmp_path, config, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        made(tmp_path / name, config, rows(2))
    assert main(["report", "a"]) == 0
    assert "report: a/report.html (" in capsys.readouterr().out
    assert main(["report", "a", "b", "nowhere"]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err
    assert main(["report", "nowhere"]) == 2
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "b" / "config.json").unlink()
    assert main(["report", "a", "b", "--out", "c.html", "--csv", "d.csv"]) == 0
    assert "warning: b is left out" in capsys.readouterr().out
    assert (tmp_path / "d.csv").read_text().startswith("run,")
    assert main(["report"]) == 2


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt-get install chromium")
def test_a_browser_draws_every_chart_without_a_word_of_complaint(run, tmp_path):
    out = tmp_path / "page.html"
    report.write([run], out)
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
             "--disable-background-networking", "--disable-component-update"]  # fmt: skip
    seen = ["--enable-logging=stderr", "--virtual-time-budget=2000", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    shown = subprocess.run([CHROMIUM, *quiet, *seen, out.as_uri()], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in shown.stderr
    charts = Page(out.read_text()).data["charts"]
    assert shown.stdout.count("<canvas") == len(charts) > 5
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert f"{log[-1]['loss']:.4g}" in shown.stdout  # the legend shows the last value
