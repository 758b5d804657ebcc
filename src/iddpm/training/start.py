"""What a run is: new or resumed, its config and data; then its training."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from iddpm import build
from iddpm.config import Config, check, every_field, settings_of, total_steps
from iddpm.config.presets import PRESETS
from iddpm.data.batches import open_data, open_validation
from iddpm.data.own import Dataset
from iddpm.errors import UserError
from iddpm.parallel import processes
from iddpm.store import lock, log
from iddpm.store.checkpoint import read_weights
from iddpm.store.remote import place, replace
from iddpm.training import loop, trial

OWN = "a data set of the program's own"  # in the place of a path


def start(
    run: Path, data: str = "", preset: str = "", given: Mapping[str, Any] = {}, dry: bool = False, own: Dataset | None = None
) -> Path | None:
    """Train a run, or go on with it, until its end; returns its last checkpoint. With `dry`, say what would be done and stop.

    `own` is a data set of the program's own, in the place of files at `data`.

    UserError where it cannot be; a refused run leaves nothing behind.
    """
    config, notes = resolve(run, data or ("" if own is None else OWN), preset, given)
    if (config.data.path == OWN) != (own is not None):
        raise UserError(f"{run} was trained on a data set of a program's own: go on from that program, or give the images")
    total_steps(config.train)
    with ExitStack() as stack:
        stack.enter_context(processes.session(build.device(config.train.device), config.train.timeout))
        # Whatever may be refused comes before the lock and the first file.
        images, config = open_data(config, own)
        held_out = open_validation(config)
        build.network(config)  # only to see that its sizes fit
        if dry:
            trial.dry_run(config, images)
            return None
        stack.enter_context(lock.held(run))
        stack.enter_context(log.copied())
        leads = processes.rank() == 0
        if leads:
            print("\n".join((images.describe(), *notes)))
            write_config(run, config)
        last = loop.train(config, images, run, notes=notes, held_out=held_out)
        if leads and last:
            print(f"done: {run} (weights in {last.name}, pictures in samples/, numbers in progress.csv)")
        if leads:
            print(f"next: {config.task.next.format(run=run, data=config.data.path)}")
        return last


def default_run(data: str, preset: str) -> str:
    """The folder of a run that is given none."""
    if not data:
        raise UserError("which images? iddpm train DATA, or --run DIR to go on with a run")
    return "runs/" + (preset or "-".join(place(data).resolve().parts[-2:]).strip("/:") or "run")


def resolve(run: Path, data: str, preset: str, given: Mapping[str, Any]) -> tuple[Config, list[str]]:
    """The config of a run: stored, else from its source or preset; then the settings given. And what a resumed run changes."""
    record = run / "config.json"
    if record.exists() and any((run / "checkpoints").glob("step_*")):
        stored = Config.from_json(record.read_text(), str(record))
        if preset and preset != stored.preset:
            raise UserError(f"--preset {preset}: {run} was begun with {stored.preset or 'none'}; take another --run")
        return resumed(stored, dict(given, path=data) if data else given, str(run))
    # A folder with a config and no checkpoint was stopped before its first save: it starts anew, perhaps with other flags.
    if run.exists() and not record.exists() and any(not p.name.startswith(".") for p in run.iterdir()):
        raise UserError(f"{run} is not empty and no run of iddpm: give another --run")
    if not data:
        raise UserError(f"which images? {run} holds no run yet: iddpm train DATA --run {run}")
    return build.require_fit(check(new(preset, {**given, "path": data}))), []


def new(preset: str, given: Mapping[str, Any]) -> Config:
    """The config of a new run: its source's (--init_from), the preset's, then the settings given; unchecked."""
    if preset and preset not in PRESETS:
        raise UserError(f"--preset {preset} is not one of: {', '.join(PRESETS)}")
    given, config = _implied(given), Config()
    if source := given.get("init_from"):
        other = read_weights(place(source)).config
        inherited = settings_of(other.model, other.diffusion, other.sample)
        config = config.updated({k: v for k, v in other.flat().items() if k in inherited})
    if preset:
        config = config.updated(PRESETS[preset][1])
    return config.updated({**given, "preset": preset})


def resumed(stored: Config, given: Mapping[str, Any], run: str) -> tuple[Config, list[str]]:
    """The config of a run that goes on with other settings, and a line on each; UserError for one that cannot change."""
    given, now, fields = _implied(given), stored.flat(), every_field()
    changed = {k: v for k, v in given.items() if k not in now or v != now[k]}
    if fixed := [k for k in changed if fields[k].fixed]:
        k = fixed[0]
        was = now.get(k, "none")
        raise UserError(f"--{k} {changed[k]}: {run} was trained with {was}, which cannot change; take another --run")
    notes = [f"changed on resume: {k} {now.get(k)} -> {v}" for k, v in changed.items()]
    return build.require_fit(check(stored.updated(changed))), notes


def _implied(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings given, with what follows from them."""
    if bool(given.get("steps")) != bool(given.get("images")):  # one of them replaces the other, wherever that came from
        given = {"steps": 0, "images": 0, **given}
    if given.get("eval_every") == 0:  # what belongs to measuring goes with it
        idle = {k: f.default for k, f in every_field().items() if f.only == "eval_every"}
        given = idle | dict(given)
    return dict(given)


def write_config(run: Path, config: Config) -> None:
    """Keep the config in the run's folder, in one step."""
    run.mkdir(parents=True, exist_ok=True)
    replace(run / "config.json", lambda file: file.write(config.to_json().encode()))
