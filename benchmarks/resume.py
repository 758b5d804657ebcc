"""From `iddpm train` to the first step's line: a run that is resumed against one that begins, in real processes.

    python benchmarks/resume.py [--preset cifar10] [--batch 2] [--rounds 5]

They take turns. A resumed run does what a cold one does, and verifies its checkpoint (sha256 of every file) and reads it.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import first_line, machine
from PIL import Image

from iddpm.config import Config, image_size
from iddpm.config.presets import PRESETS
from iddpm.store import files as storage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="cifar10", choices=PRESETS)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    model = Config().updated(PRESETS[args.preset][1]).model
    times = []
    with tempfile.TemporaryDirectory() as place:
        pictures, warm, cold = (Path(place) / name for name in ("pictures", "warm", "cold"))
        for kind in ("a", "b"):
            (pictures / kind).mkdir(parents=True)
            for k in range(32):
                pixels = np.random.default_rng(k).integers(0, 256, (*image_size(model), 3)).astype(np.uint8)
                Image.fromarray(pixels).save(pictures / kind / f"{k}.png")

        def command(run: Path, **more: object) -> list[str]:
            flags = dict(preset=args.preset, batch_size=args.batch, log_interval=1, sample_interval=0, device="cpu", steps=1000)
            flags |= more
            return [sys.executable, "-m", "iddpm", "train", str(pictures), "--run", str(run),
                    *(str(token) for k, v in flags.items() for token in (f"--{k}", v))]  # fmt: skip

        first_line(command(warm, save_interval=1), "saved ")
        size = sum(f.stat().st_size for f in storage.step_dirs(warm)[-1].rglob("*") if f.is_file())
        for _ in range(args.rounds):
            began = first_line(command(cold, save_interval=1000), "step ")
            shutil.rmtree(cold)
            times.append((first_line(command(warm, save_interval=1000), "step "), began))
    resumed, cold_start = (statistics.median(column) for column in zip(*times))
    print(f"{args.preset}, batch {args.batch}, a checkpoint of {size / 2**20:,.0f} MiB; to the first step:")
    ratios = sorted(a / b for a, b in times)
    spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}, median {statistics.median(ratios):.2f}"
    print(f"resumed {resumed:.1f} s, cold {cold_start:.1f} s, ratio {resumed / cold_start:.2f}; round by round {spread}")
    print(f"rounds (resumed, cold): {', '.join(f'({a:.1f}, {b:.1f})' for a, b in times)}")
    print(machine())


if __name__ == "__main__":
    main()
