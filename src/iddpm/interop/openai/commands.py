"""The original's commands on this project's engine: its flags in, its files out."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from iddpm import build, fit, rng
from iddpm.config import ENDLESS, Config, check, image_size, small_size
from iddpm.data import read_npz
from iddpm.data.batches import open_data, open_validation
from iddpm.diffusion.denoiser import Network
from iddpm.errors import UserError
from iddpm.interop.openai.formats import files, flags
from iddpm.interop.openai.python import logger
from iddpm.measure.bound import bits_per_dim, summary, write_original_tables
from iddpm.parallel import processes
from iddpm.sampling import draw
from iddpm.sampling.job import Job, trained_classes
from iddpm.sampling.open import digest_of, restore
from iddpm.sampling.writers import draw_into
from iddpm.store.remote import write_file
from iddpm.store.weights import Weights
from iddpm.training import loop as train
from iddpm.words import many

Given = dict[str, Any]  # the original's flags, all of them
OURS = ("time", "images", "images_per_second", "skipped", "lr")  # columns of our log that the original has not


def run(work: str, task: str, program: str, given: Given) -> None:
    """Train, sample or measure (`work`) for one of our tasks, by the flags of one of the two programs."""
    with processes.session(build.device(given["device"])):  # first: the batch of a config depends on how many there are
        WORK[work](_config(task, program, given), given, processes.own_device(build.device(given["device"])))


def _config(task: str, program: str, given: Given) -> Config:
    # the original takes --sigma_small beside --learn_sigma, where it never had an effect; ours would refuse the two
    known = {k: v for k, v in given.items() if not (k == "sigma_small" and given.get("learn_sigma"))}
    config = flags.to_config(task, known, program, processes.world())
    given = {k: given[k] for k in ("seed", "device") if k in given}
    return fit.require_fit(check(config.updated(dict(given, published=True))))


def _path(given: Given, flag: str, what: str) -> Path:
    """A path that a command cannot do without."""
    if not given[flag]:
        raise UserError(f"which {what}? --{flag} {'FOLDER' if flag == 'data_dir' else 'FILE'}")
    return Path(given[flag])


# ---- training


class _Log:
    """The rows of a run in the original's columns and files; the terms of a classifier's loss begin with train_."""

    def __init__(self, config: Config):
        self.terms = ("loss", "acc@") if config.task.classifies else ()

    def row(self, **values: Any) -> None:
        for name, value in values.items():
            if name not in OURS:
                logger.logkv(f"train_{name}" if name.startswith(self.terms) else name, value)
        logger.logkv("samples", values["images"])
        logger.dumpkvs()

    def event(self, step: int, text: str) -> None:
        logger.log(text)

    def close(self) -> None:
        logger.reset()


def _train(config: Config, given: Given, device: torch.device) -> None:
    # with this variable the original ends at its first checkpoint
    if steps := config.train.save_interval if os.environ.get("DIFFUSION_TRAINING_TEST") else given["steps"]:
        config = config.updated({"steps": steps})
    _path(given, "data_dir", "images")
    logger.configure()
    folder = Path(os.environ.get("DIFFUSION_BLOB_LOGDIR") or logger.get_dir())
    # The original would begin anew and overwrite what lies there. A run goes on only from a checkpoint that is named.
    resume = Path(given["resume_checkpoint"]) if given["resume_checkpoint"] else None
    if (held := files.numbered(folder)) and not resume:
        way = f"go on with --resume_checkpoint {held[-1]}, or set another OPENAI_LOGDIR"
        raise UserError(f"{folder} holds checkpoints already: {way}")
    images, config = open_data(config)
    logger.log(images.describe())
    logger.log(f"logs in {logger.get_dir()}, checkpoints in {folder}")
    if config.train.steps == ENDLESS:
        logger.log("this run goes on until it is stopped; Ctrl-C saves it, --steps N ends it")
    last = train.train(
        config, images, folder,
        say=logger.log, store=files.Store(folder, resume, config), log=lambda step: _Log(config), save_start=True,
        held_out=open_validation(config), sheets=False,
    )  # fmt: skip
    if last and processes.rank() == 0:
        print(f"done: {last}")
        print(f"next: the {flags.KINDS[config.model.task].sampler} command with --model_path, or iddpm import {last}")


# ---- sampling


def _open(path: Path, config: Config, device: torch.device) -> tuple[Weights, Network]:
    """The weights of a file of the original's, with the classes stored beside them, and the network."""
    weights = files.read_model(path, config)
    return weights, restore(weights, device, config.train.precision)


def _sample(config: Config, given: Given, device: torch.device) -> None:
    weights, net = _open(_path(given, "model_path", "weights"), config, device)
    config, guide = weights.config, None
    if "classifier_path" in given:
        judge, scores = _open(_path(given, "classifier_path", "weights"), _config("classify", "guided", given), device)
        guide = draw.Guide(judge.config, scores, given["classifier_scale"], judge)
    grid = build.grid(config)
    job = _enlarging(given, config) if config.task.enlarges else _drawing(given, guide.config if guide else config)
    logger.configure()
    n, (height, width), size = len(job.seeds), image_size(config.model), given["batch_size"]
    out = Path(logger.get_dir()) / f"samples_{n}x{height}x{width}x{config.model.image_channels}.npz"
    # Batches and devices do not change the images: a stopped job goes on with others.
    identity = {k: v for k, v in given.items() if k not in ("batch_size", "device")} | {"weights": digest_of(weights)}
    draw_into(
        out, config, job, identity,
        draw=lambda rest, tick: draw.images([draw.painter(config, net, device, tick, guide=guide)], rest, size),
        ticks=lambda n: grid.steps * -(-n // (size * processes.world())),
        replacing=True,  # as the original does
    )  # fmt: skip
    if processes.rank() == 0:
        print(f"{many(n, 'image')}: {out}")


def _drawing(given: Given, config: Config) -> Job:
    """As many images as asked, their classes drawn at random from those trained, as the original draws them."""
    # each --seed has 2^32 image numbers to itself, so that jobs of different seeds share no image
    seeds = range(given["seed"] << 32, (given["seed"] << 32) + given["num_samples"])
    if not config.model.class_cond:
        return Job(seeds, [-1] * len(seeds))
    drawn = rng.uniform(given["seed"], rng.SAMPLE, 0, len(seeds)) * trained_classes(config)
    return Job(seeds, drawn.long().tolist())


def _enlarging(given: Given, config: Config) -> Job:
    """The base samples, each once."""
    path = _path(given, "base_samples", "images")
    # The original begins the file anew when it is through, and so enlarges some images twice.
    images, labels, _ = read_npz(path, small_size(config.model), config.model.image_channels)
    n = min(given["num_samples"], len(images))
    if n < given["num_samples"] and processes.rank() == 0:
        print(f"{path} holds {n} images: each is enlarged once")
    classes = [-1] * n
    if config.model.class_cond:
        if labels is None:
            raise UserError(f"{path} has no labels (arr_1), and this model was trained with classes")
        if labels.max() >= (known := trained_classes(config)):
            raise UserError(f"{path} has the label {labels.max()}: the model knows 0 to {known - 1}")
        classes = labels[:n].tolist()
    first = given["seed"] << 32
    return Job(range(first, first + n), classes, images[:n].transpose(0, 2, 3, 1))


# ---- likelihood


def _nll(config: Config, given: Given, device: torch.device) -> None:
    weights, net = _open(_path(given, "model_path", "weights"), config, device)
    _path(given, "data_dir", "images")
    images, config = open_data(weights.config)
    n = min(given["num_samples"], len(images))
    logger.configure()
    folder = Path(logger.get_dir())
    logger.log(images.describe())
    if n < given["num_samples"]:
        logger.log(f"there are {n} images, each measured once")
    # nll.partial holds what is measured so far: the same command goes on from there.
    bound = bits_per_dim(
        config, net, images, device, chosen=np.arange(n), batch_size=given["batch_size"], seed=given["seed"],
        state=folder / "nll.partial", identity=dict(weights=given["model_path"], data=given["data_dir"]), say=logger.log,
    )  # fmt: skip
    if processes.rank():
        return
    numbers = summary(bound)
    write_file(folder / "nll.json", json.dumps(numbers, indent=1))
    tables = write_original_tables(bound, folder)
    (folder / "nll.partial").unlink(missing_ok=True)
    logger.log(f"done {n} samples: bpd={numbers['bits_per_dim']:.5f} +- {numbers['standard_error'] or 0:.5f}")
    logger.log(f"terms, from the noisiest step down to 0: {', '.join(map(str, tables))}; all numbers: {folder / 'nll.json'}")


WORK: dict[str, Callable[[Config, Given, torch.device], None]] = {"train": _train, "sample": _sample, "nll": _nll}
