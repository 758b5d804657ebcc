import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from iddpm.errors import UserError
from iddpm.measure.metrics.probe import Probe, consistency, too_few


def clouds(n: int, classes: int = 4, d: int = 10, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping clouds (n, d), one for each class, and their labels in turn."""
    rng, labels = np.random.default_rng(seed), np.arange(n) % classes
    return 1.2 * np.eye(classes, d)[labels] + rng.normal(size=(n, d)) * np.linspace(0.3, 1.5, d), labels


def test_predictions_are_scikit_learns_discriminant_analysis_shrunk_by_half():
    x, y = clouds(200)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.5).fit(x, y)
    fresh, _ = clouds(500, seed=1)
    assert (Probe.fit(x, y, 4).predict(fresh) == theirs.predict(fresh)).all()


def test_rows_labelled_minus_one_and_classes_without_images_play_no_part():
    x, y = clouds(200)
    out = np.random.default_rng(2).random(200) < 0.3
    fresh, _ = clouds(300, seed=1)
    found = Probe.fit(x, np.where(out, -1, y), 9).predict(fresh)
    assert (found == Probe.fit(x[~out], y[~out], 4).predict(fresh)).all()


def test_a_common_class_is_not_preferred():
    x, y = clouds(4000, classes=2, d=3)
    few = (y == 0) | (np.arange(4000) < 200)
    fresh, wanted = clouds(2000, classes=2, d=3, seed=1)
    assert Probe.fit(x[few], y[few], 2).predict(fresh).mean() == pytest.approx(wanted.mean(), abs=0.03)


def test_real_digits_reach_the_ceiling_and_wrongly_labelled_ones_fall_by_their_share():
    x, y = load_digits(return_X_y=True)
    shuffled = np.random.default_rng(0).permutation(len(x))  # they come by their writers
    x, y = x[shuffled], y[shuffled]
    found = consistency(x[:800], y[:800], x[800:], y[800:])
    assert found.ceiling.value > 0.9
    assert abs(found.samples.value - found.ceiling.value) < 0.05
    wanted = np.where(np.arange(800) % 2, (y[:800] + 1) % 10, y[:800])
    assert consistency(x[:800], wanted, x[800:], y[800:]).samples.value == pytest.approx(0.5, abs=0.07)


@pytest.mark.parametrize("order", [np.arange(400), np.argsort(np.arange(400) % 4, kind="stable")])
def test_the_halves_hold_all_classes_in_whatever_order_they_come(order):
    (x, y), (fresh, wanted) = clouds(400), clouds(2000, seed=1)
    found = consistency(fresh, wanted, x[order], y[order])
    assert found.samples.value == pytest.approx(found.ceiling.value, abs=4 * found.ceiling.error)
    assert 0.5 < found.ceiling.value < 1
    assert found.samples.error == pytest.approx(np.sqrt(found.samples.value * (1 - found.samples.value) / 2000), rel=0.01)


def test_reference_images_without_a_label_count_nowhere():
    (x, y), (fresh, wanted) = clouds(400), clouds(200, seed=1)
    more = np.concatenate([x, fresh + 50])
    assert consistency(fresh, wanted, more, np.concatenate([y, np.full(200, -1)])) == consistency(fresh, wanted, x, y)


def test_too_few_or_broken_images_are_refused():
    x, y = clouds(40)
    with pytest.raises(UserError, match="4 labelled images are too few to fit a classifier on half of them"):
        consistency(x, y, x[:4], y[:4])
    with pytest.raises(UserError, match="4 labelled images are too few for a classifier: give at least 2 of a class"):
        Probe.fit(x[:4], y[:4], 4)
    with pytest.raises(UserError, match="1 of 40 rows"):
        consistency(x, y, np.where(x < x.max(), x, np.nan), y)
    with pytest.raises(UserError, match=r"widths \[3, 10\]"):
        consistency(x[:, :3], y, x, y)


@pytest.mark.parametrize("n", range(2, 26))
@pytest.mark.parametrize("classes", [1, 3, 10])
def test_too_few_foretells_whether_a_probe_can_be_fitted(n, classes):
    x, y = clouds(n, classes)
    labels = np.append(y, -1)  # an image without a label helps nowhere
    if too_few(labels):
        with pytest.raises(UserError, match=f"{n} labelled images"):
            consistency(x, y, np.append(x, x[:1], 0), labels)
    else:
        assert 0 <= consistency(x, y, np.append(x, x[:1], 0), labels).ceiling.value <= 1
    assert bool(too_few(labels)) == (n < (3 if classes == 1 else 2 * classes + 1))


def test_a_class_of_one_image_is_fitted_and_not_judged():
    (x, y), (one, _) = clouds(40), clouds(1, seed=1)
    found = consistency(one + 50, np.array([4]), np.append(x, one + 50, 0), np.append(y, 4))
    assert found.samples.value == 1
