"""All that a run remembers: what is in it, how it is saved and restored, and where it starts."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from iddpm import build
from iddpm.config import ENDLESS, Config, ema_rates, ema_widths, seconds_of, total_steps
from iddpm.diffusion.weighting import Remembering
from iddpm.errors import UserError
from iddpm.parallel import processes, shard
from iddpm.store import checkpoint
from iddpm.store.files import Best
from iddpm.store.log import Meter
from iddpm.store.weights import Weights
from iddpm.training import decayed
from iddpm.training.ema import EMA
from iddpm.training.muon import Muon
from iddpm.training.paths import Paths
from iddpm.words import many

MEMORIES = {"law": "law of t", "weighting": "weighting", "paths": "beginning"}  # of TrainState: what may have tensors of its own
COUNTS = ("step", "images", "skipped", "skipped_in_a_row")  # of TrainState


SKIPS, FP16_SKIPS = 1, 25  # steps in a row without a finite gradient after which weights are suspect; fp16 finds its scale so
CLASSES = "label_emb.weight"  # (classes, width): the parameter that has a row for each class
DIVERGED = 100  # times the loss at the beginning: no run comes back from there


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
    """All that a run remembers; exactly this is checkpointed.

    `net` is the network, `parallel` what is trained: of several processes, it averages their gradients. Where they share the
    network's weights out (--shard), `params`, the averages and the optimizer's state are sharded tensors.
    """

    def __init__(self, config: Config, device: torch.device):
        settings, self.device = config.train, device
        torch.manual_seed(settings.seed)  # the initial weights
        self.net = build.network(config).to(device)
        self.parallel = shard.spread(self.net, settings.shard)
        self.law, self.weighting = build.law(config), build.weighting(config)
        self.params = dict(self.net.named_parameters())  # after sharding, which replaces them
        levels = build.path_levels(config)
        self.paths = Paths(config, device, levels) if levels else None  # walked by the weights of the beginning
        self.optimizer = optimizer(config, self.net, self.params)
        self.ema = EMA(self.params, ema_rates(settings), settings.ema_warmup, ema_widths(settings))
        self.scale = LossScale(settings.precision == "fp16", settings.fp16_scale_growth)
        self.step = 0  # optimizer steps tried
        self.images = 0  # images seen: the position in the data order
        self.skipped = 0  # steps skipped for a gradient that was not finite, in all
        self.skipped_in_a_row = 0
        self.measured = 0  # the last step whose samples were measured (--eval_every)
        self.best: Best | None = None  # of the steps measured
        # where the run ends, by its settings; of --images, as if all its batches had been of the present size
        self.end = total_steps(settings) if settings.steps or settings.images else ENDLESS
        self.time, self.by_clock = seconds_of(settings.time, "time"), bool(settings.time or settings.finish)
        self.seconds = 0.0  # trained, in all parts of the run
        self.decay: checkpoint.Decay | None = None  # once it has begun
        self.meter = Meter()  # of the log's next line
        self.health = Meter()  # the loss since the last save ...
        self.first_loss = 0.0  # ... and of the first step, of a network that knew nothing: no good one's is far above it
        self.last_loss: Tensor | float = 0.0  # of the last step, this process's images alone
        self.first: Tensor | None = None  # this process's part of it, until all come together at the first save

    @property
    def stop(self) -> int:
        """The step at which the run stops; ENDLESS where it stops by time, until its decay has begun."""
        return self.decay["end"] if self.decay else ENDLESS if self.by_clock else self.end

    def progress(self) -> float:
        """The share of the run that is done; 0 of one without an end."""
        if self.decay:
            done, steps = self.decay["done"], self.decay["end"] - self.decay["start"]
            return min(1.0, done + (1 - done) * (self.step - self.decay["start"]) / max(1, steps))
        if self.time:
            return min(1.0, self.seconds / self.time)
        return min(1.0, self.step / self.end) if self.end < ENDLESS else 0.0

    def count(self, images: int, good: bool) -> None:
        """Take note of a step on so many images; `good`: its gradient was finite."""
        self.scale.update(good)
        self.skipped += not good
        self.skipped_in_a_row = 0 if good else self.skipped_in_a_row + 1
        self.step += 1
        self.images += images

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state, perhaps sharded, by its name in a checkpoint."""
        out = {checkpoint.WEIGHTS + name: p.detach() for name, p in self.params.items()}
        for rate, average in self.ema.averages.items():
            out |= {checkpoint.AVERAGE.format(rate) + name: tensor for name, tensor in average.items()}
        for width, average in self.ema.powers.items():
            out |= {f"{checkpoint.OPTIMIZER}power.{width:g}.{name}": tensor for name, tensor in average.items()}
        for name, p in self.params.items():
            slots = self.optimizer.state.get(p, {})
            out |= {f"{checkpoint.OPTIMIZER}{name}.{slot}": value for slot, value in slots.items()}
        for owner, values in self.remembered().items():
            out |= {f"{checkpoint.OPTIMIZER}{owner}.{name}": value for name, value in values.items()}
        return out

    def remembered(self) -> dict[str, dict[str, Tensor]]:
        """What the law of t and the weighting keep of past losses, and the weights that walk paths; most keep nothing."""
        found = {"law": self.law.state_dict()}
        if isinstance(self.weighting, Remembering):
            found["weighting"] = self.weighting.state_dict()
        if self.paths:
            found["paths"] = self.paths.state_dict()
        return {owner: values for owner, values in found.items() if values}

    def numbers(self) -> dict[str, Any]:
        """The rest of the state, the same on every process."""
        counts = {name: getattr(self, name) for name in COUNTS}
        counts |= dict(ema_updates=self.ema.updates, lg_loss_scale=self.scale.lg, law=[])
        counts |= {owner: list(values) for owner, values in self.remembered().items()}
        counts |= dict(meter=self.meter.sums(processes.sum_), first_loss=self.first_loss, seconds=self.seconds)
        counts |= dict(decay=self.decay) if self.decay else {}
        return counts | (dict(measured=self.measured, best=self.best) if self.measured else {})

    def fault(self) -> str:
        """Why this state is not worth a checkpoint, "" where it is; of what was trained since the last call. On all processes."""
        loss = self.health.read(processes.sum_).get("loss", 0.0)
        finite = all(bool(torch.isfinite(norm)) for norm in torch._foreach_norm(shard.local(list(self.params.values()))))
        if not all(processes.every(finite)):
            return "its weights are not finite"
        if self.skipped_in_a_row >= (FP16_SKIPS if self.scale.enabled else SKIPS):
            return f"no finite gradient in the last {many(self.skipped_in_a_row, 'step')}"
        if self.first is not None:
            processes.sum_(self.first)
            self.first_loss, self.first = max(0.0, float(f"{self.first.nan_to_num():.4g}")), None  # as one process has it, too
        self.first_loss = self.first_loss or loss  # of a run that began before this was kept
        if loss > DIVERGED * self.first_loss > 0:
            return f"the loss is {loss:.3g}, and was {self.first_loss:.3g} at the beginning"
        return ""

    def to_saved(self) -> checkpoint.Saved:
        """What a checkpoint keeps, whole; with a sharded network, every process must call this."""
        return checkpoint.Saved.of(self.tensors(), self.numbers())

    def restore(self, saved: checkpoint.Saved, config: Config) -> None:
        """Become what was saved, by any number of processes. Rates and decays come from the config, not from the checkpoint.

        UserError where the checkpoint holds weights alone, or not those of this network.
        """
        if saved.state.get("weights_only"):  # as imports write them
            raise UserError("this run holds weights alone, nothing to go on from: train a new one from them with --init_from")
        # AdamW makes its averages in its first step; here they must be there to be filled, as whole or as sharded as the weights.
        for name in saved.tensors():
            param, _, slot = name.removeprefix(checkpoint.OPTIMIZER).rpartition(".")
            if name.startswith(checkpoint.OPTIMIZER) and param in self.params:
                p = self.params[param]
                self.optimizer.state[p][slot] = torch.zeros(()) if slot == "step" else torch.zeros_like(p)
        memories: dict[str, dict[str, Tensor]] = {}
        for owner, kept in ((owner, saved.state.get(owner, [])) for owner in MEMORIES):
            now = self.remembered().get(owner, {})
            if unknown := set(kept) - set(now):
                raise UserError(
                    f"the checkpoint of step {saved.step} has {min(unknown)!r} of another {MEMORIES[owner]}: it is damaged"
                )
            memories[owner] = {name: torch.empty_like(now[name]) for name in kept}
        if self.paths and not memories["paths"]:
            raise UserError(f"the checkpoint of step {saved.step} lacks the weights that walk its paths: begin another run")
        own = {
            k: v for k, v in self.tensors().items() if not k.startswith(tuple(f"{checkpoint.OPTIMIZER}{m}." for m in MEMORIES))
        }
        saved.fill(own | {f"{checkpoint.OPTIMIZER}{m}.{name}": t for m, kept in memories.items() for name, t in kept.items()})
        for owner, kept in memories.items():
            if kept:
                getattr(self, owner).load_state_dict(kept)
        for name in COUNTS:
            setattr(self, name, saved.state[name])
        self.ema.updates = saved.state["ema_updates"]
        self.measured, self.first_loss = saved.state.get("measured", 0), saved.state.get("first_loss", 0.0)
        if processes.rank() == 0:  # the sums of all, which the next line of the log adds up again
            self.meter.load(saved.state.get("meter", {}), self.device)
        if config.train.images:
            self.end = self.step + max(0, math.ceil((config.train.images - self.images) / config.train.batch_size))
        self.best, self.seconds = saved.state.get("best"), saved.state.get("seconds", 0.0)
        self.decay = decayed.kept(saved.state, config.train, self.end)
        # 0 is what runs in other precisions save: one that changes to fp16 begins with the usual scale.
        if config.train.precision == "fp16" and saved.state["lg_loss_scale"]:
            self.scale.lg = saved.state["lg_loss_scale"]


def optimizer(config: Config, net: nn.Module, params: Mapping[str, Tensor]) -> torch.optim.Optimizer:
    """The optimizer of a network's parameters. Its embeddings, first and last layers are no matrices to Muon."""
    settings = config.train
    # fused: one pass over each weight instead of about ten
    own: dict[str, Any] = dict(lr=settings.lr, betas=(0.9, settings.adam_beta2), weight_decay=settings.weight_decay, fused=True)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(params.values(), **own)
    first = [m.weight for m in net.modules() if isinstance(m, nn.Conv2d)][:1]
    ends = {id(p) for p in (*first, *(m.weight for m in net.modules() if isinstance(m, nn.Embedding)))}
    matrices = {name for name, p in params.items() if p.ndim > 1 and id(p) not in ends and not name.startswith("out.")}
    return Muon(params, matrices, dtype=build.DTYPES[settings.precision] or torch.float32, **own)


def initialise(state: TrainState, weights: Weights, reset: bool, classes: tuple[str, ...] = ()) -> list[str]:
    """Start from other weights (--init_from); returns what was re-initialised instead.

    The rows of classes go by their names: those of `classes` that the weights do not know start anew, whatever their number.
    UserError naming the layers that do not fit, unless `reset` lets them start anew.
    """
    own, tensors, known = state.params, dict(weights.tensors), weights.config.data.classes
    new = [name for name in classes if name not in known] if known else []
    if known and classes and classes != known and {CLASSES} <= own.keys() & tensors.keys():
        rows = shard.whole(own[CLASSES]).detach().cpu().clone()
        if rows.shape[1:] == tensors[CLASSES].shape[1:]:
            for y, name in enumerate(classes):
                if name in known:
                    rows[y] = tensors[CLASSES][known.index(name)]
            if len(rows) == len(classes) + 1 and len(tensors[CLASSES]) == len(known) + 1:  # that of no class
                rows[-1] = tensors[CLASSES][-1]
            tensors[CLASSES] = rows
    fits = {k: v for k, v in tensors.items() if k in own and own[k].shape == v.shape}
    misfits = sorted(k for k in own if k not in fits)
    if misfits and not reset:
        names = ", ".join(misfits[:3]) + (f" and {len(misfits) - 3} more" if len(misfits) > 3 else "")
        raise UserError(f"{weights.path} does not fit in {names}: --init_reset True starts these layers anew")
    for name, tensor in fits.items():
        shard.put(tensor, own[name])
    for average in (*state.ema.averages.values(), *state.ema.powers.values()):
        copy_weights(state.params, average)
    if state.paths:
        state.paths.begin(state.params)
    return misfits + ([f"the classes {', '.join(new)}"] if new and CLASSES in fits else [])


@torch.no_grad()
def copy_weights(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Write the tensors of `source` into those of `target`."""
    for name, tensor in source.items():
        target[name].copy_(tensor)
