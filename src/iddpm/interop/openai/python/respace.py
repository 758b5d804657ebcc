"""Fewer steps of a process, as the original's classes."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from iddpm.diffusion.grid import respace
from iddpm.interop.openai.python.gaussian_diffusion import GaussianDiffusion, Kwargs, Model, Out, chain_of


def space_timesteps(num_timesteps: int, section_counts: str | Sequence[int]) -> set[int]:
    """The steps that a respacing keeps: "250", "10,15,20", "ddim50" or a list of counts; ValueError where they do not fit."""
    return set(respace(num_timesteps, section_counts))


class SpacedDiffusion(GaussianDiffusion):
    """The process on `use_timesteps` of the steps; models see the numbers of the whole."""

    def __init__(self, use_timesteps: Iterable[int], **kwargs: Any):
        self.use_timesteps = set(use_timesteps)
        self.original_num_steps = len(kwargs["betas"])
        chain = chain_of(kwargs["betas"], [i for i in self.use_timesteps if i < self.original_num_steps])
        self.timestep_map = chain.kept
        super().__init__(**(kwargs | {"betas": chain.betas.numpy()}))

    def p_mean_variance(self, model: Model, *args: Any, **kwargs: Any) -> Out:
        return super().p_mean_variance(self._wrap_model(model), *args, **kwargs)

    def training_losses(self, model: Model, *args: Any, **kwargs: Any) -> Out:
        return super().training_losses(self._wrap_model(model), *args, **kwargs)

    def condition_mean(self, cond_fn: Model, p_mean_var: Out, x: Tensor, t: Tensor, model_kwargs: Kwargs = None) -> Tensor:
        return super().condition_mean(self._wrap_model(cond_fn), p_mean_var, x, t, model_kwargs)

    def condition_score(self, cond_fn: Model, p_mean_var: Out, x: Tensor, t: Tensor, model_kwargs: Kwargs = None) -> Out:
        return super().condition_score(self._wrap_model(cond_fn), p_mean_var, x, t, model_kwargs)

    def _wrap_model(self, model: Model) -> Model:
        if isinstance(model, _WrappedModel):
            return model
        return _WrappedModel(model, self.timestep_map, self.rescale_timesteps, self.original_num_steps)

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        return t  # the wrapped model does


class _WrappedModel:
    """A model that is given steps of the respaced process, and sees those of the whole."""

    def __init__(self, model: Model, timestep_map: Sequence[int], rescale_timesteps: bool, original_num_steps: int):
        self.model, self.timestep_map = model, timestep_map
        self.rescale_timesteps, self.original_num_steps = rescale_timesteps, original_num_steps

    def __call__(self, x: Tensor, ts: Tensor, **kwargs: Any) -> Tensor:
        t = ts.new_tensor(self.timestep_map)[ts]
        return self.model(x, t.float() * (1000.0 / self.original_num_steps) if self.rescale_timesteps else t, **kwargs)
