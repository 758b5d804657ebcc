"""The recipe of a run that names none (`--preset auto`): from the images, the device and the time to every setting, with reasons.

One function a rule, in the order of `RULES`; a later one reads what those before it chose, and a flag given wins over all. The
experiments behind the numbers are in docs/log.md, "the best pictures per hour".
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from iddpm.config.groups import Model
from iddpm.config.tasks import TASKS, Task
from iddpm.words import duration

GRID = 32  # pixels, or patches of them, that the first level has at least
BATCHES = ((4e5, 32), (4e6, 64), (math.inf, 128))  # images that are seen, up to which a step has so many
OF_STEPS = 64  # channels, where the number of steps is given and not the time; on CUDA twice as many
WIDTHS = (32, 48, 64, 96, 128, 192, 256)  # channels of the first level
SEEN, KNOWN = 120_000, 166e3  # images, repeated ones too, that a network is to see in a run of so many 10^9 operations: few seen
# images cost more than few channels (log). In longer ones images and operations an image grow alike (Hoffmann et al. 2022)
FINE = 128  # channels, of a network that sees enough images, from which on patches are halved
HEAD = 32  # channels of an attention head, or the largest divisor of the width that divides this
FEW = 5000  # images: a network sees each of them many times
OFTEN = 200  # times that each image is seen, beyond which a network knows it by heart; EDM's own sees each 4000 times
GUIDANCE = ((1e6, 2.5), (math.inf, 1.5))  # by the images seen, up to so many: what knows little follows its classes loosely
LEAST = 8  # pixels, of the smallest images there can be
LEAST_OF_CLASS = 10  # images, or its class is not learned
CLASSES = 1000  # at most
EXPECTED = ((66, 0.5), (166, 0.29))  # 10^12 operations of training on CIFAR-10, and the KD-lite0-128 that came of them (log)
DAYS = 3.0  # of a run, beyond which it is told at once


class Facts(NamedTuple):
    """What the rules go by."""

    images: int
    height: int  # pixels, of the middle one of some that were looked at ...
    width: int
    alike: bool  # ... and whether all of these have that size
    channels: int  # 1 where all of these are grey, else 3
    classes: int  # 0: none
    smallest: int  # images of the smallest class
    cuda: bool
    seconds: float  # of the run; 0: its steps or images are given instead
    gflops: float  # 10^9 operations a second of training, in the faster precision
    cost: Callable[[Mapping[str, Any]], float]  # 10^9 operations of training on one image, with these settings


class Choice(NamedTuple):
    """What a rule chose, and why in a few words."""

    settings: dict[str, Any]
    why: str


def _task(now: Mapping[str, Any]) -> Task:
    return TASKS[now.get("task", Model().task)]


def size(facts: Facts, now: Mapping[str, Any]) -> Choice:
    """As the images, up to what the time allows: twice the side costs four times as much."""
    side, given = min(facts.height, facts.width), now.get("image_size")
    most = (32 if facts.seconds and facts.seconds < 1800 else 64) if not facts.cuda else 128 if facts.seconds < 86400 else 256
    unit = max(4, (1 << side.bit_length() - 1) // 4)  # so that it can be halved, and cut into patches
    fits = max(LEAST, min(most, side // unit * unit))
    if given:
        return Choice({"image_channels": facts.channels}, "as the images")
    why = f"{'all' if facts.alike else 'many'} of the {facts.images:,} images have {facts.height}x{facts.width} pixels"
    if fits > side:
        why += f", and {LEAST} is the least"
    elif side > most:
        why += f", and {most} at most suit this time and device"
    elif fits != max(facts.height, facts.width):
        why += ", of which the middle square is taken" + f", at {fits}" * (fits != side)
    return Choice({"image_size": str(fits), "image_channels": facts.channels}, why)


def classes(facts: Facts, now: Mapping[str, Any]) -> Choice:
    """Their classes, where there are some with enough images: guidance makes the greatest difference of all."""
    if _task(now).classifies:
        return Choice({"class_cond": True}, "which it is to tell")
    if now.get("class_cond") is False:
        return Choice({}, "")
    if not 2 <= facts.classes <= CLASSES or facts.smallest < LEAST_OF_CLASS:
        if now.get("class_cond"):
            return Choice({"class_dropout": 0.1}, "so that samples can be guided")
        few = f"one of the {facts.classes} has {facts.smallest} images only"
        why = "there are none" if facts.classes < 2 else f"{facts.classes} are many" if facts.classes > CLASSES else few
        return Choice({"class_cond": False}, why)
    return Choice({"class_cond": True, "class_dropout": 0.1}, f"{facts.classes} classes, towards which samples are guided")


def network(facts: Facts, now: Mapping[str, Any]) -> Choice:
    """The widest network that still sees enough images in the time; of large images patches, which make a step much faster."""
    height, _, width = str(now["image_size"]).lower().partition("x")
    side = min(int(height), int(width or height))
    work = facts.gflops * facts.seconds
    enough = SEEN * max(1.0, (work / KNOWN) ** 0.5)
    patches = [p for p in (2, 4, 8, 16, 32) if GRID * p <= side and not side % (4 * p) and not _task(now).classifies]
    for patch in (*reversed(patches), 1):
        shape = _shape(side // patch, patch)
        unit = facts.cost({**now, **shape, "num_channels": 64}) / 64**2  # the cost of a network goes as the square of its width
        if work / unit < 4 * enough * FINE**2:  # half the patch costs four times as much
            break
    able = [n for n in WIDTHS if work / unit >= enough * n**2]
    widest = max(able, default=WIDTHS[0]) if facts.seconds else OF_STEPS * (1 + facts.cuda)
    shape["num_channels"] = now.get("num_channels", widest)
    shape["num_head_channels"] = math.gcd(HEAD, shape["num_channels"])
    pace = facts.gflops / (unit * shape["num_channels"] ** 2)
    of_time = next(n for images, n in BATCHES if pace * facts.seconds <= images)
    batch = now.get("batch_size", of_time if facts.seconds else BATCHES[0][1] * (4 if facts.cuda else 1))
    images = _seen(facts, {**now, "batch_size": batch}, pace)
    told = f"about {pace:,.2g} images/s here, {images:,.0f} in all"
    if now.get("class_dropout"):
        shape["guidance"] = next(w for most, w in GUIDANCE if images <= most)
    return Choice({**shape, "batch_size": batch}, told + too_long(0 if facts.seconds else images / pace))


def _shape(grid: int, patch: int) -> dict[str, Any]:
    """Of a network on a grid of so many patches a side: all but its width."""
    levels = max(1, min(4, (grid & -grid).bit_length(), grid.bit_length() - 2))
    return dict(
        unet_patch=patch, num_res_blocks=1, channel_mult=",".join(["1", "2", "2", "2"][:levels]),
        attention_resolutions=next((str(s) for s in (grid >> k for k in range(levels)) if s <= 8), ""), num_head_channels=HEAD,
    )  # fmt: skip


def _seen(facts: Facts, now: Mapping[str, Any], pace: float) -> float:
    """Images that a run sees, at so many a second where its time is given."""
    return now.get("images") or now.get("steps", 0) * now["batch_size"] or pace * facts.seconds


def too_long(seconds: float) -> str:
    """What to say, behind other words, of a run of so many seconds; "" where it ends in some days."""
    if seconds < 86400 * DAYS:
        return ""
    return f": that takes {duration(seconds)} on this device; --time 8h, without flags of the network, ends by then"


def method(facts: Facts, now: Mapping[str, Any]) -> Choice:
    """What is learned, and at which levels of noise."""
    if _task(now).classifies:
        return Choice({"noise_schedule": "cosine", "schedule_sampler": "stratified"}, "noisy images of all levels")
    made = dict(noise_schedule="cosine", diffusion_steps=1000, parametrization="v", schedule_sampler="stratified")
    return Choice(made, "the best of those tried at equal time")


def training(facts: Facts, now: Mapping[str, Any]) -> Choice:
    """The optimizer: a high rate that ends at 0, and an average over the last tenth of the run."""
    rate = 1e-3 * min(1.0, 64 / now["num_channels"]) * min(2.0, (now["batch_size"] / 32) ** 0.5)
    steps = _seen(facts, now, facts.gflops / facts.cost(now)) / now["batch_size"]
    made: dict[str, Any] = dict(
        lr=float(f"{rate:.2g}"), lr_warmup_steps=int(min(200, steps / 5)), adam_beta2=0.99, ema_rate="0.9999"
    )
    if not now.get("shard"):
        made["optimizer"] = "muon"
    if not now.get("lr_anneal_steps"):
        made["lr_decay"] = 0.4
    return Choice(made, "a high rate, which falls to 0 at the end")


def small(facts: Facts, now: Mapping[str, Any]) -> Choice:
    """What keeps a network from learning few images by heart."""
    made: dict[str, Any] = {"random_flip": facts.channels == 3 and not _task(now).translates}
    times = _seen(facts, now, facts.gflops / facts.cost(now)) / facts.images
    if facts.images < FEW or times > OFTEN:
        made["dropout"] = 0.1
        if times > OFTEN and _task(now).draws:
            made["augment"] = 0.12
        writing = "; --random_flip False for writing" * made["random_flip"]
        return Choice(made, f"{facts.images:,} images are each seen {times:,.0f} times{writing}")
    return Choice(made, "twice the images (--random_flip False where left and right differ, as in writing)")


def sampling(facts: Facts, now: Mapping[str, Any]) -> Choice:
    """The solver of its sheets, and of `iddpm sample`."""
    return Choice({"solver": "dpmpp_2m", "sampling_steps": "25"}, "as good as ten times as many steps of the chain")


RULES: tuple[Callable[[Facts, Mapping[str, Any]], Choice], ...] = (
    size, classes, network, method, training, small, sampling,
)  # fmt: skip


def expected(facts: Facts, now: Mapping[str, Any]) -> str:
    """What is known of runs with about as many operations, so that a user knows what to hope for."""
    cost = facts.cost(now)
    work = _seen(facts, now, facts.gflops / cost) * cost / 1e3
    known = ", ".join(f"{kd:.2f} after {done}" for done, kd in EXPECTED)
    return f"to expect: this run has {work:,.2g} TFLOP; CIFAR-10, 32 pixels, came to KD-lite0-128 {known} (real images: 0.00)"


def recipe(facts: Facts, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The settings chosen beside those given, and a line a rule."""
    chosen: dict[str, Any] = {}
    lines = []
    for rule in RULES:
        settings, why = rule(facts, {**chosen, **given})
        own = {name: value for name, value in settings.items() if name not in given}
        chosen |= own
        if own:
            lines.append(" ".join(f"--{name} {value}" for name, value in own.items()) + f"  ({why})" * bool(why))
    return chosen, lines + [expected(facts, {**chosen, **given})] * _task(given).draws
