import numpy as np
import pytest
import torch
from prdc import compute_prdc
from sklearn.neighbors import NearestNeighbors

from iddpm.errors import UserError
from iddpm.measure.metrics import neighbours
from iddpm.measure.metrics.kernel import kernel_distance
from iddpm.measure.metrics.memorisation import memorised
from iddpm.measure.metrics.neighbours import MANY, Manifold, manifold, nearest, squared_distances
from iddpm.measure.metrics.rows import exact


def values(found: Manifold) -> dict[str, float]:
    return {name: estimate.value for name, estimate in found._asdict().items()}


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("block", [37, 2048])
def test_precision_recall_density_and_coverage_are_prdcs(k, block, pair):
    x, y = pair[0], pair[1][:210]
    assert values(manifold(x, y, k, block=block)) == pytest.approx(compute_prdc(y, x, nearest_k=k), rel=1e-12)


def test_blocks_change_neither_the_four_nor_their_errors(pair):
    x, y = pair[0], pair[1][:210]
    for found, expected in zip(manifold(x, y, 3, block=37), manifold(x, y, 3)):
        assert found == pytest.approx(expected, rel=1e-12)


def test_with_three_neighbours_precision_and_recall_are_torch_fidelitys(pair, fidelity):
    module = fidelity("metric_prc")
    theirs = module.prc_features_to_metric(*map(torch.from_numpy, pair), prc_neighborhood=3, verbose=False)
    ours = values(manifold(*pair, k=3))
    assert ours["precision"] == pytest.approx(theirs["precision"], rel=1e-6)
    assert ours["recall"] == pytest.approx(theirs["recall"], rel=1e-6)


def test_ties_and_doubles_are_counted_as_prdc_does():
    rng = np.random.default_rng(0)
    x, y = (rng.integers(0, 3, (120, 3)).astype(np.float64) for _ in range(2))  # 27 places: distances are exact, many are zero
    x[:8] = x[0]
    assert values(manifold(x, y, block=50)) == pytest.approx(compute_prdc(y, x, nearest_k=5), rel=1e-12)
    assert values(manifold(x, x, block=50)) == pytest.approx(compute_prdc(x, x, nearest_k=5), rel=1e-12)


def test_on_a_line_the_four_are_what_one_counts_by_hand():
    reference, samples = np.array([[0.0], [1], [3]]), np.array([[0.5], [0.75], [10]])
    found = values(manifold(samples, reference, k=1))  # radii 1, 1, 2 and 0.25, 0.25, 9.25
    assert found == pytest.approx(dict(precision=2 / 3, recall=2 / 3, density=4 / 3, coverage=2 / 3))


@pytest.mark.parametrize("shrunk", [1.0, 0.8])
def test_errors_are_the_spread_of_new_samples_and_seldom_less(shrunk):
    rng = np.random.default_rng(1)
    reference = rng.normal(size=(200, 6))
    draws = [manifold(shrunk * rng.normal(size=(200, 6)), reference) for _ in range(100)]
    for name in ("precision", "density", "recall", "coverage"):
        value, error = np.array([getattr(draw, name) for draw in draws]).T
        assert 0.75 < np.sqrt((error**2).mean()) / value.std() < (1.3 if name in ("precision", "density") else 2.3), name


def test_dropped_modes_cost_recall_and_coverage_and_noise_costs_precision_and_density():
    rng = np.random.default_rng(2)
    centres = 8 * np.eye(6)[rng.integers(0, 6, 800)]
    real, fresh = np.split(rng.normal(size=(800, 6)) + centres, 2)
    whole, dropped, noisy = (values(manifold(x, real)) for x in (fresh, fresh[fresh[:, :3].max(1) > 4], fresh * 1.6))
    assert dropped["recall"] < 0.7 * whole["recall"] and dropped["coverage"] < 0.7 * whole["coverage"]
    assert dropped["precision"] > 0.9 * whole["precision"]
    assert noisy["precision"] < 0.7 * whole["precision"] and noisy["density"] < 0.7 * whole["density"]


@pytest.mark.parametrize("block", [16, 2048])
def test_the_nearest_are_scikit_learns(block, pair):
    x, y = pair
    for k, (a, b, alone) in ((1, (x, y, False)), (4, (x[:50], y, False)), (3, (y, y, True))):
        theirs = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(b).kneighbors(None if alone else a)
        indices, distances = nearest(a, b, k, exclude_self=alone, block=block)
        assert (indices == theirs[1]).all()
        np.testing.assert_allclose(distances, theirs[0], rtol=1e-9)


def test_a_copy_is_at_distance_zero_and_a_near_copy_keeps_its_digits():
    x = 1000 + np.random.default_rng(3).normal(size=(40, 64))
    near = x.copy()
    near[:, 5] += 2.0**-20
    indices, distances = nearest(np.concatenate([x, near]), x, 1, block=30)
    assert (indices[:, 0] == np.tile(np.arange(40), 2)).all()
    assert (distances[:40] == 0).all()
    np.testing.assert_allclose(distances[40:], 2.0**-20, rtol=1e-6)
    assert (nearest(np.repeat(x, 2, 0), np.repeat(x, 2, 0), 1, exclude_self=True, block=7)[1] == 0).all()


def test_too_few_or_broken_features_are_refused(pair):
    x, y = pair
    with pytest.raises(UserError, match="with 5 neighbours needs at least 6 images, not 5"):
        manifold(x, y[:5])
    with pytest.raises(UserError, match="at least 4 images, not 3"):
        nearest(y[:3], y[:3], 3, exclude_self=True)
    with pytest.raises(UserError, match=r"widths \[4, 12\]"):
        nearest(x[:, :4], y)
    with pytest.raises(UserError, match="2 of 300 rows"):
        manifold(x, np.where(np.arange(300)[:, None] < 2, np.inf, y))


def test_of_fresh_images_one_in_a_hundred_counts_as_memorised_and_all_copies_do():
    rng = np.random.default_rng(4)
    training, fresh = rng.normal(size=(3000, 4)), rng.normal(size=(3000, 4))
    own = nearest(training, training, exclude_self=True)[1][:, 0]
    found = memorised(nearest(fresh, training)[1][:, 0], own)
    assert found.share.value == pytest.approx(0.01, abs=0.006)
    assert found.share.error == pytest.approx(np.sqrt(found.share.value / 3000), rel=0.05)
    assert found.ratio == pytest.approx(1, abs=0.05)
    half = np.concatenate([training[:500], fresh[:500]])
    assert memorised(nearest(half, training)[1][:, 0], own).share.value == pytest.approx(0.5, abs=0.02)


def test_copies_are_found_where_the_training_images_have_doubles():
    training = np.random.default_rng(5).normal(size=(200, 4))
    training[:10] = training[10:20]
    own = nearest(training, training, exclude_self=True)[1][:, 0]
    found = memorised(nearest(training[50:100], training)[1][:, 0], own)
    assert found.share.value == 1 and found.ratio == 0


def test_there_is_no_ratio_where_half_of_the_training_images_are_doubles():
    training = np.random.default_rng(6).normal(size=(200, 4))
    training[:60] = training[60:120]
    own = nearest(training, training, exclude_self=True)[1][:, 0]
    assert np.median(own) == 0
    for samples in (training[130:], np.random.default_rng(7).normal(size=(70, 4))):
        assert memorised(nearest(samples, training)[1][:, 0], own).ratio is None


@pytest.mark.parametrize("different", [1, 3, 40])  # images that a collapsed model draws: all pairs close, many, or few
@pytest.mark.parametrize("noise", [0, 1e-7])
def test_distances_of_rows_that_are_nearly_equal_are_those_of_the_pairs(different, noise):
    rng = np.random.default_rng(8)
    x = 5 + rng.normal(size=(different, 30))[np.arange(200) % different] + noise * rng.normal(size=(200, 30))
    found = squared_distances(torch.from_numpy(x), torch.from_numpy(x)).numpy()
    brute = ((x[:, None] - x[None]) ** 2).sum(2)
    np.testing.assert_allclose(found, brute, rtol=1e-9, atol=0)


def test_a_collapsed_models_block_is_computed_at_once(monkeypatch):
    calls = []
    cdist = torch.cdist
    monkeypatch.setattr(neighbours.torch, "cdist", lambda *args, **how: calls.append(how) or cdist(*args, **how))
    spread = torch.from_numpy(np.random.default_rng(9).normal(size=(64, 8)))
    squared_distances(spread, spread)  # each is close to itself alone
    assert 1 / len(spread) < MANY and not calls
    same = spread[:1].repeat(64, 1)
    assert (squared_distances(same, same) == 0).all() and len(calls) == 1


def test_an_apple_gpu_which_has_no_float64_leaves_the_pairs_to_the_cpu(pair):
    x, y = pair
    assert manifold(x, y, device="mps") == manifold(x, y)
    assert kernel_distance(x, y, device="mps") == kernel_distance(x, y)
    assert exact("cuda:1") == torch.device("cuda:1")
