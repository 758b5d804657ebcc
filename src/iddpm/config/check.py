"""What cannot work, or would be silently ignored, is refused before anything is done."""

from iddpm.config.fields import check_fields, check_own, fields_of, unmet
from iddpm.config.parse import check_sampling_steps, ema_rates, image_size, numbers, small_size
from iddpm.config.run import Config
from iddpm.errors import UserError

LEVELS = 16  # each halves the image


def check(config: Config) -> Config:
    """The config itself, or UserError for the first thing in it that cannot work or would be silently ignored.

    What depends on the rows chosen together (a learned variance on a continuous schedule) is checked by `build.require_fit`.
    """
    now, own = config.flat(), dict(config.own)
    for _, group in config.groups():
        check_fields(group)
        check_own(group, own)
    for _, group in config.groups():
        for name, f in fields_of(group).items():
            if f.only and getattr(group, name) != f.default:
                for reason in unmet(f.only, now):
                    raise UserError(f"--{name} has no effect {reason}; its default is {f.default!r}")
    model, train = config.model, config.train
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
    if config.data.validation and config.data.validation == config.data.path:
        raise UserError(f"--validation {config.data.validation} is what the run is trained on: give held-out images")
    if train.microbatch == 0:
        raise UserError("--microbatch 0: give a number of images, or -1 for the whole batch")
    check_sampling_steps(config)
    return config
