"""The diffusion process as the original's class: its methods call each other as there, and ours do the arithmetic."""

import enum
import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iddpm.diffusion.bound import mean_flat, prior_term
from iddpm.diffusion.denoiser import VARIANCES
from iddpm.diffusion.grid import Chain, Step
from iddpm.diffusion.schedule import MAX_BETA, Cosine, Linear
from iddpm.interop.openai.python.losses import discretized_gaussian_log_likelihood, normal_kl

Model = Callable[..., Tensor]  # (x, t, **model_kwargs)
Kwargs = Mapping[str, Any] | None
Out = dict[str, Tensor]
Denoised = Callable[[Tensor], Tensor] | None
Device = torch.device | str | None


SCHEDULES: dict[str, Callable[[int], Linear | Cosine]] = {"linear": Linear, "cosine": Cosine}


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> np.ndarray:
    """The betas (T,) float64 of a schedule; NotImplementedError for an unknown name."""
    if schedule_name not in SCHEDULES:
        raise NotImplementedError(f"unknown beta schedule: {schedule_name}; there are {', '.join(SCHEDULES)}")
    return SCHEDULES[schedule_name](num_diffusion_timesteps).betas().numpy()


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = MAX_BETA
) -> np.ndarray:
    """The betas (T,) float64 of any alpha_bar(u), u = t / T in [0, 1]."""
    bar = [alpha_bar(i / num_diffusion_timesteps) for i in range(num_diffusion_timesteps + 1)]
    return np.array([min(1 - after / before, max_beta) for before, after in zip(bar, bar[1:])])


class ModelMeanType(enum.Enum):
    """What the network predicts."""

    PREVIOUS_X = enum.auto()
    START_X = enum.auto()
    EPSILON = enum.auto()


class ModelVarType(enum.Enum):
    """The variance of p(x_{t-1} | x_t): iddpm.diffusion.denoiser.VARIANCES, in capitals."""

    LEARNED = enum.auto()
    FIXED_SMALL = enum.auto()
    FIXED_LARGE = enum.auto()
    LEARNED_RANGE = enum.auto()


class LossType(enum.Enum):
    """The training loss; both MSEs add the bound where the variance is learned."""

    MSE = enum.auto()
    RESCALED_MSE = enum.auto()  # the bound's term times T / 1000
    KL = enum.auto()
    RESCALED_KL = enum.auto()  # T times: an estimate of the whole bound

    def is_vb(self) -> bool:
        """Whether the bound alone is trained on."""
        return self in (LossType.KL, LossType.RESCALED_KL)


LEARNED = (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)


def chain_of(betas: Sequence[float] | np.ndarray, kept: Sequence[int] | None = None) -> Chain:
    """The chain of the betas (T,), on the steps `kept` of it."""
    values = torch.from_numpy(np.array(betas, dtype=np.float64))
    schedule: Any = SimpleNamespace(steps=len(values), betas=lambda: values)
    return Chain(schedule, kept)


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    """A method's arguments, to pass on by name; cond_fn only where given, since an overridden p_sample may not know it."""
    return {k: v for k, v in arguments.items() if k != "self" and (k != "cond_fn" or v is not None)}


def _last_of(progressive: Callable[..., Iterator[Out]]) -> Callable[..., Tensor]:
    """The method that takes the same and gives the images (B, C, H, W) that the walk ends in."""

    @functools.wraps(progressive)
    def loop(self: "GaussianDiffusion", *args: Any, **settings: Any) -> Tensor:
        (last,) = deque(getattr(self, progressive.__name__)(*args, **settings), maxlen=1)
        return last["sample"]

    loop.__name__, loop.__doc__ = progressive.__name__.removesuffix("_progressive"), "The last sample of the same."
    return loop


class GaussianDiffusion:
    """Training, sampling and likelihood on the chain of `betas` (T,), noisiest last.

    Its tables (betas, alphas_cumprod, posterior_variance, ...) are numpy float64 and are there to be read: the arithmetic
    uses `chain`. With rescale_timesteps the model sees t * 1000 / T.
    """

    def __init__(
        self, *, betas: Sequence[float] | np.ndarray, model_mean_type: ModelMeanType, model_var_type: ModelVarType,
        loss_type: LossType, rescale_timesteps: bool = False,
    ):  # fmt: skip
        self.model_mean_type, self.model_var_type, self.loss_type = model_mean_type, model_var_type, loss_type
        self.rescale_timesteps = rescale_timesteps
        self.betas = np.array(betas, dtype=np.float64)
        assert self.betas.ndim == 1, "betas must be 1-D"
        assert (self.betas > 0).all() and (self.betas <= 1).all(), "each beta must lie in (0, 1]"
        self.num_timesteps = len(self.betas)
        self.chain = chain_of(self.betas)
        s = self.chain.table
        self._steps = torch.stack(s).float()  # (columns, T)

        # what forks read
        self.alphas_cumprod = np.cumprod(1.0 - self.betas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.alphas_cumprod_next = np.append(self.alphas_cumprod[1:], 0.0)
        self.sqrt_alphas_cumprod = s.alpha.numpy()
        self.sqrt_one_minus_alphas_cumprod = s.sigma.numpy()
        self.log_one_minus_alphas_cumprod = np.log(1.0 - self.alphas_cumprod)
        self.sqrt_recip_alphas_cumprod = (1 / s.alpha).numpy()
        self.sqrt_recipm1_alphas_cumprod = (s.sigma / s.alpha).numpy()
        self.posterior_variance = ((1 - s.last) * s.log_min.exp()).numpy()
        self.posterior_log_variance_clipped = s.log_min.numpy()
        self.posterior_mean_coef1, self.posterior_mean_coef2 = s.coef_x0.numpy(), s.coef_xt.numpy()

    def _at(self, t: Tensor, x: Tensor) -> Step:
        """The chain's steps t (B,), float32, which broadcast over x (B, ...)."""
        self._steps = self._steps.to(t.device)  # once: it stays there
        return Step(*self._steps[:, t].view(len(self._steps), -1, *(1,) * (x.ndim - 1)))

    # ---- q: from clean to noisy

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log variance of q(x_t | x_0)."""
        log_variance = _extract_into_tensor(self.log_one_minus_alphas_cumprod, t, x_start.shape)
        return self._at(t, x_start).alpha * x_start, log_variance.exp(), log_variance

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t for x_0, with the noise given or drawn."""
        noise = torch.randn_like(x_start) if noise is None else noise
        assert noise.shape == x_start.shape
        step = self._at(t, x_start)
        return step.alpha * x_start + step.sigma * noise

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log variance of q(x_{t-1} | x_t, x_0); at t = 0, where it is 0, the log variance of t = 1."""
        assert x_start.shape == x_t.shape
        step = self._at(t, x_t)
        mean, log_variance = step.coef_x0 * x_start + step.coef_xt * x_t, step.log_min.expand_as(x_t)
        return mean, (1 - step.last) * log_variance.exp(), log_variance

    # ---- p: what the model says

    def p_mean_variance(
        self, model: Model, x: Tensor, t: Tensor, clip_denoised: bool = True, denoised_fn: Denoised = None,
        model_kwargs: Kwargs = None,
    ) -> Out:  # fmt: skip
        """mean, variance and log_variance of p(x_{t-1} | x_t), and pred_xstart, through denoised_fn and clipped to [-1, 1]."""
        output, values = self._split(model(x, self._scale_timesteps(t), **(model_kwargs or {})), x)
        step = self._at(t, x)
        log_variance = VARIANCES[self.model_var_type.name.lower()](step, values).expand_as(x)
        variance = log_variance.exp()
        if self.model_var_type == ModelVarType.FIXED_SMALL:
            variance = (1 - step.last) * variance  # the original reports 0 there, and samples with the log variance

        def process(x0: Tensor) -> Tensor:
            x0 = x0 if denoised_fn is None else denoised_fn(x0)
            return x0.clamp(-1, 1) if clip_denoised else x0

        if self.model_mean_type == ModelMeanType.PREVIOUS_X:
            x0, mean = process(self._predict_xstart_from_xprev(x_t=x, t=t, xprev=output)), output
        else:
            eps = self.model_mean_type == ModelMeanType.EPSILON
            x0 = process(self._predict_xstart_from_eps(x_t=x, t=t, eps=output) if eps else output)
            mean, _, _ = self.q_posterior_mean_variance(x_start=x0, x_t=x, t=t)
        assert mean.shape == log_variance.shape == x0.shape == x.shape
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": x0}

    def _split(self, output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.model_var_type not in LEARNED:
            return output, None
        assert output.shape == (len(x), 2 * x.shape[1], *x.shape[2:]), "a learned variance needs twice the channels"
        first, second = output.chunk(2, dim=1)
        return first, second

    def _predict_xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        assert x_t.shape == eps.shape
        recip, recipm1 = self.sqrt_recip_alphas_cumprod, self.sqrt_recipm1_alphas_cumprod
        return _extract_into_tensor(recip, t, x_t.shape) * x_t - _extract_into_tensor(recipm1, t, x_t.shape) * eps

    def _predict_xstart_from_xprev(self, x_t: Tensor, t: Tensor, xprev: Tensor) -> Tensor:
        assert x_t.shape == xprev.shape
        of_x0, of_xt = self.posterior_mean_coef1, self.posterior_mean_coef2
        return _extract_into_tensor(1 / of_x0, t, x_t.shape) * xprev - _extract_into_tensor(of_xt / of_x0, t, x_t.shape) * x_t

    def _predict_eps_from_xstart(self, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        step = self._at(t, x_t)
        return (x_t - step.alpha * pred_xstart) / step.sigma

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        return t.float() * (1000.0 / self.num_timesteps) if self.rescale_timesteps else t

    # ---- guidance, by cond_fn(x, t, **model_kwargs), the gradient of log p(y | x_t)

    def condition_mean(self, cond_fn: Model, p_mean_var: Out, x: Tensor, t: Tensor, model_kwargs: Kwargs = None) -> Tensor:
        """The mean, moved by variance times gradient (Dhariwal & Nichol 2021, algorithm 1)."""
        gradient = cond_fn(x, self._scale_timesteps(t), **(model_kwargs or {}))
        return p_mean_var["mean"].float() + p_mean_var["variance"] * gradient.float()

    def condition_score(self, cond_fn: Model, p_mean_var: Out, x: Tensor, t: Tensor, model_kwargs: Kwargs = None) -> Out:
        """The prediction for the score moved by the gradient (algorithm 2)."""
        gradient = cond_fn(x, self._scale_timesteps(t), **(model_kwargs or {}))
        step = self._at(t, x)
        x0 = p_mean_var["pred_xstart"] + step.sigma**2 / step.alpha * gradient
        mean, _, _ = self.q_posterior_mean_variance(x_start=x0, x_t=x, t=t)
        return {**p_mean_var, "pred_xstart": x0, "mean": mean}

    # ---- sampling

    def p_sample(
        self, model: Model, x: Tensor, t: Tensor, clip_denoised: bool = True, denoised_fn: Denoised = None,
        model_kwargs: Kwargs = None, cond_fn: Model | None = None,
    ) -> Out:  # fmt: skip
        """sample, a draw of x_{t-1}, and pred_xstart."""
        out = self.p_mean_variance(model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs)
        noise = torch.randn_like(x)
        if cond_fn is not None:
            out["mean"] = self.condition_mean(cond_fn, out, x, t, model_kwargs=model_kwargs)
        sample = out["mean"] + (1 - self._at(t, x).last) * torch.exp(0.5 * out["log_variance"]) * noise
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def ddim_sample(
        self, model: Model, x: Tensor, t: Tensor, clip_denoised: bool = True, denoised_fn: Denoised = None,
        model_kwargs: Kwargs = None, eta: float = 0.0, cond_fn: Model | None = None,
    ) -> Out:  # fmt: skip
        """As p_sample, by DDIM."""
        out = self.p_mean_variance(model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs)
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs=model_kwargs)
        x0, step = out["pred_xstart"], self._at(t, x)
        eps, fresh = self._predict_eps_from_xstart(x, t, x0), (1 - step.last) * eta * torch.exp(0.5 * step.log_min)
        kept = ((1 - eta**2) * step.sigma_to**2 + (eta * step.coef_xt * step.sigma) ** 2).sqrt()  # of the noise that is there
        return {"sample": step.alpha_to * x0 + kept * eps + fresh * torch.randn_like(x), "pred_xstart": x0}

    def ddim_reverse_sample(
        self, model: Model, x: Tensor, t: Tensor, clip_denoised: bool = True, denoised_fn: Denoised = None,
        model_kwargs: Kwargs = None, eta: float = 0.0,
    ) -> Out:  # fmt: skip
        """sample, the x_{t+1} from which DDIM with eta = 0 comes to x, and pred_xstart."""
        assert eta == 0.0, "only DDIM's deterministic path can be reversed"
        out = self.p_mean_variance(model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs)
        eps, bar = self._predict_eps_from_xstart(x, t, out["pred_xstart"]), self.alphas_cumprod_next
        alpha, sigma = (_extract_into_tensor(np.sqrt(z), t, x.shape) for z in (bar, 1 - bar))
        sample = alpha * out["pred_xstart"] + sigma * eps
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def p_sample_loop_progressive(
        self, model: Model, shape: Sequence[int], noise: Tensor | None = None, clip_denoised: bool = True,
        denoised_fn: Denoised = None, model_kwargs: Kwargs = None, device: Device = None, progress: bool = False,
        cond_fn: Model | None = None,
    ) -> Iterator[Out]:  # fmt: skip
        """What p_sample gives at each step, the next from its "sample", on the way to images of `shape` (B, C, H, W).

        They start from `noise` or from drawn numbers, on `device` or the model's.
        """
        return self._walk(self.p_sample, **_given(locals()))

    def ddim_sample_loop_progressive(
        self, model: Model, shape: Sequence[int], noise: Tensor | None = None, clip_denoised: bool = True,
        denoised_fn: Denoised = None, model_kwargs: Kwargs = None, device: Device = None, progress: bool = False,
        eta: float = 0.0, cond_fn: Model | None = None,
    ) -> Iterator[Out]:  # fmt: skip
        """As p_sample_loop_progressive, by DDIM."""
        return self._walk(self.ddim_sample, **_given(locals()))

    p_sample_loop, ddim_sample_loop = _last_of(p_sample_loop_progressive), _last_of(ddim_sample_loop_progressive)

    def _walk(
        self, step: Callable[..., Out], model: Any, shape: Sequence[int], noise: Tensor | None, device: Device, progress: bool,
        **settings: Any,
    ) -> Iterator[Out]:  # fmt: skip
        # Every draw comes from torch's global generator, in the original's order: a seeded script gets its images.
        device = next(model.parameters()).device if device is None else device
        x = torch.randn(*shape, device=device) if noise is None else noise
        steps: Any = range(self.num_timesteps - 1, -1, -1)
        if progress:
            from tqdm.auto import tqdm

            steps = tqdm(steps)
        for i in steps:
            with torch.no_grad():
                out = step(model, x, torch.full((shape[0],), i, device=device), **settings)
            yield out
            x = out["sample"]

    # ---- losses and likelihood

    def _vb_terms_bpd(
        self, model: Model, x_start: Tensor, x_t: Tensor, t: Tensor, clip_denoised: bool = True, model_kwargs: Kwargs = None
    ) -> Out:
        """output, each image's term of the bound in bits/dim (the decoder's at t = 0, else a KL), and pred_xstart."""
        mean, _, log_variance = self.q_posterior_mean_variance(x_start=x_start, x_t=x_t, t=t)
        out = self.p_mean_variance(model, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs)
        kl = normal_kl(mean, log_variance, out["mean"], out["log_variance"])
        decoder = -discretized_gaussian_log_likelihood(x_start, means=out["mean"], log_scales=0.5 * out["log_variance"])
        bits = torch.where(t == 0, mean_flat(decoder), mean_flat(kl)) / np.log(2.0)
        return {"output": bits, "pred_xstart": out["pred_xstart"]}

    def training_losses(
        self, model: Model, x_start: Tensor, t: Tensor, model_kwargs: Kwargs = None, noise: Tensor | None = None
    ) -> Out:
        """Each image's loss (B,), and "mse" and "vb" where it is made of them."""
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise=noise)
        at: Any = dict(x_start=x_start, x_t=x_t, t=t)
        if self.loss_type.is_vb():  # unclipped: where x0 is held at the edge, no gradient would come back
            vb = self._vb_terms_bpd(model=model, clip_denoised=False, model_kwargs=model_kwargs, **at)["output"]
            return {"loss": vb * (self.num_timesteps if self.loss_type == LossType.RESCALED_KL else 1)}

        output, values = self._split(model(x_t, self._scale_timesteps(t), **(model_kwargs or {})), x_t)
        terms = {}
        if values is not None:  # the bound trains the variance alone: the mean is held
            held = torch.cat([output.detach(), values], dim=1)
            vb = self._vb_terms_bpd(model=lambda *_: held, clip_denoised=False, **at)["output"]
            terms["vb"] = vb * (self.num_timesteps / 1000 if self.loss_type == LossType.RESCALED_MSE else 1)
        target = {
            ModelMeanType.PREVIOUS_X: lambda: self.q_posterior_mean_variance(**at)[0],
            ModelMeanType.START_X: lambda: x_start,
            ModelMeanType.EPSILON: lambda: noise,
        }[self.model_mean_type]()
        assert output.shape == target.shape == x_start.shape
        terms["mse"] = mean_flat((target - output) ** 2)
        terms["loss"] = terms["mse"] + terms["vb"] if "vb" in terms else terms["mse"]
        return terms

    def _prior_bpd(self, x_start: Tensor) -> Tensor:
        return prior_term(self.chain, x_start)

    def calc_bpd_loop(self, model: Model, x_start: Tensor, clip_denoised: bool = True, model_kwargs: Kwargs = None) -> Out:
        """The whole bound in bits/dim: total_bpd and prior_bpd (B,); vb, xstart_mse and mse (B, T), from t = T - 1 to 0."""
        columns: dict[str, list[Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        for i in reversed(range(self.num_timesteps)):
            t, noise = torch.full((len(x_start),), i, device=x_start.device), torch.randn_like(x_start)
            x_t = self.q_sample(x_start=x_start, t=t, noise=noise)
            with torch.no_grad():
                out = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs)
            eps = self._predict_eps_from_xstart(x_t, t, out["pred_xstart"])
            columns["vb"].append(out["output"])
            columns["xstart_mse"].append(mean_flat((out["pred_xstart"] - x_start) ** 2))
            columns["mse"].append(mean_flat((eps - noise) ** 2))
        tables = {name: torch.stack(column, dim=1) for name, column in columns.items()}
        prior = self._prior_bpd(x_start)
        return {"total_bpd": tables["vb"].sum(dim=1) + prior, "prior_bpd": prior, **tables}


def _extract_into_tensor(arr: np.ndarray, timesteps: Tensor, broadcast_shape: Sequence[int]) -> Tensor:
    """arr[timesteps] float32, expanded to `broadcast_shape`, whose first dimension is the batch."""
    values = torch.from_numpy(arr).to(device=timesteps.device)[timesteps].float()
    return values.view(-1, *(1,) * (len(broadcast_shape) - 1)).expand(*broadcast_shape)
