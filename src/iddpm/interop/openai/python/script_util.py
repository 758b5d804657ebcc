"""Networks and processes from flags, as the original's scripts build them; and the few words of guided-diffusion they lack."""

import argparse
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from iddpm.config import numbers
from iddpm.interop.openai.formats import flags
from iddpm.interop.openai.python import gaussian_diffusion as gd
from iddpm.interop.openai.python.respace import SpacedDiffusion, space_timesteps
from iddpm.interop.openai.python.unet import EncoderUNetModel, SuperResModel, UNetModel
from iddpm.nn import attention_rates, channel_mult_for

NUM_CLASSES = 1000  # read when a network is made, so it can be set


# ---- defaults


def copy_of(table: Mapping[str, Any]) -> Callable[[], dict[str, Any]]:
    """A function that gives a dict of its own to each who asks for some flags."""
    return lambda: dict(table)


model_and_diffusion_defaults = copy_of(flags.IMAGE)
sr_model_and_diffusion_defaults = copy_of(flags.SUPER_RES | {"sigma_small": False})  # which the original forgot
diffusion_defaults = copy_of(flags.DIFFUSION)  # these are guided-diffusion's
classifier_defaults = copy_of(flags.CLASSIFIER)
classifier_and_diffusion_defaults = copy_of(flags.CLASSIFIER | flags.DIFFUSION)


# ---- image models


def create_model_and_diffusion(
    image_size: int, class_cond: bool, learn_sigma: bool, sigma_small: bool, num_channels: int, num_res_blocks: int,
    num_heads: int, num_heads_upsample: int, attention_resolutions: str, dropout: float, diffusion_steps: int,
    noise_schedule: str, timestep_respacing: str, use_kl: bool, predict_xstart: bool, rescale_timesteps: bool,
    rescale_learned_sigmas: bool, use_checkpoint: bool, use_scale_shift_norm: bool, channel_mult: str = "",
    num_head_channels: int = -1, resblock_updown: bool = False, use_fp16: bool = False, use_new_attention_order: bool = False,
) -> tuple[UNetModel, SpacedDiffusion]:  # fmt: skip
    """The network and the process of the image flags."""
    return with_process(create_model, locals())


def create_model(
    image_size: int, num_channels: int, num_res_blocks: int, learn_sigma: bool, class_cond: bool, use_checkpoint: bool,
    attention_resolutions: str, num_heads: int, num_heads_upsample: int, use_scale_shift_norm: bool, dropout: float,
    channel_mult: str = "", num_head_channels: int = -1, resblock_updown: bool = False, use_fp16: bool = False,
    use_new_attention_order: bool = False,
) -> UNetModel:  # fmt: skip
    """The network of the image flags."""
    return network(UNetModel, NUM_CLASSES, image_size, locals())


def sr_create_model_and_diffusion(
    large_size: int, small_size: int, class_cond: bool, learn_sigma: bool, num_channels: int, num_res_blocks: int,
    num_heads: int, num_heads_upsample: int, attention_resolutions: str, dropout: float, diffusion_steps: int,
    noise_schedule: str, timestep_respacing: str, use_kl: bool, predict_xstart: bool, rescale_timesteps: bool,
    rescale_learned_sigmas: bool, use_checkpoint: bool, use_scale_shift_norm: bool, sigma_small: bool = False,
    num_head_channels: int = -1, resblock_updown: bool = False, use_fp16: bool = False,
) -> tuple[SuperResModel, SpacedDiffusion]:  # fmt: skip
    """The network and the process of the super-resolution flags."""
    return with_process(sr_create_model, locals())


def sr_create_model(
    large_size: int, small_size: int, num_channels: int, num_res_blocks: int, learn_sigma: bool, class_cond: bool,
    use_checkpoint: bool, attention_resolutions: str, num_heads: int, num_heads_upsample: int, use_scale_shift_norm: bool,
    dropout: float, num_head_channels: int = -1, resblock_updown: bool = False, use_fp16: bool = False,
) -> SuperResModel:  # fmt: skip
    """The network of the super-resolution flags; it takes any small size, so that one is not used."""
    return network(SuperResModel, NUM_CLASSES, large_size, locals(), widest=256)


def create_gaussian_diffusion(
    *, steps: int = 1000, learn_sigma: bool = False, sigma_small: bool = False, noise_schedule: str = "linear",
    use_kl: bool = False, predict_xstart: bool = False, rescale_timesteps: bool = False, rescale_learned_sigmas: bool = False,
    timestep_respacing: str | list[int] = "",
) -> SpacedDiffusion:  # fmt: skip
    """The process of the flags."""
    mse = gd.LossType.RESCALED_MSE if rescale_learned_sigmas else gd.LossType.MSE
    fixed = gd.ModelVarType.FIXED_SMALL if sigma_small else gd.ModelVarType.FIXED_LARGE
    return SpacedDiffusion(
        use_timesteps=space_timesteps(steps, timestep_respacing or [steps]),
        betas=gd.get_named_beta_schedule(noise_schedule, steps),
        model_mean_type=gd.ModelMeanType.START_X if predict_xstart else gd.ModelMeanType.EPSILON,
        model_var_type=gd.ModelVarType.LEARNED_RANGE if learn_sigma else fixed,
        loss_type=gd.LossType.RESCALED_KL if use_kl else mse,
        rescale_timesteps=rescale_timesteps,
    )


# ---- classifiers


def create_classifier_and_diffusion(
    image_size: int, classifier_use_fp16: bool, classifier_width: int, classifier_depth: int,
    classifier_attention_resolutions: str, classifier_use_scale_shift_norm: bool, classifier_resblock_updown: bool,
    classifier_pool: str, learn_sigma: bool, diffusion_steps: int, noise_schedule: str, timestep_respacing: str,
    use_kl: bool, predict_xstart: bool, rescale_timesteps: bool, rescale_learned_sigmas: bool,
) -> tuple[EncoderUNetModel, SpacedDiffusion]:  # fmt: skip
    """guided-diffusion's classifier and the process whose noise it sees."""
    return with_process(create_classifier, locals())


def create_classifier(
    image_size: int, classifier_use_fp16: bool, classifier_width: int, classifier_depth: int,
    classifier_attention_resolutions: str, classifier_use_scale_shift_norm: bool, classifier_resblock_updown: bool,
    classifier_pool: str,
) -> EncoderUNetModel:  # fmt: skip
    """guided-diffusion's classifier, of NUM_CLASSES classes."""
    return EncoderUNetModel(
        image_size=image_size, in_channels=3, model_channels=classifier_width, out_channels=NUM_CLASSES,
        num_res_blocks=classifier_depth, use_fp16=classifier_use_fp16, num_head_channels=64,
        use_scale_shift_norm=classifier_use_scale_shift_norm, resblock_updown=classifier_resblock_updown,
        pool=classifier_pool, **sizes(image_size, classifier_attention_resolutions),
    )  # fmt: skip


# ---- what they share


def network(make: Callable[..., Any], num_classes: int, side: int, given: Mapping[str, Any], widest: int = 1 << 20) -> Any:
    """make(...) with the network's part of the flags, for images of `side` pixels, with the levels of at most `widest`."""
    kept = ("num_res_blocks", "use_checkpoint", "num_heads", "num_heads_upsample", "num_head_channels", "dropout",
            "use_scale_shift_norm", "resblock_updown", "use_fp16", "use_new_attention_order")  # fmt: skip
    return make(
        image_size=side,
        in_channels=3,
        model_channels=given["num_channels"],
        out_channels=6 if given["learn_sigma"] else 3,
        num_classes=num_classes if given["class_cond"] else None,
        **sizes(side, given["attention_resolutions"], given.get("channel_mult", ""), widest),
        **{name: given[name] for name in kept if name in given},
    )


def sizes(side: int, attention_resolutions: str, channel_mult: str = "", widest: int = 1 << 20) -> dict[str, Any]:
    """channel_mult and attention_resolutions, here rates, of a network for images of `side` pixels."""
    mult = numbers(channel_mult, "channel_mult", float) if channel_mult else channel_mult_for(min(side, widest))
    resolutions = numbers(attention_resolutions, "attention_resolutions")
    return dict(channel_mult=mult, attention_resolutions=attention_rates(resolutions, side, len(mult)))


def with_process(create: Callable[..., Any], given: Mapping[str, Any]) -> tuple[Any, SpacedDiffusion]:
    """The network that `create` makes, and the process, each of those flags that it takes."""
    return called(create, given), called(create_gaussian_diffusion, {**given, "steps": given["diffusion_steps"]})


def called(function: Callable[..., Any], values: Mapping[str, Any]) -> Any:
    """function(...) with those of the values that it takes."""
    return function(**{name: value for name, value in values.items() if name in inspect.signature(function).parameters})


# ---- argparse


def add_dict_to_argparser(parser: argparse.ArgumentParser, default_dict: Mapping[str, Any]) -> None:
    """A --flag for each entry, of its default's type."""
    for name, default in default_dict.items():
        kind: Any = str if default is None else str2bool if isinstance(default, bool) else type(default)
        parser.add_argument(f"--{name}", default=default, type=kind)


def args_to_dict(args: argparse.Namespace, keys: Iterable[str]) -> dict[str, Any]:
    """Those of the parsed flags."""
    return {k: getattr(args, k) for k in keys}


def str2bool(v: str | bool) -> bool:
    """yes, true, t, y, 1 and their opposites, in any case."""
    if isinstance(v, bool):
        return v
    truth = {"yes": True, "true": True, "t": True, "y": True, "1": True} | dict.fromkeys(("no", "false", "f", "n", "0"), False)
    if v.lower() not in truth:
        raise argparse.ArgumentTypeError(f"boolean value expected, not {v!r}: True or False")
    return truth[v.lower()]
