"""Which library draws the best images after the same time on the same machine, each by the recipe that it recommends itself.

    iddpm data cifar10 data/cifar10
    python benchmarks/quality.py data/cifar10/train [--time 20m] [--seeds 0,1,2] [--only NAMES] [--original DIR]

Ours is the bare `iddpm train DATA --time T` (or what `--ours` says); the peers' recipes: `recipes.py`. Each trains for the time,
counted from its start, and draws 256 images in 50 calls of its network with the solver and the average that it recommends (with
more than one kind of weights, the better counts). The table is KD-lite0-128 against 2,000 images of the folder trained on: lower
is better, real images have 0. What is done is kept in OUT/results.json, its images beside it, and is not repeated: a killed
benchmark, started again, goes on with the contestant that it was at.
"""

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
from common import HERE, Worker, environment, machine, table
from recipes import RECIPES, Job

OURS = "train {data} --time {time} --seed {seed} --run {run}"
UNITS = {"s": 1, "m": 60, "h": 3600}
TWICE = {"heun": 2, "edm": 1}  # solvers of two calls a step, but for so many less in all


def seconds(text: str) -> float:
    """Of a time such as 20m."""
    try:
        return float(text[:-1]) * UNITS[text[-1:]]
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is no time: 90s, 20m or 1h") from None


def checked(text: str) -> str:
    """A time as it was typed, which `iddpm train --time` reads too."""
    seconds(text)
    return text


def ours(args: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    """Train by the command, and draw as the run says, in so many calls."""
    import iddpm

    run, began = folder / "run", time.monotonic()
    words = [word.format(data=args.data, time=args.time, seed=seed, run=run) for word in shlex.split(args.ours)]
    subprocess.run([sys.executable, "-m", "iddpm", *words], env=environment(), check=True, stdout=subprocess.DEVNULL)
    trained = time.monotonic() - began
    model = iddpm.load(run)
    solver, less = model.config.sample.solver, TWICE.get(model.config.sample.solver, 0)
    steps = (args.calls + less) // 2 if less else args.calls
    np.savez(folder / "ema.npz", model.sample(args.samples, seed=seed, steps=steps))
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    drawn = time.monotonic() - began - trained
    return dict(steps=max(row["step"] for row in log if "step" in row), train_seconds=trained, draw_seconds=drawn, solver=solver)


def peer(name: str, args: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    job = Job(
        args.data,
        str(folder),
        seconds(args.time),
        seed,
        args.samples,
        args.calls,
        args.original,
        args.original_flags,
        str(args.out / "cache"),
    )
    python = sys.executable if name == "original" else args.peers
    worker = Worker([python, str(HERE / "recipes.py"), name, json.dumps(asdict(job))])
    try:
        return worker.answer()
    finally:
        worker.end()


def score(images: Path, args: argparse.Namespace) -> float:
    import iddpm

    how: dict[str, Any] = dict(extractor="lite0-128", metrics="kd", num_reference=args.num_reference)
    return next(iter(iddpm.evaluate(np.load(images)["arr_0"], reference=args.data, **how).values()))


def lacks(name: str, args: argparse.Namespace) -> str:
    """What a contestant cannot do without, "" where it is there."""
    if name == "original":
        return "" if args.original else "--original DIR"
    return "" if name == "ours" or os.path.exists(args.peers) else "make .venv/peers/ready"


def result(name: str, args: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    """Train, draw and score one contestant in its folder, which is emptied unless it holds what was drawn before."""
    what, drawn = about(name, args, seed), folder / "drawn.json"
    found = json.loads(drawn.read_text()) if drawn.exists() else {}
    if found.get("about") != what:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        found = (ours(args, seed, folder) if name == "ours" else peer(name, args, seed, folder)) | dict(about=what)
        drawn.write_text(json.dumps(found))
    scores = {path.stem: score(path, args) for path in sorted(folder.glob("*.npz"))}
    return found | dict(kd=min(scores.values()), scores=scores, machine=machine())


def report(results: dict[str, dict[str, Any]], args: argparse.Namespace) -> str:
    """Of those with this time, number of images and calls, by contestant; best first."""
    rows = []
    for name in ("ours", *RECIPES):
        own = [r for r in results.values() if r["about"] == about(name, args, r["about"]["seed"])]
        if own:
            kds = [r["kd"] for r in own]
            spread = f"{statistics.stdev(kds):.3f}" if len(kds) > 1 else "-"
            steps = statistics.median(r["steps"] for r in own)
            minutes = statistics.median(r["train_seconds"] for r in own) / 60
            seeds = ", ".join(f"{kd:.3f}" for kd in kds)
            rows.append(
                (statistics.mean(kds), [name, f"{statistics.mean(kds):.3f}", spread, seeds, f"{steps:.0f}", f"{minutes:.1f}"])
            )
    head = ["", "KD-lite0-128", "deviation", "by seed", "steps", "minutes of training"]
    return table(head, [row for _, row in sorted(rows, key=lambda row: row[0])])


def about(name: str, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """What a result depends on, and is kept under."""
    own = {"ours": args.ours, "original": args.original_flags}.get(name, "")
    return dict(name=name, time=args.time, seed=seed, samples=args.samples, calls=args.calls, flags=own, data=args.data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="the folder of CIFAR-10's training images")
    parser.add_argument("--time", default="20m", type=checked, help="of training, of each: 90s, 20m, 1h")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--only", default="", metavar="NAME,...", help=f"ours, {', '.join(RECIPES)}")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--num_reference", type=int, default=2000, help="images of the folder to compare with")
    parser.add_argument("--calls", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--ours", default=OURS, help=f"the command after iddpm [{OURS}]")
    parser.add_argument("--original", default="", metavar="DIR", help="a checkout of openai/improved-diffusion")
    parser.add_argument("--original_flags", default="", help="of its image_train.py, after those that it recommends")
    parser.add_argument("--peers", default=str(HERE.parent / ".venv/peers/bin/python"), metavar="PYTHON")
    args = parser.parse_args()
    names = args.only.split(",") if args.only else ["ours", *RECIPES]
    if unknown := set(names) - {"ours", *RECIPES}:
        sys.exit(f"--only {min(unknown)!r} is not one of: ours, {', '.join(RECIPES)}")
    kept = args.out / "results.json"
    results: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}
    for seed in map(int, args.seeds.split(",")):
        for name in names:
            what = about(name, args, seed)
            key = json.dumps(what, sort_keys=True)
            if key in results:
                print(f"{name}, seed {seed}: done before", flush=True)
            elif needs := lacks(name, args):
                print(f"{name} is left out: it needs {needs}", flush=True)
            else:
                results[key] = result(name, args, seed, args.out / f"{name}-{args.time}-{seed}")
                aside = kept.with_suffix(".partial")
                aside.write_text(json.dumps(results, indent=1))
                aside.replace(kept)
                print(f"{name}, seed {seed}: {results[key]['kd']:.4f} after {results[key]['steps']} steps", flush=True)
    print(f"\n{machine()}\n{args.time} of training each, {args.samples} images in {args.calls} calls\n\n{report(results, args)}")


if __name__ == "__main__":
    main()
