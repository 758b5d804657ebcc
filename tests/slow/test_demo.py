"""The demo, as a newcomer runs it: drawn digits are read as asked, and are no copies."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


def distances(a: np.ndarray, b: np.ndarray, skip_self: bool = False) -> np.ndarray:
    """Euclidean distance of each row of a to its nearest row of b."""
    d = np.sqrt(np.maximum(((a[:, None] - b[None]) ** 2).sum(-1), 0))
    if skip_self:
        np.fill_diagonal(d, np.inf)
    return d.min(1)


@pytest.mark.slow
def test_a_classifier_reads_the_demos_digits_as_asked(tmp_path):
    from sklearn.datasets import load_digits
    from sklearn.svm import SVC

    def iddpm(*args: object) -> None:
        subprocess.run([sys.executable, "-m", "iddpm", *map(str, args)], check=True, cwd=tmp_path)

    iddpm("data", "digits", "digits")
    began = time.monotonic()
    iddpm("train", "digits/train", "--preset", "digits", "--run", "run")
    minutes = (time.monotonic() - began) / 60
    iddpm("sample", "run", "--num_samples", "500", "--out", "drawn.npz")
    with np.load(tmp_path / "drawn.npz") as file:
        drawn, asked = file["arr_0"].reshape(500, 64) / 255 * 16, file["arr_1"]

    pixels, digits = load_digits(return_X_y=True)
    half = np.arange(len(pixels)) % 2 == 0
    judge = SVC(gamma=0.001, C=10).fit(pixels[half], digits[half])
    held_out = judge.score(pixels[~half], digits[~half])
    agreed = judge.score(drawn, asked)

    test = np.arange(len(pixels)) % 5 == 4  # what the demo was not trained on
    of_samples, of_real = distances(drawn, pixels[~test]), distances(pixels[test], pixels[~test])
    print(f"\ndigits: trained in {minutes:.1f} min; {agreed:.1%} of 500 read as asked (held-out real digits: {held_out:.1%})")
    for name, d in (("samples", of_samples), ("held-out real", of_real)):
        print(f"nearest training digit, {name}: " + "  ".join(f"{q}% {np.percentile(d, q):.1f}" for q in (1, 10, 50, 90)))
    assert agreed >= 0.85
    assert np.percentile(of_samples, 1) > 0.5 * np.percentile(of_real, 1), "some samples are copies"
