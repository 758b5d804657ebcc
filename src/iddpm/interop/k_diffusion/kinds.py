"""What a kind of network of k-diffusion's is here: the settings that are read of it, and what they become."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict

import msgspec
from torch import Tensor

from iddpm.config.presets import recipes

Size = Annotated[int, msgspec.Meta(ge=1, le=65536)]
Sizes = Annotated[list[Size], msgspec.Meta(min_length=1, max_length=16)]
Pair = Annotated[list[Size], msgspec.Meta(min_length=2, max_length=2)]
Depths = Annotated[list[Annotated[int, msgspec.Meta(ge=1, le=64)]], msgspec.Meta(min_length=1, max_length=16)]
Tensors = dict[str, Tensor]
WEIGHTINGS = {  # of the error of its output
    "karras": lambda data: dict(weighting="edm"),
    "soft-min-snr": lambda data: dict(weighting="soft_min_snr", snr_gamma=data**-2),
    "snr": lambda data: dict(weighting="p2", p2_gamma=0.0),
}


class File(TypedDict, total=False):
    """The settings that every network has, as "model" of a config has them."""

    input_channels: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    input_size: Pair
    mapping_cond_dim: int
    has_variance: bool
    loss_config: str
    loss_weighting: str
    loss_scales: int
    sigma_data: Annotated[float, msgspec.Meta(gt=0)]
    sigma_min: float
    sigma_max: float


DEFAULTS = File(
    mapping_cond_dim=0, has_variance=False, loss_config="karras", loss_weighting="karras", loss_scales=1, sigma_data=1.0
)  # fmt: skip


class Kind(NamedTuple):
    """A network of k-diffusion's, as one of ours."""

    network: str  # of ours
    file: type  # the settings of it that are read, those of its data among them
    defaults: Any
    faults: Callable[[Any], Iterator[str]]  # what its settings ask for that ours has not
    settings: Callable[[Any], dict[str, Any]]  # the fields of a run
    weights: Callable[[Tensors, Any, Path], Tensors]  # weights by our names
    left: Callable[[Any], dict[str, bool]]  # what it may know that is left out, and whether it does


def common(model: Any) -> dict[str, Any]:
    """The fields of a run that follow from settings which every network has: the images, the noise, the loss, the drawing."""
    height, width = model["input_size"]
    simple = model["loss_config"] == "simple"  # the error of eps
    return recipes("edm")[0] | WEIGHTINGS["snr" if simple else model["loss_weighting"]](model["sigma_data"]) | dict(
        image_size=str(height) if height == width else f"{height}x{width}",
        image_channels=model["input_channels"],
        sigma_data=model["sigma_data"],
        sigma_min=model["sigma_min"],
        sigma_max=model["sigma_max"],
        clip_denoised=False,  # nor does k-diffusion
        solver="dpmpp_2m",
        sampling_steps="50",  # as its sample.py, by another method of one call a step
    )  # fmt: skip
