"""The order of training: permutations by epoch, the same however it is asked for."""

import numpy as np
import pytest

from iddpm.data import Order


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
