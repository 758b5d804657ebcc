"""The quality of a run's samples while it trains (--eval_every), and which of its checkpoints is the best."""

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from iddpm import distributed, extractors, sample
from iddpm.config import Config, image_size
from iddpm.data import Order
from iddpm.diffusion.denoiser import Network
from iddpm.evaluate.features import extract, features_of
from iddpm.evaluate.image_sets import Like, open_images
from iddpm.metrics.frechet import Gaussian, frechet_distance
from iddpm.metrics.kernel import kernel_distance
from iddpm.places import replace

REFERENCE = 2000  # real images that samples are compared with, at the most


class Quality:
    """Draws the first `eval_samples` seeds, and compares them with real images; leaves the run's randomness alone."""

    def __init__(self, config: Config, device: torch.device, say: Any):
        t, m = config.train, config.model
        self.config, self.device = config, device
        self.extractor = extractors.open(t.eval_extractor, "", device)
        path = t.eval_reference or config.data.validation or config.data.path
        images = open_images(path, Like("the run", image_size(m), m.image_channels))
        chosen = Order(images.n, t.seed).indices(0, min(REFERENCE, images.n))
        self.reference = extract(images, chosen, self.extractor, say=say)
        self.job = sample.job(config, range(t.eval_samples))
        say(f"every {t.eval_every} steps: {t.eval_samples} samples against {len(chosen)} images of {path}, {self.extractor.name}")

    def __call__(self, net: Network) -> dict[str, float]:
        """kd_EXTRACTOR and its error, and fd_EXTRACTOR, of what a network draws now; the same on every process."""
        began, parts = time.monotonic(), []
        for drawn in sample.images(self.config, net, self.job, self.device, self.config.train.eval_batch):
            mine = distributed.share(len(drawn))
            own = features_of(drawn[mine.start : mine.stop].transpose(0, 3, 1, 2), self.extractor)["pool"]
            parts.append(distributed.gather(own).numpy())
        return distributed.same(self._compare(np.concatenate(parts), began) if distributed.rank() == 0 else {})

    def _compare(self, drawn: np.ndarray, began: float) -> dict[str, float]:
        name = self.extractor.name.replace("-", "_")
        kd = kernel_distance(drawn, self.reference.rows("pool"), device=self.device)
        fd = frechet_distance(Gaussian.of_few(drawn), self.reference.gaussian("pool"))
        error = {f"kd_{name}_error": kd.error} if kd.error is not None else {}
        return {f"kd_{name}": kd.value, **error, f"fd_{name}": fd, "eval_seconds": time.monotonic() - began}


class Best(NamedTuple):
    """The checkpoint whose samples had the least kernel distance so far."""

    step: int
    value: float
    metric: str


def read_best(run: Path) -> Best | None:
    """What RUN/checkpoints/best.json says, which is never pruned; None where there is none."""
    try:
        held = json.loads((run / "checkpoints" / "best.json").read_text())
        return Best(int(held["step"]), float(held["value"]), str(held["metric"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def write_best(run: Path, best: Best) -> None:
    text = json.dumps(best._asdict())
    replace(run / "checkpoints" / "best.json", lambda file: file.write(text.encode()))
