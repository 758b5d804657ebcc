"""Label consistency: whether a conditional model's samples show the class that was asked for, by a linear classifier."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from iddpm.errors import UserError
from iddpm.measure.metrics.interface import Comparison, Finding, Metric, images, needs
from iddpm.measure.metrics.moments import Moments
from iddpm.measure.metrics.rows import Estimate, Rows, blocks, require


@dataclass(frozen=True, eq=False)
class Probe:
    """Linear discriminant analysis: the class c of the largest x.w_c + b_c."""

    weight: np.ndarray  # (d, classes)
    bias: np.ndarray  # (classes,)

    @staticmethod
    def fit(features: Rows, labels: np.ndarray, classes: int) -> "Probe":
        """w_c = S^-1 mu_c, b_c = -mu_c.w_c/2, for features (n, d) of labels (n,) in [0, classes); rows labelled -1 are left out.

        mu_c are the classes' means and S = W + tr(W)/d I, where W is the covariance within classes: shrunk halfway to a multiple
        of I (Friedman 1989), whatever the data, so nothing is tuned. Classes count alike, however common; one without images is
        never predicted. UserError where no class has 2 images.
        """
        within, count, total = Moments.blank(features.shape[1]), np.zeros(classes), np.zeros((classes, features.shape[1]))
        for at, x in blocks(features):
            member = labels[at, None] == np.arange(classes)
            count += member.sum(0)
            total += member.T.astype(np.float64) @ x
        mean = total / np.maximum(count, 1)[:, None]
        for at, x in blocks(features):
            known = labels[at] >= 0
            within.add(x[known] - mean[labels[at][known]])
        degrees = within.n - int((count > 0).sum())
        if degrees < 1:
            raise UserError(f"{within.n} labelled images are too few for a classifier: give at least 2 of a class")
        d = len(within.mean)
        w = within.outer / degrees
        weight = np.linalg.solve(w + (np.trace(w) / d or 1.0) * np.eye(d), mean.T)
        return Probe(weight, np.where(count > 0, -(mean.T * weight).sum(0) / 2, -np.inf))

    def predict(self, features: Rows) -> np.ndarray:
        """The class (n,) of each of features (n, d)."""
        predicted = np.empty(len(features), np.int64)
        for at, x in blocks(features):
            predicted[at] = (x @ self.weight + self.bias).argmax(1)
        return predicted


class Consistency(NamedTuple):
    """Shares in [0, 1]."""

    samples: Estimate  # of samples in which the probe sees the class that was asked for
    ceiling: Estimate  # of held-out reference images in which it sees theirs: what real images would get


def consistency(samples: Rows, wanted: np.ndarray, reference: Rows, labels: np.ndarray) -> Consistency:
    """How often samples (n, d) look like the class wanted (n,), by a probe on one half of the reference (m, d) with labels (m,).

    Every second image of each class fits the probe, which then judges the others and the samples. The first error is over a new
    draw of samples, the second of held-out images. UserError where there are `too_few`.
    """
    require(1, "label consistency", samples, reference)
    if why := too_few(labels):
        raise UserError(why)
    classes, held_out = int(max(labels.max(), wanted.max())) + 1, _held_out(labels)
    probe = Probe.fit(reference, np.where(held_out, -1, labels), classes)
    right, ceiling = probe.predict(samples) == wanted, (probe.predict(reference) == labels)[held_out]
    return Consistency(Estimate.mean(right.astype(np.float64)), Estimate.mean(ceiling.astype(np.float64)))


def too_few(labels: np.ndarray) -> str:
    """Why `consistency` has too few reference images of labels (m,), -1 for none; "" where it has enough."""
    known = labels[labels >= 0]
    if np.bincount(known).max(initial=0) >= 3:  # two fit the probe, by their distance from each other, and one is judged
        return ""
    return f"{len(known)} labelled images are too few to fit a classifier on half of them: give at least 3 of a class"


def _held_out(labels: np.ndarray) -> np.ndarray:
    """Which images (m,) do not fit the probe: the second, fourth ... of each class."""
    order = np.argsort(labels, kind="stable")
    place = np.arange(len(labels)) - np.searchsorted(labels[order], labels[order])  # within the class
    held_out = np.empty(len(labels), bool)
    held_out[order] = place % 2 == 1
    return held_out & (labels >= 0)


def _classes(c: Comparison) -> str:
    """Why the classes of the two sides cannot be compared; "" where they can."""
    ours, theirs = c.samples, c.reference
    if ours.labels is None or theirs.labels is None:
        return "the samples or the reference have no classes"
    if ours.classes and theirs.classes and ours.classes != theirs.classes:
        mine, others = (", ".join(names[:5]) + (" ..." if len(names) > 5 else "") for names in (ours.classes, theirs.classes))
        return f"the samples have the classes {mine}, the reference {others}"
    numbers = ours.classes or theirs.classes  # one side has names: the other's numbers are meant only where these are numbers
    if bool(ours.classes) != bool(theirs.classes) and numbers != tuple(map(str, range(len(numbers)))):
        return f"one side's classes are named ({', '.join(numbers[:5])}), and the other's are numbers, which may stand for any"
    if ours.labels.max() > theirs.labels.max():
        return "the samples have classes that the reference has not"
    return too_few(theirs.labels)


@needs(images(1), _classes)
def labels(c: Comparison) -> list[Finding]:
    """The share of samples that are of the class they were asked for."""
    assert c.samples.labels is not None and c.reference.labels is not None
    found = consistency(c.samples.rows["pool"], c.samples.labels, c.reference.rows["pool"], c.reference.labels)
    return [Finding("label consistency", found.samples, c.reference.n, real=found.ceiling.value)]


METRICS: dict[str, Metric] = {"labels": labels}
