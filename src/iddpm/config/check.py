"""What cannot work, or would be silently ignored, is refused before anything is done."""

from iddpm.config.fields import check_groups, fields_of, unmet
from iddpm.config.groups import ENDS, Train
from iddpm.config.parse import ema_rates, ema_widths, image_size, is_chain, names, numbers, seconds_of, share, small_size, whole
from iddpm.config.run import Config
from iddpm.errors import UserError

LEVELS = 16  # each halves the image


def check(config: Config) -> Config:
    """The config itself, or UserError for the first thing in it that cannot work or would be silently ignored.

    What depends on the rows chosen together (a learned variance on a continuous schedule) is checked by `fit.require_fit`.
    """
    now, model, train, data = config.flat(), config.model, config.train, config.data
    check_groups(config.parts, dict(config.own))
    for name, f in fields_of(*config.parts).items():
        if now[name] != f.default and (reason := next(unmet(f.only, now), None)):
            raise UserError(f"--{name} has no effect {reason}; its default is {f.default!r}")
    image_size(model)
    if config.task.enlarges:
        small_size(model)
    if config.task.classifies and not model.class_cond:
        raise UserError("--task classify learns the classes of the data: add --class_cond True")
    widths = numbers(model.channel_mult, "channel_mult", float)
    empty = model.channel_mult and not widths
    if empty or len(widths) > LEVELS or not all(0 < width <= 1024 for width in widths):
        raise UserError(f"--channel_mult {model.channel_mult!r}: give up to {LEVELS} widths, each above 0, as 1,2,2,2")
    numbers(model.attention_resolutions, "attention_resolutions")
    if bad := [r for r in ema_rates(train) if not 0 <= r < 1]:
        raise UserError(f"--ema_rate {bad[0]}: rates lie in [0, 1), as 0.999 or 0.999,0.9999")
    if bad := [w for w in ema_widths(train) if not 0.01 <= w <= 0.25]:
        raise UserError(f"--ema_power {bad[0]}: relative widths lie from 0.01 to 0.25, as 0.05,0.10")
    for name in ("only_classes", "balance"):
        if data.labels == "none" and now[name]:
            raise UserError(f"--{name} has no effect with --labels none, which reads no classes")
    if data.only_classes and not names(data.only_classes):
        raise UserError(f"--only_classes {data.only_classes!r} names none: give them as cat,dog")
    if data.labels.startswith("attributes:") and not names(data.labels.removeprefix("attributes:")):
        raise UserError("--labels attributes: which? Name columns of the table, as attributes:Male,Smiling")
    if data.validation and data.validation == data.path:
        raise UserError(f"--validation {data.validation} is what the run is trained on: give held-out images")
    if data.validation and not share(data.validation) and config.task.translates and not data.validation_given:
        raise UserError(f"--validation {data.validation}: which images are given with these? --validation_given FOLDER")
    if data.given and data.given == data.path and model.given_channels in (0, model.image_channels):
        raise UserError(f"--given {data.given} is what the run is to draw: give other images, or other --given_channels")
    if train.shard and train.optimizer == "muon":
        raise UserError("--optimizer muon needs whole matrices, which --shard divides: leave one of them out")
    if train.microbatch == 0:
        raise UserError("--microbatch 0: give a number of images, or -1 for the whole batch")
    check_end(train)
    _check_sampling_steps(config)
    return config


def check_end(train: Train) -> None:
    """Raise UserError where two settings say when the run ends, or how its rate does."""
    ends = [name for name in ENDS if getattr(train, name)]
    if len(ends) > 1:
        raise UserError(f"--{ends[0]} and --{ends[1]} both say when to stop: give one")
    seconds_of(train.time, "time")
    seconds_of(train.finish, "finish")
    if train.lr_decay and train.lr_anneal_steps:
        raise UserError("--lr_decay and --lr_anneal_steps both lower the rate to 0: give one")
    if train.time and train.lr_anneal_steps == -1:
        raise UserError("--lr_anneal_steps -1 ends at a step, which --time does not know: --lr_decay 1 is the same by time")


def _check_sampling_steps(config: Config) -> None:
    """Raise UserError where the spec asks for more steps than there are (the strides of ddimN come later)."""
    spec, d = config.sample.sampling_steps, config.diffusion
    counts = [whole(part.strip()) or 0 for part in spec.removeprefix("ddim").split(",")] if spec != "all" else []
    if not all(counts):
        raise UserError(f"--sampling_steps {spec!r}: give a count (250), counts per section (10,15,20), ddimN (ddim50), or all")
    if not is_chain(d) and whole(spec) is None:
        raise UserError(f"--sampling_steps {spec}: the steps of --noise_schedule {d.noise_schedule} are only counted, as 50")
    if (grid := config.sample.grid) != "respaced" and spec != "all" and whole(spec) is None:
        raise UserError(f"--sampling_steps {spec}: the steps of --grid {grid} are only counted, as 50")
    if is_chain(d) and sum(counts) > d.diffusion_steps:
        raise UserError(f"--sampling_steps {spec}: the chain has only {d.diffusion_steps} steps (--diffusion_steps)")
