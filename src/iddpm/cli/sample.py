"""`iddpm sample`: draw images from a run; guided by a classifier, or enlarged by super-resolution models, where asked."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from iddpm.cli.flags import Parser, Verb
from iddpm.config import Config, Draw, Sample, Which, fields_of, make, seed_list
from iddpm.errors import UserError
from iddpm.sampling.open import Opened, beside, open_weights
from iddpm.store.remote import place

if TYPE_CHECKING:
    import numpy as np

    from iddpm.sampling.draw import Guide, Job


def _parser(parser: Parser) -> None:
    parser.add_argument("run", help="a run's folder, one of its checkpoints, or a .safetensors file of weights")
    parser.add_fields(Draw)
    parser.add_fields(Sample, "How to draw them", inherited=True)
    parser.add_fields(Which)


class Inputs(NamedTuple):
    """The small images that a super-resolution model is to enlarge, and what they were made from, where that is known."""

    low_res: "np.ndarray"  # (N, h, w, C) uint8
    labels: list[int] | None
    originals: "np.ndarray | None"  # (N, C, H, W) uint8


def _sample(run: str, **given: Any) -> None:
    from iddpm import build
    from iddpm.parallel import processes

    with processes.session(build.device(make(Which, given).device)):
        _sample_in(run, given)


def _sample_in(run: str, given: dict[str, Any]) -> None:
    draw = make(Draw, given)
    first = open_weights(run, given)
    chain = [first, *(open_weights(name, {k: given[k] for k in given if k in fields_of(Which)}) for name in _names(draw.then))]
    _check(draw, given, chain)
    inputs = _inputs(draw, first.config) if first.config.model.network == "super_res" else None
    guide = _guide(draw, first, given) if draw.classifier else None
    if guide and first.config.sample.solver == "ddim":
        _warn_of_jump(first.config)
    task = _job(draw, first.config, guide.config if guide else first.config, inputs)
    from iddpm import build
    from iddpm.parallel import processes
    from iddpm.sampling import draw as sample

    last, step, rate = chain[-1], first.weights.about["step"], first.weights.about.get("ema_rate", 0)
    identity = dict(
        weights=[str(o.weights.path) for o in chain], step=step, ema_rate=rate, seeds=list(task.seeds),
        labels=list(task.labels), **_shaping(draw), **{k: getattr(first.config.sample, k) for k in fields_of(Sample)},
    )  # fmt: skip
    out = place(draw.out) if draw.out else beside(first.weights.path) / "samples" / f"sample_{step:08d}_{len(task.seeds)}.png"
    drawn = sample.draw_into(
        out,
        last.config,
        task,
        identity,
        draw=lambda rest, tick: _draw(chain, rest, guide, draw, tick),
        ticks=lambda n: sum(sample.solver_steps(o.config, n, first.which.batch_size) for o in chain),
        keep=bool(inputs),
    )
    if processes.rank():
        return
    steps = [build.chain(o.config.diffusion, o.config.sample.sampling_steps).steps for o in chain]
    whose = f"average {rate}" if rate else "raw weights"
    how = f"{first.config.sample.solver}, {' + '.join(map(str, steps))} steps, {whose}"
    print(f"{len(task.seeds)} images of step {step} ({how}): {out}")
    if inputs and drawn is not None:
        _compare(first.config, out, drawn, inputs, task)


def _shaping(draw: Draw) -> dict[str, Any]:
    """What else decides the images, so that a job is only continued by the same one."""
    return {k: getattr(draw, k) for k in ("classifier", "classifier_scale", "low_res", "high_res", "low_res_noise")}


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _check(draw: Draw, given: dict[str, Any], chain: list[Opened]) -> None:
    """Raise UserError for flags that would be ignored, and for models that do not follow on each other."""
    first = chain[0].config
    if draw.seeds and draw.num_samples:
        raise UserError("--seeds and --num_samples both say how many: give one")
    if draw.low_res and draw.high_res:
        raise UserError("--low_res and --high_res both give the images to enlarge: give one")
    if first.model.network == "classifier":
        raise UserError(f"{chain[0].weights.path} is a classifier, which draws nothing: give it as --classifier to another run")
    if first.model.network != "super_res" and (flag := next((f for f in ("low_res", "high_res") if getattr(draw, f)), "")):
        raise UserError(f"--{flag}: {chain[0].weights.path} does not enlarge images; to enlarge its samples: --then RUN")
    if first.model.network == "super_res" and not (draw.low_res or draw.high_res):
        raise UserError(f"{chain[0].weights.path} enlarges images: which? --low_res SMALL_IMAGES, or iddpm sample BASE --then it")
    if draw.low_res_noise and not any(o.config.model.low_res_noise for o in chain):
        raise UserError("--low_res_noise has no effect: no model here was trained with it")
    if "classifier_scale" in given and not draw.classifier:
        raise UserError("--classifier_scale has no effect without --classifier")
    from iddpm.config import image_size, small_size

    for base, up in zip(chain, chain[1:]):
        if up.config.model.network != "super_res":
            raise UserError(f"--then {up.weights.path}: this run does not enlarge images")
        if (has := image_size(base.config.model)) != (wants := small_size(up.config.model)):
            raise UserError(f"--then {up.weights.path} enlarges images of {wants[0]}x{wants[1]}, not {has[0]}x{has[1]}")
        if base.config.model.image_channels != up.config.model.image_channels:
            raise UserError(f"--then {up.weights.path} has {up.config.model.image_channels} channels, unlike the images")
        if up.config.model.class_cond and up.config.data.classes != base.config.data.classes:
            raise UserError(f"--then {up.weights.path} was trained on other classes than {base.weights.path}")


def _guide(draw: Draw, first: Opened, given: dict[str, Any]) -> "Guide":
    from iddpm.sampling.draw import Guide

    judge = open_weights(draw.classifier, {k: given[k] for k in given if k in ("device", "precision")})
    theirs, ours = judge.config, first.config
    if theirs.model.network != "classifier":
        raise UserError(f"--classifier {draw.classifier} is no classifier (train one with --network classifier)")
    for name in ("image_size", "image_channels"):
        if (a := getattr(theirs.model, name)) != (b := getattr(ours.model, name)):
            raise UserError(f"--classifier {draw.classifier} has --{name} {a}, the model {b}")
    for name in ("diffusion_steps", "noise_schedule"):
        if (a := getattr(theirs.diffusion, name)) != (b := getattr(ours.diffusion, name)):
            raise UserError(f"--classifier {draw.classifier} has --{name} {a}, the model {b}: it would see other noise")
    if ours.model.class_cond and ours.data.classes != theirs.data.classes:
        raise UserError(f"--classifier {draw.classifier} was trained on other classes than the model")
    return Guide(theirs, judge.net, draw.classifier_scale)


def _warn_of_jump(config: Config) -> None:
    """DDIM multiplies the first gradient by about alpha_prev / alpha, which is huge where the chain begins in pure noise."""
    from iddpm import build

    table = build.chain(config.diffusion, config.sample.sampling_steps).table
    if (jump := (table.alpha_prev[-1] / table.alpha[-1]).item()) > 10:
        print(f"the first step of ddim would magnify the guidance {jump:.0f} times: take --sampling_steps ddimN (as ddim50), "
              f"which begins below pure noise, or --solver ancestral")  # fmt: skip


def _job(draw: Draw, config: Config, classes_of: Config, inputs: Inputs | None) -> "Job":
    """The seeds and classes to draw: with inputs, seed k enlarges input k, of its class where that is known."""
    from iddpm.sampling import draw as sample

    if inputs is None:
        count = len(_names(draw.labels)) or sample.trained_classes(classes_of)
        count = draw.num_samples or (10 * count if classes_of.model.class_cond else 64)
        return sample.job(classes_of, seed_list(draw.seeds) if draw.seeds else range(count), draw.labels)
    n = len(inputs.low_res)
    seeds = seed_list(draw.seeds) if draw.seeds else list(range(draw.num_samples or n))
    if max(seeds) >= n:
        raise UserError(f"there are {n} images to enlarge, numbered from 0: ask for fewer than {max(seeds) + 1}")
    task = sample.job(config, seeds, draw.labels)
    if config.model.class_cond and not draw.labels:
        if inputs.labels is None:
            raise UserError("this model knows classes, and the images to enlarge have none: give --labels")
        task = task._replace(labels=[inputs.labels[s] for s in seeds])
    return task._replace(low_res=inputs.low_res[seeds])


def _inputs(draw: Draw, config: Config) -> Inputs:
    """The images of --low_res or --high_res, and their labels; UserError where they do not fit the model."""
    import numpy as np

    from iddpm.config import image_size, small_size
    from iddpm.data import Images, read_npz
    from iddpm.sampling import draw as sample

    path, size = (draw.low_res, small_size(config.model)) if draw.low_res else (draw.high_res, image_size(config.model))
    if path.endswith(".npz"):
        images, labels = read_npz(place(path), size, config.model.image_channels)
        if labels is not None and config.model.class_cond and labels.max() >= sample.trained_classes(config):
            raise UserError(f"{path} has the label {labels.max()}; the model knows 0 to {sample.trained_classes(config) - 1}")
    else:
        classes = config.data.classes if config.model.class_cond else None
        rule = config.data.labels if config.model.class_cond else "none"
        data = Images.open(path, size, config.model.image_channels, labels=rule, classes=classes)
        if draw.low_res:
            data.require_size(size)
        images, labels = data.batch(np.arange(len(data))), data.labels
    known = None if labels is None else [int(y) for y in labels]
    if draw.high_res:
        return Inputs(sample.shrunk(config, images), known, images)
    return Inputs(images.transpose(0, 2, 3, 1), known, None)


def _draw(chain: list[Opened], job: "Job", guide: "Guide | None", draw: Draw, tick: Any) -> Iterator["np.ndarray"]:
    """The job's images, batch by batch, through every model of the chain."""
    from iddpm.sampling import draw as sample

    first, size, at = chain[0], chain[0].which.batch_size, 0
    noise = draw.low_res_noise if first.config.model.low_res_noise else 0.0
    for drawn in sample.images(first.config, first.net, job, first.device, size, tick, guide, noise):
        part, at = job.part(at, at + len(drawn)), at + len(drawn)
        for up in chain[1:]:
            noise = draw.low_res_noise if up.config.model.low_res_noise else 0.0
            task = part._replace(low_res=drawn)
            (drawn,) = sample.images(up.config, up.net, task, up.device, size, tick, low_res_noise=noise)
        yield drawn


def _compare(config: Config, out: Path, drawn: "np.ndarray", inputs: Inputs, task: "Job") -> None:
    """Beside the enlarged images: how faithful they are, and a sheet of the first of them."""
    from iddpm.sampling import draw as sample

    seeds = list(task.seeds)
    small, originals = inputs.low_res[seeds], None if inputs.originals is None else inputs.originals[seeds]
    sheet = out.with_name(f"{out.stem}_compared.png")
    few = slice(0, 16)
    sample.comparison_file(config, sheet, drawn[few], small[few], None if originals is None else originals[few])
    print(f"beside the small images and their bicubic enlargement: {sheet}")
    if originals is None:
        return
    result = sample.fidelity(config, drawn, small, originals)
    record = out.with_name(f"{out.stem}_compared.json")
    record.write_text(json.dumps(result, indent=1))
    for name, unit, text in (("psnr", " dB", "PSNR"), ("ssim", "", "SSIM")):
        if f"{name}_model" in result:
            print(f"{text} {result[f'{name}_model']:.3f}{unit} (bicubic {result[f'{name}_bicubic']:.3f}{unit})")
    print(f"the numbers: {record}")


VERB = Verb(_sample, _parser, "RUN", "draw images from a run", resumes=True)
