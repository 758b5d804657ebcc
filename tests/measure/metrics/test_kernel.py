import itertools
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.image.kid import KernelInceptionDistance

from iddpm.errors import UserError
from iddpm.measure.metrics.kernel import _across, _sums, _within, kernel_distance


def by_torchmetrics(x, y, fidelity) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it keeps all features
        metric = KernelInceptionDistance(feature=nn.Identity(), subsets=1, subset_size=len(x))
    metric.update(torch.from_numpy(y), real=True)
    metric.update(torch.from_numpy(x), real=False)
    return metric.compute()[0].item()


def by_torch_fidelity(x, y, fidelity) -> float:
    module = fidelity("metric_kid")
    found = module.kid_features_to_metric(*map(torch.from_numpy, (x, y)), kid_subsets=1, kid_subset_size=len(x), verbose=False)
    return found[module.KEY_METRIC_KID_MEAN]


@pytest.mark.parametrize("library", [by_torchmetrics, by_torch_fidelity])
def test_the_distance_is_the_libraries_on_one_subset_of_all(library, pair, fidelity):
    assert kernel_distance(*pair).value == pytest.approx(library(*pair, fidelity), rel=1e-9)


def test_the_distance_is_the_mean_over_pairs_one_by_one():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5, 3)), rng.normal(size=(7, 3)) + 1

    def k(a, b):
        return (sum(a * b) / 3 + 1) ** 3

    own = [np.mean([k(a, b) for a, b in itertools.combinations(z, 2)]) for z in (x, y)]
    assert kernel_distance(x, y).value == pytest.approx(sum(own) - 2 * np.mean([k(a, b) for a in x for b in y]), rel=1e-12)


def test_the_scatter_of_pairs_is_that_of_rows_that_are_all_different():
    rng = np.random.default_rng(4)
    x, y = (torch.from_numpy(rng.normal(size=(n, 2))) for n in (5, 4))
    k, across = (x @ x.T / 2 + 1).numpy() ** 3, (x @ y.T / 2 + 1).numpy() ** 3
    four = list(itertools.permutations(range(5), 4))
    centred = np.mean([k[a, b] ** 2 - 2 * k[a, b] * k[a, c] + k[a, b] * k[c, d] for a, b, c, d in four])
    assert _within(*_sums(x, x, 2)[0]) == pytest.approx(centred, rel=1e-10)
    two = list(itertools.product(itertools.permutations(range(5), 2), itertools.permutations(range(4), 2)))
    k = across
    centred = np.mean([k[a, c] * (k[a, c] - k[a, d] - k[b, c] + k[b, d]) for (a, b), (c, d) in two])
    assert _across(*_sums(x, y, 2)) == pytest.approx(centred, rel=1e-10)


@pytest.mark.parametrize("block", [7, 299, 300])
def test_blocks_change_neither_the_distance_nor_its_error(block, pair):
    x, y = pair[0], pair[1][:80]
    assert kernel_distance(x, y, block=block) == pytest.approx(kernel_distance(x, y), rel=1e-10)


@pytest.mark.parametrize(
    ("n", "m", "shift", "least", "most"), [(100, 100, 1.0, 0.85, 1.15), (100, 60, 0.1, 0.9, 1.3), (60, 100, 0.0, 0.95, 1.25)]
)
def test_the_error_is_the_spread_of_new_draws_near_and_far(n, m, shift, least, most):
    rng = np.random.default_rng(1)
    values, errors = np.array([kernel_distance(rng.normal(size=(n, 8)) + shift, rng.normal(size=(m, 8))) for _ in range(300)]).T
    assert least < np.sqrt((errors**2).mean()) / values.std() < most
    assert shift or abs(values.mean()) < 3 * values.std() / np.sqrt(300)  # no bias


def test_above_the_limit_it_is_the_mean_over_disjoint_parts_in_order():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(250, 4)), rng.normal(size=(400, 4)) + 0.5
    parts = [kernel_distance(x[a:b], y[c : c + 100]) for a, b, c in ((0, 83, 0), (83, 166, 133), (166, 250, 266))]
    values, errors = np.array(parts).T
    whole = kernel_distance(x, y, limit=100)
    assert whole.value == pytest.approx(values.mean(), rel=1e-12)
    assert whole.error == pytest.approx(np.sqrt((errors**2).sum()) / 3, rel=1e-12)


def test_with_one_side_below_the_limit_all_of_it_counts():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(90, 4)), rng.normal(size=(400, 4))
    assert kernel_distance(x, y, limit=100) == kernel_distance(x, y[:100])


def test_few_or_broken_or_unlike_features_are_refused(pair):
    x, y = pair
    for bad, message in (
        (x[:3], "at least 4 images, not 3"), (x[:, :5], r"widths \[5, 12\]"), (np.where(x < x.max(), x, np.nan), "1 of 300 rows"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            kernel_distance(bad, y)
