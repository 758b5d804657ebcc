"""Images turned, stretched and shifted, each in its way, of which the network is told (Karras et al. 2022, EDM, appendix F.2).

A network that is told how an image was changed does not draw changed ones: in sampling it is told that nothing was.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def augmented(x: Tensor, share: float, numbers: np.random.Generator) -> tuple[Tensor, Tensor]:
    """An image (C, H, W) in [-1, 1], each of six changes made to it with probability `share`; and what tells them, (9,).

    Mirrored, upside down, scaled by 2^(0.2 n), turned by any angle, stretched by 2^(0.2 n) along any direction, and shifted by
    n / 8 of its sides, with n standard normal. What comes in at the edges is the image mirrored.
    """
    on = numbers.random(6) < share
    size, stretch, right, down = numbers.standard_normal(4) * on[[2, 4, 5, 5]]
    turn, along = (2 * numbers.random(2) - 1) * math.pi * on[[3, 4]]
    told = [
        on[0],
        on[1],
        size,
        math.cos(turn) - 1,
        math.sin(turn),
        stretch * math.cos(along),
        stretch * math.sin(along),
        right,
        down,
    ]
    height, width = x.shape[1:]
    if on.any():
        moved = (
            np.diag([1.0 - 2 * on[0], 1 - 2 * on[1]]) * 2 ** (0.2 * size) @ _turned(turn)
        )  # pixels of x by those of the result
        moved = moved @ _turned(along) @ np.diag([2 ** (0.2 * stretch), 2 ** (-0.2 * stretch)]) @ _turned(-along)
        sides = np.array([width, height])
        places = np.column_stack([moved * sides / sides[:, None], [right / 4, down / 4]])  # a side is 2 long
        grid = F.affine_grid(torch.from_numpy(places).float()[None], [1, 1, 2 * height, 2 * width], align_corners=False)
        finer = F.grid_sample(x[None], grid, "bicubic", "reflection", align_corners=False)  # two by two, so that little aliases
        x = F.avg_pool2d(finer, 2)[0].clamp(-1, 1)
    return x, torch.tensor(told, dtype=torch.float32)


def _turned(angle: float) -> np.ndarray:
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
