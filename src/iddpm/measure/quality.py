"""The quality of a run's samples while it trains (--eval_every)."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from iddpm.config import Config, ema_rates, image_size, share
from iddpm.data import Order
from iddpm.data.preparation import preparation
from iddpm.diffusion.denoiser import Network
from iddpm.errors import UserError
from iddpm.measure import extractors, figures
from iddpm.measure.features import extract, features_of
from iddpm.measure.image_sets import Like, drawing, open_images
from iddpm.measure.metrics.frechet import frechet_distance
from iddpm.measure.metrics.kernel import kernel_distance
from iddpm.measure.metrics.moments import Gaussian
from iddpm.parallel import processes
from iddpm.sampling.draw import painter
from iddpm.sampling.images import eight_bits
from iddpm.sampling.job import job
from iddpm.store.files import Best

REFERENCE = 2000  # real images that samples are compared with, at the most
LEAST = 4  # rows a side of a kernel distance


class Quality:
    """Draws the first `eval_samples` seeds, and compares them with real images; leaves the run's randomness alone."""

    def __init__(self, config: Config, run: Path, device: torch.device, say: Callable[[str], None]):
        settings, m, n = config.train, config.model, config.train.eval_samples
        self.config, self.device, self.out, self.say = config, device, run / "metrics.json", say
        figures.read(self.out)  # what cannot be written to is refused before the work
        validation = config.data.validation
        path = settings.eval_reference or (not share(validation) and validation) or config.data.path
        how = preparation(config, bits=8)
        images = open_images(path, Like("the run", image_size(m), m.image_channels, how, config.data.labels))
        if images.n < LEAST:
            raise UserError(f"--eval_every: {path} holds fewer than the {LEAST} images it needs: give others by --eval_reference")
        chosen = Order(images.n, settings.seed).indices(0, min(REFERENCE, images.n))
        self.extractor = extractors.open(settings.eval_extractor, config.numbers(), device)
        self.reference = extract(images, chosen, self.extractor, say=say)
        self.job = job(config, range(n))
        self.conditions: dict[str, Any] = dict(  # under which numbers can be compared, as JSON holds them
            n=n, seeds=f"0-{n - 1}", **drawing(config, settings.precision, next(iter(ema_rates(settings)), 0)),
            extractor=self.extractor.name, extractor_identity=self.extractor.identity,
            reference_key=self.reference.folder.name, reference_n=len(chosen),
        )  # fmt: skip
        self.about = self.conditions | dict(samples=str(run), reference=path, weights=None, seed=0, labels=None, draws=None)
        self.name = self.extractor.name.replace("-", "_")
        which = ", of all classes, since it says none of --only_classes" * (bool(how.only) and not images.how.only)
        against = f"{len(chosen)} images of {path}{which}, {self.extractor.name}"
        say(f"every {settings.eval_every} steps: {n} samples against {against}")

    def __call__(self, net: Network) -> dict[str, float]:
        """The log's row on what a network draws now: kd_EXTRACTOR and its error, fd_EXTRACTOR; the same on every process."""
        began, parts = time.monotonic(), []
        draw = painter(self.config, net, self.device)
        for r in processes.rounds(len(self.job.seeds), self.config.train.eval_batch):
            drawn = processes.together(partial(draw, self.job.part(r.call.start, r.call.stop))).cpu().numpy()
            found = features_of(eight_bits(drawn).transpose(0, 3, 1, 2), self.extractor)["pool"][: len(r.mine)]
            parts.append(processes.gather(found).numpy())
        return processes.same(self._compare(np.concatenate(parts), began) if processes.rank() == 0 else {})

    def _compare(self, drawn: np.ndarray, began: float) -> dict[str, float]:
        kd = kernel_distance(drawn, self.reference.rows["pool"], device=self.device)
        fd = frechet_distance(Gaussian.of(drawn), self.reference.gaussian("pool"))
        error = {f"kd_{self.name}_error": kd.error} if kd.error is not None else {}
        found = {f"kd_{self.name}": kd.value, **error, f"fd_{self.name}": fd}
        return found | dict(eval_n=len(drawn), eval_reference_n=len(self.reference), eval_seconds=time.monotonic() - began)

    def best(self, step: int, found: dict[str, float]) -> Best:
        """How a step does, by the kernel distance: of the two, the one without bias."""
        metric = f"kd_{self.name}"
        return Best(step=step, value=found[metric], metric=metric, conditions=self.conditions)

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
