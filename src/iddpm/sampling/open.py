"""From the path of a run or of weights to a network that is ready to use."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from iddpm import build, fit
from iddpm.config import FOUND, Config, Which, check
from iddpm.diffusion.denoiser import Network
from iddpm.errors import UserError
from iddpm.parallel import processes
from iddpm.sampling.grids import with_found
from iddpm.store.files import best
from iddpm.store.remote import fetch, remote, sha256
from iddpm.store.weights import Weights, read_weights


class Opened(NamedTuple):
    """Trained weights, ready to use."""

    weights: Weights
    config: Config  # the run's, with the changes asked for
    net: Network
    device: torch.device
    which: Which

    @property
    def home(self) -> Path:
        """The run's folder of a weights file, or the folder of a lone one."""
        return beside(self.weights.path)


def open_weights(source: Path, which: Which, changes: Mapping[str, Any] = {}) -> Opened:
    """The weights of a run, a checkpoint or a file, with `changes` to how it samples; UserError where they fail."""
    device = processes.own_device(build.device(which.device))
    weights = read_weights(source, _step(source, which), which.ema_rate if which.ema_rate >= 0 else None)
    config = check(weights.config.updated(changes))
    config = fit.require_fit(with_found(config, beside(weights.path)) if config.sample.grid in FOUND else config)
    return Opened(weights, config, restore(weights, device, which.precision), device, which)


def restore(weights: Weights, device: torch.device, precision: str = "fp32") -> Network:
    """The trained network of some weights, ready to predict."""
    with torch.device("meta"):  # so that the weights are in memory once, not twice
        net = build.network(weights.config)
    try:
        net.load_state_dict(weights.tensors, assign=True)
    except RuntimeError as e:
        raise UserError(f"{weights.path} does not hold the network its config names: {str(e).splitlines()[1].strip()}") from None
    return build.in_precision(net.to(device).eval().requires_grad_(False), device, precision)


def digest_of(weights: Weights) -> str:
    """The sha256 of a file of weights: what they are, wherever they lie."""
    path = weights.path
    return weights.digest or _digest_as_of(path, path.modified() if remote(path) else path.stat().st_mtime_ns)


@cache
def _digest_as_of(weights: Path, modified: float | None) -> str:
    return sha256(fetch(weights))


def _step(run: Path, which: Which) -> int | None:
    """The step of the checkpoint asked for; None: the newest."""
    if not which.best:
        return which.checkpoint_step if which.checkpoint_step >= 0 else None
    if which.checkpoint_step >= 0:
        raise UserError("--best and --checkpoint_step both name a checkpoint: give one")
    if (step := best(run)) is None:
        raise UserError(f"--best: {run} names no best checkpoint; train it with --eval_every N")
    return step


def beside(weights: Path) -> Path:
    """The run's folder of a weights file, or the folder of a lone one."""
    return weights.parents[2] if weights.parent.parent.name == "checkpoints" else weights.parent
