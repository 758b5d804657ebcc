"""The library's front: load a model and draw with it, train one, measure images. Settings are named as the flags are."""

import tempfile
from collections.abc import Mapping, Sequence
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iddpm import build, fit
from iddpm.config import BOUND, SEED, Config, Evaluate, Sample, Which, check, given_shape, image_size, make, settings_of
from iddpm.config.run import typed
from iddpm.diffusion.denoiser import Prediction
from iddpm.diffusion.grid import Grid, Step
from iddpm.diffusion.schedule import Level
from iddpm.errors import UserError
from iddpm.look import report
from iddpm.measure.bound import bits_per_dim
from iddpm.measure.likelihood import in_memory
from iddpm.sampling.draw import images, painter
from iddpm.sampling.grids import with_found
from iddpm.sampling.job import Job, job, one_class, trained_classes
from iddpm.sampling.open import Opened, open_weights
from iddpm.store.remote import place


def load(source: str | Path, **which: Any) -> "Model":
    """The model of a run, a checkpoint or a .safetensors file, on this machine or at an fsspec address.

    `which` are flags of every verb: checkpoint_step, best, ema_rate, device, precision, batch_size.
    UserError where there is none.
    """
    return Model(open_weights(place(source), make(Which, typed(which, Which))))


class Model:
    """A trained model of images, ready to draw, to denoise and to tell likelihoods."""

    def __init__(self, opened: Opened):
        self.opened, self.config, self.device = opened, opened.config, opened.device

    def __repr__(self) -> str:
        size = f"{self.config.model.image_size}, {self.config.model.image_channels} channels"
        return f"Model({self.opened.weights.path}: {self.config.model.task}, {size})"

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes it was trained on; none for a model without."""
        return self.config.data.classes if self.config.model.class_cond else ()

    def sample(
        self,
        n: int,
        *,
        seed: int = 0,
        labels: str | int | Sequence[int | str] = (),
        low_res: np.ndarray | None = None,
        given: np.ndarray | None = None,
        **how: Any,
    ) -> np.ndarray:
        """n images (n, H, W, C) uint8, of 16 bits uint16, of the seeds `seed`, `seed` + 1 ...: image k depends on its seed alone.

        `labels` are classes by name or number, taken in turn (default: all). `low_res` (n, h, w, C) uint8 is what a
        super-resolution model enlarges, `given` (n, H, W, G) uint8 what a model of --task translate is given. `how` are flags of
        `iddpm sample`: solver, sampling_steps (or steps), eta ...
        UserError for what the model or the solver does not know.
        """
        config = self._changed(how)
        if config.task.classifies:
            raise UserError(f"{self.opened.weights.path} is a classifier, which draws nothing")
        named = {name: np.asarray(images) for name, images in (("low_res", low_res), ("given", given)) if images is not None}
        if bad := next((name for name in named if name not in config.task.inputs), ""):
            raise UserError(f"{bad}: this is {config.task.help}, which is not given such images")
        if config.task.inputs and not named:
            raise UserError(f"this is {config.task.help}: of which images? {config.task.inputs[0]}=, (n, h, w, channels) uint8")
        shape, of, kind = given_shape(config.model), next(iter(named.values()), None), f"uint{config.model.bit_depth}"
        if shape and of is not None and (of.dtype not in (np.uint8, kind) or of.shape != (n, *shape[1:], shape[0])):
            wanted = f"({n}, {shape[1]}, {shape[2]}, {shape[0]}) {kind}"
            raise UserError(f"{next(iter(named))} must be {wanted}, an image for each that is drawn, not {of.shape} {of.dtype}")
        named_so = labels if isinstance(labels, str) else [str(label) for label in np.atleast_1d(np.asarray(labels))]
        task: Job = job(config, _seeds(seed, n), named_so)._replace(given=of)
        paint = painter(config, self.opened.net, self.device)
        height, width = image_size(config.model)
        empty = np.zeros((0, height, width, config.model.image_channels), kind)
        return np.concatenate([empty, *images([paint], task, self.opened.which.batch_size)])

    def grid(self, steps: int | str = "") -> Grid:
        """The levels that a solver walks, noisiest first: a count of steps, or a spec as of --sampling_steps."""
        return build.grid(self._changed({"sampling_steps": str(steps)} if steps != "" else {}))

    @torch.inference_mode()
    def denoise(self, x: Tensor, level: Level | Step, **cond: Tensor) -> Prediction:
        """What the network says of x_t (B, C, H, W) at a level: `.x0`, and at a step of a grid `.mean` and `.log_var`.

        `cond` is what else it sees: y (B,) int64 classes, given (B, G, h, w) in [-1, 1]. UserError for x that is not of floats.
        """
        if not x.is_floating_point():
            raise UserError(f"x is {x.dtype}: give floats, an image as pixels / 127.5 - 1 and noise with it")
        at = {name: value.to(self.device) for name, value in cond.items()}
        return build.sampling_denoiser(self.config, self.opened.net)(x.to(self.device), level, at)

    @torch.inference_mode()
    def bits_per_dim(
        self, images: np.ndarray, labels: Sequence[int | str] | None = None, *, seed: int = 0, **how: Any
    ) -> np.ndarray:
        """The variational bound on -log2 p (N,) float64, in bits/dim, of images (N, H, W, C) uint8, of a model of 16 bits uint16.

        On the grid of `sampling_steps` (or steps), by default every step of the chain. The noise depends on the seed and an
        image's place. UserError where the images do not fit the model, its classes are missing, or a bound is not finite.
        """
        if idle := next((name for name in how if name in settings_of(Sample) and name not in BOUND), ""):
            raise UserError(f"{idle} has no effect on the bound, which no solver walks: it reads {', '.join(BOUND)}")
        config = self._changed({"sampling_steps": "all", **how} if "steps" not in how else how)
        _seeds(seed, 1)
        if not config.task.draws:
            raise UserError(f"{self.opened.weights.path} is no model of images alone: its likelihood needs iddpm nll")
        m, size = config.model, image_size(config.model)
        images = np.asarray(images)
        if images.dtype != (kind := f"uint{m.bit_depth}") or images.shape[1:] != (*size, m.image_channels):
            wanted = f"(N, {size[0]}, {size[1]}, {m.image_channels}) {kind}"
            raise UserError(f"images must be {wanted}, not {images.shape} {images.dtype}")
        if m.class_cond and (labels is None or len(labels) != len(images)):
            raise UserError("this model knows classes: give the label of each image")
        if labels is not None and not m.class_cond:
            raise UserError("labels: this model was trained without classes")
        ys = None if labels is None else [one_class(config, y) if isinstance(y, str) else y for y in labels]
        if ys and not 0 <= min(ys) <= max(ys) < trained_classes(config):
            raise UserError(f"labels must lie from 0 to {trained_classes(config) - 1}")
        if not len(images):
            return np.zeros(0)
        data = in_memory(config, images, ys)
        settings: dict[str, Any] = dict(batch_size=self.opened.which.batch_size, seed=seed, say=lambda line: None)
        return bits_per_dim(config, self.opened.net, data, self.device, chosen=np.arange(len(images)), **settings).total

    def _changed(self, how: Mapping[str, Any]) -> Config:
        how = dict(how)
        if "steps" in how:
            if "sampling_steps" in how:
                raise UserError("steps and sampling_steps are the same setting: give one")
            how["sampling_steps"] = how.pop("steps")
        config = fit.require_fit(with_found(check(self.config.updated(typed(how, Sample))), self.opened.home))
        return fit.require_steering(config, how)


def _seeds(seed: int, n: int) -> range:
    """n seeds, from `seed` on; UserError where they are no numbers that seeds may be."""
    try:
        first, count = index(seed), index(n)
    except TypeError:
        raise UserError(f"n={n!r}, seed={seed!r}: give whole numbers") from None
    if not (count >= 0 and 0 <= first <= first + count <= SEED + 1):
        raise UserError(f"n={n}, seed={seed}: give n from 0, and seeds from 0 to {SEED}")
    return range(first, first + count)


def train(data: Any, *, run: str | Path = "", preset: str = "", config: str | Path = "", **settings: Any) -> Path:
    """Train a model, or go on with its run, to its end; returns the run's folder, for `load`.

    `data` is a folder or archive of images, or a data set of the program's own: len(data) and data[k] -> (image, label). For
    task="translate" so is `given`, which holds the image that the model is given for each of them.
    `config` is the config.json of a run to begin as. `settings` are flags of `iddpm train`; in the place of a name, a choice may
    be the program's own: objective=my_loss. UserError where it cannot be done, saying what to change.
    """
    from iddpm.training.start import default_run, start

    path, given = data if isinstance(data, (str, Path)) else "", settings.get("given", "")
    if not path and not run and not preset:
        raise UserError("run='runs/NAME': a data set of the program's own names no folder")
    own_given = None if isinstance(given, (str, Path)) else settings.pop("given")
    settings = typed(settings)
    folder = place(run) if run else default_run(str(path), preset, settings)[0]
    start(
        folder, str(path), preset, settings, own=None if path else data, recipe=str(config), own_given=own_given, look=report.keep
    )
    return folder


def evaluate(samples: Any, *, reference: Any, device: str = "auto", batch_size: int = 64, **settings: Any) -> dict[str, float]:
    """How good samples are against real images: every metric that applies, by name.

    Both are arrays (N, H, W, C) uint8, an .npz, a folder or an archive. `settings` are flags of `iddpm evaluate`: extractor,
    metrics, num_samples ...
    """
    from iddpm.measure import compare
    from iddpm.measure.image_sets import open_images, write_images

    with tempfile.TemporaryDirectory() as folder:

        def on_disk(images: Any, name: str) -> str:
            if isinstance(images, (str, Path)):
                return str(images)
            return write_images(Path(folder) / f"{name}.npz", np.asarray(images))

        chosen = make(Evaluate, typed({"reference": on_disk(reference, "reference"), **settings}, Evaluate))
        sets = [open_images(on_disk(samples, "samples"))]
        found = compare.evaluate(sets, chosen, build.device(device), batch_size=batch_size)
    return {finding.name: finding.estimate.value for finding in found.findings} if found else {}
