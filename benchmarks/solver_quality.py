"""How good the images of each solver are in few calls of the network, on a run of your own.

    python benchmarks/solver_quality.py RUN REFERENCE [--images 1024] [--calls 5,8,10,15,25,50] [--grids respaced,found_path]
        [--solvers ddim,dpmpp_2m,...] [--precision fp32]

The table is KD-lite0-128 (the kernel distance of EfficientNet's features, `iddpm evaluate`) of so many images, of the same seeds
for all, against the reference; in brackets the calls where a solver cannot make just as many. Above it stands that of `unipc` in
100 calls.
A grid that was not found yet is found first (and kept in the run).
"""

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import iddpm
from iddpm.config import FOUND
from iddpm.config.choices import choices
from iddpm.errors import UserError
from iddpm.sampling.grids import find, keep, with_found

TWICE = {"heun": 2, "edm": 1}  # calls a step, but for so many less in all
OWN_STEPS = ("adaptive", "consistency")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("reference")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--calls", default="5,8,10,15,25,50")
    parser.add_argument("--grids", default="respaced,found_path")
    parser.add_argument("--solvers", default=",".join(name for name in choices("solver") if name not in OWN_STEPS))
    parser.add_argument("--precision", default="fp32")
    given = parser.parse_args()
    model, counts = iddpm.load(given.run, precision=given.precision), [int(part) for part in given.calls.split(",")]

    def distance(**how: object) -> str:
        images = model.sample(given.images, **how)
        found = iddpm.evaluate(images, reference=given.reference, extractor="lite0-128", metrics="kd")
        return f"{next(iter(found.values())):.4f}"

    print(f"unipc in 100 calls: {distance(solver='unipc', steps=100, grid='respaced')}", flush=True)
    for grid in given.grids.split(","):
        print(f"\n| `--grid {grid}` | " + " | ".join(map(str, counts)) + " |\n|" + "---|" * (len(counts) + 1), flush=True)
        for solver in given.solvers.split(","):
            print(f"| {solver} |", end="", flush=True)
            for count in counts:
                less = TWICE.get(solver, 0)
                steps, own = (count + less) // 2 if less else count, {"S_churn": 0.0} if solver == "edm" else {}
                calls = 2 * steps - less if less else steps
                try:
                    if grid in FOUND:
                        _find(model, grid, steps)
                    cell = distance(solver=solver, steps=steps, grid=grid, **own) + (f" ({calls})" if calls != count else "")
                except UserError:  # fewer steps than it reads
                    cell = "-"
                print(f" {cell} |", end="", flush=True)
            print(flush=True)


def _find(model: iddpm.Model, grid: str, steps: int) -> None:
    """Find the grid of so many steps, if the run has none."""
    config, opened = model.config.updated(dict(grid=grid, sampling_steps=str(steps))), model.opened
    try:
        with_found(config, opened.home)
    except UserError:
        keep(opened.home, grid, find(model.config, opened.net, opened.device, steps, grid, 64))


if __name__ == "__main__":
    main()
