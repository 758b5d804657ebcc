"""How much of a grid of its patches' period a transformer's samples show: each checkpoint of a run against real images.

    python benchmarks/patch_grid.py RUN IMAGES [--samples 512] [--steps 20]

Printed is the mean square step between neighbouring pixels across the edges of patches over that inside of them, and its
standard error, of eight parts. Real images have a ratio of their own, so samples are compared with theirs, not with 1.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from PIL import Image

import iddpm

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from patch_grid import patch_grid


def ratio(images: np.ndarray, patch: int) -> str:
    """Of uint8 images (N, H, W, C)."""
    x = torch.from_numpy(images).movedim(3, 1).float()
    parts = torch.tensor([patch_grid(part, patch) for part in x.chunk(8)])
    return f"{patch_grid(x, patch):.3f} +- {parts.std() / 8**0.5:.3f}"


def real(folder: Path, count: int, like: np.ndarray) -> np.ndarray:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".png", ".jpg"))
    chosen = [paths[k] for k in np.random.default_rng(0).permutation(len(paths))[:count]]
    return np.stack([np.asarray(Image.open(path)).reshape(like.shape) for path in chosen])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("images", type=Path, help="a folder of real images of the run's size")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20, help="of the solver unipc")
    given = parser.parse_args()
    for k, step in enumerate(sorted(int(path.name.split("_")[1]) for path in (given.run / "checkpoints").iterdir())):
        model = iddpm.load(given.run, checkpoint_step=step, device="cpu")
        patch = dict(model.config.own)["patch_size"]
        drawn = model.sample(given.samples, seed=0, solver="unipc", steps=given.steps)
        if k == 0:
            print(f"real images    {ratio(real(given.images, given.samples, drawn[0]), patch)}")
        print(f"after {step:7,}  {ratio(drawn, patch)}", flush=True)


if __name__ == "__main__":
    main()
