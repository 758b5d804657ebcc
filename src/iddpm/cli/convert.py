"""`iddpm import`: a run from the original's files. `iddpm export`: such files from a run."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iddpm.cli.flags import Parser, Verb, boolean
from iddpm.config import Config, Diffusion, Model, Sample, Train, ema_rates, fields_of
from iddpm.errors import UserError
from iddpm.interop.openai.formats import flags

if TYPE_CHECKING:
    from torch import Tensor

    from iddpm.interop.openai.formats.files import Family
    from iddpm.store.checkpoint import Saved

# ---- import


def _import_parser(parser: Parser) -> None:
    parser.add_argument("file", help="model000000.pt, ema_0.9999_000000.pt, or any file of such weights")
    parser.add_argument("--run", default="", metavar="DIR", help="the folder to make of it [runs/NAME]")
    parser.add_argument("--published", default="", metavar="NAME", help="it is this published file: take its flags")
    parser.add_argument(
        "--classes",
        default="",
        metavar="DIR|NAMES|N",
        help="the classes it was trained on: the folder of its images, or their names in order, or how many [all rows]",
    )
    parser.booleans.add("alone")
    parser.add_argument(
        "--alone", type=boolean, default=False, metavar="BOOL",
        help="only this file, not the optimizer and averages beside it: training cannot go on [False]",
    )  # fmt: skip
    for group in (Model, Diffusion, Sample, Train):
        parser.add_fields(group)
    section = parser.add_argument_group("The original's names of these")
    taken = {option.removeprefix("--") for action in parser._actions for option in action.option_strings}
    names = {k: v for table in flags.COMMANDS.values() for command in table.values() for k, v in command.items()}
    for name, value in names.items():
        if name in taken or name in NOT_HERE:
            continue
        if isinstance(value, bool):
            parser.booleans.add(name)
        kind, metavar = (boolean, "BOOL") if isinstance(value, bool) else (type(value), "N" if value != "" else "TEXT")
        section.add_argument(f"--{name}", type=kind, metavar=metavar, default=argparse.SUPPRESS)
    parser.epilog = (
        "What shapes tell need not be given: widths, blocks, attention, learned variance, classes. What neither they nor flags\n"
        "tell is as by default in the original, and named. A file that iddpm wrote brings its own config."
    )


NOT_HERE = (  # of the original's flags: what belongs to a command that trains, samples or measures
    "data_dir", "val_data_dir", "resume_checkpoint", "model_path", "classifier_path", "classifier_scale", "base_samples",
    "num_samples", "eval_interval",
)  # fmt: skip


def _import(file: str, run: str, published: str, classes: str, alone: bool, **given: Any) -> None:
    path, folder = Path(file), Path(run or f"runs/{Path(file).stem}")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: give another --run")
    from iddpm.cli.train import write_config
    from iddpm.interop.openai.formats import files
    from iddpm.interop.openai.formats.weights import row_of
    from iddpm.store import checkpoint

    weights, record = files.read(path), files.record_of(path)
    if record and published:
        raise UserError(f"--published: {path} was written by iddpm, which kept its config in {record.name}")
    if record:
        config, notes = _stored(files.recorded(record), given, record), [f"config: {record}"]
    else:
        config, notes = _settled(weights, given, path, published)
    kin = _kin(path, alone)
    if kin is None:
        number = _number(path) or (row_of(published).steps if published else 0)
        saved = checkpoint.Saved(number, weights, {}, {}, dict(step=number, images=0, weights_only=True))
        config = config.updated({"ema_rate": ""})
    elif record:
        saved = files.load_run(path, config)[0]
    else:
        saved, config = _saved(path, kin, config, given)
    config = _with_classes(config, classes)
    step = checkpoint.save(folder, config, saved)
    write_config(folder, config)
    count = sum(t.numel() for t in weights.values())
    print("\n".join([f"{path}: {len(weights)} tensors, {count:,} weights", *notes]))
    print(f"wrote {folder / 'config.json'} and {step} ({_content(saved)})")
    print(f"next: {_next(config, saved, folder)}")


def _kin(path: Path, alone: bool) -> "Family | None":
    """The files beside a file, if training is to go on from them; None for weights by themselves."""
    from iddpm.interop.openai.formats import files

    average = files.AVERAGE.match(path.name)
    if alone or (average and not any((path.parent / f"{kind}{average[2]}.pt").exists() for kind in ("model", "opt"))):
        return None
    kin = files.family(path)
    if kin.optimizer is None and not kin.record:
        return kin if kin.averages else None
    return kin


def _settled(weights: "Mapping[str, Tensor]", given: dict[str, Any], path: Path, published: str) -> tuple[Config, list[str]]:
    """The config of the original's weights, and what to tell of how it came about."""
    from iddpm.interop.openai.formats import weights as of

    settled = of.settle(of.shapes_of(weights), given, str(path), published)
    if published:
        return settled.config, [f"config: that of the published {published.removesuffix('.pt')}"]
    notes = []
    if settled.assumed:
        text = " ".join(f"--{k} {v}" for k, v in settled.assumed.items())
        notes.append(f"its shapes do not tell these, taken as by default in {settled.program}-diffusion: {text}")
    if settled.alike:
        notes.append(f"its shapes are those of a published file; if it is that: --published {' or '.join(settled.alike)}")
    return settled.config, notes


def _stored(config: Config, given: dict[str, Any], record: Path) -> Config:
    """The config that iddpm kept, with flags that do not contradict it."""
    from iddpm.config import check

    metas, now = {k: m for _, g in config.groups() for k, (_, _, m) in fields_of(g).items()}, config.flat()
    for name, value in given.items():
        if name not in now:
            raise UserError(f"--{name}: {record} holds the config; change it by our names, if at all")
        if metas[name]["fixed"] and value != now[name]:
            raise UserError(f"--{name} {value} contradicts {record}, which says {now[name]}")
    return check(config.updated(given))


def _saved(path: Path, kin: "Family", config: Config, given: dict[str, Any]) -> "tuple[Saved, Config]":
    """The state of the original's files, and the config with the rates of its averages."""
    from iddpm.interop.openai.formats import files
    from iddpm.interop.openai.formats.weights import check_fit, shapes_of
    from iddpm.store.checkpoint import Saved

    average = files.AVERAGE.match(path.name)
    first = [float(average[1])] if average else []
    rates = first + sorted((r for r in kin.averages if r not in first), reverse=True)
    if "ema_rate" in given:
        rates = list(ema_rates(config.train))
    elif not rates and config.model.network != "classifier" and kin.optimizer:
        raise UserError(
            f"ema_RATE_{kin.digits}.pt is missing beside {path}: training would go on without averages; "
            f"for the weights by themselves give --alone"
        )
    config = config.updated({"ema_rate": ",".join(map(str, rates))})
    if kin.optimizer is None:
        number = int(kin.digits)
        averages = {rate: files.read(kin.averages[rate]) for rate in rates}
        saved = Saved(number, files.read(kin.model), averages, {}, dict(step=number, images=0, weights_only=True))
    else:
        saved = files.load_run(path, config)[0]
        if "batch_size" not in given:  # then where in the data it was is anybody's guess
            saved.state["images"] = 0
    for name, tensors in ((kin.model.name, saved.weights), *((f"average {r}", a) for r, a in saved.averages.items())):
        check_fit(shapes_of(tensors), config, f"{path.parent / name}")
    return saved, config


def _number(path: Path) -> int:
    """The number in the name of a model's or an average's file, or 0."""
    from iddpm.interop.openai.formats import files

    match = files.AVERAGE.match(path.name) or files.MODEL.match(path.name)
    return int(match[match.re.groups]) if match else 0


def _with_classes(config: Config, text: str) -> Config:
    if not text:
        return config
    if not config.model.class_cond:
        raise UserError("--classes: this network knows no classes")
    if Path(text).is_dir():
        from iddpm.config import image_size
        from iddpm.data import Images

        m = config.model
        found = Images.open(text, image_size(m), m.image_channels, labels=config.data.labels, cache_bytes=0)
        names = tuple(found.classes)
    elif text.isdigit():
        names = tuple(map(str, range(int(text))))
    else:
        names = tuple(part.strip() for part in text.split(","))
    if len(names) > config.model.num_classes:
        raise UserError(f"--classes {text}: the network has room for {config.model.num_classes}")
    return config.updated({"classes": names})


def _content(saved: "Saved") -> str:
    averages = [f"average {rate}" for rate in saved.averages]
    rest = "no optimizer" if saved.state.get("weights_only") else f"the optimizer after {saved.step} steps"
    return ", ".join(["weights", *averages, rest])


def _next(config: Config, saved: "Saved", run: Path) -> str:
    use = {
        "unet": f"iddpm sample {run}, iddpm nll {run} DATA",
        "super_res": f"iddpm sample {run} --low_res SMALL_IMAGES, or iddpm sample BASE --then {run}",
        "classifier": f"iddpm sample RUN --classifier {run}",
    }[config.model.network]
    if saved.state.get("weights_only"):
        return f"{use}; to train from these weights, iddpm train DATA --run NEW --init_from {run} --steps N"
    return f"{use}; to train on, iddpm train DATA --run {run} --steps N"


IMPORT = Verb(_import, _import_parser, "FILE", "a run from weights of improved- or guided-diffusion (.pt)")

# ---- export


def _export_parser(parser: Parser) -> None:
    parser.add_argument("run", help="a run's folder, one of its checkpoints, or a .safetensors file of weights")
    parser.add_argument("--to", default="openai", choices=("openai",), help="whose files to write [openai]")
    parser.add_argument("--out", default="", metavar="DIR", help="where they go [RUN/openai]")
    parser.add_argument("--checkpoint_step", type=int, default=-1, metavar="N", help="of this step; -1: the newest [-1]")
    parser.add_argument(
        "--label_rows", type=int, default=flags.NUM_CLASSES, metavar="N",
        help=f"rows of label_emb, of which the original has {flags.NUM_CLASSES}; 0: as many as trained [{flags.NUM_CLASSES}]",
    )  # fmt: skip


def _export(run: str, to: str, out: str, checkpoint_step: int, label_rows: int) -> None:
    from iddpm.interop.openai.formats import files
    from iddpm.sampling.open import beside
    from iddpm.store import checkpoint

    weights = checkpoint.read_weights(Path(run), checkpoint_step if checkpoint_step >= 0 else None)
    folder = Path(out) if out else beside(weights.path) / "openai"
    config, notes = _padded_config(weights.config, label_rows)
    whole = weights.path.parent / "state"
    if whole.is_dir():
        saved = checkpoint.load(whole.parent)
        saved = saved._replace(
            weights=_padded(saved.weights, config),
            averages={rate: _padded(average, config) for rate, average in saved.averages.items()},
            optimizer=_padded(saved.optimizer, config),
        )
        model = files.save_run(folder, config, saved)
        kin = files.family(model)
        written = [p.name for p in (model, *kin.averages.values(), kin.optimizer, kin.record) if p]
        rates = ema_rates(config.train)
        best = kin.averages.get(rates[0], model) if rates else model
    else:
        step, rate = weights.about["step"], weights.about.get("ema_rate")
        best = folder / (f"ema_{rate}_{step:06d}.pt" if rate else f"model{step:06d}.pt")
        files.write_weights(best, _padded(weights.tensors, config), config)
        written = [best.name]
    print("\n".join([f"wrote in {folder}: {', '.join(written)}", *notes]))
    print(f"next: {_original_command(config, best)}")


def _padded_config(config: Config, rows: int) -> tuple[Config, list[str]]:
    have = config.model.num_classes
    if not config.model.class_cond or config.model.network == "classifier" or not rows or rows == have:
        return config, []
    if rows < have:
        raise UserError(f"--label_rows {rows}: the network has {have}")
    return config.updated({"num_classes": rows}), [
        f"label_emb has {rows} rows, as the original's: those from {have} on are zeros (--label_rows 0 leaves them out)"
    ]


def _padded(tensors: "dict[str, Tensor]", config: Config) -> "dict[str, Tensor]":
    """The tensors with zeros for the label_emb's rows that are not there: its weights, and AdamW's moments of them."""
    import torch

    out = dict(tensors)
    for name, value in tensors.items():
        if name.startswith("label_emb.weight") and value.ndim == 2:
            more = config.model.num_classes - len(value)
            out[name] = torch.cat([value, value.new_zeros(more, value.shape[1])]) if more else value
    return out


def _original_command(config: Config, file: Path) -> str:
    """What to type there to draw from a file, or why it cannot be used there."""
    try:
        program, named = flags.from_config(config)
    except UserError as e:
        return f"iddpm import {file} ({e}: its own code cannot use these files)"
    defaults = flags.NETWORKS[program][config.model.network]
    line = flags.line(named, defaults)
    script, option = {
        "unet": ("image_sample", "model_path"),
        "super_res": ("super_res_sample", "model_path"),
        "classifier": ("classifier_sample", "classifier_path"),
    }[config.model.network]
    return f"in {program}-diffusion, python scripts/{script}.py --{option} {file} {line}"


EXPORT = Verb(_export, _export_parser, "RUN", "a run's weights, averages and optimizer as the original's files (.pt)")
