"""`iddpm train`: find out what the run is, new or resumed, and train it."""

from pathlib import Path
from typing import Any

from iddpm.cli.flags import Parser, Verb, boolean
from iddpm.config import Config, Train, check, fields_of
from iddpm.config.presets import PRESETS
from iddpm.errors import UserError
from iddpm.store.remote import place, replace


def _parser(parser: Parser) -> None:
    parser.add_argument("data", nargs="?", default="", help="a folder of images; a resumed run remembers it")
    parser.add_argument("--preset", default="", help="a recipe to start from", metavar="NAME")
    parser.add_argument("--run", default="", help="the run's folder [runs/PRESET or runs/DATA]", metavar="DIR")
    parser.booleans.add("dry_run")
    parser.add_argument(
        "--dry_run", type=boolean, default=False, metavar="BOOL", help="say what would be done, time a step, and stop"
    )
    for _, group in Config().groups():
        parser.add_fields(type(group))
    rows = (f"  {name:14} {text}" for name, (text, _) in PRESETS.items())
    codes = "exit codes: 0 done; 2 one line says what to mend; 75 stopped by Ctrl-C or SIGTERM with all saved, start it again"
    parser.epilog = "presets (flags given beside one win):\n" + "\n".join(rows) + f"\n\n{codes}"


def _train(data: str, preset: str, run: str, dry_run: bool, **given: Any) -> None:
    folder = place(run or _default_run(data, preset))
    config, notes = _resolve(folder, data, preset, given)
    from iddpm import build
    from iddpm.config import total_steps
    from iddpm.data.batches import open_data, open_validation
    from iddpm.parallel import processes
    from iddpm.store import lock, log
    from iddpm.training import loop as train

    total_steps(config.train)
    with processes.session(build.device(config.train.device), config.train.timeout):
        leads = processes.rank() == 0
        images, config = open_data(config)
        held_out = open_validation(config)
        build.network(config)
        if dry_run:
            train.dry_run(config, images)
            return
        with lock.held(folder), log.copied():  # after all that may be refused: a refused command leaves nothing behind
            if leads:
                print("\n".join((images.describe(), *notes)))
                write_config(folder, config)
            last = train.train(config, images, folder, notes=notes, held_out=held_out)
    if leads and last:
        print(f"done: {folder} (weights in {last.name}, pictures in samples/, numbers in progress.csv)")
    if leads:
        print(f"next: {_next(config, folder)}")


def _next(config: Config, run: Path) -> str:
    return {
        "unet": f"iddpm sample {run}",
        "super_res": f"iddpm sample {run} --high_res {config.data.path}, or iddpm sample BASE --then {run}",
        "classifier": f"iddpm sample RUN --classifier {run}",
    }[config.model.network]


def _default_run(data: str, preset: str) -> str:
    if not data:
        raise UserError("which images? iddpm train DATA, or --run DIR to go on with a run")
    return "runs/" + (preset or "-".join(place(data).resolve().parts[-2:]).strip("/:") or "run")


def _resolve(run: Path, data: str, preset: str, given: dict[str, Any]) -> tuple[Config, list[str]]:
    """The config of a run: stored, else from its source or preset; then the flags. Also says what a resumed run changes."""
    if bool(given.get("steps")) != bool(given.get("images")):  # one of them replaces the other, wherever that came from
        given = {"steps": 0, "images": 0, **given}
    if given.get("eval_every") == 0:  # what belongs to measuring goes with it
        given = {k: getattr(Train, k) for k in ("eval_samples", "eval_reference", "eval_extractor", "eval_batch")} | given
    if preset and preset not in PRESETS:
        raise UserError(f"--preset {preset} is not one of: {', '.join(PRESETS)}")
    record = run / "config.json"
    if not record.exists() or not any((run / "checkpoints").glob("step_*")):
        if run.exists() and not record.exists() and any(not p.name.startswith(".") for p in run.iterdir()):
            raise UserError(f"{run} is not empty and no run of iddpm: give another --run")
        config = Config()
        if source := given.get("init_from"):
            from iddpm.store.checkpoint import read_weights

            other = read_weights(place(source)).config
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


def write_config(run: Path, config: Config) -> None:
    run.mkdir(parents=True, exist_ok=True)
    replace(run / "config.json", lambda file: file.write(config.to_json().encode()))


VERB = Verb(_train, _parser, "DATA", "train a model on a folder of images; the same command resumes")
