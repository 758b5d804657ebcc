"""The original's training loop, method by method, for scripts that subclass it; its defects are mended (see each)."""

import copy
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from iddpm.errors import UserError
from iddpm.interop.openai.formats import files
from iddpm.interop.openai.formats.optimizer import flatten, slots_of
from iddpm.interop.openai.python import dist_util, fp16_util, logger
from iddpm.interop.openai.python.nn import update_ema
from iddpm.interop.openai.python.resample import LossAwareSampler, ScheduleSampler, UniformSampler
from iddpm.parallel.processes import barrier, every, rank, same, world
from iddpm.parallel.shard import spread
from iddpm.store.remote import place
from iddpm.training.loop import MAX_SKIPS
from iddpm.training.state import LossScale

INITIAL_LOG_LOSS_SCALE = 20.0
EXTRA = "iddpm"  # the key, in an opt file, of what the original does not save


class TrainLoop:
    """Trains `model` on `data`, pairs of (batch, cond), one optimizer step for each; `batch_size` is this process's.

    Under several processes gradients are averaged, on CPUs too. A step whose gradient is not finite is skipped.
    """

    def __init__(
        self, *, model: nn.Module, diffusion: Any, data: Iterator[tuple[Tensor, dict[str, Tensor]]], batch_size: int,
        microbatch: int, lr: float, ema_rate: float | str, log_interval: int, save_interval: int, resume_checkpoint: str,
        use_fp16: bool = False, fp16_scale_growth: float = 1e-3, schedule_sampler: ScheduleSampler | None = None,
        weight_decay: float = 0.0, lr_anneal_steps: int = 0,
    ):  # fmt: skip
        self.model, self.diffusion, self.data = model, diffusion, data
        self.batch_size, self.microbatch = batch_size, microbatch if microbatch > 0 else batch_size
        self.lr, self.weight_decay, self.lr_anneal_steps = lr, weight_decay, lr_anneal_steps
        self.ema_rate = [float(r) for r in ema_rate.split(",")] if isinstance(ema_rate, str) else [float(ema_rate)]
        self.log_interval, self.save_interval, self.resume_checkpoint = log_interval, save_interval, resume_checkpoint
        self.use_fp16, self.fp16_scale_growth = use_fp16, fp16_scale_growth
        self.schedule_sampler = schedule_sampler or UniformSampler(diffusion)

        self.step = self.resume_step = 0  # steps of this process, and before
        self.skipped = self.skipped_in_a_row = 0
        self.global_batch = batch_size * world()
        self.model_params = list(model.parameters())
        self.master_params: list[Any] = self.model_params
        self.scale = LossScale(use_fp16, fp16_scale_growth)
        self.lg_loss_scale = INITIAL_LOG_LOSS_SCALE if use_fp16 else 0.0
        self.sync_cuda = torch.cuda.is_available()

        # In the original's order: forks override these, and rely on what is there when they are called.
        self._load_and_sync_parameters()
        if use_fp16:
            self._setup_fp16()
        self.opt = AdamW(self.master_params, lr=lr, weight_decay=weight_decay)
        if self._main_checkpoint():
            self.ema_params = [self._load_ema_parameters(rate) for rate in self.ema_rate]
            self._load_optimizer_state()
        else:
            self.ema_params = [copy.deepcopy(self.master_params) for _ in self.ema_rate]
        self.use_ddp, self.ddp_model = world() > 1, spread(model)

    @property
    def lg_loss_scale(self) -> float:
        """log2 of the factor on fp16 losses."""
        return self.scale.lg

    @lg_loss_scale.setter
    def lg_loss_scale(self, value: float) -> None:
        self.scale.lg = value

    # ---- resuming

    def _main_checkpoint(self) -> str:
        return find_resume_checkpoint() or self.resume_checkpoint

    def _load_and_sync_parameters(self) -> None:
        if main := self._main_checkpoint():
            self.resume_step = _number_beside(main)
            logger.log(f"loading model from checkpoint: {main}...")
            self.model.load_state_dict(dist_util.load_state_dict(main, map_location="cpu"))
            logger.log("the data starts over: where an iterator stood cannot be restored")
        dist_util.sync_params(self.model.parameters())

    def _load_ema_parameters(self, rate: float) -> list[Any]:
        main = self._main_checkpoint()
        if path := find_ema_checkpoint(main, self.resume_step, rate):
            logger.log(f"loading EMA from checkpoint: {path}...")
            params = self._state_dict_to_master_params(dist_util.load_state_dict(path, map_location=dist_util.dev()))
        else:
            logger.warn(f"no ema_{rate}_{self.resume_step:06d}.pt beside {main}: this average starts from its weights")
            params = copy.deepcopy(self.master_params)
        dist_util.sync_params(params)
        return params

    def _load_optimizer_state(self) -> None:
        """AdamW's moments; the rate and decay stay those asked for (B6), and the true number of steps is the optimizer's (B7)."""
        path = place(self._main_checkpoint()).with_name(f"opt{self.resume_step:06}.pt")
        if not path.exists():
            logger.warn(f"no {path}: the optimizer starts anew, at step {self.resume_step}")
            return
        logger.log(f"loading optimizer state from checkpoint: {path}")
        saved = dist_util.load_state_dict(str(path), map_location="cpu")
        shapes = {name: tuple(p.shape) for name, p in self.model.named_parameters()}
        slots, updates = slots_of(saved, shapes, str(path))
        state = flatten(slots, shapes, "flat" if self.use_fp16 else "each")
        self.opt.load_state_dict({"state": state, "param_groups": self.opt.state_dict()["param_groups"]})
        extra = saved.get(EXTRA, {})
        self.resume_step = extra.get("step", updates or self.resume_step)
        self.skipped = extra.get("skipped", 0)
        if self.use_fp16:
            self.lg_loss_scale = extra.get("lg_loss_scale", self.lg_loss_scale)
        if extra.get("sampler") and hasattr(self.schedule_sampler, "load_state_dict"):
            self.schedule_sampler.load_state_dict(extra["sampler"])

    def _setup_fp16(self) -> None:
        self.master_params = list(fp16_util.make_master_params(self.model_params))
        self.model.convert_to_fp16()  # type: ignore[operator]

    # ---- training

    def run_loop(self) -> None:
        """Train to step lr_anneal_steps, or, where that is 0, until stopped or the data ends."""
        if not self._main_checkpoint():
            _refuse_to_overwrite()
            self.save()
        if not self.lr_anneal_steps:
            logger.log("no lr_anneal_steps: training goes on until it is stopped")
        saved_at = self.step
        while not self.lr_anneal_steps or self.step + self.resume_step < self.lr_anneal_steps:
            try:
                batch, cond = next(self.data)
            except StopIteration:
                logger.log(f"the data ends at step {self.step + self.resume_step}")
                break
            self.run_step(batch, cond)
            if self.step % self.log_interval == 0:
                _average_row()
                logger.dumpkvs()
            self.step += 1
            if (self.step + self.resume_step) % self.save_interval == 0:
                self.save()
                saved_at = self.step
                if os.environ.get("DIFFUSION_TRAINING_TEST", ""):
                    return
        if self.step != saved_at:
            self.save()

    def run_step(self, batch: Tensor, cond: dict[str, Tensor]) -> None:
        """One optimizer step."""
        self.forward_backward(batch, cond)
        if self.use_fp16:
            self.optimize_fp16()
        else:
            self.optimize_normal()
        self.log_step()

    def forward_backward(self, batch: Tensor, cond: dict[str, Tensor]) -> None:
        """The gradient of the batch's mean loss, whatever the microbatches (B8)."""
        fp16_util.zero_grad(self.model_params)
        for i in range(0, len(batch), self.microbatch):
            micro = batch[i : i + self.microbatch].to(dist_util.dev())
            micro_cond = {k: v[i : i + self.microbatch].to(dist_util.dev()) for k, v in cond.items()}
            last = i + self.microbatch >= len(batch)  # gradients are exchanged once, in the last backward pass
            t, weights = self.schedule_sampler.sample(len(micro), dist_util.dev())
            with nullcontext() if last or not self.use_ddp else self.ddp_model.no_sync():  # type: ignore[operator]
                losses = self.diffusion.training_losses(self.ddp_model, micro, t, model_kwargs=micro_cond)
            if isinstance(self.schedule_sampler, LossAwareSampler):
                self.schedule_sampler.update_with_local_losses(t, losses["loss"].detach())
            log_loss_dict(self.diffusion, t, {k: v * weights for k, v in losses.items()})
            # divided by the whole batch, so that a short last microbatch weighs no more than its images
            (self.scale.factor * (losses["loss"] * weights).sum() / len(batch)).backward()

    def optimize_fp16(self) -> None:
        """A step of the float32 masters; after one that is not finite the loss scale is halved, down to 1."""
        fp16_util.model_grads_to_master_grads(self.model_params, self.master_params)
        self.master_params[0].grad.mul_(1.0 / self.scale.factor)
        if self._finite():
            self._update()
            fp16_util.master_params_to_model_params(self.model_params, self.master_params)

    def optimize_normal(self) -> None:
        """A step of the optimizer and the averages, unless a gradient is not finite."""
        if self._finite():
            self._update()

    def _update(self) -> None:
        self._log_grad_norm()
        self._anneal_lr()
        self.opt.step()
        for rate, params in zip(self.ema_rate, self.ema_params):
            update_ema(params, self.master_params, rate=rate)

    def _finite(self) -> bool:
        """Whether the step may be taken; counts those that may not, and gives up after 50 in a row (B9)."""
        good = bool(torch.isfinite(fp16_util.grad_norm(self.master_params)))
        self.scale.update(good)
        if good:
            self.skipped_in_a_row = 0
            return True
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        scale = f"; lg_loss_scale is now {self.lg_loss_scale}" if self.use_fp16 else ""
        logger.log(f"a gradient is not finite: step {self.step + self.resume_step} is skipped{scale}")
        if self.skipped_in_a_row >= MAX_SKIPS:
            raise UserError(f"{MAX_SKIPS} steps in a row had no finite gradient: lower --lr, or leave fp16")
        return False

    def _log_grad_norm(self) -> None:
        logger.logkv_mean("grad_norm", fp16_util.grad_norm(self.master_params).item())

    def _anneal_lr(self) -> None:
        if self.lr_anneal_steps:
            for group in self.opt.param_groups:
                group["lr"] = self.lr * (1 - (self.step + self.resume_step) / self.lr_anneal_steps)

    def log_step(self) -> None:
        """Put the step's numbers into the row to come."""
        logger.logkv("step", self.step + self.resume_step)
        logger.logkv("samples", (self.step + self.resume_step + 1) * self.global_batch)
        if self.skipped:
            logger.logkv("skipped", self.skipped)
        if self.use_fp16:
            logger.logkv("lg_loss_scale", self.lg_loss_scale)

    # ---- saving

    def save(self) -> None:
        """modelN, ema_RATE_N and optN, N the steps made (B7); the model last, so that its presence says that all is there."""
        number = f"{self.step + self.resume_step:06d}.pt"
        folder = place(get_blob_logdir())
        for rate, params in [*zip(self.ema_rate, self.ema_params), (0, self.master_params)]:  # 0 stands for the model
            weights = self._master_params_to_state_dict(params)
            if rank() == 0:
                logger.log(f"saving model {rate}...")
                if not rate:
                    sampler = self.schedule_sampler.state_dict() if hasattr(self.schedule_sampler, "state_dict") else {}
                    extra = dict(step=self.step + self.resume_step, skipped=self.skipped, sampler=sampler)
                    extra |= {"lg_loss_scale": self.lg_loss_scale} if self.use_fp16 else {}
                    files.save(folder / f"opt{number}", self.opt.state_dict() | {EXTRA: extra})
                files.save(folder / (f"ema_{rate}_{number}" if rate else f"model{number}"), weights)
        barrier()

    def _master_params_to_state_dict(self, master_params: Any) -> dict[str, Tensor]:
        return fp16_util.masters_to_state_dict(self.model, master_params, self.use_fp16)

    def _state_dict_to_master_params(self, state_dict: Mapping[str, Tensor]) -> list[Any]:
        return fp16_util.state_dict_to_masters(self.model, state_dict, self.use_fp16)


# ---- names of files


def parse_resume_step_from_filename(filename: str) -> int:
    """N of path/to/modelN.pt, else 0."""
    number = re.search(r"model(\d+)(\.[^/]*)?$", filename)
    return int(number[1]) if number else 0


def _number_beside(main: str) -> int:
    """The number in the names of the files beside a checkpoint: its own, or that of the one optimizer file there (B4)."""
    path = place(main)
    if digits := files.name_of(path)["digits"]:
        return int(digits)
    numbers = [int(digits) for other in path.parent.glob("opt*.pt") if (digits := files.name_of(other)["digits"])]
    if len(numbers) == 1:
        return numbers[0]
    logger.warn(f"{path.name} does not say its step; {len(numbers)} optimizer files lie beside it: its weights alone are used")
    return 0


def get_blob_logdir() -> str:
    """Where checkpoints go: DIFFUSION_BLOB_LOGDIR or the log's folder."""
    return os.environ.get("DIFFUSION_BLOB_LOGDIR") or logger.get_dir()


def find_resume_checkpoint() -> str | None:
    """Replace this to discover the newest checkpoint by oneself; it is called each time."""
    return None


def find_ema_checkpoint(main_checkpoint: str | None, step: int, rate: float) -> str | None:
    """The file of an average beside a checkpoint, if there is one."""
    path = place(main_checkpoint).with_name(f"ema_{rate}_{step:06d}.pt") if main_checkpoint else None
    return str(path) if path and path.exists() else None


def _refuse_to_overwrite() -> None:
    folder = get_blob_logdir()
    if there := same([path.name for path in files.numbered(place(folder))]):
        raise UserError(f"{folder} holds {there[-1]} already: go on with --resume_checkpoint, or set another OPENAI_LOGDIR")


# ---- numbers


def _average_row() -> None:
    """Make the means of the row to come those over all processes, on each of them."""
    if world() > 1:
        row = logger.get_current()
        row.name2val.update(logger.weighted_mean(every({name: row.counted()[name] for name in row.name2cnt})))


def log_loss_dict(diffusion: Any, ts: Tensor, losses: Mapping[str, Tensor]) -> None:
    """Add losses (B,) to the means of the row to come, whole and by quartile of t."""
    quartiles = (4 * ts // diffusion.num_timesteps).tolist()
    for (key, _), values in zip(losses.items(), torch.stack([v.detach().float() for v in losses.values()]).cpu().numpy()):
        logger.logkv_mean(key, float(np.mean(values)))
        for quartile, value in zip(quartiles, values.tolist()):
            logger.logkv_mean(f"{key}_q{quartile}", value)
