"""`iddpm sample`: draw images from a run; guided by a classifier, or enlarged by super-resolution models, where asked."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iddpm.cli.flags import Parser, Verb
from iddpm.config import (
    FOUND,
    Config,
    Draw,
    Sample,
    Which,
    fields_of,
    given_shape,
    image_size,
    is_chain,
    make,
    settings_of,
    small_size,
)
from iddpm.config.tasks import TASKS
from iddpm.errors import UserError
from iddpm.saying import say
from iddpm.store.remote import place
from iddpm.words import many

if TYPE_CHECKING:
    import numpy as np

    from iddpm.build import Weak
    from iddpm.sampling.draw import Guide
    from iddpm.sampling.job import Inputs, Job
    from iddpm.sampling.open import Opened
    from iddpm.store.weights import Weights

# What decides the images beside weights, seeds and classes: a job is only continued by the same one.
FEW = 100  # steps below which the fixed large variance leaves noise in the images
SAME_WORLD = (
    "image_size", "image_channels", "diffusion_steps", "noise_schedule", "snr_shift", "zero_terminal_snr", "rescale_timesteps",
)  # fmt: skip
SHAPING = ("classifier", "classifier_scale", "autoguide", "autoguidance", "low_res", "high_res", "low_res_noise")
INPUTS = tuple(name for task in TASKS.values() for name in task.inputs)  # flags of the images that a model is given


def _parser(parser: Parser) -> None:
    parser.add_argument("run", help="a run's folder, one of its checkpoints, or a .safetensors file of weights")
    parser.add_fields(Draw)
    parser.add_fields(Sample, "How to draw them", inherited=True)
    parser.add_fields(Which)


def _sample(run: str, **given: Any) -> None:
    draw, which = make(Draw, given), make(Which, given)
    if draw.seeds and draw.num_samples:
        raise UserError("--seeds and --num_samples both say how many: give one")
    if len(named := [f"--{name}" for name in INPUTS if getattr(draw, name)]) > 1:
        raise UserError(f"{' and '.join(named)} all name the images that the model is given: give one")
    if draw.fit and draw.given.endswith(".npz"):
        raise UserError(f"--fit scales files: {draw.given} must hold images of the model's size")
    idle = given.keys() & (fields_of(Draw).keys() - {"find_grid"} | {"solver"})
    if draw.find_grid and idle:
        raise UserError(f"--{min(idle)} has no effect with --find_grid, which draws nothing")
    from iddpm import build, fit
    from iddpm.parallel import processes
    from iddpm.sampling.draw import images, painter
    from iddpm.sampling.job import asked, inputs
    from iddpm.sampling.open import open_weights
    from iddpm.sampling.writers import draw_into, free

    with processes.session(build.device(which.device)):
        if draw.find_grid:
            _find_grid(run, draw.find_grid, given, which)
            return
        first = open_weights(place(run), which, {k: given[k] for k in given if k in settings_of(Sample)})
        chain = [first, *(open_weights(place(name.strip()), which) for name in draw.then.split(",") if name.strip())]
        _check(draw, chain)
        fit.require_steering(first.config, given, away=bool(draw.autoguide))
        solver = build.solver(first.config)  # now, so that what it refuses leaves nothing behind
        guide = _guide(draw, first, which) if draw.classifier else None
        weak = _weak(draw, first, which) if draw.autoguide else None
        classes_of = guide.config if guide else first.config
        given_images = inputs(draw, first.config, classes_of) if first.config.task.inputs else None
        task = asked(draw, classes_of, given_images)
        grids = [build.grid(o.config) for o in chain]
        step, rate = first.weights.about["step"], first.weights.about.get("ema_rate", 0)
        steering: dict[str, Any] = dict(guide=guide, weak=weak[1] if weak else None)
        others = [*([guide.weights] if guide else []), *([weak[0].weights] if weak else [])]
        identity = _identity(draw, chain, others, task)
        default = first.home / "samples" / f"sample_{step:08d}_{len(task.seeds)}.png"
        out = place(draw.out) if draw.out else free(default, identity)

        def drawing(rest: "Job", tick: Callable[[], Any]) -> "Iterator[np.ndarray]":
            painters = []
            for o in chain:
                noise = draw.low_res_noise if o.config.model.low_res_noise else 0.0  # only for a model trained with it
                painters.append(painter(o.config, o.net, o.device, tick, noise, **(steering if o is first else {})))
            return images(painters, rest, which.batch_size)

        drawn = draw_into(
            out, chain[-1].config, task, identity, drawing, keep=bool(given_images),
            ticks=lambda n: sum(g.steps for g in grids) * -(-n // (which.batch_size * processes.world())),
        )  # fmt: skip
        if processes.rank():
            return
        whose = f"average {rate}" if rate else "raw weights"
        if why := _too_few(first.config, grids[0].steps):
            print(why)
        steps = "its own" if getattr(solver, "own_steps", False) else " + ".join(str(g.steps) for g in grids)
        how = f"{first.config.sample.solver}, {steps} steps, {whose}"
        text = f"{many(len(task.seeds), 'image')} of step {step} ({how}): {out}"
        say(text, "wrote", path=out, images=len(task.seeds), step=step)
        if given_images and drawn is not None:
            _compare(first.config, out, drawn, given_images, list(task.seeds))


def _find_grid(run: str, steps: int, given: dict[str, Any], which: Which) -> None:
    """The levels that are best for so many steps, found and kept in the run."""
    from iddpm.parallel import processes
    from iddpm.sampling.grids import find, keep
    from iddpm.sampling.open import open_weights

    by = given.get("grid", FOUND[0])
    if by not in FOUND:
        raise UserError(f"--find_grid finds a grid: --grid {' or '.join(FOUND)}, not {by}")
    if "sampling_steps" in given:
        raise UserError("--find_grid and --sampling_steps both say how many steps: give one")
    own = {k: given[k] for k in given if k in settings_of(Sample) and k != "grid"}
    opened = open_weights(place(run), which, own)
    (u,) = find(opened.config, opened.net, opened.device, [steps], by, which.batch_size)
    if not processes.rank():
        file = keep(opened.home, by, u)
        print(f"{many(len(u), 'level')}, from u = {u[0]:.4g} to 1: {file}")
        print(f"next: iddpm sample {run} --grid {by} --sampling_steps {steps} --solver dpmpp_2m")


def _identity(draw: Draw, chain: "list[Opened]", others: "list[Weights]", task: "Job") -> dict[str, Any]:
    """What a job is: the same one goes on where it was killed."""
    from iddpm.sampling.open import digest_of

    first = chain[0]
    models = [*(o.weights for o in chain), *others]
    kept = {k: v for k, v in first.config.flat().items() if k in settings_of(Sample)}
    sampled = {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}  # as it comes back from JSON
    if draw.given and task.given is not None:  # what lies there, too: other images under the same path are another job
        sampled |= dict(given=draw.given, fit=draw.fit, pixels=hashlib.sha256(task.given.tobytes()).hexdigest())
    return dict(
        weights=[digest_of(weights) for weights in models], step=first.weights.about["step"],
        ema_rate=first.weights.about.get("ema_rate", 0), seeds=list(task.seeds), labels=list(task.labels),
        **{k: getattr(draw, k) for k in SHAPING}, **sampled, **(dict(bits=16) if first.config.model.bit_depth == "16" else {}),
    )  # fmt: skip


def _too_few(config: Config, steps: int) -> str:
    """That the steps are too few for the solver, where they are."""
    chain = config.diffusion
    if config.sample.solver != Sample.solver or chain.learn_sigma or chain.sigma_small or steps >= FEW or not is_chain(chain):
        return ""
    return (
        f"{steps} steps are too few for --solver ancestral with the variance beta, whose noise stays in the images: take "
        f"{FEW} or more, or --solver ddim or dpmpp_2m"
    )


def _check(draw: Draw, chain: "list[Opened]") -> None:
    """Raise UserError for flags that would be ignored, and for models that do not follow on each other."""
    first, name = chain[0].config, chain[0].weights.path
    if first.task.classifies:
        raise UserError(f"{name} is a classifier, which draws nothing: give it as --classifier to another run")
    if flag := next((f for f in INPUTS if getattr(draw, f) and f not in first.task.inputs), ""):
        owner = next(task for task in TASKS.values() if flag in task.inputs)
        instead = "; to enlarge its samples: --then RUN" if owner.enlarges else ""
        raise UserError(f"--{flag} is for {owner.help}, and {name} is {first.task.help}{instead}")
    if first.task.inputs and not any(getattr(draw, f) for f in first.task.inputs):
        which = "--low_res SMALL_IMAGES, or iddpm sample BASE --then it" if first.task.enlarges else "--given IMAGES"
        raise UserError(f"{name} is {first.task.help}: of which images? {which}")
    if draw.low_res_noise and not any(o.config.model.low_res_noise for o in chain):
        raise UserError("--low_res_noise has no effect: no model here was trained with it")
    for base, up in zip(chain, chain[1:]):
        if not up.config.task.enlarges:
            raise UserError(f"--then {up.weights.path}: this run does not enlarge images")
        if (has := image_size(base.config.model)) != (wants := small_size(up.config.model)):
            raise UserError(f"--then {up.weights.path} enlarges images of {wants[0]}x{wants[1]}, not {has[0]}x{has[1]}")
        if base.config.model.image_channels != up.config.model.image_channels:
            raise UserError(f"--then {up.weights.path} has {up.config.model.image_channels} channels, unlike the images")
        if up.config.model.class_cond and up.config.data.classes != base.config.data.classes:
            raise UserError(f"--then {up.weights.path} was trained on other classes than {base.weights.path}")


def _guide(draw: Draw, first: "Opened", which: Which) -> "Guide":
    """The classifier that guides; UserError where it was trained for other images, noise or classes."""
    from iddpm import build
    from iddpm.sampling.draw import Guide
    from iddpm.sampling.open import open_weights

    newest = dataclasses.replace(which, checkpoint_step=-1, best=False, ema_rate=-1.0)  # these name the model's own checkpoint
    judge = open_weights(place(draw.classifier), newest)
    theirs, ours = judge.config, first.config
    if not theirs.task.classifies:
        raise UserError(f"--classifier {draw.classifier} is no classifier (train one with --task classify)")
    _same_world(f"--classifier {draw.classifier}", theirs, ours)
    step = next(iter(build.grid(ours)))
    # all solvers but ancestral multiply the first gradient by about alpha_to / alpha, which is huge where a chain begins in noise
    if ours.sample.solver != Sample.solver and step.alpha and (jump := (step.alpha_to / step.alpha).item()) > 10:
        print(f"the first step of {ours.sample.solver} would magnify the guidance {jump:.0f} times: take --sampling_steps ddimN "
              f"(as ddim50), which begins below pure noise, or --solver ancestral")  # fmt: skip
    return Guide(theirs, judge.net, draw.classifier_scale, judge.weights)


def _weak(draw: Draw, first: "Opened", which: Which) -> "tuple[Opened, Weak]":
    """The model to guide away from; UserError where it draws other images, from other noise, or of other classes."""
    from iddpm.build import Weak
    from iddpm.sampling.open import open_weights

    where = place(draw.autoguide)
    if where == place(str(first.home)):
        raise UserError(f"--autoguide {draw.autoguide} is the model itself: name one of its checkpoints/step_... folders")
    other = open_weights(where, dataclasses.replace(which, checkpoint_step=-1, best=False))
    if other.config.model.task != first.config.model.task:
        raise UserError(f"--autoguide {draw.autoguide} has --task {other.config.model.task}, the model {first.config.model.task}")
    if (a := given_shape(other.config.model)) and (b := given_shape(first.config.model)) and a[0] != b[0]:
        raise UserError(f"--autoguide {draw.autoguide} is given images of {a[0]} channels, the model those of {b[0]}")
    _same_world(f"--autoguide {draw.autoguide}", other.config, first.config)
    return other, Weak(other.config, other.net, draw.autoguidance)


def _same_world(flag: str, theirs: Config, ours: Config) -> None:
    """Raise UserError where a model that is to guide another sees other images, other noise, or other classes."""
    for name in SAME_WORLD:
        if (a := theirs.flat()[name]) != (b := ours.flat()[name]):
            also = ": it would see other noise" if name in fields_of(ours.diffusion) else ""
            raise UserError(f"{flag} has --{name} {a}, the model {b}{also}")
    if theirs.model.class_cond and ours.model.class_cond and ours.data.classes != theirs.data.classes:
        raise UserError(f"{flag} was trained on other classes than the model")
    if theirs.model.class_cond and not theirs.task.classifies and not ours.model.class_cond:
        raise UserError(f"{flag} draws classes, and the model knows none")


def _compare(config: Config, out: Path, drawn: "np.ndarray", inputs: "Inputs", seeds: list[int]) -> None:
    """Beside what was made of the images given: a sheet of the first of them, and how faithful enlarged ones are."""
    from iddpm.measure.fidelity import fidelity
    from iddpm.sampling.sheets import comparison_file
    from iddpm.sampling.writers import free, marked

    given, originals = inputs.given[seeds], None if inputs.originals is None else inputs.originals[seeds]
    own = {"compared": out.name}  # two --out that differ in their ending have a sheet each
    sheet = free(out.with_name(f"{out.stem}_compared.png"), own)
    record = sheet.with_suffix(".json")
    comparison_file(config, sheet, drawn[:16], given[:16], None if originals is None else originals[:16], marked(own))
    print(f"beside the small images and their bicubic enlargement: {sheet}" if config.task.enlarges else f"as pairs: {sheet}")
    if originals is None:
        return
    result = fidelity(config, drawn, given, originals)
    record.write_text(json.dumps(result, indent=1))
    for name, unit in (("psnr", " dB"), ("ssim", "")):
        if f"{name}_model" in result:
            model, bicubic = (f"{result[f'{name}_{by}']:.3f}{unit}" for by in ("model", "bicubic"))
            print(f"{name.upper()} {model} (bicubic {bicubic})")
    print(f"the numbers: {record}")


VERB = Verb(_sample, _parser, "RUN", "draw images from a run", resumes=True)
