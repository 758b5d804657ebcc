"""Everything a run is made of, as frozen dataclasses: the flags, their help, their ranges and the JSON all come from here."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from iddpm.errors import UserError

EXTRACTORS = "lite0-128, lite0-224, inception, inception-pytorch-fid (its scaling of images), dinov2"
ENDLESS = 2**62  # steps of a run that goes on until it is stopped, as the original's do


def opt(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    fixed: bool = False,
    flag: bool = True,
) -> Any:
    """A field with its help, inclusive range or choices. `fixed`: a resumed run cannot change it; `flag`: a user may set it."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices, fixed=fixed, flag=flag))


@dataclass(frozen=True)
class Model:
    """The network."""

    network: str = opt(
        "unet",
        "what to train: a model of images, one that enlarges them, or a classifier of noisy ones",
        choices=("unet", "super_res", "classifier"),
        fixed=True,
    )
    image_size: str = opt("64", "pixels, or HEIGHTxWIDTH", fixed=True)
    small_size: str = opt("", "super_res: the size it enlarges from, pixels or HEIGHTxWIDTH", fixed=True)
    low_res_noise: float = opt(
        0.0,
        "super_res: noise up to this deviation on the small image in training, and its level told to the network "
        "(conditioning augmentation)",
        low=0,
        high=1,
        fixed=True,
    )
    image_channels: int = opt(3, "1 grey, 3 colour, 4 with transparency", low=1, high=4, fixed=True)
    num_channels: int = opt(128, "channels of the first level", low=1, fixed=True)
    num_res_blocks: int = opt(2, "residual blocks per level", low=1, fixed=True)
    channel_mult: str = opt("", "width of each level, as 1,2,2,2; empty: the usual one for the image size", fixed=True)
    attention_resolutions: str = opt("16,8", "sizes (of the shorter side) that get attention; empty: none", fixed=True)
    num_heads: int = opt(4, "attention heads", low=1, fixed=True)
    num_head_channels: int = opt(-1, "channels per head, instead of num_heads", low=-1, fixed=True)
    num_heads_upsample: int = opt(-1, "attention heads on the way up; -1: as num_heads", low=-1, fixed=True)
    resblock_updown: bool = opt(False, "change sizes inside residual blocks", fixed=True)
    new_attention_order: bool = opt(False, "attention's channels are q, k, v, then heads (some published weights)", fixed=True)
    classifier_pool: str = opt(
        "attention", "classifier: how it sums an image up", choices=("adaptive", "attention", "spatial", "spatial_v2"), fixed=True
    )
    use_scale_shift_norm: bool = opt(True, "time and class scale and shift the normalised features", fixed=True)
    dropout: float = opt(0.0, "share of features dropped in training", low=0, high=0.999)
    use_checkpoint: bool = opt(False, "recompute activations in the backward pass: less memory, a third more time")
    class_cond: bool = opt(False, "condition on the classes of the data", fixed=True)
    num_classes: int = opt(0, "classes the network knows", low=0, fixed=True, flag=False)


@dataclass(frozen=True)
class Diffusion:
    """The process, and what is learned of it."""

    diffusion_steps: int = opt(1000, "steps T of the chain", low=1, fixed=True)
    noise_schedule: str = opt("linear", "variances of the chain", choices=("linear", "cosine"), fixed=True)
    parametrization: str = opt("eps", "what the network predicts", choices=("eps", "x0", "v", "previous"), fixed=True)
    learn_sigma: bool = opt(False, "learn the variance, as a range (twice the output channels)", fixed=True)
    sigma_small: bool = opt(False, "fixed variance: the posterior's rather than beta", fixed=True)
    rescale_timesteps: bool = opt(True, "the network sees i * 1000/T rather than i", fixed=True)
    objective: str = opt(
        "auto",
        "the loss; auto: hybrid with learn_sigma, else simple",
        choices=("auto", "simple", "hybrid", "hybrid_unscaled", "vlb", "vlb_unscaled"),
        fixed=True,
    )
    noised: bool = opt(True, "classifier: learn from images of every noise level, not from clean ones", fixed=True)
    schedule_sampler: str = opt("uniform", "law of t", choices=("uniform", "stratified", "loss-second-moment"), fixed=True)


@dataclass(frozen=True)
class Data:
    """The images."""

    labels: str = opt(
        "auto",
        "where classes come from; original: prefix if every name has one, else folder",
        choices=("auto", "file", "folder", "prefix", "original", "none"),
    )
    validation: str = opt("", "held-out images, on which the loss is measured every --validation_interval steps")
    random_flip: bool = opt(False, "mirror half of the training images")
    random_crop: bool = opt(False, "cut training images out at random, at 80 to 100 % of their side")
    on_broken: str = opt("skip", "a file that cannot be read: name and skip it, or stop", choices=("skip", "fail"))
    cache_gb: float = opt(2.0, "keep decoded images in memory up to this size", low=0)
    num_workers: int = opt(2, "threads that prepare batches ahead", low=1)
    path: str = opt("", "the images", flag=False)
    rule: str = opt("", "how the classes were found", flag=False)
    classes: tuple[str, ...] = opt((), "names of the classes", flag=False)


@dataclass(frozen=True)
class Train:
    """The training."""

    steps: int = opt(0, "end after this many optimizer steps", low=0)
    images: int = opt(0, "or after this many images", low=0)
    batch_size: int = opt(64, "images per step, in all", low=1)
    microbatch: int = opt(-1, "images at a time, to save memory; -1: all. Changes no gradient", low=-1)
    lr: float = opt(1e-4, "learning rate", low=0)
    lr_warmup_steps: int = opt(0, "raise the rate linearly over the first steps", low=0)
    lr_anneal_steps: int = opt(0, "lower it linearly to 0 at this step; 0: never, -1: at the end of the run", low=-1)
    weight_decay: float = opt(0.0, "AdamW's decay", low=0)
    adam_beta2: float = opt(0.999, "AdamW's second-moment rate", low=0, high=0.999999)
    grad_clip: float = opt(0.0, "largest gradient norm; 0: no limit", low=0)
    ema_rate: str = opt("0.9999", "rates of the averaged weights, comma-separated; the first is sampled from", fixed=True)
    ema_warmup: bool = opt(True, "average over a tenth of the run so far while that is shorter than the rate's horizon")
    precision: str = opt("fp32", "arithmetic of the network; the weights stay fp32", choices=("fp32", "bf16", "fp16"))
    fp16_scale_growth: float = opt(1e-3, "log2 growth of the fp16 loss scale per good step", low=0)
    device: str = opt("auto", "cpu, cuda, cuda:1, mps; auto: the best there is")
    seed: int = opt(0, "seed of everything random", low=0, high=2**63 - 1, fixed=True)
    log_interval: int = opt(50, "steps between log lines", low=1)
    validation_interval: int = opt(100, "steps between measurements on --validation", low=1)
    save_interval: int = opt(1000, "steps between checkpoints", low=1)
    sample_interval: int = opt(1000, "steps between sample grids; 0: only at the end", low=0)
    keep: int = opt(3, "newest checkpoints to keep; 0: all", low=0)
    keep_every: int = opt(0, "also keep the checkpoint of every step that this divides; 0: none", low=0)
    async_save: bool = opt(True, "write checkpoints in the background: training stops only while they are copied in memory")
    shard: int = opt(
        0, "of several processes, how many share one set of weights out (FSDP2); 0: each holds all (DDP), -1: all share", low=-1
    )
    timeout: float = opt(1800.0, "seconds that several processes wait for one that hangs", low=1)
    init_from: str = opt("", "start from the weights of this run or .safetensors file (fine-tuning)", fixed=True)
    init_reset: bool = opt(False, "with --init_from: layers that do not fit start anew", fixed=True)
    tensorboard: bool = opt(False, "also write TensorBoard events (extra: tensorboard)")
    eval_every: int = opt(0, "steps between measurements of drawn samples; the best checkpoint is kept. 0: never", low=0)
    eval_samples: int = opt(256, "how many samples such a measurement draws", low=4)
    eval_reference: str = opt(
        "", "the real images they are compared with; empty: those of --validation, else the training images"
    )
    eval_extractor: str = opt("lite0-128", f"the network whose features are compared: {EXTRACTORS}")
    eval_batch: int = opt(64, "how many of them a process draws at a time", low=1)


@dataclass(frozen=True)
class Sample:
    """How samples are drawn unless a command says otherwise."""

    solver: str = opt("ancestral", "how to walk from noise to image", choices=("ancestral", "ddim"))
    sampling_steps: str = opt("250", "a count (250), counts per section (10,15,20), or ddimN; all: every step")
    eta: float = opt(0.0, "ddim's share of fresh noise", low=0, high=1)
    clip_denoised: bool = opt(True, "hold the predicted image in [-1, 1] at each step")
    consistent: bool = opt(False, "super_res: hold the predicted image's means over areas at the small image, too")


@dataclass(frozen=True)
class Which:
    """Which weights, and on what they run."""

    checkpoint_step: int = opt(-1, "the checkpoint of this step; -1: the newest that is whole", low=-1)
    best: bool = opt(False, "the checkpoint that --eval_every found best")
    ema_rate: float = opt(-1.0, "the average of this rate; 0: the raw weights, -1: the first rate of the run", low=-1, high=1)
    device: str = opt("auto", "cpu, cuda, cuda:1, mps; auto: the best there is")
    precision: str = opt("fp32", "arithmetic of the network", choices=("fp32", "bf16", "fp16"))
    batch_size: int = opt(64, "images at a time; does not change them", low=1)


@dataclass(frozen=True)
class Draw:
    """What to draw."""

    num_samples: int = opt(0, "images; 0: 64, or 10 of each class", low=0)
    seeds: str = opt("", "seeds instead of a number of images, as 0-63 or 7,9,20-29")
    labels: str = opt("", "classes by name or number, comma-separated; empty: all")
    classifier: str = opt("", "the run of a classifier that guides the samples to their classes")
    classifier_scale: float = opt(1.0, "how strongly it pulls", low=0)
    then: str = opt("", "super-resolution runs that enlarge the images, comma-separated")
    low_res: str = opt("", "super_res: the small images to enlarge, a folder or an npz")
    high_res: str = opt("", "super_res: or full-size images, to be shrunk, enlarged again and compared")
    low_res_noise: float = opt(0.0, "super_res: noise put on the small images, for a model trained with it", low=0, high=1)
    out: str = opt("", "a grid.png, a file.npz or a folder of PNGs; empty: a grid in the run's samples/")


@dataclass(frozen=True)
class Measure:
    """What to measure."""

    num_samples: int = opt(0, "images, drawn by the seed; 0: all", low=0)
    seed: int = opt(0, "seed of the draw and of the noise", low=0, high=2**63 - 1)
    curve: str = opt("", "bits/dim against the number of steps instead: of chains respaced to these, as 10,50,250,all")
    out: str = opt("", "where the numbers go; empty: nll.json or nll_curve.json in the run. Tables and a picture go beside it")
    per_image: str = opt("", "also the bits/dim of each image, as a .csv or .npz")
    against: str = opt("", "another run: the difference to it, on the same images and noise")


@dataclass(frozen=True)
class Evaluate:
    """What to measure, and against what."""

    reference: str = opt("", "real images: a folder, an .npz or archive of them; or an .npz of their statistics (mu, sigma)")
    extractor: str = opt("lite0-128", f"the network whose features are compared: {EXTRACTORS}")
    inception_weights: str = opt("", "the file of Inception's weights; empty: where torch keeps what it downloads")
    dinov2_weights: str = opt("", "the file of DINOv2's weights; empty: where torch keeps what it downloads")
    metrics: str = opt("", "some of fd, sfd, is, kd, prdc, labels, memorisation, comma-separated; empty: all that apply")
    num_samples: int = opt(0, "images; 0: all of a file, 2048 of a run", low=0)
    num_reference: int = opt(0, "reference images, drawn by the seed; 0: all", low=0)
    labels: str = opt("", "a run's classes to draw, by name or number; empty: all")
    seed: int = opt(
        0, "a run's first seed, and the seed of the choice among more images than are compared", low=0, high=2**63 - 1
    )
    draws: int = opt(1, "sets of samples that a run draws, of which mean and spread are told", low=1)
    neighbours: int = opt(5, "the k of precision, recall, density and coverage", low=1, high=100)
    save_statistics: str = opt("", "also write the reference's mu and sigma to this .npz, for other tools and later use")
    out: str = opt("", "where the figures go; empty: metrics.json in the run, or beside the samples")


@dataclass(frozen=True)
class Config:
    """All of a run. Field names are unique across the groups, so a flat name finds its group."""

    model: Model = Model()
    diffusion: Diffusion = Diffusion()
    data: Data = Data()
    train: Train = Train()
    sample: Sample = Sample()
    preset: str = ""

    def updated(self, flat: Mapping[str, Any]) -> "Config":
        """A copy with the named fields changed, whichever group they belong to."""
        groups = {}
        for name, group in self.groups():
            own = {k: v for k, v in flat.items() if k in fields_of(group)}
            groups[name] = dataclasses.replace(group, **own)
        unknown = [k for k in flat if not any(k in fields_of(g) for _, g in self.groups()) and k != "preset"]
        assert not unknown, unknown
        return dataclasses.replace(self, **groups, preset=flat.get("preset", self.preset))

    def groups(self) -> Iterator[tuple[str, Any]]:
        return ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "preset")

    def flat(self) -> dict[str, Any]:
        """Every field of every group by its name."""
        return {name: getattr(group, name) for _, group in self.groups() for name in fields_of(group)}

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @staticmethod
    def from_json(text: str, source: str = "this config") -> "Config":
        """The config that `to_json` wrote; UserError where a field is unknown, as in a file of a newer version."""
        try:
            raw = json.loads(text)
            flat = {k: v for group in raw.values() if isinstance(group, dict) for k, v in group.items()}
            flat["preset"] = raw["preset"]
        except (ValueError, AttributeError, KeyError, TypeError) as e:
            raise UserError(f"{source} is not a config of iddpm ({e})") from None
        known = Config().flat()
        if unknown := [k for k in flat if k not in known and k != "preset"]:
            raise UserError(f"{source} has the unknown field {unknown[0]!r}: it needs a newer iddpm")
        return Config().updated({k: tuple(v) if isinstance(v, list) else v for k, v in flat.items()})


def fields_of(group: Any) -> dict[str, Any]:
    """name -> (type, default, metadata) of a dataclass or an instance of one."""
    hints = get_type_hints(group if isinstance(group, type) else type(group))
    return {f.name: (hints[f.name], f.default, f.metadata) for f in dataclasses.fields(group)}


def check_fields(group: Any) -> None:
    """Raise UserError for the first value out of its range or choices, saying what is allowed."""
    for name, (kind, _, meta) in fields_of(group).items():
        value, low, high = getattr(group, name), meta.get("low"), meta.get("high")
        if kind in (int, float):
            out = not math.isfinite(value) or (low is not None and value < low) or (high is not None and value > high)
            if out:
                limits = f"from {low:g} to {high:g}" if high is not None else f"{low:g} or more"
                raise UserError(f"--{name} {value} is out of range: {limits}")
        if (choices := meta.get("choices")) and value not in choices:
            raise UserError(f"--{name} {value!r} is not one of: {', '.join(choices)}")


def make(group: type, given: dict[str, Any]) -> Any:
    """A group of settings from the flags given, checked."""
    made = group(**{k: v for k, v in given.items() if k in fields_of(group)})
    check_fields(made)
    return made


def numbers(text: str, name: str, kind: type = int) -> tuple[Any, ...]:
    """The comma-separated numbers of a flag."""
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UserError(f"--{name} {text!r}: give numbers separated by commas") from None


def image_size(model: Model) -> tuple[int, int]:
    """(height, width) in pixels, each from 8 to 1024."""
    return _size(model.image_size, "image_size", 8)


def small_size(model: Model) -> tuple[int, int]:
    """(height, width) of what a super_res model enlarges, each a whole fraction of the image's."""
    if not model.small_size:
        raise UserError("--network super_res enlarges images: from which --small_size?")
    small, large = _size(model.small_size, "small_size", 1), image_size(model)
    if any(big % little or big == little for big, little in zip(large, small)):
        raise UserError(f"--small_size {model.small_size}: {model.image_size} must be a whole multiple of it, twice or more")
    return small


def _size(text: str, name: str, low: int) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(p.isdigit() and low <= int(p) <= 1024 for p in parts):
        raise UserError(f"--{name} {text!r}: give pixels from {low} to 1024, as 64 or (height x width) 64x96")
    return int(parts[0]), int(parts[-1])


def check(config: Config) -> Config:
    """The config itself, or UserError for the first thing in it that cannot work or would be silently ignored."""
    for _, group in config.groups():
        check_fields(group)
    model, diffusion, train, sample = config.model, config.diffusion, config.train, config.sample
    image_size(model)
    _check_network(model, diffusion)
    numbers(model.channel_mult, "channel_mult", float)
    numbers(model.attention_resolutions, "attention_resolutions")
    if bad := [r for r in ema_rates(train) if not 0 <= r < 1]:
        raise UserError(f"--ema_rate {bad[0]}: rates lie in [0, 1), as 0.999 or 0.999,0.9999")
    if diffusion.learn_sigma and diffusion.sigma_small:
        raise UserError("--sigma_small has no effect with --learn_sigma: leave one out")
    if diffusion.learn_sigma and diffusion.objective == "simple":
        raise UserError("--objective simple does not train the variance of --learn_sigma: take hybrid or vlb")
    if not diffusion.learn_sigma and diffusion.objective.startswith("hybrid"):
        raise UserError(f"--objective {diffusion.objective} needs --learn_sigma True")
    if sample.eta and sample.solver != "ddim":
        raise UserError(f"--eta has no effect with --solver {sample.solver}: it belongs to ddim")
    if config.data.validation and config.data.validation == config.data.path:
        raise UserError(f"--validation {config.data.validation} is what the run is trained on: give held-out images")
    if sample.consistent and model.network != "super_res":
        raise UserError(f"--consistent has no effect with --network {model.network}: it belongs to super_res")
    if train.eval_every and model.network != "unet":
        raise UserError(f"--eval_every has no effect with --network {model.network}: it draws samples")
    only = () if train.eval_every else ("eval_samples", "eval_reference", "eval_extractor", "eval_batch")
    if useless := [k for k in only if getattr(train, k) != getattr(Train, k)]:
        raise UserError(f"--{useless[0]} has no effect without --eval_every; its default is {getattr(Train, useless[0])!r}")
    if train.microbatch == 0:
        raise UserError("--microbatch 0: give a number of images, or -1 for the whole batch")
    check_sampling_steps(diffusion.diffusion_steps, sample.sampling_steps)
    return config


def _check_network(model: Model, diffusion: Diffusion) -> None:
    if model.network == "super_res":
        small_size(model)
    elif model.small_size or model.low_res_noise:
        name = "small_size" if model.small_size else "low_res_noise"
        raise UserError(f"--{name} has no effect with --network {model.network}: it belongs to super_res")
    if model.network != "classifier":
        if not diffusion.noised:
            raise UserError(f"--noised False is for --network classifier, not {model.network}")
        if model.classifier_pool != Model().classifier_pool:
            raise UserError(f"--classifier_pool has no effect with --network {model.network}: it belongs to classifier")
        return
    if not model.class_cond:
        raise UserError("--network classifier learns the classes of the data: add --class_cond True")
    if diffusion.learn_sigma or diffusion.objective != "auto":
        name = "learn_sigma" if diffusion.learn_sigma else "objective"
        raise UserError(f"--{name} has no effect with --network classifier, whose loss is the cross-entropy")
    if not diffusion.noised and diffusion.schedule_sampler != "uniform":
        raise UserError(f"--schedule_sampler {diffusion.schedule_sampler} has no effect with --noised False")


def check_sampling_steps(steps: int, spec: str) -> None:
    """Raise UserError where a sampling spec's counts cannot be taken from so many steps (the strides of ddimN come later)."""
    text = spec.removeprefix("ddim")
    if spec == "all" or (text and all(part.strip().isdigit() and int(part) > 0 for part in text.split(","))):
        total = 0 if spec == "all" else sum(int(part) for part in text.split(","))
        if total > steps:
            raise UserError(f"--sampling_steps {spec}: the chain has only {steps} steps (--diffusion_steps)")
        return
    raise UserError(f"--sampling_steps {spec!r}: give a count (250), counts per section (10,15,20), ddimN (ddim50), or all")


def ema_rates(train: Train) -> tuple[float, ...]:
    """The rates of the averages, in the order given."""
    return numbers(train.ema_rate, "ema_rate", float)


def seed_list(text: str) -> list[int]:
    """The seeds of 0-63 or 7,9,20-29, in the order given."""
    seeds: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or (last and (not last.isdigit() or int(last) < int(first))):
            raise UserError(f"--seeds {text!r}: give them as 0-63 or 7,9,20-29")
        seeds += range(int(first), int(last or first) + 1)
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {text!r} names a seed twice")
    return seeds


def total_steps(train: Train) -> int:
    """Optimizer steps of the whole run; UserError where neither --steps nor --images says."""
    if train.steps and train.images:
        raise UserError("--steps and --images both say when to stop: give one")
    if not train.steps and not train.images:
        raise UserError("say when to stop: --steps N or --images N (or take a --preset)")
    return train.steps or math.ceil(train.images / train.batch_size)
