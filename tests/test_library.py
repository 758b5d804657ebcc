"""The library's front: every program of the guide runs, and what it returns is what the commands give."""

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import iddpm
from iddpm.cli.main import main
from iddpm.config import choices
from iddpm.measure import figures

ROOT = Path(__file__).parents[1]


def programs(path: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), re.S)


@pytest.fixture
def there(pictures, tmp_path, monkeypatch):
    """A folder with photos, and no rows of earlier programs."""
    from PIL import Image

    (tmp_path / "photos").mkdir()
    for k in range(8):
        pixels = np.random.default_rng(k).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{k}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(choices, "ADDED", {})
    return tmp_path


def test_the_guides_programs_run_one_after_another(there):
    names: dict = {}
    for program in programs("docs/guides/library.md"):
        # few steps where the reader's runs draw their sheets of samples in 250
        program = re.sub(r"(iddpm\.train\(.*)\)", r"\1, sampling_steps=3)", program)
        exec(compile(program, "library.md", "exec"), names)
    assert names["images"].shape == (4, 8, 8, 3) and names["images"].dtype == np.uint8
    assert names["bits"].shape == (4,) and np.isfinite(names["bits"]).all()
    assert any(name.startswith("KD") for name in names["figures"])
    assert torch.isfinite(names["x"]).all()
    assert names["drawn"].shape == (2, 8, 8, 3)
    for run in ("huber", "arc", "plain", "stripes"):
        assert (there / "runs" / run / "checkpoints" / "step_00000002").is_dir()
    assert json.loads((there / "runs/plain/config.json").read_text())["own"]["width"] == 8


def test_the_program_of_the_guide_to_pairs_runs(there):
    (program,), names = programs("docs/guides/translate.md"), dict[str, Any]()
    exec(compile(re.sub(r"(iddpm\.train\(.*)\)", r"\1, sampling_steps=3)", program), "translate.md", "exec"), names)
    assert names["several"].shape == (4, 8, 8, 3) and len({image.tobytes() for image in names["several"]}) == 4


@pytest.fixture
def model(run):
    return iddpm.load(run, device="cpu")


def test_the_lines_of_the_readme_run(there):
    """On a small run and few images in the place of the reader's, for two steps."""
    (block,) = re.findall(r"^    import iddpm.*?(?=^\S)", (ROOT / "README.md").read_text(), re.S | re.M)
    program = textwrap.dedent(block)
    small = dict(num_channels=32, num_res_blocks=1, batch_size=2, diffusion_steps=50, sampling_steps=3, device="cpu")
    iddpm.train("photos", run="runs/tiny", image_size=8, steps=1, **small)
    program = re.sub(r"iddpm\.train\((.*)\)", rf"iddpm.train(\1, **{small})", program)
    program = re.sub(r"image_size=\d+", "image_size=8", re.sub(r"\bsteps=[\d_]+", "steps=2", program))
    exec(compile(program, "README.md", "exec"), {})


def test_image_k_depends_on_its_seed_alone_and_is_the_commands(model, run, tmp_path):
    four, one = model.sample(4, seed=3), model.sample(1, seed=5)
    assert np.abs(four[2].astype(int) - one[0]).max() <= 1
    assert main(["sample", str(run), "--seeds", "3-6", "--out", str(tmp_path / "x.npz"), "--device", "cpu"]) == 0
    with np.load(tmp_path / "x.npz") as file:
        assert np.array_equal(file["arr_0"], four)
    one = model.sample(2, labels="disc", steps=2)
    assert np.array_equal(one, model.sample(2, labels=1, steps=2)) and np.array_equal(one, model.sample(2, labels=["1"], steps=2))
    assert model.sample(0).shape == (0, *four.shape[1:])


def test_bits_per_dim_is_the_bound(model):
    """Against the terms added up by hand, with the same noise."""
    from functools import partial

    from iddpm import build, rng
    from iddpm.diffusion.bound import bound_terms, prior_term

    images, labels = model.sample(3, labels=[0, 1, 2]), [0, 1, 2]
    x0 = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    grid = model.grid("all")
    denoise = partial(build.sampling_denoiser(model.config, model.opened.net), cond={"y": torch.tensor(labels)})
    with torch.no_grad():
        terms = bound_terms(denoise, x0, grid, lambda k: rng.normal(0, rng.LIKELIHOOD, k, range(3), x0.shape[1:]))
        total = prior_term(grid, x0) + sum(term.vb for term in terms)
    np.testing.assert_allclose(model.bits_per_dim(images, labels), total.numpy(), rtol=1e-5)
    np.testing.assert_allclose(model.bits_per_dim(images, ["across", "disc", "down"]), total.numpy(), rtol=1e-5)
    assert model.bits_per_dim(images[:0], []).shape == (0,)


def test_evaluate_gives_the_figures_of_the_command(there, model):
    np.savez(there / "drawn.npz", images := model.sample(8))
    np.savez(there / "real.npz", real := np.ascontiguousarray(255 - images))
    ours = iddpm.evaluate(images, reference=real, metrics="fd,kd", device="cpu")
    command = ["evaluate", "drawn.npz", "--reference", "real.npz", "--metrics", "fd,kd", "--device", "cpu", "--out", "m.json"]
    assert main(command) == 0
    theirs = {row["name"]: row["value"] for row in figures.read(there / "m.json")}
    assert len(ours) >= 2 and ours == {name: pytest.approx(theirs[name], rel=1e-9) for name in ours}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.sample(1, solvr="ddim"), "did you mean 'solver'"),
        (lambda m: m.sample(1, solver="euler"), "ancestral, ddim"),
        (lambda m: m.sample(1, solver="ancestral", eta=0.5), "eta"),
        (lambda m: m.sample(1, labels=["square"]), "square"),
        (lambda m: m.sample(1, low_res=np.zeros((1, 4, 4, 1), np.uint8)), "low_res"),
        (lambda m: m.bits_per_dim(np.zeros((1, 9, 9, 1), np.uint8), [0]), "must be"),
        (lambda m: m.bits_per_dim(np.zeros((1, 8, 8, 1), np.uint8)), "label"),
        (lambda m: m.bits_per_dim(np.zeros((1, 8, 8, 1), np.uint8), [7]), "from 0 to 2"),
        (lambda m: m.bits_per_dim(np.zeros((1, 8, 8, 1), np.uint8), ["square"]), "knows across"),
        (lambda m: m.bits_per_dim(np.zeros((1, 8, 8, 1), np.uint8), [0], solver="ddim"), "no effect on the bound"),
        (lambda m: m.bits_per_dim(np.zeros((1, 8, 8, 1), np.uint8), [0], seed=-1), "seeds from 0"),
        (lambda m: m.sample(-1), "n from 0"),
        (lambda m: m.sample(2.5), "whole numbers"),
        (lambda m: m.sample(1, seed=2**64), "seeds from 0 to 18446744073709551615"),
        (lambda m: m.sample(1, labels=["disc,down"]), "knows across"),  # of a list each is a name
        (lambda m: m.sample(1, steps=3, sampling_steps="5"), "give one"),
        (lambda m: m.sample(1, guidance_kind="apg"), "no effect without --guidance"),
        (lambda m: m.grid(0), "sampling_steps '0'"),
        (lambda m: m.denoise(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), next(iter(m.grid(3)))), "give floats"),
        (lambda m: iddpm.evaluate(np.zeros((2, 8, 8, 3)), reference="photos"), "^samples holds float64"),
        (lambda m: iddpm.evaluate(np.zeros((2, 8, 8, 3), np.uint8), reference=""), "an empty text"),
        (lambda m: iddpm.train("nowhere", run="r", steps=1), "nowhere"),
        (lambda m: iddpm.train("nowhere", stepz=1), "did you mean 'steps'"),
        (lambda m: iddpm.train("nowhere", steps="many"), "whole number"),
        (lambda m: iddpm.train([1], steps=1), "run="),
        (lambda m: iddpm.train([], run="r", steps=1, image_size=8), "empty"),
        (lambda m: iddpm.load("nowhere"), "nowhere"),
    ],
)
def test_what_cannot_be_done_is_refused_in_words(there, model, call, words):
    with pytest.raises(iddpm.UserError, match=words):
        call(model)
    assert not (there / "r").exists()


def test_importing_the_package_imports_neither_torch_nor_numpy():
    code = "import sys, iddpm; dir(iddpm); sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert set(iddpm.__all__) == {"Model", "UserError", "add", "evaluate", "load", "train"}
