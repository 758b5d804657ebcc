import ignite.metrics
import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from iddpm.errors import UserError
from iddpm.measure.metrics.frechet import frechet_distance, frechet_error
from iddpm.measure.metrics.moments import Gaussian, Moments


class Identity(nn.Identity):
    """Features that are there already, as torchmetrics takes them."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features


def of(x: np.ndarray) -> Gaussian:
    """By the eigenproblem, however few rows there are."""
    moments = Moments.of(x)
    return Gaussian(moments.mean, moments.covariance)


def by_torchmetrics(x, y, fidelity) -> float:
    metric = FrechetInceptionDistance(feature=Identity(x.shape[1])).set_dtype(torch.float64)
    metric.update(torch.from_numpy(y), real=True)
    metric.update(torch.from_numpy(x), real=False)
    return metric.compute().item()


def by_ignite(x, y, fidelity) -> float:
    metric = ignite.metrics.FID(num_features=x.shape[1], feature_extractor=nn.Identity())
    metric.update((torch.from_numpy(y), torch.from_numpy(x)))
    return metric.compute()


def by_torch_fidelity(x, y, fidelity) -> float:
    module = fidelity("metric_fid")
    stats = [module.fid_features_to_statistics(torch.from_numpy(z)) for z in (x, y)]
    return module.fid_statistics_to_metric(*stats, verbose=False)[module.KEY_METRIC_FID]


def by_a_matrix_square_root(x, y, fidelity) -> float:
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)


LIBRARIES = [by_torchmetrics, by_ignite, by_torch_fidelity, by_a_matrix_square_root]


@pytest.mark.parametrize("library", LIBRARIES)
def test_at_full_rank_the_distance_is_the_libraries(library, pair, fidelity):
    assert frechet_distance(*map(of, pair)) == pytest.approx(library(*pair, fidelity), rel=1e-6)


@pytest.mark.parametrize("library", LIBRARIES[:3])
def test_with_fewer_images_than_features_the_distance_is_nearly_the_libraries(library, fidelity):
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(20, 40)), 1.5 * rng.normal(size=(20, 40)) + 0.2
    assert frechet_distance(of(x), of(y)) == pytest.approx(library(x, y, fidelity), rel=1e-3)


def test_of_two_samples_without_full_rank_every_digit_is_right():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(6, 50)), rng.normal(size=(9, 50))
    root = np.linalg.svd((x - x.mean(0)) @ (y - y.mean(0)).T, compute_uv=False).sum() / np.sqrt(5 * 8)  # from the samples alone
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + x.var(0, ddof=1).sum() + y.var(0, ddof=1).sum() - 2 * root
    assert frechet_distance(of(x), of(y)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n", [5, 20, 30])
def test_a_few_rows_as_they_are_give_the_gaussian_of_their_moments(n):
    rng = np.random.default_rng(n)
    x, y = rng.standard_normal((n, 20)) + 0.3, rng.standard_normal((50, 20)) @ np.diag(np.linspace(0.1, 2, 20))
    few = Gaussian.of(x)
    assert (few.few is None, few.n) == (n > 20, n)
    np.testing.assert_allclose(few.factor @ few.factor.T, few.covariance, atol=1e-12)
    assert frechet_distance(few, of(y)) == pytest.approx(frechet_distance(of(x), of(y)), rel=1e-9)


def test_gaussians_that_share_their_axes_have_a_closed_form():
    rng = np.random.default_rng(5)
    axes = np.linalg.qr(rng.normal(size=(7, 7)))[0]
    s, t, mu = rng.uniform(0, 2, 7), rng.uniform(0, 2, 7), rng.normal(size=7)
    a, b = Gaussian(mu, axes * s**2 @ axes.T), Gaussian(np.zeros(7), axes * t**2 @ axes.T)
    assert frechet_distance(a, b) == pytest.approx(mu @ mu + ((s - t) ** 2).sum(), rel=1e-12)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


def test_images_that_are_all_one_differ_by_mean_and_scatter_alone(pair):
    point = of(np.ones((5, 12)))
    assert frechet_distance(point, of(pair[1])) == pytest.approx(
        ((1 - pair[1].mean(0)) ** 2).sum() + pair[1].var(0, ddof=1).sum(), rel=1e-12
    )
    assert frechet_error(np.ones((5, 12)), point, of(pair[1])) == 0


def test_the_error_is_the_bootstraps_spread(pair):
    x, b = pair[0], of(pair[1])
    rng = np.random.default_rng(6)
    again = [frechet_distance(of(x[rng.integers(0, 300, 300)]), b) for _ in range(400)]
    assert frechet_error(x, of(x), b) == pytest.approx(np.std(again), rel=0.15)


@pytest.mark.parametrize(("shift", "least", "most"), [(0.3, 0.85, 1.15), (0, 1, 1.6)])
def test_the_error_is_the_spread_of_new_draws_and_no_less_for_equal_laws(shift, least, most):
    rng = np.random.default_rng(7)
    b, values, errors = Gaussian(np.zeros(6), np.eye(6)), [], []
    for _ in range(300):
        x = rng.normal(size=(300, 6)) + shift
        values.append(frechet_distance(of(x), b))
        errors.append(frechet_error(x, of(x), b, block=128))
    assert least < np.mean(errors) / np.std(values) < most


def test_an_error_needs_two_images():
    with pytest.raises(UserError, match="at least 2 images, not 1"):
        frechet_error(np.ones((1, 3)), Gaussian(np.ones(3), np.eye(3)), Gaussian(np.ones(3), np.eye(3)))


def test_shifted_shrunken_and_dropped_modes_are_farther_the_worse_they_are():
    rng = np.random.default_rng(8)
    y = rng.normal(size=(2000, 5)) + 3 * rng.integers(0, 2, 2000)[:, None]
    x = rng.normal(size=(2000, 5)) + 3 * rng.integers(0, 2, 2000)[:, None]
    b = of(y)
    for worse in (lambda s: x + s, lambda s: (1 - s) * x, lambda s: x[x.sum(1) < np.quantile(x.sum(1), 1 - s)]):
        distances = [frechet_distance(of(worse(s)), b) for s in (0.0001, 0.2, 0.5)]
        assert distances == sorted(distances) and distances[2] > 10 * distances[0]


def test_a_matrix_that_is_no_covariance_is_refused():
    eye = Gaussian(np.zeros(3), np.eye(3))
    with pytest.raises(UserError, match="has the eigenvalue -1: that is none"):
        frechet_distance(eye, Gaussian(np.zeros(3), np.diag([1.0, 1.0, -1.0])))
