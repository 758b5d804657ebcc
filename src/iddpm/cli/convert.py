"""`iddpm import`: a run from the files of other programs. `iddpm export`: such files from a run."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from iddpm.cli.flags import Parser, Verb, listed
from iddpm.config import Diffusion, Model, Sample, Train
from iddpm.errors import UserError
from iddpm.interop.openai.formats.flags import FLAGS, NUM_CLASSES
from iddpm.saying import say

# ---- import

NOT_HERE = (  # of the original's flags: what belongs to a command that trains, samples or measures
    "data_dir", "val_data_dir", "resume_checkpoint", "model_path", "classifier_path", "classifier_scale", "base_samples",
    "num_samples", "eval_interval",
)  # fmt: skip


def _import_parser(parser: Parser) -> None:
    text = (
        "model000000.pt, ema_0.9999_000000.pt, or any file of such weights; a .pkl of EDM's or EDM2's; the folder of diffusers' "
        "UNet2DModel; a checkpoint of denoising-diffusion-pytorch's Trainer or of k-diffusion"
    )
    parser.add_argument("file", help=text)
    parser.add_argument("--run", default="", metavar="DIR", help="the folder to make of it [runs/NAME]")
    parser.add_argument("--published", default="", metavar="NAME", help="it is this published file: take its flags")
    text = "the classes it was trained on: the folder of its images, or their names in order, or how many [all rows]"
    parser.add_flag("classes", str, text, metavar="DIR|NAMES|N", default="")
    text = "only this file, not the optimizer and averages beside it: training cannot go on [False]"
    parser.add_flag("alone", bool, text, default=False)
    for group in (Model, Diffusion, Sample, Train):
        parser.add_fields(group)
    for name, like in FLAGS.items():
        if not parser.has(name) and name not in NOT_HERE:
            parser.add_flag(name, type(like), title="The original's names of these")
    parser.epilog = (
        "What the shapes of the weights show need not be given: widths, blocks, attention, learned variance, classes.\n"
        "What neither shapes nor flags say is taken from the original's defaults, and the command says so. A file that\n"
        "iddpm wrote brings its own config."
    )


def _reader(path: Path) -> tuple[str, Callable[..., Any] | None]:
    """What a path is, and what makes a run's state of it, the flags and the classes; none where it may be of the original."""
    from iddpm.interop import ddpm_pytorch
    from iddpm.interop.diffusers import read
    from iddpm.interop.edm import read as edm
    from iddpm.interop.k_diffusion import read as k_diffusion
    from iddpm.interop.openai.formats import files

    if path.is_dir():
        return "a folder", partial(read.imported, path)
    if not path.is_file():
        return "", None
    if edm.is_pickle(path):
        return "a pickle of EDM's kind", partial(edm.imported, path)
    if path.suffix == ".safetensors":
        return "a .safetensors", partial(k_diffusion.imported, path, k_diffusion.opened(path))
    found = files.load(path)
    for module, name in ((ddpm_pytorch, "denoising-diffusion-pytorch"), (k_diffusion, "k-diffusion")):
        if module.is_one(found):
            return f"of {name}", partial(module.imported, path, found)
    return "", None


def _import(file: str, run: str, published: str, classes: str, alone: bool, **given: Any) -> None:
    from iddpm.store.remote import place

    path, folder = Path(file), place(run or f"runs/{Path(file).stem}")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: give another --run")
    from iddpm.interop.openai.formats import convert
    from iddpm.store import checkpoint
    from iddpm.training.start import write_config

    what, imported = _reader(path)
    if imported and (published or alone):
        raise UserError(f"--{'published' if published else 'alone'} is for files of the original, and {path} is {what}")
    if imported:
        saved, config, notes = imported(given, classes)
    else:
        saved, config, notes = convert.imported(path, given, published, classes, alone)
    step = checkpoint.save(folder, config, saved)
    write_config(folder, config)
    count = sum(t.numel() for t in saved.weights.values())
    print("\n".join([f"{path}: {len(saved.weights)} tensors, {count:,} weights", *notes]))
    lone = saved.state.get("weights_only")
    averages = [f"average {rate}" for rate in saved.averages]
    content = ", ".join(["weights", *averages, "no optimizer" if lone else f"the optimizer after {saved.step} steps"])
    say(f"wrote {folder / 'config.json'} and {step} ({content})", "wrote", path=folder)
    use = config.task.next.format(run=folder, data="IMAGES")
    new = f"to train from these weights, iddpm train DATA --run NEW --init_from {folder} --steps N"
    print(f"next: {use}; {new if lone else f'to train on, iddpm train DATA --run {folder} --steps N'}")


IMPORT = Verb(
    _import,
    _import_parser,
    "FILE",
    "a run from weights of improved- or guided-diffusion, diffusers, EDM, EDM2, k-diffusion or denoising-diffusion-pytorch",
)

# ---- export

TO = {  # whose files to write: what they are, and which flags are theirs alone
    "openai": "weights, averages and optimizer for improved- or guided-diffusion (.pt)",
    "diffusers": "a folder that diffusers.DiffusionPipeline loads and that draws the same images from the same noise",
    "onnx": "a graph for any batch, and the levels that a sampler walks (extra: export)",
    "safetensors": "one file of weights, with the config in it",
}


def _export_parser(parser: Parser) -> None:
    parser.add_argument("run", help="a run's folder, one of its checkpoints, or a .safetensors file of weights")
    parser.add_argument("--to", default="openai", choices=tuple(TO), help="whose files to write, see below [openai]")
    parser.add_argument("--out", default="", metavar="DIR", help="where they go [RUN/TO]")
    parser.add_argument("--checkpoint_step", type=int, default=-1, metavar="N", help="of this step; -1: the newest [-1]")
    text = f"rows of label_emb, of which the original has {NUM_CLASSES}; 0: as many as trained (to openai) [{NUM_CLASSES}]"
    parser.add_argument("--label_rows", type=int, metavar="N", help=text)
    text = "by what the pipeline draws (to diffusers) [the run's solver if it is one of these, else ddim]"
    parser.add_argument("--solver", choices=("ancestral", "ddim"), help=text)
    parser.epilog = f"--to:\n{listed(TO)}"


def _export(run: str, to: str, out: str, checkpoint_step: int, label_rows: int | None, solver: str | None) -> None:
    for flag, value, owner in (("label_rows", label_rows, "openai"), ("solver", solver, "diffusers")):
        if value is not None and to != owner:
            raise UserError(f"--{flag} has no effect with --to {to}: it belongs to --to {owner}")
    if checkpoint_step < -1:
        raise UserError(f"--checkpoint_step {checkpoint_step}: give a step, or -1 for the newest")
    from iddpm.interop import onnx, single
    from iddpm.interop.diffusers import write
    from iddpm.interop.openai.formats import convert
    from iddpm.sampling.open import beside
    from iddpm.store.remote import place
    from iddpm.store.weights import read_weights

    weights = read_weights(place(run), checkpoint_step if checkpoint_step >= 0 else None)
    folder = place(out) if out else beside(weights.path) / to
    if to != "openai" and folder.is_dir() and any(folder.iterdir()):  # what lies there may be replaced if it is ours alone
        card = folder / "README.md"
        if not card.is_file() or "iddpm" not in card.read_text(errors="replace"):
            raise UserError(f"{folder} is not empty, and no export of iddpm: give another --out")
    writers: dict[str, Callable[[], list[str]]] = {
        "openai": lambda: convert.exported(weights, folder, NUM_CLASSES if label_rows is None else label_rows),
        "diffusers": lambda: write.exported(weights, folder, solver or ""),
        "onnx": lambda: onnx.exported(weights, folder),
        "safetensors": lambda: single.exported(weights, folder),
    }
    for line in writers[to]():
        say(line)
    say("", "wrote", path=folder)


EXPORT = Verb(_export, _export_parser, "RUN", "a run's weights as the files of other programs")
