import tracemalloc

import ignite.metrics
import numpy as np
import pytest
import torch
from torch import nn

from iddpm.errors import UserError
from iddpm.measure.metrics.inception_score import InceptionScore, inception_score


def probabilities(n: int, classes: int, seed: int = 0) -> np.ndarray:
    return torch.from_numpy(3 * np.random.default_rng(seed).normal(size=(n, classes))).softmax(1).numpy()


def of(p: np.ndarray, splits: int = 10) -> InceptionScore:
    return inception_score([p], len(p), splits)


@pytest.mark.parametrize("n", [200, 207])
def test_the_score_and_its_deviation_over_ten_parts_are_torch_fidelitys(n, fidelity):
    p = probabilities(n, 30)
    module = fidelity("metric_isc")
    theirs = module.isc_features_to_metric(torch.from_numpy(p).log(), splits=10, shuffle=False)
    ours = of(p)
    assert ours.score.value == pytest.approx(theirs[module.KEY_METRIC_ISC_MEAN], rel=1e-10)
    assert ours.deviation == pytest.approx(theirs[module.KEY_METRIC_ISC_STD], rel=1e-9)
    assert ours.score.error == pytest.approx(theirs[module.KEY_METRIC_ISC_STD] / 3, rel=1e-9)  # sqrt(10 - 1)


def test_the_score_of_all_images_as_one_part_is_ignites():
    p = probabilities(150, 20)
    metric = ignite.metrics.InceptionScore(num_features=20, feature_extractor=nn.Identity())
    metric.update(torch.from_numpy(p))
    assert of(p).whole == pytest.approx(metric.compute(), rel=1e-9)


def test_certain_images_of_every_class_score_the_number_of_classes_and_equal_ones_score_one():
    certain = np.eye(8)[np.arange(160) % 8]  # with zeros, of which the logarithm is none
    for p, expected in ((certain, 8), (np.tile(probabilities(1, 8), (160, 1)), 1)):
        score, deviation, whole = of(p, splits=5)
        assert (*score, deviation, whole) == pytest.approx((expected, 0, 0, expected), abs=1e-12)


def test_small_parts_score_lower_than_all_as_one():
    p = probabilities(100, 50)
    assert of(p).score.value < of(p, splits=5).score.value < of(p).whole
    assert of(p, splits=1).score == (pytest.approx(of(p).whole), None)


def test_blocks_of_any_size_give_the_same():
    p = probabilities(200, 10)
    for found, expected in zip(inception_score(np.split(p, [1, 26, 26, 150]), 200), of(p)):
        assert found == pytest.approx(expected, rel=1e-12)


def test_memory_does_not_grow_with_the_number_of_images():
    peaks = []
    for n in (1000, 20_000):
        tracemalloc.start()
        inception_score((probabilities(500, 20, a) for a in range(0, n, 500)), n)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_too_few_images_and_what_is_no_probability_are_refused():
    with pytest.raises(UserError, match="in 10 parts needs at least 20 images, not 19"):
        of(probabilities(19, 10))
    p = probabilities(20, 10)
    p[3, 2], p[5] = np.nan, 2 * p[5]
    p[7, :2] = -0.5, 0.5 + p[7, :2].sum()
    with pytest.raises(UserError, match="3 of 20 rows are not probabilities"):
        of(p)
