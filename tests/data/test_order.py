"""The order of training: permutations by epoch, the same however it is asked for."""

import tracemalloc

import numpy as np
import pytest

from iddpm.data import Order, order


@pytest.mark.parametrize("n", [1, 2, 7, 100])
@pytest.mark.parametrize("epoch", [0, 1, 5, 1_000_000])
def test_each_epoch_is_a_permutation(n: int, epoch: int) -> None:
    indices = Order(n, seed=3).indices(epoch * n, n)
    assert indices.dtype == np.int64
    assert sorted(indices.tolist()) == list(range(n))


@pytest.mark.parametrize(("n", "count"), [(1, 5), (3, 10), (10, 3), (10, 10), (10, 7)])
def test_the_order_does_not_depend_on_how_it_is_asked(n: int, count: int) -> None:
    whole = Order(n, seed=0).indices(0, 60)
    order = Order(n, seed=0)
    pieces = [order.indices(start, min(count, 60 - start)) for start in range(0, 60, count)]
    assert np.array_equal(np.concatenate(pieces), whole)
    backwards = [int(order.indices(p, 1)[0]) for p in reversed(range(60))]
    assert backwards[::-1] == whole.tolist()


def test_a_resumed_run_goes_on_where_it_stopped() -> None:
    assert np.array_equal(Order(13, seed=9).indices(1234, 50), Order(13, seed=9).indices(0, 2000)[1234:1284])


def test_epochs_and_seeds_give_different_orders() -> None:
    order = Order(50, seed=1)
    assert not np.array_equal(order.indices(0, 50), order.indices(50, 50))
    assert not np.array_equal(order.indices(0, 50), Order(50, seed=2).indices(0, 50))


def test_the_first_image_of_an_epoch_is_uniform() -> None:
    n, epochs = 5, 4000
    order = Order(n, seed=11)
    first = [int(order.indices(epoch * n, 1)[0]) for epoch in range(epochs)]
    deviation = np.bincount(first, minlength=n) - epochs / n
    assert np.abs(deviation).max() < 5 * np.sqrt(epochs / n * (1 - 1 / n))


def test_no_images_asked_gives_an_empty_array() -> None:
    assert Order(4, seed=0).indices(7, 0).shape == (0,)


def test_the_largest_seed_is_accepted() -> None:
    assert sorted(Order(4, seed=2**64 - 1).indices(0, 4).tolist()) == [0, 1, 2, 3]


@pytest.fixture
def computed(monkeypatch) -> None:
    """Orders of few images are computed as those of many are."""
    monkeypatch.setattr(order, "LARGE", 1)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 16, 100, 101, 1000])
@pytest.mark.parametrize("epoch", [0, 1, 2**40])
def test_each_epoch_of_a_large_set_is_a_permutation(computed, n, epoch):
    indices = Order(n, seed=3).indices(epoch * n, n)
    assert indices.dtype == np.int64 and sorted(indices.tolist()) == list(range(n))


def test_a_large_order_does_not_depend_on_how_it_is_asked(computed):
    whole = Order(13, seed=9).indices(0, 100)
    assert np.array_equal(np.concatenate([Order(13, seed=9).indices(p, 7) for p in range(0, 98, 7)]), whole[:98])
    assert not np.array_equal(whole[:13], whole[13:26]) and not np.array_equal(whole, Order(13, seed=8).indices(0, 100))


def test_a_large_order_looks_drawn_at_random(computed):
    """Image by place is uniform, and so is the step from a place to the next: both by chi-square, 4 deviations."""
    n, epochs = 12, 6000
    orders = np.stack([Order(n, seed=1).indices(epoch * n, n) for epoch in range(epochs)])
    table = np.stack([np.bincount(orders[:, place], minlength=n) for place in range(n)])
    steps = np.bincount(((orders[:, 1:] - orders[:, :-1]) % n).ravel(), minlength=n)[1:]
    for counts, freedom in ((table, (n - 1) ** 2), (steps, n - 2)):
        chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
        assert abs(chi2 - freedom) < 4 * np.sqrt(2 * freedom), (chi2, freedom)


def test_a_far_place_of_a_large_order_needs_no_table():
    tracemalloc.start()
    found = Order(10**9, seed=0).indices(10**15 + 10**9 - 3, 6)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert len(set(found.tolist())) == 6 and 0 <= found.min() <= found.max() < 10**9
