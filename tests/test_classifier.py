"""The classifier of noisy images: its loss, its training, and the samples it guides."""

import numpy as np
import pytest
import torch

from conftest import TINY, flags
from golden_rules import image_tensor, noise
from iddpm import build
from iddpm.cli.main import main
from iddpm.diffusion.objective import cross_entropy
from iddpm.store.log import read_rows

JUDGE = dict(TINY, task="classify", class_cond=True, learn_sigma=False, num_head_channels=8, steps=60, log_interval=60, lr=3e-3)


@pytest.fixture(scope="module")
def judge(pictures, tmp_path_factory) -> str:
    run = tmp_path_factory.mktemp("judge") / "run"
    assert main(["train", str(pictures), "--run", str(run), *flags(**JUDGE)]) == 0
    return str(run)


def test_its_loss_is_the_cross_entropy_of_the_noisy_image(config):
    """A linear network of the noisy image: the loss and the ranks, worked out by hand."""
    d = build.denoiser(config, lambda x, t: x.flatten(1)[:, :7] * 3 + t[:, None] / 100)
    chain = build.schedule(config)
    x0, eps, i, y = (
        image_tensor(0, (4, 1, 8, 8)),
        noise(0, (4, 1, 8, 8)),
        torch.tensor([0, 5, 10, 19]),
        torch.tensor([0, 3, 5, 6]),
    )
    terms = cross_entropy(d, chain, x0, eps, (i + 0.5) / chain.steps, {"y": y})
    alpha, sigma, time = (column[i].float() for column in (chain.table.alpha, chain.table.sigma, chain.table.time))
    xt = alpha.view(-1, 1, 1, 1) * x0 + sigma.view(-1, 1, 1, 1) * eps
    logits = (xt.flatten(1)[:, :7] * 3 + time[:, None] / 100).double().numpy()
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert terms["loss"].numpy() == pytest.approx(-np.log(p[range(4), y]), rel=1e-5)
    order = np.argsort(-logits, axis=1)
    assert terms["acc@1"].tolist() == [float(order[k, 0] == y[k]) for k in range(4)]
    assert terms["acc@5"].tolist() == [float(y[k] in order[k, :5]) for k in range(4)]


def test_it_learns_and_logs_its_accuracy(judge, tmp_path):
    from pathlib import Path

    last = read_rows(Path(judge))[-1]
    assert last["acc@1_q0"] > 0.6  # of three classes, on the least noisy quarter, over the whole run
    assert {"loss", "acc@1", "acc@5", "loss_q3"} <= last.keys()
    assert not (Path(judge) / "samples").exists()


@pytest.mark.parametrize("solver", ["ancestral", "ddim"])
def test_guidance_changes_the_samples_and_no_scale_does_not(run, judge, tmp_path, solver):
    """An own model without classes is guided to labels; a scale of 0 gives the unguided images."""
    arrays = {}
    for name, extra in dict(
        plain=[], none=["--classifier", judge, "--classifier_scale", "0"], full=["--classifier", judge]
    ).items():
        out = tmp_path / f"{name}.npz"
        argv = ["sample", str(run), "--solver", solver, "--labels", "disc", "--num_samples", "4", "--out", str(out), *extra]
        assert main(argv) == 0
        with np.load(out) as file:
            arrays[name] = file["arr_0"].astype(int)
            assert file["arr_1"].tolist() == [1] * 4
    assert np.array_equal(arrays["plain"], arrays["none"])
    assert abs(arrays["plain"] - arrays["full"]).max() > 1


def test_a_model_without_classes_is_guided_to_those_of_the_classifier(pictures, judge, tmp_path):
    plain = tmp_path / "plain"
    assert main(["train", str(pictures), "--run", str(plain), *flags(**TINY)]) == 0
    out = tmp_path / "x.npz"
    argv = ["sample", str(plain), "--classifier", judge, "--classifier_scale", "5", "--labels", "down", "--num_samples", "3"]
    assert main([*argv, "--out", str(out)]) == 0
    with np.load(out) as file:
        assert file["arr_1"].tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "DATA", "--task", "classify", "--steps", "1", "--preset", "none"], "--class_cond True"),
        (["train", "DATA", "--task", "classify", "--class_cond", "--learn_sigma", "--steps", "1"], "no effect"),
        (["train", "DATA", "--classifier_pool", "spatial", "--steps", "1"], "belongs to --task classify"),
        (["sample", "JUDGE"], "draws nothing"),
        (["sample", "RUN", "--classifier", "RUN"], "no classifier"),
        (["sample", "RUN", "--classifier_scale", "2"], "without --classifier"),
        (["sample", "OTHER", "--classifier", "JUDGE"], "other noise"),
    ],
)
def test_what_cannot_be_guided_is_one_clear_line(argv, words, pictures, run, judge, tmp_path, capsys):
    other = tmp_path / "other"
    if "OTHER" in argv:
        assert main(["train", str(pictures), "--run", str(other), *flags(**dict(TINY, diffusion_steps=10))]) == 0
    places = dict(DATA=pictures, RUN=run, JUDGE=judge, OTHER=other)
    capsys.readouterr()
    assert main([str(places.get(a, a)) for a in argv]) == 2
    err = capsys.readouterr().err.strip()
    assert words in err and len(err.splitlines()) == 1


def test_ddim_says_where_its_guidance_would_jump(run, judge, tmp_path, capsys):
    """The cosine chain ends in pure noise; a ddimN grid leaves that step out."""
    argv = ["sample", str(run), "--classifier", judge, "--solver", "ddim", "--num_samples", "1", "--out", str(tmp_path / "x.npz")]
    assert main([*argv, "--sampling_steps", "5"]) == 0
    assert "take --sampling_steps ddimN" in capsys.readouterr().out
    assert main([*argv[:-1], str(tmp_path / "y.npz"), "--sampling_steps", "ddim10"]) == 0
    assert "ddimN" not in capsys.readouterr().out
