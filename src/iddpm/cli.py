"""The command line. Flags, defaults, ranges and help come from the dataclasses in config.py; each verb is one function here."""

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import iddpm
from iddpm.config import (
    Config,
    Draw,
    Measure,
    Sample,
    Which,
    check,
    check_fields,
    fields_of,
    seed_list,
)
from iddpm.errors import UserError
from iddpm.presets import PRESETS

TRUE, FALSE = ("true", "yes", "t", "y", "1"), ("false", "no", "f", "n", "0")


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are a UserError, with flags made from dataclass fields."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, formatter_class=_Help, **settings)
        self.booleans: set[str] = set()

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see iddpm {self.prog.split()[-1]} --help)")

    def add_fields(self, group: type, title: str = "", inherited: bool = False) -> None:
        """A flag for each field a user may set; what is not given is absent from the result."""
        section = self.add_argument_group(title or (group.__doc__ or "").rstrip("."))
        for name, (kind, default, meta) in fields_of(group).items():
            if not meta.get("flag", True):
                continue
            shown = "the run's" if inherited else "none" if default == "" else default
            text = f"{meta['help']} [{shown}]".replace("%", "%%")
            if kind is bool:
                self.booleans.add(name)
                section.add_argument(f"--{name}", type=_boolean, metavar="BOOL", default=argparse.SUPPRESS, help=text)
            else:
                metavar = "|".join(meta["choices"]) or {int: "N", float: "X"}.get(kind, "TEXT")
                section.add_argument(f"--{name}", type=kind, metavar=metavar, default=argparse.SUPPRESS, help=text)

    def read(self, argv: Sequence[str]) -> dict[str, Any]:
        """The arguments given, by name. Underscores and hyphens are alike; --flag and --no-flag mean True and False."""
        tokens: list[str] = []
        for k, token in enumerate(argv):
            if not token.startswith("--") or token == "--":
                tokens.append(token)
                continue
            flag, equals, value = token[2:].partition("=")
            flag = flag.replace("-", "_")
            if flag.removeprefix("no_") in self.booleans and flag.startswith("no_"):
                tokens += [f"--{flag.removeprefix('no_')}", "False"]
            elif flag in self.booleans and not equals and (k + 1 == len(argv) or argv[k + 1].lower() not in TRUE + FALSE):
                tokens += [f"--{flag}", "True"]
            else:
                tokens.append(f"--{flag}{equals}{value}")
        known, extra = self.parse_known_args(tokens)
        if extra:
            flags = [s for action in self._actions for s in action.option_strings]
            near = difflib.get_close_matches(extra[0].partition("=")[0], flags, n=1)
            raise UserError(
                f"unknown argument {extra[0]}" + (f": did you mean {near[0]}?" if near else f" (see {self.prog} --help)")
            )
        return vars(known)


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=118)


def _boolean(text: str) -> bool:
    if text.lower() not in TRUE + FALSE:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() in TRUE


# ---- train


def _train_parser(parser: Parser) -> None:
    parser.add_argument("data", nargs="?", default="", help="a folder of images; a resumed run remembers it")
    parser.add_argument("--preset", default="", help="a recipe to start from", metavar="NAME")
    parser.add_argument("--run", default="", help="the run's folder [runs/PRESET or runs/DATA]", metavar="DIR")
    parser.booleans.add("dry_run")
    parser.add_argument(
        "--dry_run", type=_boolean, default=False, metavar="BOOL", help="say what would be done, time a step, and stop"
    )
    for _, group in Config().groups():
        parser.add_fields(type(group))
    rows = (f"  {name:14} {text}" for name, (text, _) in PRESETS.items())
    parser.epilog = "presets (flags given beside one win):\n" + "\n".join(rows)


def _train(data: str, preset: str, run: str, dry_run: bool, **given: Any) -> None:
    folder = Path(run or _default_run(data, preset))
    config, notes = _resolve(folder, data, preset, given)
    from iddpm import build, train
    from iddpm.config import image_size, total_steps
    from iddpm.data import Images

    total_steps(config.train)
    build.device(config.train.device)
    images = Images.open(
        config.data.path,
        image_size=image_size(config.model),
        channels=config.model.image_channels,
        on_broken=config.data.on_broken,
        cache_bytes=int(config.data.cache_gb * 2**30),
        labels=config.data.labels,
        classes=config.data.classes or None,
    )
    print(images.describe())
    if config.model.class_cond and images.labels is None:
        raise UserError(f"--class_cond: {config.data.path} has no classes; put each class in a sub-folder, or add labels.csv")
    if config.model.class_cond:
        config = config.updated(dict(classes=images.classes, rule=images.rule, num_classes=len(images.classes)))
    build.network(config)
    if dry_run:
        train.dry_run(config, images)
        return
    _write_config(folder, config)
    for note in notes:
        print(note)
    last = train.train(config, images, folder, notes=notes)
    print(f"done: {folder} (weights in {last.name}, pictures in samples/, numbers in progress.csv)")
    print(f"next: iddpm sample {folder}")


def _default_run(data: str, preset: str) -> str:
    if not data:
        raise UserError("which images? iddpm train DATA, or --run DIR to go on with a run")
    return "runs/" + (preset or "-".join(Path(data).resolve().parts[-2:]).strip("/") or "run")


def _resolve(run: Path, data: str, preset: str, given: dict[str, Any]) -> tuple[Config, list[str]]:
    """The config of a run: stored, else from its source or preset; then the flags. Also says what a resumed run changes."""
    if bool(given.get("steps")) != bool(given.get("images")):  # one of them replaces the other, wherever that came from
        given = {"steps": 0, "images": 0, **given}
    if preset and preset not in PRESETS:
        raise UserError(f"--preset {preset} is not one of: {', '.join(PRESETS)}")
    record = run / "config.json"
    if not record.exists() or not any((run / "checkpoints").glob("step_*")):
        if run.exists() and not record.exists() and any(run.iterdir()):
            raise UserError(f"{run} is not empty and no run of iddpm: give another --run")
        config = Config()
        if source := given.get("init_from"):
            from iddpm.checkpoint import read_weights

            other = read_weights(Path(source)).config
            inherited = {k: getattr(g, k) for g in (other.model, other.diffusion, other.sample) for k in fields_of(g)}
            config = config.updated(inherited)
        config = config.updated({**(PRESETS[preset][1] if preset else {}), **given, "preset": preset})
        if not data:
            raise UserError(f"which images? {run} holds no run yet: iddpm train DATA --run {run}")
        return check(config.updated({"path": data})), []
    stored = Config.from_json(record.read_text(), str(record))
    if preset and preset != stored.preset:
        raise UserError(f"--preset {preset}: {run} was begun with {stored.preset or 'none'}; take another --run")
    now, metas = stored.flat(), {k: m for _, g in stored.groups() for k, (_, _, m) in fields_of(g).items()}
    changed = {k: v for k, v in given.items() if v != now[k]}
    if fixed := [k for k in changed if metas[k]["fixed"]]:
        k = fixed[0]
        raise UserError(f"--{k} {changed[k]}: {run} was trained with {now[k]}, which cannot change; take another --run")
    if data and data != stored.data.path:
        changed["path"] = data
    return check(stored.updated(changed)), [f"changed on resume: {k} {now[k]} -> {v}" for k, v in changed.items()]


def _write_config(run: Path, config: Config) -> None:
    run.mkdir(parents=True, exist_ok=True)
    aside = run / ".config.json"
    aside.write_text(config.to_json())
    os.replace(aside, run / "config.json")


# ---- sample and nll


def _sample_parser(parser: Parser) -> None:
    parser.add_argument("run", help="a run's folder, one of its checkpoints, or a .safetensors file of weights")
    parser.add_fields(Draw)
    parser.add_fields(Sample, "How to draw them", inherited=True)
    parser.add_fields(Which)


def _nll_parser(parser: Parser) -> None:
    parser.add_argument("run", help="a run's folder, one of its checkpoints, or a .safetensors file of weights")
    parser.add_argument("data", help="a folder of images")
    parser.add_fields(Measure)
    parser.add_fields(Sample, "The chain (of which solver and eta have no effect here)", inherited=True)
    parser.add_fields(Which)


def _open(run: str, given: dict[str, Any]) -> tuple[Any, Config, Any, Any, Which]:
    """The weights, the config with the flags given, the network and device a verb works with."""
    which = _make(Which, given)
    from iddpm import build, checkpoint, sample

    step = which.checkpoint_step if which.checkpoint_step >= 0 else None
    device = build.device(which.device)
    weights = checkpoint.read_weights(Path(run), step, which.ema_rate if which.ema_rate >= 0 else None)
    config = weights.config.updated({k: v for k, v in given.items() if k in fields_of(Sample)})
    if given.get("solver") == "ancestral" and "eta" not in given:
        config = config.updated({"eta": 0.0})
    check(config)
    build.chain(config.diffusion, config.sample.sampling_steps)
    return weights, config, sample.restore(weights, device, which.precision), device, which


def _make(group: type, given: dict[str, Any]) -> Any:
    made = group(**{k: v for k, v in given.items() if k in fields_of(group)})
    check_fields(made)
    return made


def _sample(run: str, **given: Any) -> None:
    draw = _make(Draw, given)
    if draw.seeds and draw.num_samples:
        raise UserError("--seeds and --num_samples both say how many: give one")
    seeds = seed_list(draw.seeds) if draw.seeds else None
    weights, config, net, device, which = _open(run, given)
    from tqdm import tqdm

    from iddpm import build, sample

    if seeds is None:
        shown = len([part for part in draw.labels.split(",") if part.strip()]) or config.model.num_classes
        seeds = list(range(draw.num_samples or (10 * shown if config.model.class_cond else 64)))
    job = sample.job(config, seeds, draw.labels)
    step, rate = weights.about["step"], weights.about.get("ema_rate", 0)
    identity = dict(
        weights=str(weights.path), step=step, ema_rate=rate, seeds=list(job.seeds), labels=list(job.labels),
        **{k: getattr(config.sample, k) for k in fields_of(Sample)},
    )  # fmt: skip
    out = Path(draw.out) if draw.out else _beside(weights.path) / "samples" / f"sample_{step:08d}_{len(seeds)}.png"
    writer = sample.writer(out, config, job, identity)
    if writer.done:
        print(f"{writer.done} of {len(seeds)} images are there already")
    rest = sample.Job(job.seeds[writer.done :], job.labels[writer.done :])
    steps = build.chain(config.diffusion, config.sample.sampling_steps).steps
    batches = -(-len(rest.seeds) // which.batch_size)
    with tqdm(total=steps * batches, unit="step", desc=f"{len(rest.seeds)} images", disable=None) as bar:
        for batch in sample.images(config, net, rest, device, which.batch_size, bar.update):
            writer.write(batch)
    writer.close()
    whose = f"average {rate}" if rate else "raw weights"
    print(f"{len(seeds)} images of step {step} ({config.sample.solver}, {steps} steps, {whose}): {out}")


def _nll(run: str, data: str, **given: Any) -> None:
    measure = _make(Measure, given)
    weights, config, net, device, which = _open(run, given)
    import json

    from tqdm import tqdm

    from iddpm import build, evaluate
    from iddpm.config import image_size
    from iddpm.data import Images

    images = Images.open(
        data,
        image_size=image_size(config.model),
        channels=config.model.image_channels,
        labels=config.data.labels if config.model.class_cond else "none",
        classes=config.data.classes if config.model.class_cond else None,
    )
    if config.model.class_cond and images.labels is None:
        raise UserError(f"{data} has no classes, and this model was trained with them")
    print(images.describe())
    total = build.chain(config.diffusion, config.sample.sampling_steps).steps
    count = min(measure.num_samples or len(images), len(images))
    with tqdm(total=total * count, unit="term", unit_scale=True, disable=None) as bar:
        result = evaluate.bits_per_dim(
            config, net, images, device,
            num_samples=count, batch_size=which.batch_size, seed=measure.seed, say=bar.write, tick=bar.update,
        )  # fmt: skip
    about = dict(weights=str(weights.path), data=data, step=weights.about["step"], ema_rate=weights.about.get("ema_rate", 0))
    out = Path(measure.out) if measure.out else _beside(weights.path) / "nll.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name("." + out.name)
    aside.write_text(json.dumps(about | result, indent=1))
    os.replace(aside, out)
    name = "bits/dim" if total == result["chain_steps"] else f"bits/dim, the bound of the chain respaced to {total} steps"
    error = f" +- {result['standard_error']:.3f}" if result["standard_error"] is not None else ""
    print(f"{result['bits_per_dim']:.4f}{error} {name} ({result['images']} images; prior {result['prior']:.5f}, "
          f"decoder {result['vb'][0]:.4f}); every term: {out}")  # fmt: skip


def _beside(weights: Path) -> Path:
    """The run's folder of a weights file, or the folder of a lone one."""
    return weights.parents[2] if weights.parent.parent.name == "checkpoints" else weights.parent


# ---- data


def _data_parser(parser: Parser) -> None:
    parser.add_argument("name", help="cifar10, or digits (scikit-learn's handwritten digits, 8x8 grey)")
    parser.add_argument("out", help="the folder to write: OUT/{train,test}/CLASS/CLASS_00000.png")
    parser.add_argument("--source", default="", metavar="FILE", help="cifar10: the official archive, where you have it")


def _data(name: str, out: str, source: str) -> None:
    from iddpm.data.fetch import DATASETS

    if name not in DATASETS:
        raise UserError(f"data {name!r} is not one of: {', '.join(DATASETS)}")
    if source and name != "cifar10":
        raise UserError(f"--source has no effect with {name}")
    print(DATASETS[name](Path(out), Path(source)) if source else DATASETS[name](Path(out)))
    print(f"next: iddpm train {out}/train --preset {'cifar10-tiny' if name == 'cifar10' else name}")


class Verb(NamedTuple):
    run: Callable[..., None]
    parser: Callable[[Parser], None]
    usage: str
    help: str


VERBS = {
    "train": Verb(_train, _train_parser, "DATA", "train a model on a folder of images; the same command resumes"),
    "sample": Verb(_sample, _sample_parser, "RUN", "draw images from a run"),
    "nll": Verb(_nll, _nll_parser, "RUN DATA", "bits per dimension of a data set, and every term of the bound"),
    "data": Verb(_data, _data_parser, "NAME OUT", "fetch and lay out a data set"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code: 0, or 2 after one line on what to mend."""
    argv = sys.argv[1:] if argv is None else list(argv)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: waiting threads that spin cost 3x on a shared machine
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(
            "iddpm: train, sample and measure diffusion models of images\n\nusage: iddpm VERB ... (iddpm VERB --help says more)\n"
        )
        print("\n".join(f"  {name:8} {verb.help}" for name, verb in VERBS.items()))
        return 0
    if argv[0] in ("-V", "--version"):
        print(iddpm.__version__)
        return 0
    try:
        if argv[0] not in VERBS:
            near = difflib.get_close_matches(argv[0], VERBS, n=1)
            raise UserError(
                f"unknown verb {argv[0]!r}: " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(VERBS)}")
            )
        verb = VERBS[argv[0]]
        parser = Parser(prog=f"iddpm {argv[0]}", description=verb.help, usage=f"iddpm {argv[0]} {verb.usage} [--flag value ...]")
        verb.parser(parser)
        verb.run(**parser.read(argv[1:]))
    except UserError as e:
        return _say(str(e))
    except KeyboardInterrupt:
        return _say("interrupted")
    except OSError as e:
        return _say(f"{e.strerror or e}{f': {e.filename}' if e.filename else ''}")
    except RuntimeError as e:
        if "out of memory" not in str(e):
            raise
        return _say(
            "out of memory: train with a smaller --microbatch or --use_checkpoint True, sample with a smaller --batch_size"
        )
    return 0


def _say(line: str) -> int:
    print(f"iddpm: {' '.join(line.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
