"""The original's flags: their names and defaults, and what they mean in a Config of ours, there and back.

`program` says whose they are: improved-diffusion's, or guided-diffusion's, which added some and changed two defaults.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from iddpm.config import ENDLESS, Config, fields_of, image_size, numbers, small_size
from iddpm.config.fields import values_of
from iddpm.config.tasks import TASKS
from iddpm.errors import UserError

NUM_CLASSES = 1000  # rows of label_emb, however many classes are trained

# ---- names and defaults, in the original's order

DIFFUSION: dict[str, Any] = dict(
    learn_sigma=False, diffusion_steps=1000, noise_schedule="linear", timestep_respacing="", use_kl=False,
    predict_xstart=False, rescale_timesteps=False, rescale_learned_sigmas=False,
)  # fmt: skip
CLASSIFIER: dict[str, Any] = dict(
    image_size=64, classifier_use_fp16=False, classifier_width=128, classifier_depth=2,
    classifier_attention_resolutions="32,16,8", classifier_use_scale_shift_norm=True, classifier_resblock_updown=True,
    classifier_pool="attention",
)  # fmt: skip
IMAGE: dict[str, Any] = dict(
    image_size=64, num_channels=128, num_res_blocks=2, num_heads=4, num_heads_upsample=-1, attention_resolutions="16,8",
    dropout=0.0, learn_sigma=False, sigma_small=False, class_cond=False, diffusion_steps=1000, noise_schedule="linear",
    timestep_respacing="", use_kl=False, predict_xstart=False, rescale_timesteps=True, rescale_learned_sigmas=True,
    use_checkpoint=False, use_scale_shift_norm=True,
)  # fmt: skip
ADDED: dict[str, Any] = dict(  # by guided-diffusion
    num_head_channels=-1, channel_mult="", resblock_updown=False, use_new_attention_order=False, use_fp16=False,
)  # fmt: skip
GUIDED_IMAGE = {k: v for k, v in IMAGE.items() if k != "sigma_small"} | ADDED | DIFFUSION


def _super_res(image: Mapping[str, Any], *without: str) -> dict[str, Any]:
    return {k: v for k, v in image.items() if k not in ("image_size", *without)} | dict(large_size=256, small_size=64)


SUPER_RES = _super_res(IMAGE, "sigma_small")
GUIDED_SUPER_RES = _super_res(GUIDED_IMAGE, "channel_mult", "use_new_attention_order")

# What makes the network of a task, and its process, in each program.
NETWORKS: dict[str, dict[str, dict[str, Any]]] = {
    "improved": {"images": IMAGE, "enlarge": SUPER_RES},
    "guided": {"images": GUIDED_IMAGE, "enlarge": GUIDED_SUPER_RES, "classify": CLASSIFIER | DIFFUSION},
}

TRAIN: dict[str, Any] = dict(
    data_dir="", schedule_sampler="uniform", lr=1e-4, weight_decay=0.0, lr_anneal_steps=0, batch_size=1, microbatch=-1,
    ema_rate="0.9999", log_interval=10, save_interval=10000, resume_checkpoint="", use_fp16=False, fp16_scale_growth=1e-3,
)  # fmt: skip
SAMPLE: dict[str, Any] = dict(clip_denoised=True, num_samples=10000, batch_size=16, use_ddim=False, model_path="")
NLL: dict[str, Any] = dict(data_dir="", clip_denoised=True, num_samples=1000, batch_size=1, model_path="")
CLASSIFIER_TRAIN: dict[str, Any] = dict(
    data_dir="", val_data_dir="", noised=True, iterations=150000, lr=3e-4, weight_decay=0.0, anneal_lr=False, batch_size=4,
    microbatch=-1, schedule_sampler="uniform", resume_checkpoint="", log_interval=10, eval_interval=5, save_interval=10000,
)  # fmt: skip

COMMANDS: dict[str, dict[str, dict[str, Any]]] = {
    program: {
        "image_train": TRAIN | nets["images"],
        "image_sample": SAMPLE | nets["images"],
        "image_nll": NLL | nets["images"],
        "super_res_train": TRAIN | nets["enlarge"],
        "super_res_sample": SAMPLE | {"base_samples": ""} | nets["enlarge"],
    }
    for program, nets in NETWORKS.items()
}
COMMANDS["guided"] |= {
    "classifier_train": CLASSIFIER_TRAIN | CLASSIFIER | DIFFUSION,
    "classifier_sample": SAMPLE | dict(classifier_path="", classifier_scale=1.0) | GUIDED_IMAGE | CLASSIFIER,
}


class Kind(NamedTuple):
    """What the original has for one of our tasks."""

    words: str
    size: str  # the flag of the image's size
    sampler: str  # the command that uses its weights
    weights: str  # that command's flag for them


KINDS = {
    "images": Kind("a model of images", "image_size", "image_sample", "model_path"),
    "enlarge": Kind("a super-resolution model", "large_size", "super_res_sample", "model_path"),
    "classify": Kind("a classifier", "image_size", "classifier_sample", "classifier_path"),
}

# ---- what they mean

# Our names of a classifier's settings, and the original's, which keep them apart from those of the model that it guides.
PREFIXED = dict(
    num_channels="classifier_width", num_res_blocks="classifier_depth", resblock_updown="classifier_resblock_updown",
    attention_resolutions="classifier_attention_resolutions", use_scale_shift_norm="classifier_use_scale_shift_norm",
)  # fmt: skip
OTHERWISE = dict(  # the original's names that are others here, with the same values
    large_size="image_size", use_new_attention_order="new_attention_order", data_dir="path", val_data_dir="validation",
    eval_interval="validation_interval", iterations="steps", **{theirs: ours for ours, theirs in PREFIXED.items()},
)  # fmt: skip
MEANINGS: dict[str, tuple[str, Callable[[Any], Any]]] = {  # names and values that are others here
    "predict_xstart": ("parametrization", lambda v: "x0" if v else "eps"),
    "use_fp16": ("precision", lambda v: "fp16" if v else "fp32"),
    "classifier_use_fp16": ("precision", lambda v: "fp16" if v else "fp32"),
    "timestep_respacing": ("sampling_steps", lambda v: v or "all"),
    "use_ddim": ("solver", lambda v: "ddim" if v else "ancestral"),
    "anneal_lr": ("lr_anneal_steps", lambda v: -1 if v else 0),
    "image_size": ("image_size", str),  # words here, where 64x96 is a size too
    "large_size": ("image_size", str),
    "small_size": ("small_size", str),
}
FLAGS = {name: default for table in COMMANDS.values() for command in table.values() for name, default in command.items()}
SAME = {name: name for name in FLAGS if name in fields_of(*Config().parts)} | OTHERWISE  # the original's name: ours
TWINS = OTHERWISE | {theirs: ours for theirs, (ours, _) in MEANINGS.items() if theirs not in SAME}  # which say the same
TWINS |= dict(use_kl="objective", rescale_learned_sigmas="objective")
ALWAYS: dict[str, Any] = dict(ema_warmup=False, keep=0, sample_interval=0)  # what the original does without a flag
OF_CLASSIFIERS: dict[str, Any] = dict(  # they see the step's own number, learn from mirrored crops, and are not averaged
    num_head_channels=64, class_cond=True, num_classes=NUM_CLASSES, labels="original", rescale_timesteps=False,
    random_flip=True, random_crop=True, ema_rate="", learn_sigma=False, sigma_small=False, parametrization="eps",
)  # fmt: skip
WIDTHS_512 = "1,1,2,2,4,4"  # guided-diffusion builds its upsampler to 512 pixels as wide as that to 256


def to_config(task: str, given: Mapping[str, Any], program: str = "improved", processes: int = 1) -> Config:
    """The config that the original's flags name; those that make the network and are not given have the program's defaults.

    `task` is one of ours. Flags that mean nothing for it are passed over, as the original's own recipes
    need. `batch_size` is that of each of the `processes`.
    """
    judge = TASKS[task].classifies

    def meant(name: str) -> bool:  # classifier_sample has flags of two networks: the classifier, and the model that it guides
        return name in CLASSIFIER | DIFFUSION or name not in GUIDED_IMAGE if judge else not name.startswith("classifier_")

    flags = {k: v for k, v in (NETWORKS[program][task] | dict(given)).items() if meant(k)}
    flat = {"task": task, **ALWAYS} | {SAME[name]: value for name, value in flags.items() if name in SAME}
    flat |= {MEANINGS[name][0]: MEANINGS[name][1](value) for name, value in flags.items() if name in MEANINGS}
    if "class_cond" in flags:
        known = flags["class_cond"]
        flat |= dict(num_classes=NUM_CLASSES if known else 0, labels="original" if known else "none")
    if "lr_anneal_steps" in flags:
        flat["steps"] = flags["lr_anneal_steps"] or ENDLESS
    if "batch_size" in flags:
        flat["batch_size"] = flags["batch_size"] * processes
    flat |= OF_CLASSIFIERS if judge else {"objective": objective(flags)}
    if not TASKS[task].enlarges:
        flat.pop("small_size", None)
    elif not flat.get("channel_mult") and flat["image_size"] == "512":
        flat["channel_mult"] = WIDTHS_512
    return Config().updated(flat)


def objective(flags: Mapping[str, Any]) -> str:
    """The loss of the original's flags: the bound, or the squared error with the bound's gradient for a learned variance."""
    if flags["use_kl"]:
        return "vlb"
    if not flags["learn_sigma"]:
        return "simple"
    return "hybrid" if flags["rescale_learned_sigmas"] else "hybrid_unscaled"


# ---- and back

SUPPORTED: dict[str, dict[str, tuple[int, ...]]] = {  # sizes without --channel_mult
    "improved": {"images": (32, 64, 256), "enlarge": (64, 256)},
    "guided": {"images": (64, 128, 256, 512), "enlarge": (64, 256, 512), "classify": (64, 128, 256, 512)},
}


def from_config(config: Config) -> tuple[str, dict[str, Any]]:
    """The program and the flags, of those that make a network and its process, that name a config.

    UserError, with the first setting that has no counterpart, where neither program can make this network.
    """
    task, faults = config.model.task, [f"--task {config.model.task}"]
    for program, networks in NETWORKS.items():
        if task not in networks:
            continue
        flags = _candidate(config, networks[task])
        named, wanted = plain(to_config(task, flags, program)), plain(config)
        different = (f"--{name} {config.flat()[name] or 'none'}" for name in wanted if named[name] != wanted[name])
        fault = _unsupported(program, task, flags) or next(different, None)
        if fault is None:
            return program, flags
        faults.append(fault)
    raise UserError(f"the original has no counterpart of {faults[-1]}")


def _candidate(config: Config, defaults: Mapping[str, Any]) -> dict[str, Any]:
    flat, d, size = config.flat(), config.diffusion, image_size(config.model)
    half = config.train.precision == "fp16"
    own = flat | {theirs: flat[ours] for theirs, ours in OTHERWISE.items()} | dict(
        image_size=max(size), large_size=max(size), use_fp16=half, classifier_use_fp16=half, use_kl=d.objective == "vlb",
        predict_xstart=d.parametrization == "x0", timestep_respacing=flat["sampling_steps"].replace("all", ""),
    )  # fmt: skip
    if config.task.enlarges:
        own["small_size"] = max(small_size(config.model))
    if plain(config)["channel_mult"] == plain(config.updated({"channel_mult": ""}))["channel_mult"]:
        own["channel_mult"] = ""
    scaled = {"hybrid": True, "hybrid_unscaled": False}  # elsewhere it has no effect
    own["rescale_learned_sigmas"] = scaled.get(d.objective_name, defaults["rescale_learned_sigmas"])
    return {name: own[name] for name in defaults}


def _unsupported(program: str, task: str, flags: Mapping[str, Any]) -> str | None:
    """The first of the flags that would stop the program."""
    mult, sizes = numbers(flags.get("channel_mult", ""), "channel_mult", float), SUPPORTED[program][task]
    if not mult and (size := flags[KINDS[task].size]) not in sizes:
        return f"--image_size {size} ({program}-diffusion knows {', '.join(map(str, sizes))})"
    if any(m % 1 for m in mult):
        return f"--channel_mult {flags['channel_mult']} (it takes whole numbers)"
    if flags["noise_schedule"] not in ("linear", "cosine"):
        return f"--noise_schedule {flags['noise_schedule']}"
    attention = flags.get("classifier_attention_resolutions", flags.get("attention_resolutions"))
    return None if attention else "--attention_resolutions none"


def plain(config: Config) -> dict[str, Any]:
    """What makes the network and the process of a config, each value spelled in one way; not how many classes are trained."""
    from iddpm.nn import channel_mult_for

    m, d = config.model, config.diffusion
    found = values_of(m, d) | dict(
        image_size=image_size(m),
        channel_mult=numbers(m.channel_mult, "channel_mult", float) or channel_mult_for(min(image_size(m))),
        attention_resolutions=sorted(numbers(m.attention_resolutions, "attention_resolutions")),
        objective=d.objective_name,
        rescale_timesteps=d.rescale_timesteps or d.diffusion_steps == 1000,  # the network sees the same times
    )
    return {name: value for name, value in found.items() if name not in ("num_classes", "noised", "schedule_sampler")}


def line(flags: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """The flags that are not at their defaults, as typed."""
    return " ".join(f"--{k} {v}" for k, v in flags.items() if k not in defaults or v != defaults[k])
