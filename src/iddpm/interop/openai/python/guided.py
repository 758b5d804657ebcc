"""guided-diffusion's arguments and defaults where they are not improved-diffusion's: its script_util, unet, image_datasets."""

from collections.abc import Collection
from functools import partial
from typing import Any

from iddpm.interop.openai.formats import flags
from iddpm.interop.openai.python import image_datasets, script_util, unet
from iddpm.interop.openai.python.respace import SpacedDiffusion
from iddpm.interop.openai.python.script_util import copy_of, network, with_process

BASES = (script_util, unet, image_datasets)  # what is not defined here is theirs
__all__ = [name for module in BASES for name in vars(module) if not name.startswith("__")]
NUM_CLASSES = 1000  # read when a network is made, so it can be set


def __getattr__(name: str) -> Any:
    for module in BASES:
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# ---- unet


class AttentionBlock(unet.AttentionBlock):
    """unet.AttentionBlock, with its arguments in another order."""

    def __init__(
        self, channels: int, num_heads: int = 1, num_head_channels: int = -1, use_checkpoint: bool = False,
        use_new_attention_order: bool = False,
    ):  # fmt: skip
        super().__init__(channels, num_heads, use_checkpoint, num_head_channels, use_new_attention_order)


class UNetModel(unet.UNetModel):
    """unet.UNetModel, with the image's size in front."""

    def __init__(
        self, image_size: int, in_channels: int, model_channels: int, out_channels: int, num_res_blocks: int,
        attention_resolutions: Collection[int], *args: Any, **settings: Any,
    ):  # fmt: skip
        settings["image_size"] = image_size
        super().__init__(in_channels, model_channels, out_channels, num_res_blocks, attention_resolutions, *args, **settings)


class SuperResModel(unet.SuperResModel, UNetModel):
    """unet.SuperResModel, with the image's size in front."""


# ---- script_util


model_and_diffusion_defaults, sr_model_and_diffusion_defaults = map(copy_of, (flags.GUIDED_IMAGE, flags.GUIDED_SUPER_RES))


def create_model_and_diffusion(
    image_size: int, class_cond: bool, learn_sigma: bool, num_channels: int, num_res_blocks: int, channel_mult: str,
    num_heads: int, num_head_channels: int, num_heads_upsample: int, attention_resolutions: str, dropout: float,
    diffusion_steps: int, noise_schedule: str, timestep_respacing: str, use_kl: bool, predict_xstart: bool,
    rescale_timesteps: bool, rescale_learned_sigmas: bool, use_checkpoint: bool, use_scale_shift_norm: bool,
    resblock_updown: bool, use_fp16: bool, use_new_attention_order: bool, sigma_small: bool = False,
) -> tuple[UNetModel, SpacedDiffusion]:  # fmt: skip
    """The network and the process of the image flags."""
    return with_process(create_model, locals())


def create_model(
    image_size: int, num_channels: int, num_res_blocks: int, channel_mult: str = "", learn_sigma: bool = False,
    class_cond: bool = False, use_checkpoint: bool = False, attention_resolutions: str = "16", num_heads: int = 1,
    num_head_channels: int = -1, num_heads_upsample: int = -1, use_scale_shift_norm: bool = False, dropout: float = 0,
    resblock_updown: bool = False, use_fp16: bool = False, use_new_attention_order: bool = False,
) -> UNetModel:  # fmt: skip
    """The network of the image flags."""
    return network(UNetModel, NUM_CLASSES, image_size, locals())


def sr_create_model_and_diffusion(
    large_size: int, small_size: int, class_cond: bool, learn_sigma: bool, num_channels: int, num_res_blocks: int,
    num_heads: int, num_head_channels: int, num_heads_upsample: int, attention_resolutions: str, dropout: float,
    diffusion_steps: int, noise_schedule: str, timestep_respacing: str, use_kl: bool, predict_xstart: bool,
    rescale_timesteps: bool, rescale_learned_sigmas: bool, use_checkpoint: bool, use_scale_shift_norm: bool,
    resblock_updown: bool, use_fp16: bool, sigma_small: bool = False,
) -> tuple[SuperResModel, SpacedDiffusion]:  # fmt: skip
    """The network and the process of the super-resolution flags."""
    return with_process(sr_create_model, locals())


def sr_create_model(
    large_size: int, small_size: int, num_channels: int, num_res_blocks: int, learn_sigma: bool, class_cond: bool,
    use_checkpoint: bool, attention_resolutions: str, num_heads: int, num_head_channels: int, num_heads_upsample: int,
    use_scale_shift_norm: bool, dropout: float, resblock_updown: bool, use_fp16: bool,
) -> SuperResModel:  # fmt: skip
    """The network of the super-resolution flags; it takes any small size, so that one is not used."""
    return network(SuperResModel, NUM_CLASSES, large_size, locals(), widest=256)


# ---- image_datasets


load_data = partial(image_datasets.load_data, random_flip=None)  # mirrored unless deterministic: likelihoods are of the images
