"""The quality of a run's samples while it trains (--eval_every)."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from iddpm.config import Config, ema_rates, image_size
from iddpm.data import Order
from iddpm.diffusion.denoiser import Network
from iddpm.errors import UserError
from iddpm.measure import extractors, figures
from iddpm.measure.features import extract, features_of
from iddpm.measure.image_sets import Like, drawing, open_images
from iddpm.measure.metrics.frechet import Gaussian, frechet_distance
from iddpm.measure.metrics.kernel import kernel_distance
from iddpm.parallel import processes
from iddpm.sampling import draw as sample
from iddpm.store.files import Best

REFERENCE = 2000  # real images that samples are compared with, at the most
LEAST = 4  # rows a side of a kernel distance


class Quality:
    """Draws the first `eval_samples` seeds, and compares them with real images; leaves the run's randomness alone."""

    def __init__(self, config: Config, run: Path, device: torch.device, say: Callable[[str], None]):
        t, m = config.train, config.model
        self.config, self.device, self.out, self.say = config, device, run / "metrics.json", say
        figures.read(self.out)  # what cannot be written to is refused before the work
        path = t.eval_reference or config.data.validation or config.data.path
        images = open_images(path, Like("the run", image_size(m), m.image_channels))
        if images.n < LEAST:
            raise UserError(f"--eval_every: {path} holds fewer than the {LEAST} images it needs: give others by --eval_reference")
        chosen = Order(images.n, t.seed).indices(0, min(REFERENCE, images.n))
        self.extractor = extractors.open(t.eval_extractor, "", device)
        self.reference = extract(images, chosen, self.extractor, say=say)
        self.job = sample.job(config, range(t.eval_samples))
        self.conditions: dict[str, Any] = dict(  # under which numbers can be compared, as JSON holds them
            n=t.eval_samples, seeds=f"0-{t.eval_samples - 1}", **drawing(config, t.precision, next(iter(ema_rates(t)), 0)),
            extractor=self.extractor.name, extractor_identity=self.extractor.identity,
            reference_key=self.reference.folder.name, reference_n=len(chosen),
        )  # fmt: skip
        self.about = self.conditions | dict(samples=str(run), reference=path, weights=None, seed=0, labels=None, draws=None)
        self.name = self.extractor.name.replace("-", "_")
        say(f"every {t.eval_every} steps: {t.eval_samples} samples against {len(chosen)} images of {path}, {self.extractor.name}")

    def __call__(self, net: Network) -> dict[str, float]:
        """The log's row on what a network draws now: kd_EXTRACTOR and its error, fd_EXTRACTOR; the same on every process.

        The processes take a block each, so that blocks do not depend on their number, and call the network equally often.
        """
        began, parts = time.monotonic(), []
        draw, block = sample.painter(self.config, net, self.device), self.config.train.eval_batch
        for a in range(0, len(self.job.seeds), block * processes.world()):
            mine = self.job.part(start := a + block * processes.rank(), start + block)
            drawn = draw(mine if mine.seeds else self.job.part(0, 1))  # without a share it goes along with the others
            found = features_of(drawn.cpu().numpy().transpose(0, 3, 1, 2), self.extractor)["pool"][: len(mine.seeds)]
            parts.append(processes.gather(found).numpy())
        return processes.same(self._compare(np.concatenate(parts), began) if processes.rank() == 0 else {})

    def _compare(self, drawn: np.ndarray, began: float) -> dict[str, float]:
        kd = kernel_distance(drawn, self.reference.rows("pool"), device=self.device)
        fd = frechet_distance(Gaussian.of_few(drawn), self.reference.gaussian("pool"))
        error = {f"kd_{self.name}_error": kd.error} if kd.error is not None else {}
        found = {f"kd_{self.name}": kd.value, **error, f"fd_{self.name}": fd}
        return found | dict(eval_n=len(drawn), eval_reference_n=len(self.reference), eval_seconds=time.monotonic() - began)

    def best(self, step: int, found: dict[str, float]) -> Best:
        """How a step does, by the kernel distance: of the two, the one without bias."""
        metric = f"kd_{self.name}"
        return Best(step, found[metric], metric, self.conditions)

    def record(self, step: int, found: dict[str, float]) -> None:
        """Put the figures in the run's metrics.json; the run goes on where that cannot be."""
        about = self.about | dict(checkpoint_step=step, seconds=found["eval_seconds"], **figures.circumstances(self.device))
        rows = []
        for metric in ("KD", "FD"):
            key = f"{metric.lower()}_{self.name}"
            rows.append(figures.Figure(self.extractor.called(metric), found[key], found.get(f"{key}_error"), about))
        try:
            figures.record(self.out, rows)
        except (OSError, UserError) as e:
            self.say(f"the figures of step {step} are in the log alone: {e}")
