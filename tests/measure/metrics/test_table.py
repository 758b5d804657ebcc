"""Every row of the table of metrics says what it is, and what it cannot do without."""

import numpy as np
import pytest
import torch

from iddpm.config import Evaluate, make
from iddpm.config.choices import ADDED, choices
from iddpm.config.choices import make as row
from iddpm.errors import UserError
from iddpm.measure.compare import compare, possible
from iddpm.measure.extractors import Extractor
from iddpm.measure.metrics.interface import Comparison, Finding, Side, images, needs
from iddpm.measure.metrics.moments import Gaussian
from iddpm.measure.metrics.rows import Estimate

NETWORK = Extractor("net", "net 1", {"pool": 3}, lambda images: {}, torch.device("cpu"), lambda rows: rows.double().softmax(1))


def side(n: int, seed: int) -> Side:
    rows = {"pool": np.random.default_rng(seed).standard_normal((n, 3), np.float32)}
    return Side(rows, lambda tap: Gaussian.of(rows[tap]), np.arange(n) % 2)


@pytest.mark.parametrize("name", choices("metrics"))
def test_a_metric_gives_figures_or_says_what_is_missing(name):
    metric, both = row("metrics", name), Comparison(side(40, 0), side(50, 1), NETWORK)
    if why := metric.lacks(both):
        assert (name, why) == ("sfd", "net has no spatial features")
        return
    for finding in metric(both):
        assert isinstance(finding, Finding) and np.isfinite(finding.estimate.value)
        assert finding.reference_n in (None, 50)


@pytest.mark.parametrize("name", choices("metrics"))
def test_a_file_of_statistics_is_enough_for_a_metric_or_it_says_that_it_is_not(name):
    held = {"pool": Gaussian(np.zeros(3), np.eye(3))}
    metric, both = row("metrics", name), Comparison(side(40, 0), Side({}, held.get), NETWORK)
    assert not (why := metric.lacks(both)) or "statistics" in why or name == "sfd"
    assert why or metric(both)


def test_a_metric_of_ones_own_is_a_function_and_gets_its_floor_of_real_images(monkeypatch):
    @needs(images(10))
    def spread(c: Comparison) -> list[Finding]:
        """The samples' variance over that of the reference."""
        ours, theirs = (s.rows["pool"][:].var() for s in (c.samples, c.reference))
        return [Finding("spread", Estimate(float(ours / theirs), None), c.reference.n)]

    monkeypatch.setitem(ADDED, ("metrics", "spread"), spread)
    assert choices("metrics")["spread"].help == "The samples' variance over that of the reference"
    assert make(Evaluate, {"metrics": "fd,spread"}).metrics == "fd,spread"
    both = Comparison(side(40, 0), side(50, 1), NETWORK)
    [[found]] = compare([both], possible(both, {"spread": row("metrics", "spread")}, asked=True))
    real = side(50, 1).rows["pool"]
    assert found.real == pytest.approx(real[:25].var() / real[25:].var()) and found.real_n == (25, 25)
    few = Comparison(side(5, 0), side(50, 1), NETWORK)
    with pytest.raises(UserError, match="--metrics spread: it needs at least 10 images on both sides"):
        possible(few, {"spread": row("metrics", "spread")}, asked=True)


def test_the_number_of_a_metric_is_a_setting_where_the_metric_is_chosen():
    settings = make(Evaluate, {"metrics": "prdc", "neighbours": 3})
    assert row("metrics", "prdc", dict(settings.own)).neighbours == 3
    with pytest.raises(UserError, match="--neighbours has no effect with --metrics fd: it belongs to prdc"):
        make(Evaluate, {"metrics": "fd", "neighbours": 3})
    with pytest.raises(UserError, match="--neighbours 0 is out of range: from 1 to 100"):
        make(Evaluate, {"neighbours": 0})
