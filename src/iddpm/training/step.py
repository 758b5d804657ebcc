"""One step of training, which is the method itself: draw levels, predict, compare, step. Everything else is in the loop."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import nn

from iddpm import build, rng
from iddpm.config import Config
from iddpm.data.batches import Batch
from iddpm.diffusion.denoiser import Denoiser
from iddpm.diffusion.objective import Terms
from iddpm.diffusion.schedule import Schedule
from iddpm.diffusion.weighting import Remembering
from iddpm.nn import mp_unet
from iddpm.parallel import processes, shard
from iddpm.store.checkpoint import Decay
from iddpm.store.log import Meter
from iddpm.training.state import TrainState


class Method(NamedTuple):
    """What is trained, and how it is judged."""

    net: nn.Module  # called by the denoiser; of several processes, it averages their gradients
    denoiser: Denoiser
    schedule: Schedule
    objective: Callable[..., Terms]


def method_of(config: Config, net: nn.Module, state: TrainState | None = None) -> Method:
    """The method of a config around a network; of a run in training, its state has what the loss remembers."""
    device = next(net.parameters()).device
    denoiser = build.denoiser(config, build.in_precision(net, device, config.train.precision))
    objective = build.objective(config, state.weighting, state.progress) if state else build.objective(config)
    return Method(net, denoiser, build.schedule(config), objective)


def train_step(state: TrainState, config: Config, method: Method, batch: Batch, meter: Meter) -> None:
    """One optimizer step on this process's part of a batch. Microbatches save memory and leave the gradient as it is.

    A gradient that is not finite changes nothing but the counts of steps, and the loss scale of fp16.
    """
    settings, device = config.train, state.device
    net, denoiser, schedule, objective = method
    n, mine = settings.batch_size, processes.share(settings.batch_size)

    # Each process draws the levels of the whole batch and takes its own: they do not depend on how it is split. They stay on
    # the CPU, in float64 (8 bytes an image), where the schedule works its alpha and sigma out.
    draw = state.law(rng.uniform(settings.seed, rng.TIME, state.step, n))
    u, weight = (of_all[mine.start : mine.stop] for of_all in draw)
    if state.paths:
        (batch, u), weight = state.paths(state.step), torch.ones(len(mine))
    losses, errors = torch.zeros(2, n, device=device)  # of this process's images, each in its place in the whole batch

    state.net.train()
    torch.manual_seed(_dropout_seed(settings.seed, state.step))
    state.optimizer.zero_grad(set_to_none=True)
    parts = processes.parts(n, settings.microbatch if settings.microbatch > 0 else n)
    for k, part in enumerate(parts):
        # Processes call the network equally often, or they would wait for each other for ever. One that has run out of
        # images, as the first of two that share 7 in microbatches of 1, repeats its first with a weight of 0.
        repeats = part.start == part.stop
        part = slice(0, 1) if repeats else part
        x0, eps, w = (of_mine[part].to(device) for of_mine in (batch.x0, batch.eps, weight * (not repeats)))
        cond = {name: value[part].to(device) for name, value in batch.cond.items()}
        # Gradients are exchanged once a step, in the last backward pass.
        with nullcontext() if k == len(parts) - 1 else shard.unsynchronised(net):
            terms = objective(denoiser, schedule, x0, eps, u[part], cond)
            # A mean over the whole batch: the processes' gradients are averaged, not added, so each sum counts `world` times.
            share = processes.world() / n
            (state.scale.factor * share * (terms["loss"] * w).sum()).backward()
        if not repeats:
            meter.add({name: term * w for name, term in terms.items()}, (u[part] * 4).long().to(device))
            place = slice(mine.start + part.start, mine.start + part.stop)
            losses[place] = terms["loss"].detach()
            errors[place] = terms.get("mse", terms["loss"]).detach()

    # fp16 gradients come larger by the loss scale, which keeps small ones from vanishing: back to their size before they are
    # clipped or looked at.
    grads = [p.grad for p in state.params.values() if p.grad is not None]
    if state.scale.enabled:
        torch._foreach_div_(shard.local(grads), state.scale.factor)
    norm = shard.whole(torch.nn.utils.get_total_norm(grads))
    good = bool(torch.isfinite(norm))  # waits for the device: the price of never applying a bad gradient
    if good:
        if settings.grad_clip:
            torch._foreach_mul_(shard.local(grads), (settings.grad_clip / norm).clamp(max=1.0))
        for group in state.optimizer.param_groups:
            group["lr"], group["weight_decay"] = learning_rate(config, state.step, state.end, state.decay), settings.weight_decay
        state.optimizer.step()
        mp_unet.hold(state.net)
        state.ema.update()
        if state.law.looks:  # all processes' losses come together only for a law that reads them
            processes.sum_(losses)
            state.law.update(draw.u, losses)
        if isinstance(state.weighting, Remembering):
            processes.sum_(errors)
            state.weighting.update(schedule(draw.u), errors)
        meter.add({"grad_norm": norm[None]})
        state.health.add({"loss": losses[mine.start : mine.stop]})
    state.last_loss = losses[mine.start : mine.stop].mean()
    if state.step == 0:
        state.first = losses[mine.start : mine.stop].sum() / n
    state.count(n, good)


def _dropout_seed(seed: int, step: int) -> int:
    """Processes drop different features; a resumed run drops the same ones again."""
    return int(rng.stream(seed, rng.DROPOUT, step, processes.rank()).integers(2**63))


def learning_rate(config: Config, step: int, end: int, decay: Decay | None = None) -> float:
    """The rate of optimizer step `step`, counted from 0, of a run of `end`: warmed up linearly, annealed linearly to 0.

    Once a decay has begun: from what it then was, linearly to 0 at the decay's end.
    """
    settings = config.train
    warm = warmed(config, step)
    if decay and step >= decay["start"]:
        left = (decay["end"] - step) / max(1, decay["end"] - decay["start"])
        return settings.lr * warm * decay["factor"] * max(0.0, left)
    end = end if settings.lr_anneal_steps == -1 else settings.lr_anneal_steps
    return settings.lr * warm * (max(0.0, 1 - step / end) if end else 1.0)


def warmed(config: Config, step: int) -> float:
    """The share of the rate that the warm-up leaves optimizer step `step`."""
    length = config.train.lr_warmup_steps
    return min(1.0, (step + 1) / length) if length else 1.0
