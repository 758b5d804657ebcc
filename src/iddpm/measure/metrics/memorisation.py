"""Whether samples are copies: their distances to training images against those of training images to each other."""

from typing import NamedTuple

import numpy as np

from iddpm.measure.metrics.interface import Comparison, Finding, Metric, images, needs
from iddpm.measure.metrics.neighbours import nearest
from iddpm.measure.metrics.rows import Estimate

NEAREST = 3  # real images that are shown of each sample


class Memorised(NamedTuple):
    share: Estimate
    ratio: float | None


def memorised(samples: np.ndarray, training: np.ndarray) -> Memorised:
    """From the distances to the nearest training image: of each sample (n,), and of each training image to another (m,).

    share: of samples that lie as near as the nearest 1 % of training images do. Fresh images of the same source give 1 %, but for
    the scatter of that 1 % (0.5 % either way at a thousand training images), and copies 100 %; where more than 1 % of training
    images are doubles, fresh images give the share of these.
    ratio: the samples' median over the training images'; 1 for fresh images, 0 for copies, None where half of the training
    images or more are doubles, whose median is 0.
    """
    share = Estimate.mean((samples <= np.quantile(training, 0.01)).astype(np.float64))
    typical = float(np.median(training))
    return Memorised(share, float(np.median(samples)) / typical if typical else None)


@needs(images(2))
def memorisation(c: Comparison) -> list[Finding]:
    """Copies: how many samples are nearer to a real image than 99 % of real images are to each other."""
    reference = c.reference.rows["pool"]
    ours = nearest(c.samples.rows["pool"], reference, min(NEAREST, len(reference)), device=c.extractor.device)
    _, theirs = nearest(reference, reference, exclude_self=True, device=c.extractor.device)
    found = memorised(ours[1][:, 0], theirs[:, 0])
    findings = [Finding("near copies (1 % expected)", found.share, c.reference.n, nearest=ours)]
    if found.ratio is not None:
        findings.append(Finding("nearest distance ratio", Estimate(found.ratio, None), c.reference.n))
    return findings


METRICS: dict[str, Metric] = {"memorisation": memorisation}
