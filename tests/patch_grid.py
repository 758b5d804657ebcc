"""A measure of the grid that a transformer on patches may leave in its images."""

import torch
from torch import Tensor


def patch_grid(images: Tensor, patch: int) -> float:
    """How much of images (N, C, H, W) is a grid of the patches' period: 1 where the step over an edge is as any other.

    The mean square step between neighbours across the edges of patches, over that inside of them, in both directions.
    """
    steps = [images.diff(dim=d).square().mean(dim=(0, 1, 5 - d)) for d in (2, 3)]
    edges = [torch.arange(len(step)) % patch == patch - 1 for step in steps]
    across, inside = (torch.cat([s[e if on else ~e] for s, e in zip(steps, edges)]).mean() for on in (True, False))
    return float(across / inside)
