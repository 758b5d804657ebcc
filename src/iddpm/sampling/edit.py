"""Editing with a model of images: from an image part of the way back, around what is kept of it, and between two."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iddpm import build, rng
from iddpm.config import Config, image_size
from iddpm.diffusion.denoiser import Network
from iddpm.diffusion.grid import Grid
from iddpm.diffusion.solvers import Ddim, ddim_inversion
from iddpm.errors import UserError
from iddpm.sampling.images import Watch, as_float, as_pixels, unwatched


def begin(grid: Grid, strength: float) -> Grid:
    """The less noisy `strength` (above 0, to 1) of a grid's steps, at least one."""
    return grid.only(slice(max(1, round(strength * grid.steps))))


def filled(known: Tensor, mask: Tensor) -> Callable[[Tensor], Tensor]:
    """The projection of x0 onto images `known` (B, C, H, W) where the mask (B, 1, H, W) is 0 (Wang et al. 2023, DDNM)."""
    return lambda x0: mask * x0 + (1 - mask) * known


@torch.inference_mode()
def variations(
    config: Config, net: Network, device: torch.device, image: np.ndarray, seeds: list[int], y: int | None, strength: float,
    mask: np.ndarray | None = None, watch: Watch = unwatched,
) -> np.ndarray:  # fmt: skip
    """The image (H, W, C) drawn anew from `strength` of the way to noise, once for each seed: (N, H, W, C).

    At 1 nothing is left of it (Meng et al. 2022, SDEdit); with a mask (H, W), True where it is to be filled, the rest stays.
    """
    walked, known = begin(build.grid(config), strength), as_float(image[None]).to(device).expand(len(seeds), -1, -1, -1)
    after: tuple[Callable[[Tensor], Tensor], ...] = ()
    if mask is not None:
        after = (filled(known, torch.from_numpy(mask).to(device).float()[None, None]),)
    denoise = build.drawing(config, net, condition(config, y, len(seeds), device), *after)

    def noise(k: int) -> Tensor:
        return rng.normal(0, rng.EDIT, k, seeds, known.shape[1:]).to(device)

    first = next(iter(walked))
    x = noise(0) * walked.start if strength == 1 else first.alpha * known + first.sigma * noise(0)
    return walk_back(config, denoise, x, walked, noise, watch=watch)


@torch.inference_mode()
def noise_of(config: Config, net: Network, device: torch.device, image: np.ndarray, y: int | None) -> Tensor:
    """The noise (1, C, H, W) from which DDIM comes back to an image (H, W, C) (Song et al. 2021, DDIM, section 4.3)."""
    denoise: Any = build.drawing(config, net, condition(config, y, 1, device))
    *_, last = ddim_inversion(denoise, as_float(image[None]).to(device), build.grid(config))
    return last.x


@torch.inference_mode()
def between(
    config: Config,
    net: Network,
    device: torch.device,
    ends: tuple[Tensor, Tensor],
    y: int | None,
    frames: int,
    watch: Watch = unwatched,
) -> Iterator[np.ndarray]:
    """Images (H, W, C) of DDIM from noises on the arc between two (1, C, H, W), both ends included."""
    grid = build.grid(config)
    for share in np.linspace(0, 1, frames).tolist():
        denoise = build.drawing(config, net, condition(config, y, 1, device))
        yield walk_back(config, denoise, slerp(*ends, share), grid, None, Ddim(), watch)[0]


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """From a (0) to b (1), both (1, C, H, W), along the arc, where noises are as long as the ends are (Shoemake 1985)."""
    angle = torch.arccos(((a / a.norm()) * (b / b.norm())).sum().clamp(-1, 1))
    if angle < 1e-3:
        return a + share * (b - a)
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)


def walk_back(
    config: Config, denoise: Any, x: Tensor, grid: Grid, noise: Any, solver: Any = None, watch: Watch = unwatched
) -> np.ndarray:
    """What a solver (the config's) makes of x: (B, H, W, C) uint8, or uint16 of 16 bits."""
    for x, x0 in (solver or build.solver(config))(denoise, x, grid, noise):  # noqa: B020
        watch(x, x0)
    if not torch.isfinite(x).all():
        raise UserError("what this network draws is not finite: its training diverged; take an earlier --checkpoint_step")
    return as_pixels(x, int(config.model.bit_depth)).cpu().numpy()


def noise_of_seed(config: Config, device: torch.device, grid: Grid, seed: int) -> Tensor:
    """The noise (1, C, H, W) that `iddpm sample` draws the image of a seed from."""
    shape = (config.model.image_channels, *image_size(config.model))
    return rng.normal(0, rng.SAMPLE, 0, [seed], shape).to(device) * grid.start


def condition(config: Config, y: int | None, n: int, device: torch.device) -> dict[str, Tensor]:
    """The class of n images, where the model knows classes."""
    return {"y": torch.full((n,), y, device=device)} if config.model.class_cond and y is not None else {}
