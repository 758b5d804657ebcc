"""What a feature extractor is: from uint8 images to features. Each network has its file; the table is in the package."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Extractor(NamedTuple):
    """A network, with its own resizing and scaling, that turns images into features.

    `network` takes (n, 3, H, W) uint8 of any size on `device` and gives, for each name of `widths`, (n, width) float32. "pool"
    is what distances are of; "spatial" (Inception alone) what sFID is of.
    """

    name: str  # what figures are labelled by: inception, lite0-128, dinov2-vitl14
    identity: str  # of everything that decides the features: the weights' digest, the resizing, the version of this code
    widths: Mapping[str, int]
    network: Callable[[Tensor], Mapping[str, Tensor]]
    device: torch.device
    probabilities: Callable[[Tensor], Tensor] | None = None  # pool features (n, d) -> class probabilities (n, K), for IS

    def called(self, metric: str) -> str:
        """FD, sFD, KD or IS on these features: FID and its kin are names of Inception's alone, others bear their own."""
        if self.name == "inception":
            return {"FD": "FID", "sFD": "sFID", "KD": "KID", "IS": "IS"}[metric]
        return f"{metric}-{self.name}"


def in_parts(
    network: Callable[[Tensor], Mapping[str, Tensor]], chunk: int, device: torch.device
) -> Callable[[Tensor], Mapping[str, Tensor]]:
    """An extractor's network from one that takes `chunk` images at a time, on the device, and without TF32's ten bits."""

    @torch.inference_mode()
    def run(images: Tensor) -> dict[str, Tensor]:
        assert images.dtype == torch.uint8 and images.shape[1] == 3, (images.dtype, images.shape)
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            parts = [network(part) for part in images.to(device).split(chunk)]
        return {tap: torch.cat([part[tap] for part in parts]) for tap in parts[0]}

    return run
