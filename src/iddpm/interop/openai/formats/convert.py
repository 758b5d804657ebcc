"""A run from the original's files, and such files from a run."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iddpm import fit
from iddpm.config import Config, check, ema_rates, every_field, image_size
from iddpm.data import Images
from iddpm.errors import UserError
from iddpm.interop.openai.formats import files
from iddpm.interop.openai.formats.flags import KINDS, NETWORKS, from_config, line
from iddpm.interop.openai.formats.weights import check_fit, network_shapes, row_of, settle, shapes_of
from iddpm.store import checkpoint
from iddpm.store.checkpoint import Saved
from iddpm.store.weights import Weights, require_finite

# ---- import


def imported(
    path: Path, given: Mapping[str, Any], published: str = "", classes: str = "", alone: bool = False
) -> tuple[Saved, Config, list[str]]:
    """The state in a model's or an average's file and, unless `alone`, the files beside it; its config, and how that came about.

    `given` holds flags, the original's and ours alike; `published` names the published file that it is; `classes` names what
    the labels mean (see `named`). UserError where the files do not belong together, or where something has to be asked.
    """
    weights, record = files.read(path), files.record_of(path)
    if record and published:
        raise UserError(f"--published: {path} was written by iddpm, which kept its config in {record.path.name}")
    config, notes = _stored(record, given) if record else _settled(weights, given, path, published)
    # An average that lies alone is weights by themselves; with a part of its run beside it, it stands for the run.
    name = files.name_of(path)
    beside = [path.with_name(f"{kind}{name['digits']}.pt") for kind in ("model", "opt")] if name["rate"] else [path]
    kin = files.family(path) if not alone and any(p.exists() for p in beside) else None
    if record and kin:
        return files.load_run(path, config)[0], named(config, classes), notes

    rates = _rates(kin, float(name["rate"] or 0), config, given) if kin else []
    config = config.updated({"ema_rate": ",".join(map(str, rates))})
    if kin and kin.optimizer:
        saved = files.load_run(path, config)[0]
        if "batch_size" not in given:  # then where in the data it was is anybody's guess
            saved.state["images"] = 0
    else:
        # A file's number is all that is known of how long it was trained, where no optimizer counted.
        number = int(name["digits"] or 0) or (row_of(published).steps if published else 0)
        weights = files.read(kin.model) if kin else weights
        kept = files.read_averages(kin, rates) if kin else {}
        saved = Saved(number, weights, kept, {}, dict(step=number, images=0, weights_only=True))
    averages = {f"average {rate}": average for rate, average in saved.averages.items()}
    for part, tensors in {(kin.model if kin else path).name: saved.weights, **averages}.items():
        check_fit(shapes_of(tensors), config, f"{path.parent / part}")
        require_finite(tensors, path.parent / part)
    return saved, named(config, classes), notes


def _stored(record: files.Record, given: Mapping[str, Any]) -> tuple[Config, list[str]]:
    """The config that iddpm kept, with flags that do not contradict it."""
    return agreed(record.config, given, record.path), [f"config: {record.path}"]


def agreed(config: Config, given: Mapping[str, Any], source: Path) -> Config:
    """The config that a file holds, with the flags given; UserError where they contradict it."""
    fields, now = every_field(), config.flat()
    for name, value in given.items():
        if name not in fields:
            raise UserError(f"--{name}: {source} holds the config; change it by our names, if at all")
        if fields[name].fixed and value != now.get(name):
            raise UserError(f"--{name} {value} contradicts {source}, which says {now.get(name, 'none')}")
    return fit.require_fit(check(config.updated(given)))


def _settled(weights: Mapping[str, Tensor], given: Mapping[str, Any], path: Path, published: str) -> tuple[Config, list[str]]:
    """The config of the original's weights, and what to tell of how it came about."""
    settled = settle(shapes_of(weights), given, str(path), published)
    if published:
        return settled.config, [f"config: that of the published {published.removesuffix('.pt')}"]
    taken = f"its shapes do not tell these, taken as by default in {settled.program}-diffusion: {line(settled.assumed, {})}"
    alike = f"its shapes are those of a published file; if it is that: --published {' or '.join(settled.alike)}"
    return settled.config, [taken] * bool(settled.assumed) + [alike] * bool(settled.alike)


def _rates(kin: files.Family, first: float, config: Config, given: Mapping[str, Any]) -> list[float]:
    """The averages to take along: those asked for, or all, first that whose file was given: it is the one sampled from."""
    if "ema_rate" in given:
        return list(ema_rates(config.train))
    if not kin.averages and not config.task.classifies and kin.optimizer:
        raise UserError(
            f"ema_RATE_{kin.digits}.pt is missing beside {kin.model}: training would go on without averages; "
            f"for the weights by themselves give --alone"
        )
    return sorted(kin.averages, key=lambda rate: (rate != first, -rate))


def named(config: Config, text: str) -> Config:
    """The config with the trained classes: those of a folder of images, their names in order, or so many; "": as it was."""
    if not text:
        return config
    m = config.model
    if not m.class_cond:
        raise UserError("--classes: this network knows no classes")
    if Path(text).is_dir():
        names = Images.open(text, image_size(m), m.image_channels, labels=config.data.labels, cache_bytes=0).classes
    else:
        names = tuple(map(str, range(int(text))) if text.isdigit() else (part.strip() for part in text.split(",")))
    if len(names) > m.num_classes:
        raise UserError(f"--classes {text}: the network has room for {m.num_classes}")
    return config.updated({"classes": tuple(names)})


# ---- export


def exported(weights: Weights, folder: Path, label_rows: int) -> list[str]:
    """Write the whole checkpoint that weights belong to, or, where there are only weights, these; returns what to tell of it.

    `label_rows` is how many rows label_emb is to have, the further ones zeros; 0: as many as trained.
    """
    config, notes, have = weights.config, [], weights.config.model.num_classes
    if config.model.class_cond and not config.task.classifies and label_rows not in (0, have):
        if label_rows < have:
            raise UserError(f"--label_rows {label_rows}: the network has {have}")
        config = config.updated({"num_classes": label_rows})
        zeros = f"those from {have} on are zeros (--label_rows 0 leaves them out)"
        notes = [f"label_emb has {label_rows} rows, as the original's: {zeros}"]

    def padded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """With zeros for the rows of label_emb that are not there: its weights, and AdamW's moments of them."""
        more = config.model.num_classes - have
        rows = {name: t for name, t in tensors.items() if name.startswith("label_emb.weight") and t.ndim == 2}
        return {**tensors, **{name: torch.cat([t, t.new_zeros(more, t.shape[1])]) for name, t in rows.items()}}

    if (weights.path.parent / "state").is_dir():  # a run's checkpoint, and no lone file: its optimizer goes along
        saved = checkpoint.load(weights.path.parent)
        _require_own(folder, config, saved.step)
        averages = {rate: padded(average) for rate, average in saved.averages.items()}
        saved = saved._replace(weights=padded(saved.weights), averages=averages, optimizer=padded(saved.optimizer))
        kin = files.family(files.save_run(folder, config, saved))
        written = [*kin.record.files, kin.record.path.name] if kin.record else []
        best = next((kin.averages[rate] for rate in ema_rates(config.train) if rate in kin.averages), kin.model)
    else:
        step, rate = weights.about["step"], weights.about.get("ema_rate")
        best = folder / (f"ema_{rate}_{step:06d}.pt" if rate else f"model{step:06d}.pt")
        if best.exists():  # weights alone do not say whose they are
            raise UserError(f"{best} is there already: give another --out, or delete it")
        files.save(best, files.ordered(padded(weights.tensors), network_shapes(config)))
        written = [best.name]
    return [f"wrote in {folder}: {', '.join(written)}", *notes, f"next: {_command(config, best)}"]


def _require_own(folder: Path, config: Config, step: int) -> None:
    """UserError where files of this step lie there already that are not of a run with this config, to be written anew."""
    held = None
    with suppress(OSError, ValueError, TypeError, KeyError):
        held = json.loads((folder / f"iddpm{step:06d}.json").read_text())["config"]
    if held != json.loads(config.to_json()) and (there := sorted(folder.glob(f"*{step:06d}.pt"))):
        raise UserError(f"{there[0]} is of another run, or of other flags: give another --out, or delete it")


def _command(config: Config, file: Path) -> str:
    """What to type there to draw from a file, or why it cannot be used there."""
    try:
        program, flags = from_config(config)
    except UserError as e:
        return f"iddpm import {file} ({e}: its own code cannot use these files)"
    kind, defaults = KINDS[config.model.task], NETWORKS[program][config.model.task]
    return f"in {program}-diffusion, python scripts/{kind.sampler}.py --{kind.weights} {file} {line(flags, defaults)}"
