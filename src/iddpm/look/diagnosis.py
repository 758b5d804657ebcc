"""What stands in a run's way: rules that look at its numbers, each a function and a row of the table at the end.

A rule returns a finding, None where all is well, or why it cannot tell. The table's order is that of what mending brings: first
what breaks a run, then what bounds how good it can become, then what only costs time.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from iddpm import build
from iddpm.config import ema_rates, is_chain
from iddpm.errors import reason
from iddpm.look import pictures
from iddpm.look.dataset import Seen
from iddpm.look.evidence import (
    COPIED,
    COPIES,
    SURE,
    counted,
    few,
    loss_of,
    middle,
    misplaced,
    pairs,
    rise,
    same_place,
    uncertainty,
)
from iddpm.look.runs import Run, number
from iddpm.sampling.sheets import cells
from iddpm.words import many, rate

QUARTERS = ("nearest to the image", "below the middle", "above the middle", "nearest to pure noise")  # of the noise levels
NO_IMAGES = "the training images cannot be reached"


class Finding(NamedTuple):
    """What is wrong, in one sentence; the numbers that say so; and what to change, as a user types it."""

    says: str
    evidence: str
    change: str


Found = Finding | str | None


class Diagnosis(NamedTuple):
    """What the rules say, by their names: what they found, where all is well, and why others cannot tell."""

    findings: dict[str, Finding]
    fine: list[str]
    unknown: dict[str, str]


def diagnose(run: Run, seen: Seen | None) -> Diagnosis:
    """What the rules say of a run and of what was `seen` of its images; None: these cannot be reached."""
    told = {name: _told(rule, run, seen) for name, rule in RULES.items()}
    return Diagnosis(
        {name: found for name, found in told.items() if isinstance(found, Finding)},
        [name for name, found in told.items() if found is None],
        {name: found for name, found in told.items() if isinstance(found, str)},
    )


def _told(rule: Callable[[Run, Seen | None], Found], run: Run, seen: Seen | None) -> Found:
    try:
        return rule(run, seen)
    except Exception as e:  # files that are damaged, settings that do not fit: the other rules still tell
        return reason(e)


# ---- what breaks a run


def diverged(run: Run, seen: Seen | None) -> Found:
    """The loss is not finite, or far above what it was."""
    change = f"--lr {run.config.train.lr / 3:.1g} --grad_clip 1"
    if bad := [row["step"] for row in run.rows if "loss" in (row.get("not_finite") or ())]:
        numbers = f"not finite in {many(len(bad), 'row')}, first at step {bad[0]:,}"
        return Finding("The loss is no number any more.", numbers, change)
    loss = run.column(loss_of(run))[1]
    if why := few(loss):
        return why
    *before, last = np.array_split(loss, 6)
    low = min(before, key=middle)
    if not rise(low, last, 0.5):
        return None
    numbers = f"loss {middle(low):.4g} at its best, {middle(last):.4g} now"
    return Finding("The loss has climbed back up: the steps are too large.", numbers, change)


def skips(run: Run, seen: Seen | None) -> Found:
    """Steps whose gradient was not finite, and which did nothing."""
    skipped = run.column("skipped")[1]
    if not len(skipped):
        return "no step is logged"
    half = run.config.train.precision == "fp16"
    found, free = int(skipped[-1]), 20 if half else 0  # in which fp16 finds its loss scale
    if found - free <= max(0.01 * run.step, 3):
        return None
    numbers = f"{found:,} of {run.step:,} steps ({found / run.step:.1%})"
    change = "--precision bf16" if half else "--grad_clip 1"
    return Finding("Many steps did nothing: their gradient was not finite.", numbers, change)


def precision(run: Run, seen: Seen | None) -> Found:
    """fp16's loss scale keeps falling: gradients overflow again and again, and small ones are lost."""
    if run.config.train.precision != "fp16":
        return None
    scale = run.column("lg_loss_scale")[1]
    if why := few(scale):
        return why
    settled, last = float(np.median(scale[len(scale) // 4 : len(scale) // 2])), float(scale[-1])
    if settled - last < 2:
        return None
    numbers = f"2^{settled:.1f} in the second quarter of the run, 2^{last:.1f} now"
    return Finding("The loss scale of fp16 keeps falling: its range does not suit this network.", numbers, "--precision bf16")


def chain_end(run: Run, seen: Seen | None) -> Found:
    """Sampling begins with pure noise, which training has never shown (Lin et al. 2024, section 3.1)."""
    if run.config.task.classifies:
        return None
    last = next(iter(build.grid(run.config, "all")))
    left = float(last.alpha) / math.hypot(float(last.alpha), float(last.sigma))
    if left < 0.05:
        return None
    numbers = f"{left:.1%} of the amplitude is the image's at the last step; below 5 % does no harm"
    change = "--zero_terminal_snr True --parametrization v, or --snr_shift 2, in a new run"
    if not is_chain(run.config.diffusion):
        change = "a larger --snr_shift, or --sigma_max where the schedule has it, in a new run"
    return Finding("The noisiest step still shows the image, though drawing begins with pure noise.", numbers, change)


# ---- what bounds how good it can become


def improving(run: Run, seen: Seen | None) -> Found:
    """The loss still falls at the end: each doubling of a run brings so much, and the next one a like share of that."""
    if run.end and run.step < 0.9 * run.end:
        return f"the run is at step {run.step:,} of {run.end:,}"
    name = loss_of(run)
    name = name if few(run.column(f"val_{name}")[1]) else f"val_{name}"
    steps, loss = run.column(name)
    if why := few(loss):
        return why
    start, before, last = (
        loss[(steps > run.step * a) & (steps <= run.step * b)] for a, b in ((1 / 8, 1 / 4), (1 / 4, 1 / 2), (1 / 2, 1))
    )
    if min(map(len, (start, before, last))) < 2:
        return few(loss[:0])
    if middle(last) <= 0 or not rise(-before, -last, 0.01):
        return None
    gain, earlier = (math.log(middle(a) / middle(b)) for a, b in ((before, last), (start, before)))
    keeps = min(max(gain / earlier, 0.1), 0.8) if earlier > 0 else 0.5  # the share that each doubling has of the one before
    doublings = min(max(1, math.ceil(math.log(0.01 / gain, keeps))), 3)  # until one brings less than 1 %
    more = 1 - math.exp(-sum(gain * keeps**k for k in range(1, doublings + 1)))
    numbers = f"{name} {middle(before):.4g} in the second quarter, {middle(last):.4g} in the second half"
    says = f"It still improves: go on, about {2**doublings} times as long."
    return Finding(says, f"{numbers}; at that pace {more:.0%} lower then", f"--steps {run.step * 2**doublings}")


def overfitting(run: Run, seen: Seen | None) -> Found:
    """The loss of held-out images rises while that of training images falls."""
    if not run.config.data.validation:
        return "there are no held-out images: --validation DATA"
    (steps, held_out), (at, loss) = (run.column(start + loss_of(run)) for start in ("val_", ""))
    if why := few(held_out) or few(loss):
        return why
    best = int(np.convolve(held_out, np.ones(3) / 3, "valid").argmin()) + 1
    low, last = held_out[max(0, best - 2) : best + 3], held_out[-max(3, len(held_out) // 6) :]
    then, now = loss[at <= steps[best]][-5:], loss[-5:]
    if not rise(low, last, 0.02) or not len(then) or middle(now) > middle(then):
        return None
    numbers = f"held-out loss {middle(low):.4g} near step {steps[best]:,}, {middle(last):.4g} now"
    numbers += f"; training loss {middle(then):.4g} then, {middle(now):.4g} now"
    change = f"--steps {steps[best]}, or --dropout 0.1 --random_flip True, or more images"
    return Finding("It learns its training images by heart.", numbers, change)


def copies(run: Run, seen: Seen | None) -> Found:
    """Samples that lie nearer to a training image than these do to each other."""
    own = run.config.data.path
    rows = [r for r in run.figures if r["name"] == COPIES and number(r.get("value")) and same_place(r.get("reference"), own)]
    if not rows:
        measures = run.config.task.draws
        return f"not measured: iddpm evaluate {run.path} --reference {own}" if measures else "copies are looked for in images"
    share = rows[-1]["value"]
    if share < COPIED + SURE * uncertainty(rows[-1]):
        return None
    numbers = f"{share:.1%} of {rows[-1].get('n')} samples, where 1 % is expected"
    change = "--dropout 0.1 --random_flip True, fewer --steps, or more images"
    return Finding("Samples are near copies of training images.", numbers, change)


def few_images(run: Run, seen: Seen | None) -> Found:
    """Of a few hundred images a network learns each by heart before it learns what they share."""
    if not (n := seen.n if seen else counted(run)):
        return NO_IMAGES
    if n >= 1000 or run.config.train.init_from:
        return None
    numbers = f"{n:,} images, each seen {run.images / n:,.0f} times; about 1,000 are the least for a small network"
    change = "more images, --init_from A_RUN_ON_MORE, or --random_flip True --dropout 0.1"
    return Finding("There are few images to learn from.", numbers, change)


def imbalance(run: Run, seen: Seen | None) -> Found:
    """A class with a tenth of the images of another is drawn worse."""
    if not run.config.model.class_cond:
        return None
    if not seen or not seen.counts:
        return NO_IMAGES
    least, most = min(seen.counts.values()), max(seen.counts.values())
    if least * 10 > most:
        return None
    rare, common = (next(name for name, n in seen.counts.items() if n == end) for end in (least, most))
    numbers = f"{least:,} of {rare}, {most:,} of {common}"
    return Finding("Some classes have far fewer images than others.", numbers, "more images of these, or classes put together")


def labels(run: Run, seen: Seen | None) -> Found:
    """Images that lie among those of another class, as four of their five nearest tell."""
    if not run.config.model.class_cond:
        return None
    if not seen or not seen.counts:
        return NO_IMAGES
    own = np.array(seen.labels)
    if len(own) < 12 * (kinds := len(set(own.tolist()))) or kinds < 2:
        return f"too few images of a class were looked at ({many(len(own), 'image')} of {many(kinds, 'class')})"
    told, wrong, likely, chance = misplaced(seen.some, own)
    if told < 0.5:
        return f"pixels do not tell these classes apart: {told:.0%} of the nearest images are of the same one"
    if wrong.mean() < max(0.07, 3 * chance):
        return None
    (here, there), n = Counter(zip(own[wrong].tolist(), likely[wrong].tolist())).most_common(1)[0]
    numbers = f"{wrong.sum()} of {len(own)} images lie among those of another class, as {n} of {seen.classes[here]} "
    numbers += f"among {seen.classes[there]}"
    return Finding(
        "Images seem to be in the wrong classes.", numbers, f"look through {seen.classes[here]}, and move what is wrong"
    )


def doubles(run: Run, seen: Seen | None) -> Found:
    """Files that repeat others byte by byte count twice, and are the first to be copied."""
    if not seen:
        return NO_IMAGES
    if seen.doubles < max(2, 0.01 * seen.compared):
        return None
    numbers = f"{seen.doubles:,} of {seen.compared:,} files repeat another byte by byte"
    return Finding("Images are in the data more than once.", numbers, f"remove the repeated files from {run.config.data.path}")


def colours(run: Run, seen: Seen | None) -> Found:
    """The mean colour of the newest samples, against that of the images."""
    if run.config.task.inputs or run.config.task.classifies or not run.sheets:
        return "there are no samples to look at"
    if not seen:
        return NO_IMAGES
    step, path = run.sheets[-1]
    shares = [n for n in seen.counts.values() if n]
    if run.config.model.class_cond and shares and max(shares) > 1.2 * min(shares):
        return "the sheet has as many images of each class, the data have not"
    drawn = cells(pictures.read(path), run.config)
    if drawn is None:
        return f"{path.name} is no sheet of this run's samples"
    bands = 1 if seen.some.shape[-1] < 3 else 3
    real, ours = (x[..., :bands].reshape(len(x), -1, bands).mean(1) for x in (seen.some, drawn))  # a colour for each image
    off, sure = ours.mean(0) - real.mean(0), np.hypot(*(x.std(0) / len(x) ** 0.5 for x in (real, ours)))
    k = int(abs(off).argmax())
    if abs(off[k]) < max(10, (SURE + 1) * sure[k]):
        return None
    name = ("brightness",) if bands == 1 else ("red", "green", "blue")
    numbers = (
        f"mean {name[k]} {ours.mean(0)[k]:.0f} of 255 at step {step:,}, {real.mean(0)[k]:.0f} +- {sure[k]:.1f} of the images"
    )
    says = "The colours of samples are off." if bands == 3 else f"Samples are too {'bright' if off[k] > 0 else 'dark'}."
    return Finding(says, numbers, "more --steps, or --time")


def quartiles(run: Run, seen: Seen | None) -> Found:
    """One quarter of the noise levels gets worse while the whole gets better, or holds all of the loss."""
    loss, *parts = (run.column(loss_of(run) + end)[1] for end in ("", "_q0", "_q1", "_q2", "_q3"))
    if why := few(min((loss, *parts), key=len)):
        return why
    other = "" if run.config.task.classifies else ", or another --weighting"
    change = f"--schedule_sampler loss-second-moment{other}, in a new run"
    early, late = zip(*((x[len(x) // 4 : len(x) // 2], x[-len(x) // 4 :]) for x in (loss, *parts)))
    if middle(late[0]) < middle(early[0]):
        for before, now, where in zip(early[1:], late[1:], QUARTERS):
            if rise(before, now, 0.1):
                numbers = f"their loss {middle(before):.4g} before the middle of the run, {middle(now):.4g} at its end"
                return Finding(f"The noise levels {where} get worse while the others improve.", numbers, change)
    means = np.array([middle(part) for part in late[1:]])
    k = int(means.argmax())
    if run.config.diffusion.objective_name == "vlb" or means.min() <= 0 or means[k] < 0.9 * means.sum():
        return None
    numbers = ", ".join(f"{value:.3g} {where}" for value, where in zip(means, QUARTERS))
    return Finding(f"Nearly all of the loss is of the noise levels {QUARTERS[k]}.", numbers, change)


def averages(run: Run, seen: Seen | None) -> Found:
    """Averaged weights that still hold the start of the run, that hardly average, or that draw worse than the raw ones."""
    if not (kept := next(iter(ema_rates(run.config.train)), 0.0)) or not run.step:
        return None
    for better, worse in pairs(run, "ema_rate"):
        if better["ema_rate"] == 0 and worse["value"] - better["value"] > SURE * uncertainty(better, worse):
            numbers = f"{better['name']} {better['value']:.4g} raw, {worse['value']:.4g} averaged"
            change = "a smaller --ema_rate, or --ema_power 0.05,0.10 and iddpm ema, in a new run"
            return Finding("The raw weights draw better than their average.", numbers, change)
    length = max(run.step, run.end)
    start, span = kept**length, 1 / (1 - kept)
    if start > 0.02 and not (run.config.train.ema_warmup or run.config.train.init_from):
        numbers = f"{start:.0%} of it will be the untrained network: it spans {span:,.0f} steps, the run {length:,}"
        change = f"--ema_rate {_rate(length / 10)} in a new run, or --ema_warmup True"
        return Finding("The average of the weights is too long for this run.", numbers, change)
    if span < 0.002 * length:
        numbers = f"it spans {span:,.0f} of {length:,} steps, where a hundredth to a tenth is usual"
        change = f"--ema_rate {_rate(length / 50)} in a new run"
        return Finding("The average of the weights is too short for this run.", numbers, change)
    return None


def _rate(span: float) -> str:
    """The rate of an average over so many steps, in as few figures as tell it."""
    return f"{1 - 1 / max(span, 2):.{math.ceil(math.log10(max(span, 2)))}f}"


def solver(run: Run, seen: Seen | None) -> Found:
    """More steps of the solver were measured to draw better images."""
    found = list(pairs(run, "sampling_steps"))
    for better, worse in found:
        more, less = better.get("steps"), worse.get("steps")
        gain = worse["value"] - better["value"]
        if worse["sampling_steps"] != run.config.sample.sampling_steps or not (number(more) and number(less) and more > less):
            continue
        if gain > max(0.1 * worse["value"], SURE * uncertainty(better, worse)):
            numbers = f"{better['name']} {worse['value']:.4g} in {less} steps, {better['value']:.4g} in {more}"
            change = f"--sampling_steps {better['sampling_steps']}, or another --solver"
            return Finding("The solver takes too few steps.", numbers, change)
    if found:
        return None
    if not run.config.task.draws:
        return "its images are not measured by themselves"
    return f"one number of steps was measured: iddpm evaluate {run.path} --reference DATA --sampling_steps 10, and 50"


# ---- what costs time


def throughput(run: Run, seen: Seen | None) -> Found:
    """The machine gives fewer images a second than at the start."""
    pace = run.column("images_per_second")[1]
    if why := few(pace):
        return why
    fifth = len(pace) // 5
    first, last = float(np.median(pace[1 : 2 + fifth])), float(np.median(pace[-1 - fifth :]))  # the first row warms up
    if last > 0.75 * first:
        return None
    numbers = f"{rate(first)} images a second at the start, {rate(last)} now"
    change = "free the machine; --num_workers and --cache_gb where images come slowly"
    return Finding("Training has become slower.", numbers, change)


RULES: dict[str, Callable[[Run, Seen | None], Found]] = {
    "divergence": diverged,
    "skipped steps": skips,
    "precision": precision,
    "end of the chain": chain_end,
    "length of the run": improving,
    "overfitting": overfitting,
    "copies": copies,
    "number of images": few_images,
    "balance of classes": imbalance,
    "classes": labels,
    "duplicates": doubles,
    "colours": colours,
    "noise levels": quartiles,
    "averages": averages,
    "steps of the solver": solver,
    "throughput": throughput,
}
