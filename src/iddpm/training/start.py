"""What a run is: new or resumed, its config and data; then its training."""

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import torch

from iddpm import build, fit
from iddpm.config import ENDS, Config, check, every_field, fields_of, image_size, settings_of, share, total_steps
from iddpm.config.check import check_end
from iddpm.config.choices import row
from iddpm.config.fields import check_groups, unmet
from iddpm.config.presets import recipes
from iddpm.data import DataSet
from iddpm.data.batches import open_data, open_validation, require_used
from iddpm.data.own import Dataset
from iddpm.errors import UserError
from iddpm.parallel import processes
from iddpm.records import decode
from iddpm.saying import say
from iddpm.store import lock, log
from iddpm.store.files import step_dirs
from iddpm.store.remote import place, remote, write_file
from iddpm.store.weights import read_weights
from iddpm.training import auto, decayed, ending, loop, precision, trial
from iddpm.training.step import learning_rate
from iddpm.words import duration

OWN = "a data set of the program's own"  # in the place of a path
# Settings that name files: kept absolute.
PLACES = ("path", "given", "validation", "validation_given", "eval_reference", "init_from")
RATES = ("lr", "lr_anneal_steps", "lr_warmup_steps", "lr_decay", *ENDS, "batch_size")  # what decides the learning rate
DECAY = 0.2  # the share of a --time in which the rate falls, unless it is given
# What is said of a run's own data: no recipe for others.
OF_A_RUN = dict(classes=(), rule="", num_classes=0, identity="", asked="", path="", given="", finish="")


def start(
    run: Path | None,
    data: str = "",
    preset: str = "",
    given: Mapping[str, Any] = {},
    dry: bool = False,
    own: Dataset | None = None,
    recipe: str = "",
    own_given: Dataset | None = None,
    began: float | None = None,
    look: Callable[[Path], None] = lambda run: None,
) -> Path | None:
    """Train a run, or go on with it, until its end; returns its last checkpoint. With `dry`, say what would be done and stop.

    Without `run` its folder follows from the data or the preset (`default_run`). `own` is a data set of the program's own, in the
    place of files at `data`, `own_given` that of the images given with these; `recipe` a config.json to begin with, as a preset.
    The time of the run counts from when the command `began` (time.monotonic), else from here.
    `look` is called with the run's folder whenever there is more to see of it, and at its end, whatever that is.

    UserError where it cannot be; a refused run leaves nothing behind.
    """
    began = time.monotonic() if began is None else began
    data = data or ("" if own is None else OWN)
    given = given if own_given is None else {**given, "given": OWN}
    run, hint = (run, []) if run else default_run(data, preset, given)
    with ExitStack() as stack:
        stack.enter_context(_session(run, given))
        if not remote(run) and run.exists() and not run.is_dir():
            raise UserError(f"--run {run} is a file: give a folder, which may be new")
        config, notes = resolve(run, data, preset, given, recipe, own)
        if (config.data.path == OWN) != (own is not None):
            raise UserError(f"{run} was trained on a data set of a program's own: go on from that program, or give the images")
        if config.data.given and len({own is None, own_given is None, config.data.given != OWN}) > 1:
            raise UserError("images and those given with them: both are files, or both data sets of a program's own")
        total_steps(config.train)
        # Whatever may be refused comes before the lock and the first file.
        images, config = open_data(config, own, own_given)
        require_used(config, images)
        held_out = open_validation(config)
        if held_out:
            _require_held_out(config, images, held_out)
        build.network(config)  # only to see that its sizes fit
        config, chosen = precision.settle(config, build.device(config.train.device))
        if dry:
            _say_all(images, [*notes, *chosen])
            trial.dry_run(config, images)
            return None
        _require_time(config, run, began)
        still = ["--lr 0: nothing is learned, the weights stay as they are"] * (config.train.lr == 0)
        notes = [*hint, *still, *notes, *chosen, *_other_images(config.data.identity, images.identity())]
        config = config.updated({"identity": json.dumps(images.identity())})
        stack.enter_context(lock.held(run))
        stack.enter_context(log.copied())
        leads = processes.rank() == 0
        if leads:
            write_config(run, config)
        notes += processes.of_first(lambda: decayed.go_back(run, config.train))
        if leads:
            _say_all(images, notes)
        looks = look if not remote(run) else lambda run: None  # which to read again and again would cost
        try:
            last = loop.train(config, images, run, notes=notes, held_out=held_out, began=began, look=looks)
        finally:
            if leads:
                look(run)
        if leads and last:
            what = f"weights in {last.name}, pictures in samples/, numbers in progress.csv, all of it in report.html"
            say(f"done: {run} ({what})", "done", run=run, checkpoint=last)
        if leads:
            command = config.task.next.format(run=run, data=config.data.path)
            say(f"next: {command}", "next", command=command)
        return last


def _say_all(images: DataSet, notes: Iterable[str]) -> None:
    say(images.describe(), "images", count=len(images), classes=list(images.classes))
    for note in notes:
        say(note)


def default_run(data: str, preset: str, given: Mapping[str, Any]) -> tuple[Path, list[str]]:
    """The folder of a run that is given none: runs/PRESET or runs/DATA, or -2 and so on behind that, and then a line on why.

    The same command on the same data goes on in its own.
    """
    if not data:
        raise UserError("which images? iddpm train DATA, or --run DIR to go on with a run")
    recipe = "-".join(part for part in preset.split(",") if part not in ("auto", "none"))
    name = recipe or "-".join(place(data).resolve().parts[-2:]).strip("/:") or "run"
    run, k, hint = place(f"runs/{name}"), 1, list[str]()
    while (run / "config.json").exists() and (why := _is_other(run, data, given)):
        hint = [f"{run} is {why}, so this is a new one; to go on with that: --run {run}"]
        run, k = place(f"runs/{name}-{k + 1}"), k + 1
    return run, hint


def _is_other(run: Path, data: str, given: Mapping[str, Any]) -> str:
    """Why a run is not of this command; "" where it is."""
    stored = Config.from_json((run / "config.json").read_text(), str(run / "config.json"))
    if absolute(stored.data.path) != absolute(data):
        return f"a run on {stored.data.path}"
    if stored.data.asked not in ("", _asked(given)):
        return "the run of another command on the same images"
    return ""


def _asked(given: Mapping[str, Any]) -> str:
    """The flags of a command, to know it again."""
    kept = {name: value for name, value in given.items() if name not in ("device", "path")}
    return json.dumps({name: absolute(value) if name in PLACES else value for name, value in kept.items()}, sort_keys=True)


def absolute(path: str) -> str:
    """A local path from the root of this machine, so that it means the same wherever a run is gone on with."""
    if not path or path == OWN or share(path):
        return path
    found = place(path)
    return path if "://" in str(found) else str(Path(os.path.abspath(found)))


def _session(run: Path, given: Mapping[str, Any]) -> AbstractContextManager[torch.device]:
    """The processes of a run; those of a new one are to agree on its recipe."""
    record = run / "config.json"
    stored = Config.from_json(record.read_text(), str(record)) if record.exists() else Config()
    asked = stored.updated({name: given[name] for name in ("device", "timeout") if name in given})
    return processes.session(build.device(check(asked).train.device), asked.train.timeout)


def resolve(
    run: Path, data: str, preset: str, given: Mapping[str, Any], recipe: str = "", own: Dataset | None = None
) -> tuple[Config, list[str]]:
    """The config of a run: stored, else from its source or preset; then the settings given. And what was chosen or changed.

    The recipe of a new run that says nothing of one is chosen for its images.
    """
    given = {**given, **({"path": data} if data else {})}
    given = {name: absolute(value) if name in PLACES else value for name, value in given.items()}
    asked, record = _asked(given), run / "config.json"
    if record.exists():  # also of a run that was stopped before its first save, or a config that somebody put there
        stored = Config.from_json(record.read_text(), str(record))
        if preset and preset != stored.preset:
            raise UserError(f"--preset {preset}: {run} was begun with {stored.preset or 'none'}; take another --run")
        if not step_dirs(run):  # nothing is learned of its data yet
            stored = stored.updated({k: v for k, v in OF_A_RUN.items() if k not in ("path", "given", "asked")})
        if recipe:
            given = {**_of_recipe(recipe), **given}
        if not stored.data.path and not data:
            raise UserError(f"which images? {record} names none: iddpm train DATA --run {run}")
        if _implied(given, stored.flat()).get("finish"):
            ends = stored.train.steps or stored.train.images or stored.train.time
            rate = learning_rate(stored, decayed.goes_on(run, stored.train)[0], total_steps(stored.train)) if ends else 1.0
            decayed.require_finishable(run, given["finish"], stored.train, rate)
        config, notes = resumed(stored, given, run)
        return config.updated({"asked": stored.data.asked or asked}), notes
    if run.exists() and any(not p.name.startswith(".") for p in run.iterdir()):
        raise UserError(f"{run} is not empty and no run of iddpm: give another --run")
    if not data:
        raise UserError(f"which images? {run} holds no run yet: iddpm train DATA --run {run}")
    if recipe and preset:
        raise UserError("--config and --preset are both what to begin with: give one")
    of_recipe, found, lines = _of_recipe(recipe) if recipe else {}, dict[str, Any](), list[str]()
    if not recipe and auto.applies(preset, given):
        given_or_preset = {name: value for part in (*recipes(preset), given) for name, value in part.items()}
        asked_for = Config().updated(given_or_preset)
        check_groups(asked_for.parts, dict(asked_for.own))  # before the look at the images and the device
        check_end(asked_for.train)
        image_size(asked_for.model)
        total_steps(asked_for.train)
        found, lines = auto.choose(data, given_or_preset, own)
        preset = preset or auto.NAME
    config = new(preset, {**of_recipe, **(_implied(given, of_recipe) if recipe else given)}, found)
    build.solver(fit.require_fit(check(config)))  # which is to draw the sheets of samples: it refuses too few steps
    return config.updated({"asked": asked}), lines


def _of_recipe(recipe: str) -> dict[str, Any]:
    """The settings of a config.json, without what it says of its own data."""
    flat = Config.from_json(place(recipe).read_text(), recipe).flat()
    return {name: value for name, value in flat.items() if name not in OF_A_RUN}


def new(preset: str, given: Mapping[str, Any], found: Mapping[str, Any] = {}) -> Config:
    """The config of a new run: its source's (--init_from), what was `found`, the preset's, then what is given; unchecked."""
    parts, config, inherited = [found, *recipes(preset)], Config(), set[str]()
    if source := given.get("init_from"):
        other = read_weights(place(source)).config
        inherited = set(settings_of(other.model, other.diffusion, other.sample))
        if other.data.classes:  # the rows of named classes go by their names, whatever their number
            inherited -= {"num_classes"}
        config = config.updated({k: v for k, v in other.flat().items() if k in inherited})
    for part in parts:
        config, inherited = config.updated(part), inherited | part.keys()
    given = _implied(given, config.flat())
    if given.get("finish"):
        raise UserError("--finish ends a run that has begun, and here is none: give its --run")
    chosen = given.get("objective", "auto")
    implied = getattr(row("objective", chosen), "implies", {}) if chosen != "auto" else {}
    config = config.updated({**implied, **given, "preset": preset})
    return config.updated(_idle(config, inherited - given.keys()))  # of the source's and the preset's, what has no use here


def _idle(config: Config, names: Iterable[str]) -> dict[str, Any]:
    """Those of the settings that have no effect in a config, at their defaults."""
    now, fields = config.flat(), fields_of(*config.parts)
    idle = {k: fields[k].default for k in names if k in fields and any(unmet(fields[k].only, now))}
    without = {**now, **idle}
    if "guidance" in names and not (without["class_dropout"] or without["given_dropout"]):
        idle["guidance"] = fields["guidance"].default
    return idle


def resumed(stored: Config, given: Mapping[str, Any], run: Path) -> tuple[Config, list[str]]:
    """The config of a run that goes on with other settings, and a line on each; UserError for one that cannot change."""
    now, fields, asked = stored.flat(), every_field(), set(given)
    given = _implied(given, now)
    if given.get("precision") == precision.AUTO and step_dirs(run):  # settled when the run began
        given.pop("precision")
    changed = {k: v for k, v in given.items() if k not in now or _is_another(k, v, now[k])}
    if fixed := [k for k in changed if fields[k].fixed]:
        k = fixed[0]
        was = now.get(k, "none")
        raise UserError(f"--{k} {changed[k]}: {run} was trained with {was}, which cannot change; take another --run")
    falls = [name for name in ("lr_decay", "lr_anneal_steps") if name in asked and name in changed]
    decay = decayed.goes_on(run, stored.updated(changed).train)[1] if falls else None
    if decay:
        raise UserError(
            f"--{falls[0]} has no effect: the rate of {run} falls already, from step {decay['start']} to {decay['end']}; with a "
            "later end as well it goes on from before that"
        )
    notes = [f"changed on resume: {k} {_shown(now.get(k))} -> {_shown(v)}" for k, v in changed.items()]
    config = fit.require_fit(check(stored.updated({**changed, **{k: given[k] for k in PLACES if given.get(k)}})))
    if set(changed) & set(RATES):
        notes += _other_rate(stored, config, run)
    return config, notes


def _shown(value: Any) -> Any:
    return "none" if value == "" else value


def _is_another(name: str, value: Any, now: Any) -> bool:
    return value != now and not (name in PLACES and value == absolute(now))


def _other_rate(before: Config, now: Config, run: Path) -> list[str]:
    """A line where the learning rate of the next step is another than the settings before would have made it."""
    step, decay = decayed.goes_on(run, now.train)
    if not any(getattr(before.train, name) for name in ENDS):  # as imports write it
        return []
    found = decayed.newest(run) or {}
    was, is_ = (
        learning_rate(config, step, end, decayed.kept(found, config.train, end) if decay else None)
        for config in (before, now)
        for end in (total_steps(config.train),)
    )
    return [] if was == is_ else [f"learning rate from step {step} on: {is_:.3g}, and {was:.3g} by the settings before"]


def _other_images(before: str, now: Mapping[str, str]) -> list[str]:
    """A line where the images are others than those a run was trained on so far."""
    was = decode(before or "{}", dict[str, str], "the run's record of its images")
    if not was or was == now:
        return []
    parts = [part for part in now if part != "count" and was.get(part) != now[part]]
    counts = now["count"] if was.get("count") == now["count"] else f"{was.get('count')} before, {now['count']} now"
    return [f"the images are not those of before ({counts}; other {', '.join(parts)}): training goes on with these"]


def _require_held_out(config: Config, images: DataSet, held_out: DataSet) -> None:
    """UserError where images that are to be held out are also trained on, however the paths are written."""
    trained_on = set(map(_real, images.files))
    both = [file for file in held_out.files if _real(file) in trained_on]
    if both or held_out.identity() == images.identity():
        count = f"{len(both) or len(held_out)} of the held-out images are"
        raise UserError(f"--validation {config.data.validation}: {count} also trained on; give images that lie elsewhere")


def _require_time(config: Config, run: Path, began: float) -> None:
    """UserError where a run is given less time than a few of its steps take here, at the least: some images are timed."""
    by, until = decayed.aim(config.train)
    by_clock = by == "finish" or (by == "time" and not step_dirs(run))
    if not by_clock or decayed.goes_on(run, config.train)[1]:
        return
    device, name = build.device(config.train.device), config.train.precision
    step = precision.measured(config, device, [name])[name] * len(processes.share(config.train.batch_size))
    passed = time.monotonic() - began if by == "time" else 0.0
    if until < (least := processes.same(passed + ending.FEW * step)):
        raise UserError(
            f"--{by} {getattr(config.train, by)} is too short: {ending.FEW} steps, with what goes before them, take at least "
            f"{duration(least)} here; give more time, or a smaller network or --batch_size"
        )


def _real(file: Any) -> str:
    """Where a file lies, whatever links lead to it."""
    if not isinstance(file, Path) or remote(file):
        return str(file)
    path = os.path.join(_real_folder(str(file.parent)), file.name)
    return os.path.realpath(path) if os.path.islink(path) else path


@cache
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def _implied(given: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The settings given, with what follows from them where they change those of `now`."""
    asked = [name for name in (*ENDS, "lr_decay", "lr_anneal_steps", "finish") if given.get(name)]
    if "finish" in asked and len(asked) > 1:
        raise UserError(f"--finish says how the run ends: not together with --{asked[0]}")
    if set(asked) & set(ENDS):  # one of them replaces another, wherever that came from
        given = {"steps": 0, "images": 0, "time": "", "finish": "", **given}
    begins_time = "time" in asked and not now.get("time")
    if "lr_decay" in asked or ("lr_decay" in given and begins_time):
        given = {"lr_anneal_steps": 0, **given}
    elif "lr_anneal_steps" in asked:
        given = {"lr_decay": 0.0, **given}
    elif begins_time:
        given = {**given, "lr_decay": now.get("lr_decay") or DECAY, "lr_anneal_steps": 0}
    if given.get("eval_every") == 0:  # what belongs to measuring goes with it
        idle = {k: f.default for k, f in every_field().items() if f.only == "eval_every"}
        given = idle | dict(given)
    return dict(given)


def write_config(run: Path, config: Config) -> None:
    """Keep the config in the run's folder, in one step."""
    run.mkdir(parents=True, exist_ok=True)
    write_file(run / "config.json", config.to_json())
