"""How good the images of each solver are in few calls of the network, on a run of your own.

    python benchmarks/solver_quality.py RUN REFERENCE [--images 1024] [--calls 5,8,10,15,25,50] [--grids respaced,found_path]
        [--solvers ddim,dpmpp_2m,...] [--guidance 1] [--precision fp32] [--out runs/solvers]

Of each solver so many images, of the same seeds for all, are compared by KD-lite0-128 (the kernel distance of EfficientNet's
features, `iddpm evaluate`) with two sets: the reference, real images, and as many of the model's own, of other seeds, by `unipc`
in 100 calls. The first holds the model's error, too; the second has the solver's alone, and 0 says that it made what many steps
make. In brackets the calls where a solver cannot make just as many. A grid that was not found yet is found first (and kept).

OUT keeps every number (results.json), so that a killed benchmark goes on, and gets the picture solvers.svg.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
from common import machine, table

import iddpm
from iddpm.config import FOUND
from iddpm.config.choices import choices
from iddpm.errors import UserError
from iddpm.look.charts import COLOURS, Axis, Panel, Series, linear, page
from iddpm.sampling.grids import find, keep, with_found

TWICE = {"heun": 2, "edm": 1}  # calls a step, but for so many less in all
OWN_STEPS = ("adaptive", "consistency")
MANY = dict(solver="unipc", steps=100, grid="respaced")
SHOWN = dict(zip(("ddim", "heun", "dpmpp_2m", "unipc"), COLOURS))  # in the picture
AGAINST = {"real": "the reference", "own": f"its own images, {MANY['solver']} in {MANY['steps']} calls"}


class Judge:
    """Distances of one model's images, each kept under what it is of as soon as it is known."""

    def __init__(self, given: argparse.Namespace):
        self.given, self.model = given, iddpm.load(given.run, precision=given.precision)
        given.out.mkdir(parents=True, exist_ok=True)
        self.file, self.own = given.out / "results.json", given.out / "own.npz"
        about = dict(run=given.run, images=given.images, guidance=given.guidance, reference=given.reference)
        held = json.loads(self.file.read_text()) if self.file.exists() else dict(about=about)
        if held["about"] != about:
            raise SystemExit(f"{self.file} is of {held['about']}: give another --out")
        self.known: dict[str, Any] = held
        if not self.own.exists():
            np.savez(self.own, self.drawn(given.images, **MANY))

    def drawn(self, seed: int, **how: Any) -> np.ndarray:
        return self.model.sample(self.given.images, seed=seed, guidance=self.given.guidance, **how)

    def __call__(self, **how: Any) -> dict[str, float]:
        """KD against the real images and the model's own; UserError where the solver reads more steps."""
        key = json.dumps(how)
        if key not in self.known:
            images, sets = self.drawn(0, **how), dict(real=self.given.reference, own=str(self.own))
            score = {name: iddpm.evaluate(images, reference=of, extractor="lite0-128", metrics="kd") for name, of in sets.items()}
            self.known[key] = {name: next(iter(found.values())) for name, found in score.items()}
            self.file.write_text(json.dumps(self.known, indent=1))
        found: dict[str, float] = self.known[key]
        return found

    def find(self, grid: str, steps: list[int]) -> None:
        """Find the grids of so many steps that the run has not."""
        model, missing = self.model, []
        for count in steps:
            try:
                with_found(model.config.updated(dict(grid=grid, sampling_steps=str(count))), model.opened.home)
            except UserError:
                missing.append(count)
        if missing:
            config = model.config.updated(dict(guidance=self.given.guidance))
            for u in find(config, model.opened.net, model.opened.device, missing, grid, 64):
                keep(model.opened.home, grid, u)


def steps_of(solver: str, calls: int) -> tuple[int, int]:
    """The steps of a solver that take about so many calls, and how many they take."""
    less = TWICE.get(solver)
    steps = calls if less is None else (calls + less) // 2
    return steps, steps if less is None else 2 * steps - less


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("reference")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--calls", default="5,8,10,15,25,50")
    parser.add_argument("--grids", default="respaced,found_path")
    parser.add_argument("--solvers", default=",".join(name for name in choices("solver") if name not in OWN_STEPS))
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--out", type=Path, default=Path("runs/solvers"))
    given = parser.parse_args()
    judge, counts = Judge(given), [int(part) for part in given.calls.split(",")]
    many = judge(**MANY)
    found: dict[str, dict[str, dict[int, dict[str, float]]]] = {}
    for grid in given.grids.split(","):
        solvers = given.solvers.split(",")
        if grid in FOUND:
            judge.find(grid, sorted({steps_of(solver, calls)[0] for solver in solvers for calls in counts}))
        for solver in solvers:
            line = found.setdefault(grid, {}).setdefault(solver, {})
            for calls in counts:
                steps, own = steps_of(solver, calls)[0], {"S_churn": 0.0} if solver == "edm" else {}
                try:
                    line[calls] = judge(solver=solver, steps=steps, grid=grid, **own)
                except UserError:  # fewer steps than it reads
                    continue
            print(grid, solver, {calls: round(kd["own"], 4) for calls, kd in line.items()}, flush=True)
    print(f"\n{machine()}\n{given.images} images, {MANY['solver']} in {MANY['steps']} calls: {many['real']:.4f}\n")
    for kind, of in AGAINST.items():
        for grid, lines in found.items():
            rows = []
            for solver, line in lines.items():
                made = {calls: steps_of(solver, calls)[1] for calls in counts}
                cells = [f"{line[c][kind]:.4f}" + f" ({made[c]})" * (made[c] != c) if c in line else "-" for c in counts]
                rows.append([solver, *cells])
            print(f"KD against {of}, `--grid {grid}`\n\n{table(['calls', *map(str, counts)], rows)}\n")
    (given.out / "solvers.svg").write_text(picture(found, counts))


def picture(found: dict[str, dict[str, dict[int, dict[str, float]]]], counts: list[int]) -> str:
    """KD against the model's own images over the calls, a panel for each grid."""
    panels = []
    highest = [kd["own"] for lines in found.values() for solver in SHOWN for kd in lines.get(solver, {}).values()]
    for grid, lines in found.items():
        x = Axis(f"calls of the network, --grid {grid}", counts[0], counts[-1], [(n, str(n)) for n in counts], log=True)
        drawn = []
        for name, line in lines.items():
            if name in SHOWN:
                made, kd = [steps_of(name, calls)[1] for calls in line], [found["own"] for found in line.values()]
                drawn.append(Series(np.array(made), np.array(kd), name, SHOWN[name]))
        panels.append(Panel(x, linear("KD against many steps", np.array(highest), zero=True), drawn))
    return page("Images in few calls, against the model's own in many", panels)


if __name__ == "__main__":
    main()
