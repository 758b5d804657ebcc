"""Whether the metrics of `iddpm evaluate` see what is wrong with images: real ones, perturbed in known ways.

    iddpm data cifar10 data/cifar10
    python benchmarks/perturbed.py data/cifar10/train            # 2,000 against 2,000 images, FD-lite0-128: 2 minutes on 2 cores
    python benchmarks/perturbed.py data/cifar10/train --extractor inception --weights FILE --n 256

Prints a row for each kind of damage, as a table in Markdown. FD, KD: lower is better; the others are near 1 for real images.
"""

import argparse
import io
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from iddpm.config.choices import make
from iddpm.data import Order
from iddpm.measure import extractors
from iddpm.measure.compare import possible
from iddpm.measure.features import extract
from iddpm.measure.image_sets import ImageSet, open_images
from iddpm.measure.metrics.interface import Comparison

Damage = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def blur(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gaussian, sigma 0.7 pixels."""
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(0.7)))


def noise(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gaussian, sigma 12 of 255."""
    return (image + rng.normal(0, 12, image.shape)).round().clip(0, 255).astype(np.uint8)


def jpeg(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Quality 30."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=30)
    return np.asarray(Image.open(file))


def same(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return image


def damaged(images: ImageSet, damage: Damage, name: str, home: Path) -> ImageSet:
    def take(numbers):
        rows = images.take(numbers).transpose(0, 2, 3, 1)
        made = [damage(image, np.random.default_rng(k)) for k, image in zip(numbers, rows)]
        return np.stack(made).transpose(0, 3, 1, 2)

    return images._replace(take=take, digest=lambda numbers: name + images.digest(numbers), home=home)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a folder of images in classes")
    parser.add_argument("--n", type=int, default=2000, help="images a side")
    parser.add_argument("--extractor", default="lite0-128")
    parser.add_argument("--weights", default="")
    args = parser.parse_args()
    extractor = extractors.open(args.extractor, {f"{args.extractor.partition('-')[0]}_weights": args.weights})
    images = open_images(args.data)
    assert images.labels is not None, "the images need classes, half of which are dropped"
    order = Order(images.n, 0).indices(0, images.n)
    first, rest = order[: args.n], order[args.n :]
    others, few = rest[: args.n], rest[images.labels[rest] < len(images.classes) // 2][: args.n]
    sets: dict[str, tuple[Damage, np.ndarray]] = {
        "other real images": (same, others),
        "half of the classes": (same, few),
        "blurred, sigma 0.7": (blur, others),
        "noise, sigma 12/255": (noise, others),
        "JPEG, quality 30": (jpeg, others),
        "copies of a tenth": (same, np.tile(first[: args.n // 10], 10)),
    }
    with tempfile.TemporaryDirectory() as folder:
        reference = extract(images._replace(home=Path(folder)), first, extractor).side
        metrics = {name: make("metrics", name) for name in ("fd", "sfd", "is", "kd", "memorisation", "prdc")}
        rows = {}
        for name, (damage, chosen) in sets.items():
            features = extract(damaged(images, damage, name, Path(folder)), chosen, extractor)
            both = Comparison(features.side, reference, extractor)
            found = [f for metric in possible(both, metrics, False) for f in metric(both)]
            rows[name] = {f.name: f.estimate for f in found}
        columns = list(rows["other real images"])
        print(f"| {args.n} against {args.n} images | " + " | ".join(columns) + " |")
        print("|---" * (len(columns) + 1) + "|")
        for name, row in rows.items():
            cells = [f"{e.value:.4g}" + (f" ± {e.error:.2g}" if e.error is not None else "") for e in row.values()]
            print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
