"""The Inception Score (Salimans et al. 2016), as probabilities stream by."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch

from iddpm.errors import UserError
from iddpm.measure.metrics.interface import Comparison, Finding, Metric, needs
from iddpm.measure.metrics.rows import BLOCK, Estimate

SPLITS = 10  # parts of which papers give the mean


class InceptionScore(NamedTuple):
    """Between 1 and the number of classes, higher is better; of real images, what the classifier makes of them."""

    score: Estimate  # the mean over the parts, which papers call IS; its standard error
    deviation: float  # the parts' standard deviation, which papers write behind the +-
    whole: float  # of all images as one part; above `score`, and further above the smaller the parts are


def inception_score(blocks: Iterable[np.ndarray], n: int, splits: int = SPLITS) -> InceptionScore:
    """exp(mean KL(p(y|x) || mean p(y|x))) in each of `splits` consecutive parts of n images, and in all of them.

    The probabilities (b, K) come block by block, of which only sums are held. Parts of few images score low, as their mean p is
    too near to each p: 50,000 images in 10 parts are the custom; at far fewer, quote `whole`, and compare at equal n only.
    UserError for fewer than 2 images in a part, and for rows that are no probabilities.
    """
    if n < 2 * splits:
        raise UserError(f"an Inception Score in {splits} parts needs at least {2 * splits} images, not {n}: give more")
    ends, seen = np.arange(1, splits + 1) * n // splits, 0
    mass, entropy = np.zeros((splits, 1)), np.zeros(splits)  # each part's sums of p, (splits, K), and of p log p over all classes
    for block in blocks:
        p = np.asarray(block, np.float64)
        if bad := int((~(np.abs(p.sum(1) - 1) < 1e-3) | (p < 0).any(1)).sum()):
            raise UserError(f"{bad} of {len(p)} rows are not probabilities: look for damaged images or weights")
        part = np.searchsorted(ends, np.arange(seen, seen + len(p)), side="right")
        member = (part == np.arange(splits)[:, None]).astype(np.float64)  # (splits, b)
        mass, entropy, seen = mass + member @ p, entropy + member @ _p_log_p(p).sum(1), seen + len(p)
    assert seen == n, "not all images are in"
    parts = _score(np.diff(ends, prepend=0), mass, entropy)
    whole = _score(np.array([n]), mass.sum(0, keepdims=True), entropy.sum(keepdims=True))
    return InceptionScore(Estimate.mean(parts), float(parts.std()), float(whole[0]))


def _score(count: np.ndarray, mass: np.ndarray, entropy: np.ndarray) -> np.ndarray:
    """exp(mean over images of sum p log p - sum q log q) of each part, with q the mean p."""
    return np.exp(entropy / count - _p_log_p(mass / count[:, None]).sum(1))


def _p_log_p(p: np.ndarray) -> np.ndarray:
    return p * np.log(np.where(p > 0, p, 1))  # 0 log 0 = 0


def _probabilities(c: Comparison) -> str:
    if c.samples.n < 2 * SPLITS:
        return "ten parts need at least 20 samples"
    return "" if c.extractor.probabilities else f"{c.extractor.name} tells no classes"


@needs(_probabilities)
def score(c: Comparison) -> list[Finding]:
    """The Inception Score, of the samples alone: the mean over ten parts, as papers have it, and of all as one."""
    rows, classify, name = c.samples.rows["pool"], c.extractor.probabilities, c.extractor.called("IS")
    assert classify
    starts = range(0, len(rows), BLOCK)
    blocks = (classify(torch.from_numpy(rows[a : a + BLOCK]).to(c.extractor.device)).double().cpu().numpy() for a in starts)
    found = inception_score(blocks, len(rows))
    return [Finding(name, found.score, None), Finding(f"{name} of all at once", Estimate(found.whole, None), None)]


METRICS: dict[str, Metric] = {"is": score}
