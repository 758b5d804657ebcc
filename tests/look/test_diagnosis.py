"""Each rule finds its fault in a run that was made to have it, and nothing in a good run."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iddpm.cli.main import main
from iddpm.config import Config
from iddpm.look import report
from iddpm.look.dataset import Seen
from iddpm.look.diagnosis import RULES, diagnose
from iddpm.look.runs import Run
from iddpm.sampling import sheets
from look.pages import Page

STEPS = 100 * np.arange(1, 101)
CONFIG = Config().updated(
    dict(image_size="8", class_cond=True, num_classes=2, classes=("cat", "dog"), path="/photos", validation="/others",
         batch_size=10, steps=10_000, diffusion_steps=1000, ema_rate="0.999")
)  # fmt: skip
NOISE = np.random.default_rng(0)


def noisy(values: np.ndarray | float, deviation: float = 0.02) -> np.ndarray:
    return np.asarray(values) * (1 + deviation * NOISE.standard_normal(len(STEPS)))


def falling(to: float = 0.1, until: float = 0.3) -> np.ndarray:
    """A loss that falls in the first part of a run, and is level then."""
    return np.maximum(1 - (1 - to) * STEPS / STEPS[-1] / until, to)


GOOD = {
    "loss": noisy(falling()), "val_loss": noisy(falling(0.105)), "grad_norm": noisy(0.5), "images_per_second": noisy(100.0),
    "skipped": np.zeros(100), **{f"loss_q{q}": noisy(falling(to)) for q, to in enumerate((0.2, 0.1, 0.06, 0.04))},
}  # fmt: skip
LABELS = [k % 2 for k in range(64)]
IMAGES = NOISE.integers(80, 120, (64, 8, 8, 3), np.uint8)
IMAGES[::2, :4] += 20  # cats are lighter above, dogs below
IMAGES[1::2, 4:] += 20
SEEN = Seen(5000, "folder", {"cat": 2400, "dog": 2600}, IMAGES, LABELS, ("cat", "dog"), 5000, 0)


def figure(name: str, value: float, **conditions: object) -> dict[str, object]:
    usual = dict(error=0.001, n=1000, reference="/photos", ema_rate=0.999, sampling_steps="250", steps=250)
    return dict(name=name, value=value, **usual | conditions)


FIGURES = [
    figure("near copies (1 % expected)", 0.01), figure("KD-lite0-128", 0.05), figure("KD-lite0-128", 0.08, ema_rate=0),
    figure("KD-lite0-128", 0.049, sampling_steps="500", steps=500),
]  # fmt: skip


@pytest.fixture(scope="module")
def sheet(tmp_path_factory) -> Path:
    return drawn(tmp_path_factory.mktemp("sheet"), SEEN.some)


def drawn(folder: Path, images: np.ndarray) -> Path:
    job = sheets.preview(CONFIG)
    path = folder / "step_00010000.png"
    sheets.grid(images[: len(job.seeds)], job.labels, CONFIG.data.classes).save(path)
    return path


def a_run(sheet: Path, figures: list = FIGURES, log: dict[str, np.ndarray] = {}, **settings: object) -> Run:
    """The good run, with other figures, columns of its log or settings."""
    columns = GOOD | log
    rows = [{"step": int(s), **{name: float(v[k]) for name, v in columns.items()}} for k, s in enumerate(STEPS)]
    return Run(Path("/run"), "run", CONFIG.updated(settings), rows, [], figures, [(10_000, sheet)], {}, [])


def test_a_good_run_is_left_in_peace_by_every_rule(sheet):
    said = diagnose(a_run(sheet), SEEN)
    assert said.findings == {}
    assert said.unknown == {}
    assert said.fine == list(RULES)


def kinked(early: float, late: float) -> np.ndarray:
    return np.where(STEPS < 5000, early, late)


FAULTS = {  # the rule, what is made wrong of the good run, and a part of the evidence and of the remedy
    "divergence": (dict(log={"loss": noisy(np.where(STEPS < 8000, falling(), 0.9))}), "now", "--lr 3e-05 --grad_clip 1"),
    "skipped steps": (dict(log={"skipped": np.arange(100) * 3.0}), "297 of 10,000 steps (3.0%)", "--grad_clip 1"),
    "precision": (dict(log={"lg_loss_scale": 16 - STEPS / 1000}, precision="fp16"), "2^12.", "--precision bf16"),
    "end of the chain": (dict(snr_shift=0.1), "of the amplitude", "--zero_terminal_snr"),
    "length of the run": (dict(log={"val_loss": noisy(STEPS**-0.5)}), "val_loss 0.0", "--steps 80000"),
    "overfitting": (
        dict(log={"val_loss": noisy(np.where(STEPS < 4000, falling(), 0.1 + STEPS / 1e5))}), "training loss 0.", "--dropout",
    ),
    "copies": (dict(figures=[figure("near copies (1 % expected)", 0.4)]), "40.0% of 1000 samples", "--dropout"),
    "duplicates": (dict(seen=SEEN._replace(doubles=400)), "400 of 5,000 files", "remove"),
    "number of images": (dict(seen=SEEN._replace(n=200, counts={"cat": 100, "dog": 100})), "each seen 500 times", "--init_from"),
    "classes": (
        dict(seen=SEEN._replace(labels=[1 - y if k < 7 else y for k, y in enumerate(LABELS)])),
        "5 of 64 images lie among those of another class", "dog",
    ),
    "balance of classes": (dict(seen=SEEN._replace(counts={"cat": 90, "dog": 4910})), "90 of cat, 4,910 of dog", "more images"),
    "noise levels": (dict(log={"loss_q3": noisy(kinked(0.02, 0.05))}), "0.02", "--schedule_sampler"),
    "averages": (dict(ema_rate="0.9999", ema_warmup=False), "37% of it will be the untrained network", "--ema_rate 0.999 "),
    "steps of the solver": (
        dict(figures=[figure("KD-lite0-128", 0.3, sampling_steps="10", steps=10), FIGURES[1]], sampling_steps="10"),
        "0.3 in 10 steps, 0.05 in 250", "--sampling_steps 250",
    ),
    "throughput": (dict(log={"images_per_second": noisy(kinked(100, 50))}), "at the start, 5", "--num_workers"),
}  # fmt: skip


@pytest.mark.parametrize("rule", FAULTS)
def test_a_fault_is_found_by_its_rule_and_by_no_other(rule, sheet):
    made, evidence, change = FAULTS[rule]
    seen = made.pop("seen", SEEN) if "seen" in made else SEEN
    said = diagnose(a_run(sheet, **made), seen)
    assert list(said.findings) == [rule]
    assert evidence in said.findings[rule].evidence
    assert change in said.findings[rule].change


@pytest.mark.parametrize("wrong", [0.0, 0.03, 0.15])
def test_digits_in_wrong_classes_are_found_and_good_ones_not(sheet, wrong):
    from sklearn.datasets import load_digits

    digits, rng = load_digits(), np.random.default_rng(0)
    chosen = rng.permutation(len(digits.images))[:256]
    own = digits.target[chosen]
    own = np.where(rng.random(256) < wrong, (own + rng.integers(1, 10, 256)) % 10, own)
    names = tuple(map(str, range(10)))
    some = (digits.images[chosen] * 15.9).astype(np.uint8)[..., None]
    seen = Seen(5000, "folder", dict.fromkeys(names, 500), some, own.tolist(), names, 5000, 0)
    run = a_run(sheet, classes=names, num_classes=10, image_channels=1)
    found = diagnose(run, seen).findings.get("classes")
    assert (found is not None) == (wrong == 0.15), found


def test_every_rule_is_tried_on_a_fault():
    assert set(RULES) == {*FAULTS, "colours"}


def test_colours_that_are_off_are_found_in_the_pixels_of_the_sheet(tmp_path):
    red = SEEN.some.astype(int) + [30, 0, 0]
    found = diagnose(a_run(drawn(tmp_path, red.astype(np.uint8))), SEEN).findings["colours"]
    means = [f"mean red {x.mean():.0f} of 255" for x in (red[..., 0],)]
    assert means[0] in found.evidence
    (tmp_path / "step_00010000.png").write_bytes(b"no picture")
    assert "no picture" not in diagnose(a_run(tmp_path / "step_00010000.png"), SEEN).unknown["colours"]
    Image.new("RGB", (10, 10)).save(tmp_path / "step_00010000.png")
    assert "is no sheet" in diagnose(a_run(tmp_path / "step_00010000.png"), SEEN).unknown["colours"]


def test_colours_of_unequal_classes_are_not_judged(sheet):
    said = diagnose(a_run(sheet), SEEN._replace(counts={"cat": 2000, "dog": 3000}))
    assert said.findings == {}
    assert "as many images of each class" in said.unknown["colours"]


def test_an_average_is_judged_by_the_length_that_the_run_will_have(sheet):
    run = a_run(sheet, ema_rate="0.99975")
    assert diagnose(replace(run, rows=run.rows[:20]), SEEN).findings == {}  # 61 % of it at this step, 8 % at the end


def more(rule: str, sheet: Path, **made: object) -> str:
    found = diagnose(a_run(sheet, **made), SEEN).findings
    assert list(found) == [rule]
    return found[rule].says


def test_other_faults_of_the_same_rules(sheet):
    assert "too short" in more("averages", sheet, ema_rate="0.9")
    better = [figure("KD-lite0-128", 0.05), figure("KD-lite0-128", 0.02, ema_rate=0), *FIGURES[:1], *FIGURES[3:]]
    assert "raw weights" in more("averages", sheet, figures=better)
    steady = {f"loss_q{q}": noisy(falling(to)) for q, to in enumerate((0.38, 0.005, 0.005, 0.005))}
    assert "nearest to the image" in more("noise levels", sheet, log=steady)
    run = a_run(sheet)
    bad = [*run.rows[:-1], run.rows[-1] | {"loss": None, "not_finite": ["loss"]}]
    assert "no number" in diagnose(replace(run, rows=bad), SEEN).findings["divergence"].says


def test_what_cannot_be_told_is_said_with_how_to_learn_it(sheet):
    run = a_run(sheet, figures=[], validation="", log={}, task="images")
    said = diagnose(replace(run, rows=run.rows[:5]), None)
    assert said.findings == {}
    assert "--validation DATA" in said.unknown["overfitting"]
    assert "iddpm evaluate /run --reference /photos" in said.unknown["copies"]
    assert "step 500 of 10,000" in said.unknown["length of the run"]
    assert "cannot be reached" in said.unknown["colours"]
    assert "5 values logged" in said.unknown["throughput"]
    empty = diagnose(replace(run, rows=[], sheets=[]), None)
    assert empty.findings == {}


def test_a_run_whose_loss_has_rare_spikes_is_not_called_divergent(sheet):
    spiked = GOOD["loss"].copy()
    spiked[85::4] = 50.0
    assert diagnose(a_run(sheet, log={"loss": spiked}), SEEN).findings == {}


def test_the_verb_and_the_page_say_the_same(run, tmp_path, capsys):
    assert main(["diagnose", str(run)]) == 0
    told = capsys.readouterr().out
    report.write([run], tmp_path / "page.html")
    text = Page((tmp_path / "page.html").read_text()).text
    assert "1 finding, at step 4" in told
    for words in ("There are few images to learn from.", "22 images, each seen 1 times"):
        assert words in told
        assert words in text
    assert main(["diagnose", str(tmp_path)]) == 2
    assert "it has no config.json" in capsys.readouterr().err


def test_a_log_of_this_program_has_the_names_that_the_rules_read(run):
    names = {name for line in (run / "log.jsonl").read_text().splitlines() for name in json.loads(line)}
    assert {
        "loss",
        "mse",
        *(f"{term}_q{q}" for q in range(4) for term in ("loss", "mse")),
        "images_per_second",
        "skipped",
    } <= names
