"""How near each solver comes to the many-step path in few calls of the network, on a run of your own.

    python benchmarks/solvers.py RUN [--images 128] [--steps 5,8,10,15,25,50] [--grids respaced,karras,logsnr,found_path]

The table is the root mean square distance, in units of [-1, 1], between what a solver that draws no fresh noise makes of the same
noises in so many steps and what `unipc` makes of them in 200. Solvers with fresh noise have no such path and are left out. In
brackets the calls of the network, where they are not the steps. A grid that was not found yet is found first (and kept).
"""

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from iddpm import build, fit, rng
from iddpm.config import FOUND, Which, check, image_size
from iddpm.config.choices import choices
from iddpm.errors import UserError
from iddpm.sampling.grids import find, keep, with_found
from iddpm.sampling.job import job
from iddpm.sampling.open import open_weights
from iddpm.store.remote import place

DRAWS = ("ancestral", "dpmpp_2m_sde", "consistency")
TRUTH = dict(solver="unipc", sampling_steps="200", grid="respaced")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--steps", default="5,8,10,15,25,50")
    parser.add_argument("--grids", default="respaced,karras,logsnr,found_path")
    given = parser.parse_args()
    opened = open_weights(place(given.run), Which(device="cpu"), {})
    config, net = opened.config, opened.net
    shape = (config.model.image_channels, *image_size(config.model))
    seeds = range(given.images)
    y = torch.tensor(job(config, seeds).labels)
    cond = {"y": y} if config.model.class_cond else {}
    called = [0]

    def counted(x: torch.Tensor, t: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        called[0] += 1
        return net(x, t, **more)

    @torch.inference_mode()
    def end(**how: object) -> torch.Tensor:
        changed = check(config.updated(how))
        changed = fit.require_fit(with_found(changed, opened.home))
        grid = build.grid(changed)
        called[0] = 0
        x = rng.normal(0, rng.SAMPLE, 0, seeds, shape) * grid.start
        for x, _ in build.solver(changed)(build.drawing(changed, counted, cond), x, grid, None):  # noqa: B007, B020
            pass
        return x

    truth, steps = end(**TRUTH), [int(part) for part in given.steps.split(",")]
    for grid in given.grids.split(","):
        for count in steps if grid in FOUND else ():
            try:
                with_found(check(config.updated(dict(grid=grid, sampling_steps=str(count)))), opened.home)
            except UserError:
                keep(opened.home, grid, find(config, net, opened.device, [count], grid, 64)[0])
        print(f"\n| `--grid {grid}` | " + " | ".join(map(str, steps)) + " |\n|" + "---|" * (len(steps) + 1))
        for solver in choices("solver"):
            if solver in DRAWS:
                continue
            cells = []
            for count in steps:
                own = {"S_churn": 0.0} if solver == "edm" else {}
                try:
                    off = (end(solver=solver, sampling_steps=str(count), grid=grid, **own) - truth).square().mean().sqrt()
                    cells.append(f"{off:.4f}" + (f" ({called[0]})" if called[0] != count else ""))
                except UserError:
                    cells.append("-")  # fewer steps than it reads
            print(f"| {solver} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
