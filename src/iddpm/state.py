"""All that a run remembers: what is in it, how it is saved and restored, and where it starts."""

from collections.abc import Mapping

import torch
from torch import Tensor

from iddpm import build, checkpoint
from iddpm.config import Config, ema_rates
from iddpm.ema import EMA
from iddpm.errors import UserError


class LossScale:
    """The factor that keeps fp16 gradients from vanishing: 2^lg, a little more after each good step, half after a bad one."""

    def __init__(self, enabled: bool, growth: float):
        self.enabled, self.growth = enabled, growth
        self.lg = 20.0 if enabled else 0.0

    @property
    def factor(self) -> float:
        return 2.0**self.lg

    def update(self, good: bool) -> None:
        """Take note of a step; never below 1."""
        if self.enabled:
            self.lg = self.lg + self.growth if good else max(self.lg - 1, 0.0)


class TrainState:
    """All that a run remembers; exactly this is checkpointed."""

    def __init__(self, config: Config, device: torch.device):
        t = config.train
        torch.manual_seed(t.seed)  # the initial weights
        self.net = build.network(config).to(device)
        self.law = build.law(config.diffusion)
        self.params = dict(self.net.named_parameters())
        self.optimizer = torch.optim.AdamW(self.params.values(), lr=t.lr, betas=(0.9, t.adam_beta2), weight_decay=t.weight_decay)
        self.ema = EMA(self.params, ema_rates(t), t.ema_warmup)
        self.scale = LossScale(t.precision == "fp16", t.fp16_scale_growth)
        self.step = 0  # optimizer steps tried
        self.images = 0  # images seen: the position in the data order
        self.skipped = 0  # steps skipped for a gradient that was not finite, in all
        self.skipped_in_a_row = 0

    def to_saved(self) -> checkpoint.Saved:
        """What a checkpoint keeps."""
        names = list(self.params)
        optimizer: dict[str, Tensor] = {}
        for k, slots in self.optimizer.state_dict()["state"].items():
            optimizer |= {f"{names[k]}.{slot}": value for slot, value in slots.items()}
        law = self.law.state_dict()
        optimizer |= {f"law.{name}": value for name, value in law.items()}
        counts = {n: getattr(self, n) for n in ("step", "images", "skipped", "skipped_in_a_row")}
        state = counts | dict(ema_updates=self.ema.updates, lg_loss_scale=self.scale.lg, law=list(law))
        return checkpoint.Saved(self.step, dict(self.params), self.ema.averages, optimizer, state)

    def restore(self, saved: checkpoint.Saved, config: Config) -> None:
        """Become what was saved. Rates and decays come from the config, not from the checkpoint."""
        self.net.load_state_dict(saved.weights)
        slots: dict[int, dict[str, Tensor]] = {}
        numbers = {name: k for k, name in enumerate(self.params)}
        law = {name: saved.optimizer[f"law.{name}"] for name in saved.state["law"]}
        for key, value in saved.optimizer.items():
            name, slot = key.rsplit(".", 1)
            if name in numbers:
                slots.setdefault(numbers[name], {})[slot] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        if law:
            self.law.load_state_dict(law)
        for rate, average in self.ema.averages.items():
            for name, tensor in average.items():
                tensor.copy_(saved.averages[rate][name])
        for name in ("step", "images", "skipped", "skipped_in_a_row"):
            setattr(self, name, saved.state[name])
        self.ema.updates = saved.state["ema_updates"]
        if config.train.precision == "fp16" and saved.state["lg_loss_scale"]:
            self.scale.lg = saved.state["lg_loss_scale"]


def initialise(state: TrainState, weights: checkpoint.Weights, reset: bool) -> list[str]:
    """Start from other weights (--init_from); returns what was re-initialised instead.

    UserError naming the layers that do not fit, unless `reset` lets them start anew.
    """
    own = state.net.state_dict()
    fits = {k: v for k, v in weights.tensors.items() if k in own and own[k].shape == v.shape}
    misfits = sorted(k for k in own if k not in fits)
    if misfits and not reset:
        names = ", ".join(misfits[:3]) + (f" and {len(misfits) - 3} more" if len(misfits) > 3 else "")
        raise UserError(f"{weights.path} does not fit in {names}: --init_reset True starts these layers anew")
    state.net.load_state_dict(fits, strict=False)
    for average in state.ema.averages.values():
        copy_weights(state.params, average)
    return misfits


@torch.no_grad()
def copy_weights(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Write the tensors of `source` into those of `target`."""
    for name, tensor in source.items():
        target[name].copy_(tensor)
