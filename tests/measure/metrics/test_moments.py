import tracemalloc

import numpy as np
import pytest

from iddpm.errors import UserError
from iddpm.measure.metrics.moments import Moments


class Endless:
    """Rows that are made when they are asked for."""

    def __init__(self, n: int, d: int):
        self.shape = (n, d)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        return np.sin(np.arange(rows.start, rows.stop)[:, None] * np.arange(1, self.shape[1] + 1))


def assert_moments_of(moments: Moments, x: np.ndarray) -> None:
    assert moments.n == len(x)
    np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(x, rowvar=False), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("block", [1, 2, 7, 100, 1000])
def test_moments_are_numpys_in_blocks_of_any_size(block):
    x = np.random.default_rng(0).normal(size=(101, 5)) + 100  # far from zero, where sums of squares would lose digits
    assert_moments_of(Moments.of(x, block), x)


@pytest.mark.parametrize("cuts", [(0,), (1, 2), (50,), (3, 3, 99)])
def test_parts_add_up_to_the_whole_however_it_is_cut(cuts):
    x = np.random.default_rng(1).normal(size=(100, 4))
    whole = Moments.blank(4)
    for part in np.split(x, cuts):
        whole.add(part)
    assert_moments_of(whole, x)


def test_float16_features_are_summed_in_float64():
    x = np.random.default_rng(2).normal(size=(3000, 3)).astype(np.float16) + np.float16(50)
    assert_moments_of(Moments.of(x), x.astype(np.float64))


def test_memory_does_not_grow_with_the_number_of_images():
    peaks = []
    for n in (2000, 40_000):
        tracemalloc.start()
        Moments.of(Endless(n, 32), block=500)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_features_that_are_not_finite_are_counted_and_refused():
    x = np.zeros((5000, 3))
    x[[1, 1, 4999, 2500], [0, 1, 2, 0]] = np.nan, np.inf, -np.inf, np.nan
    with pytest.raises(UserError, match=r"3 of 5000 rows of features are not finite: look for"):
        Moments.of(x)
    with pytest.raises(UserError, match=r"1 of 10 rows"):
        Moments.blank(3).add(x[:10])


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_images_have_no_covariance(n):
    with pytest.raises(UserError, match=f"at least 2 images, not {n}"):
        _ = Moments.of(np.ones((n, 3))).covariance
