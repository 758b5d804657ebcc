"""Training a float16 network by way of float32 master weights, which are one flat parameter."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from iddpm.interop.openai.python import logger
from iddpm.interop.openai.python.nn import CONVOLUTIONS
from iddpm.training.state import LossScale


def convert_module_to_f16(l: nn.Module) -> None:
    """A convolution's weights as float16, for `Module.apply`; other modules stay."""
    if isinstance(l, tuple(CONVOLUTIONS.values())):
        l.half()


def convert_module_to_f32(l: nn.Module) -> None:
    """Undo `convert_module_to_f16`."""
    if isinstance(l, tuple(CONVOLUTIONS.values())):
        l.float()


def make_master_params(model_params: Iterable[Tensor]) -> list[nn.Parameter]:
    """One flat float32 parameter that holds a copy of all."""
    return [nn.Parameter(_flat(model_params))]


def model_grads_to_master_grads(model_params: Iterable[Tensor], master_params: Sequence[Tensor]) -> None:
    """Copy the gradients to the master's; a parameter without one counts as 0."""
    master_params[0].grad = _flat(torch.zeros_like(p) if p.grad is None else p.grad for p in model_params)


@torch.no_grad()
def master_params_to_model_params(model_params: Iterable[Tensor], master_params: Sequence[Tensor]) -> None:
    """Copy the master's weights to the network's."""
    params = list(model_params)
    for param, master in zip(params, unflatten_master_params(params, master_params)):
        param.copy_(master)


def unflatten_master_params(model_params: Iterable[Tensor], master_params: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The master's weights in the shapes of the network's."""
    params = list(model_params)
    parts = master_params[0].detach().flatten().split([p.numel() for p in params])
    return tuple(part.view(p.shape) for part, p in zip(parts, params))


def zero_grad(model_params: Iterable[Tensor]) -> None:
    """Forget the gradients."""
    for param in model_params:
        param.grad = None


class MixedPrecisionTrainer:
    """guided-diffusion's: the masters, the loss scale and the step of a network; a step that is not finite is left out."""

    def __init__(
        self, *, model: nn.Module, use_fp16: bool = False, fp16_scale_growth: float = 1e-3, initial_lg_loss_scale: float = 20.0
    ):
        self.model, self.use_fp16, self.scale = model, use_fp16, LossScale(use_fp16, fp16_scale_growth)
        self.model_params = self.master_params = list(model.parameters())
        if use_fp16:  # the masters are copied before the network loses their precision
            self.scale.lg, self.master_params = initial_lg_loss_scale, make_master_params(self.model_params)
            model.convert_to_fp16()  # type: ignore[operator]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        zero_grad(self.model_params)

    def backward(self, loss: Tensor) -> None:
        """The gradient of the scaled loss."""
        (loss * self.scale.factor).backward()

    def optimize(self, opt: torch.optim.Optimizer) -> bool:
        """The optimizer's step, and whether it was taken."""
        if self.use_fp16:
            model_grads_to_master_grads(self.model_params, self.master_params)
        for p in self.master_params:  # a norm is of gradients as they are, not as scaled
            if p.grad is not None:
                p.grad.mul_(1 / self.scale.factor)
        norm = grad_norm(self.master_params)
        good = bool(torch.isfinite(norm))
        self.scale.update(good)
        if good:
            logger.logkv_mean("grad_norm", norm.item())
            opt.step()
            if self.use_fp16:
                master_params_to_model_params(self.model_params, self.master_params)
        else:
            logger.log(f"a gradient is not finite: the step is skipped; lg_loss_scale is now {self.scale.lg}")
        return good

    def master_params_to_state_dict(self, master_params: Sequence[Tensor]) -> dict[str, Tensor]:
        """The network's state_dict with these weights."""
        return masters_to_state_dict(self.model, master_params, self.use_fp16)

    def state_dict_to_master_params(self, state_dict: Mapping[str, Tensor]) -> list[Any]:
        """A state_dict's weights as masters."""
        return state_dict_to_masters(self.model, state_dict, self.use_fp16)


def masters_to_state_dict(model: nn.Module, masters: Sequence[Tensor], use_fp16: bool) -> dict[str, Tensor]:
    """The network's state_dict with the masters' weights."""
    params = unflatten_master_params(model.parameters(), masters) if use_fp16 else masters
    return model.state_dict() | {name: p.detach() for (name, _), p in zip(model.named_parameters(), params)}


def state_dict_to_masters(model: nn.Module, state_dict: Mapping[str, Tensor], use_fp16: bool) -> list[Any]:
    """A state_dict's weights as masters."""
    params = [state_dict[name] for name, _ in model.named_parameters()]
    return list(make_master_params(params)) if use_fp16 else params


def grad_norm(params: Iterable[Tensor]) -> Tensor:
    """The norm of all gradients there are."""
    return nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.detach().float().flatten() for t in tensors])
