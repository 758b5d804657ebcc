"""The sentence with which `iddpm evaluate` ends."""

import pytest

from iddpm.look.figures import verdict
from iddpm.measure.metrics.interface import Finding
from iddpm.measure.metrics.rows import Estimate


def kd(value: float, error: float | None = 0.01) -> Finding:
    return Finding("KD-lite0-128", Estimate(value, error), 1000, real=0.0)


def copies(share: float) -> Finding:
    return Finding("near copies (1 % expected)", Estimate(share, 0.01), 1000)


@pytest.mark.parametrize(
    ("findings", "says"),
    [
        ([kd(0.02)], "verdict: not told apart from real images (KD-lite0-128 0.02, theirs 0): compare more of them to be surer"),
        ([kd(0.05), copies(0.01)], "verdict: worse than real images (KD-lite0-128 0.05, theirs 0), no more near copies than"),
        ([kd(0.05), copies(0.01)], ": train longer, or draw with more --guidance"),
        ([kd(1.2)], "verdict: much worse than real images"),
        ([kd(0.02), copies(0.4)], "40% near copies of the reference: more images, or --dropout"),
        ([kd(0.02, None), Finding("precision", Estimate(0.5, 0.1), 10, real=0.9)], ""),
        ([], ""),
    ],
)  # fmt: skip
def test_it_follows_from_the_figures(findings, says):
    found = verdict(findings)
    assert says in found and bool(found) == bool(says)
