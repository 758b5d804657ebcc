"""The networks that EDM's and EDM2's pickles hold: their settings, and which of ours they are."""

import math
from typing import Annotated, Any, NamedTuple, TypedDict

import msgspec

Size = Annotated[int, msgspec.Meta(ge=1, le=65536)]
Sizes = Annotated[list[Size], msgspec.Meta(max_length=16)]


class Outer(TypedDict):
    """The settings of an EDMPrecond or Precond that are read, as its state has them; EDM2's has no range of its own."""

    img_resolution: Size
    img_channels: Annotated[int, msgspec.Meta(ge=1, le=4)]
    label_dim: Annotated[int, msgspec.Meta(ge=0, le=10**6)]
    sigma_min: float
    sigma_max: float
    sigma_data: float


class Inner(TypedDict, total=False):
    """Those of its network, as they were given to it; what was not given is as in DEFAULTS."""

    augment_dim: Annotated[int, msgspec.Meta(ge=0, le=1024)]
    model_channels: Size
    channel_mult: Annotated[Sizes, msgspec.Meta(min_length=1)]
    channel_mult_emb: int | None
    num_blocks: Annotated[int, msgspec.Meta(ge=1, le=64)]
    attn_resolutions: Sizes
    dropout: float
    label_dropout: float
    embedding_type: str
    channel_mult_noise: int | None
    channels_per_head: int
    encoder_type: str
    decoder_type: str
    resample_filter: Sizes


class Kind(NamedTuple):
    """A network of EDM's: its defaults, and of each of our networks that can be it, what must be set."""

    outer: str  # the class that it is in
    defaults: dict[str, Any]
    ours: dict[str, dict[str, Any]]
    fixed: dict[str, float]  # in its parts; another number is of another version of its code
    head: int  # channels of a head of attention; 0: there is one head
    settings: dict[str, Any]  # more of ours
    names: dict[str, str]  # ours of its parts, where ours is built of the same; else they are found by their order


COMMON = dict(augment_dim=0, channel_mult_emb=4, dropout=0.1, label_dropout=0.0)
PLAIN = dict(embedding_type="positional", channel_mult_noise=1, channel_mult_emb=4, encoder_type="standard",
             decoder_type="standard", resample_filter=[1, 1])  # fmt: skip
SMOOTH = dict(PLAIN, embedding_type="fourier", channel_mult_noise=2, encoder_type="residual", resample_filter=[1, 3, 3, 1])
EDM2 = dict(channel_mult_noise=None, channel_mult_emb=None, channels_per_head=64, resample_filter=[1, 1])
KINDS = {
    "SongUNet": Kind(
        "EDMPrecond",
        dict(COMMON, **PLAIN | dict(model_channels=128, channel_mult=[1, 2, 2, 2], num_blocks=4, attn_resolutions=[16])),
        {"ddpmpp": PLAIN, "ncsnpp": SMOOTH},
        dict(adaptive_scale=False, skip_scale=0.5**0.5, eps=1e-6),
        0,
        {},
        {},
    ),
    "DhariwalUNet": Kind(
        "EDMPrecond",
        dict(COMMON, model_channels=192, channel_mult=[1, 2, 3, 4], num_blocks=3, attn_resolutions=[32, 16, 8]),
        {"unet": dict(channel_mult_emb=4)},
        dict(adaptive_scale=True, skip_scale=1.0, eps=1e-5),
        64,
        dict(num_head_channels=64, resblock_updown=True, use_scale_shift_norm=True),
        {},
    ),
    "UNet": Kind(
        "Precond",
        dict(COMMON, **EDM2 | dict(dropout=0.0, model_channels=192, channel_mult=[1, 2, 3, 4], num_blocks=3,
                                   attn_resolutions=[16, 8])),
        {"unet_mp": EDM2},
        dict(label_balance=0.5, concat_balance=0.5, res_balance=0.3, attn_balance=0.3, clip_act=256),
        64,
        dict(weighting="uncertainty", P_mean=-0.8, P_std=1.6, sampling_steps="32"),
        dict(out_conv="out", attn_qkv="qkv", attn_proj="proj", emb_label="label_emb"),
    ),
}  # fmt: skip
PIXELS = "StandardRGBEncoder"  # EDM2's, of models that draw images themselves
RANGE = dict(sigma_min=0.0, sigma_max=math.inf)  # of noise, where none is kept: any
PART = {"EDMPrecond": "model", "Precond": "unet"}  # the network's name there
OTHERS = {  # what is like an EDMPrecond, and is not
    "VPPrecond": "is told its noise and scaled as by Song et al.'s VP: iddpm reads EDM's own preconditioning, EDMPrecond",
    "VEPrecond": "is told its noise and scaled as by Song et al.'s VE: iddpm reads EDM's own preconditioning, EDMPrecond",
    "iDDPMPrecond": "is scaled as a chain: give the file of OpenAI's that it was made of; iddpm reads EDMPrecond",
}
