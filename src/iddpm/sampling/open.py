"""What the verbs that use trained weights share."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from iddpm.config import Config, Sample, Which, check, fields_of, make
from iddpm.errors import UserError
from iddpm.store.remote import place

if TYPE_CHECKING:
    import torch

    from iddpm.diffusion.denoiser import Network
    from iddpm.store.checkpoint import Weights


class Opened(NamedTuple):
    """Trained weights, ready to use."""

    weights: "Weights"
    config: Config  # the run's, with the flags given
    net: "Network"
    device: "torch.device"
    which: Which


def open_weights(run: str, given: dict[str, Any]) -> Opened:
    """The weights, the config with the flags given, the network and device a verb works with."""
    which = make(Which, given)
    from iddpm import build
    from iddpm.parallel import processes
    from iddpm.sampling import draw as sample
    from iddpm.store import checkpoint

    step = _step(place(run), which)
    device = processes.own_device(build.device(which.device))
    weights = checkpoint.read_weights(place(run), step, which.ema_rate if which.ema_rate >= 0 else None)
    config = weights.config.updated({k: v for k, v in given.items() if k in fields_of(Sample)})
    if given.get("solver") == "ancestral" and "eta" not in given:
        config = config.updated({"eta": 0.0})
    check(config)
    build.chain(config.diffusion, config.sample.sampling_steps)
    return Opened(weights, config, sample.restore(weights, device, which.precision), device, which)


def _step(run: Path, which: Which) -> int | None:
    """The step of the checkpoint asked for; None: the newest."""
    if not which.best:
        return which.checkpoint_step if which.checkpoint_step >= 0 else None
    from iddpm.store.files import best

    if which.checkpoint_step >= 0:
        raise UserError("--best and --checkpoint_step both name a checkpoint: give one")
    if (step := best(run)) is None:
        raise UserError(f"--best: {run} names no best checkpoint; train it with --eval_every N")
    return step


def beside(weights: Path) -> Path:
    """The run's folder of a weights file, or the folder of a lone one."""
    return weights.parents[2] if weights.parent.parent.name == "checkpoints" else weights.parent
