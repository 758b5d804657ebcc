"""The settings of a run and of each verb, as frozen dataclasses: flags, help, ranges and the JSON all come from these fields."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from iddpm.config.fields import opt
from iddpm.config.tasks import TASKS

FOUND = ("found_path", "found_bound")  # grids of a model's own
ENDLESS = 2**62  # steps of a run that goes on until it is stopped, as the original's do
ENDS = ("steps", "images", "time")  # of Train: each says when to stop, so one replaces another

_fixed = partial(opt, fixed=True)  # a resumed run cannot change it
_unet = partial(opt, fixed=True, only="network=unet|unet_ddpm")
_depths = partial(opt, fixed=True, only="network=unet|unet_ddpm|ddpmpp|ncsnpp|unet_mapped|unet_mp")
_levels = partial(opt, fixed=True, only="network=unet|unet_ddpm|ddpmpp|ncsnpp|unet_linear|unet_mapped|unet_mp")
_widths = partial(opt, fixed=True, only="network=unet|unet_ddpm|ddpmpp|ncsnpp|unet_linear|unet_mapped|unet_mp|hdit")
_patched = partial(opt, fixed=True, only="network=unet|unet_ddpm|unet_mapped")
_heads = partial(opt, fixed=True, only="network=unet|unet_ddpm|unet_linear")
_enlarge = partial(opt, fixed=True, only="task=enlarge")
_translate = partial(opt, fixed=True, only="task=translate")
IMAGES = f"task={'|'.join(name for name, task in TASKS.items() if not task.classifies)}"  # not for classifiers
_draws = partial(opt, fixed=True, only=IMAGES)
_chain = partial(opt, fixed=True, only="noise_schedule:betas")  # for discrete chains: schedules that have betas
_measured = partial(opt, only="eval_every")


@dataclass(frozen=True)
class Model:
    """The network."""

    task: str = _fixed("images", f"what to train: {'; '.join(t.help for t in TASKS.values())}", choices=tuple(TASKS))
    network: str = _fixed("unet", "the architecture that learns it", kind="network")
    image_size: str = _fixed("64", "pixels, or HEIGHTxWIDTH")
    small_size: str = _enlarge("", "the size it enlarges from, pixels or HEIGHTxWIDTH")
    low_res_noise: float = _enlarge(0.0, "noise up to this deviation on the small image in training, told to the network", 0, 1)
    given_channels: int = _translate(0, "channels of the image it is given: 1, 3 or 4 of files; 0: as image_channels", 0, 1024)
    given_dropout: float = _translate(
        0.0, "share of images trained without the one given (by zeros), so that --guidance can be used; 0.1 is usual", 0, 0.9
    )
    image_channels: int = _fixed(3, "1 grey, 3 colour, 4 with transparency; of arrays any number", 1, 1024)
    bit_depth: str = _draws(
        "8", "bits of each channel that it learns; 16 keeps those of PNG, TIFF and arrays", choices=("8", "16")
    )
    num_channels: int = _widths(128, "channels of the first level", 1, 65536)
    num_res_blocks: int = _depths(2, "residual blocks per level", 1, 64)
    channel_mult: str = _widths("", "width of each level, as 1,2,2,2; empty: the usual one for the image size")
    unet_patch: int = _patched(1, "side of the patches of pixels that it works on; 2 is about four times as fast", 1, 64)
    attention_resolutions: str = _levels("16,8", "sizes (of the shorter side) that get attention; empty: none")
    num_heads: int = _heads(4, "attention heads", 1, 65536)
    num_head_channels: int = _unet(-1, "channels per head, instead of num_heads", -1, 65536)
    num_heads_upsample: int = _unet(-1, "attention heads on the way up; -1: as num_heads", -1, 65536)
    resblock_updown: bool = _unet(False, "change sizes inside residual blocks")
    new_attention_order: bool = _unet(False, "attention's channels are q, k, v, then heads (some published weights)")
    classifier_pool: str = opt(
        "attention", "how the classifier pools its features over the image", fixed=True, only="task=classify",
        choices=("adaptive", "attention", "spatial", "spatial_v2"),
    )  # fmt: skip
    use_scale_shift_norm: bool = _unet(True, "time and class scale and shift the normalised features")
    dropout: float = opt(0.0, "share of features dropped in training", 0, 0.999)
    use_checkpoint: bool = opt(False, "recompute activations in the backward pass: less memory, a third more time")
    class_cond: bool = _fixed(False, "condition on the classes of the data")
    class_dropout: float = _fixed(
        0.0, "share of images trained without their class, so that --guidance can be used; 0.1 is usual", 0, 0.9,
        only=f"{IMAGES} class_cond",
    )  # fmt: skip
    trained_guidance: float = _fixed(
        0.0, "teach the network guidance up to this scale: --guidance then costs no second call; a step of training costs twice",
        0, 100, only="class_dropout",
    )  # fmt: skip
    augment: float = _fixed(
        0.0, "chance of each of six changes to an image (turned, stretched ...), told to the network; 0.12 suits few images",
        0, 1, only="network=unet|ddpmpp|ncsnpp task=images",
    )  # fmt: skip
    num_classes: int = _fixed(0, "classes the network knows", 0, 10**7, flag=False)


@dataclass(frozen=True)
class Diffusion:
    """The process, and what is learned of it."""

    noise_schedule: str = _fixed("linear", "how the noise grows with time", kind="noise_schedule")
    diffusion_steps: int = _chain(1000, "steps T of the chain", 1, 10**6)
    parametrization: str = _draws("eps", "what the network predicts", kind="parametrization")
    learn_sigma: bool = _chain(
        False, "learn the variance too, between its two bounds (twice the output channels)",
        only=f"{IMAGES} noise_schedule:betas",
    )  # fmt: skip
    sigma_small: bool = _chain(
        False, "of the two fixed variances take the posterior's, not beta",
        only=f"{IMAGES} noise_schedule:betas learn_sigma=False",
    )  # fmt: skip
    snr_shift: float = _fixed(
        1.0, "how many times as large sigma/alpha is at every step: larger images need more noise (as 2 for twice the side)",
        0.01, 100,
    )  # fmt: skip
    zero_terminal_snr: bool = _chain(False, "the last step is pure noise")
    rescale_timesteps: bool = _chain(True, "tell the network step i of T as i * 1000/T, not as i")
    objective: str = _draws("auto", "the loss; auto: hybrid with learn_sigma, else simple", kind="objective", choices=("auto",))
    weighting: str = _fixed("uniform", "weight of the squared error at each level", kind="weighting", only="objective:weighting")
    noised: bool = _fixed(True, "learn from images of every noise level, not from clean ones", only="task=classify")
    schedule_sampler: str = opt(
        "uniform", "how training draws its noise levels (the law of t)", kind="schedule_sampler", fixed=True, only="noised=True"
    )

    @property
    def objective_name(self) -> str:
        """The objective, where auto stands for one."""
        return ("hybrid" if self.learn_sigma else "simple") if self.objective == "auto" else self.objective


@dataclass(frozen=True)
class Data:
    """The images."""

    labels: str = opt(
        "auto", "where classes come from; beside: a .cls or .json of each image; original: prefix if all have one, else folder; "
        "attributes:Male,Smiling: columns of list_attr_celeba.txt, .csv or attributes.csv",
        choices=("auto", "file", "beside", "folder", "prefix", "original", "none"), begins=("attributes:",),
    )  # fmt: skip
    only_classes: str = opt("", "read images of these classes alone, comma-separated, as cat,dog")
    balance: bool = opt(False, "draw every class equally often, however many images it has")
    fit: str = opt(
        "cover", "how images of another shape fit: cover (the centre), contain (whole, in white), anywhere (a part along the "
        "longer side, another each time; the centre in measuring)", choices=("cover", "contain", "anywhere"),
    )  # fmt: skip
    floats: str = opt("", "what floats in arrays and TIFF span: unit, 0 to 1; signed, -1 to 1", choices=("", "unit", "signed"))
    given: str = opt("", "the images it is given: a folder or archive, whose names are those of DATA", only="task=translate")
    validation: str = opt(
        "", "held-out images, or a share of DATA (5%), on which the loss is measured every --validation_interval steps"
    )
    validation_given: str = opt("", "the images given with the held-out ones", only="task=translate validation")
    random_flip: bool = opt(False, "mirror half of the training images")
    random_crop: bool = opt(False, "cut training images out at random, at 80 to 100 % of their side")
    on_broken: str = opt("skip", "a file that cannot be read: name and skip it, or stop", choices=("skip", "fail"))
    cache_gb: float = opt(2.0, "keep decoded images in memory up to this size", 0, 10**6)
    num_workers: int = opt(2, "threads that prepare batches ahead", 1, 1024)
    path: str = opt("", "the images", flag=False)
    rule: str = opt("", "how the classes were found", flag=False)
    classes: tuple[str, ...] = opt((), "names of the classes", flag=False)
    identity: str = opt("", "what tells these images from others, by part", flag=False)
    asked: str = opt("", "the flags of the command that began the run", flag=False)


@dataclass(frozen=True)
class Train:
    """The training."""

    steps: int = opt(0, "end after this many optimizer steps", 0)
    images: int = opt(0, "end after this many images instead", 0)
    time: str = opt("", "end after so much time of training instead, all parts of a run together: 45m, 8h, 2h30m, 3d")
    finish: str = opt("", "end a run that has begun: its rate falls to 0 over as many steps as fit in so much time, as 10m")
    batch_size: int = opt(64, "images per step, over all processes together", 1)
    microbatch: int = opt(-1, "images of a step computed at a time, to save memory; -1: all. The gradient stays the same", -1)
    optimizer: str = _fixed(
        "adamw", "muon: matrices and kernels move by the orthogonal part of their momentum, the rest by AdamW",
        choices=("adamw", "muon"),
    )  # fmt: skip
    lr: float = opt(1e-4, "learning rate", 0)
    lr_warmup_steps: int = opt(0, "raise the rate linearly over the first steps", 0)
    lr_anneal_steps: int = opt(0, "lower it linearly to 0 at this step; 0: never, -1: at the end of the run", -1)
    lr_decay: float = opt(
        0.0,
        "share of the run, at its end, in which the rate falls linearly to 0; of a --time 0.2 unless a preset says otherwise",
        0,
        1,
    )
    weight_decay: float = opt(0.0, "AdamW's decay", 0)
    adam_beta2: float = opt(0.999, "AdamW's second-moment rate", 0, 0.999999)
    grad_clip: float = opt(0.0, "largest gradient norm; 0: no limit", 0)
    ema_rate: str = _fixed("0.9999", "rates of the averaged weights, comma-separated; the first is sampled from")
    ema_warmup: bool = opt(True, "average over a tenth of the run so far while that is shorter than the rate's horizon")
    ema_power: str = _fixed(
        "",
        "also average by powers of time, of these relative widths (0.05,0.10), in snapshots: iddpm ema makes any other of them",
    )
    ema_snapshots: int = opt(
        32, "how many snapshots of each width to keep at most, evenly over the run", 8, 1000, only="ema_power"
    )
    precision: str = opt(
        "auto", "arithmetic of the network, the weights stay fp32; auto: the faster one, timed before the run and kept in it",
        choices=("auto", "fp32", "bf16", "fp16"),
    )  # fmt: skip
    fp16_scale_growth: float = opt(1e-3, "log2 growth of the fp16 loss scale per good step", 0, 1)
    device: str = opt("auto", "cpu, cuda, cuda:1, mps; auto: the best there is")
    seed: int = _fixed(0, "seed of everything random", 0, 2**63 - 1)
    log_interval: int = opt(50, "steps between log lines", 1)
    validation_interval: int = opt(100, "steps between measurements on --validation", 1)
    save_interval: int = opt(1000, "steps between checkpoints", 1)
    sample_interval: int = opt(1000, "steps between sample grids; 0: only at the end", 0)
    keep: int = opt(3, "newest checkpoints to keep; 0: all", 0)
    keep_every: int = opt(0, "also keep every checkpoint whose step is a multiple of this; 0: none", 0)
    async_save: bool = opt(True, "write checkpoints in the background: training stops only while they are copied in memory")
    shard: int = opt(0, "how many processes divide one copy of the weights (FSDP2); 0: none do (DDP), -1: all", -1)
    timeout: float = opt(1800.0, "seconds that several processes wait for one that hangs", 1, 10**7)
    noise_candidates: int = opt(
        1, "draw so many noises for each image and train on the nearest (Wang et al. 2025, k-nearest immiscible diffusion)",
        1, 64, only=IMAGES,
    )  # fmt: skip
    init_from: str = _fixed("", "start from the weights of this run or .safetensors file (fine-tuning)")
    init_reset: bool = _fixed(False, "layers of --init_from that do not fit start anew", only="init_from")
    log_to: str = opt(
        "", "also tell the numbers to these, comma-separated; each is an extra of its name", kind="log_to", many=True
    )
    eval_every: int = opt(0, "steps between measurements of samples, of which the best stays; 0: never", 0, only="task=images")
    eval_samples: int = _measured(256, "how many samples such a measurement draws", 4)
    eval_reference: str = _measured("", "the real images compared with; empty: those of --validation, else of training")
    eval_extractor: str = _measured("lite0-128", "the network whose features are compared", kind="extractor")
    eval_batch: int = _measured(64, "samples that a process draws at a time for it", 1)


BOUND = ("sampling_steps", "clip_denoised", "grid")  # all of Sample that the bound depends on: it has no solver


@dataclass(frozen=True)
class Sample:
    """How samples are drawn unless a command says otherwise."""

    solver: str = opt("ancestral", "how to walk from noise to image", kind="solver")
    sampling_steps: str = opt("250", "a count (250), counts per section (10,15,20), or ddimN; all: every step")
    clip_denoised: bool = opt(True, "clip the predicted image to [-1, 1] at each step")
    published: bool = opt(False, "few steps begin below pure noise, as the original's commands have it", flag=False)
    grid: str = opt("respaced", "where the levels of these steps lie; found_*: as --find_grid found", kind="grid", choices=FOUND)
    found: tuple[float, ...] = opt((), "the levels of a grid that was found", flag=False)
    skip_first: bool = opt(False, "save the first call of the network: at the noisiest level eps is x / sigma")
    guidance: float = opt(
        1.0, "how far to go from what is drawn without a class (0) to what is drawn with it (1), and beyond (1.5, 3)", 0, 1000
    )
    guidance_kind: str = opt(
        "auto", "how guidance goes beyond; auto: by the network itself, of --trained_guidance, else cfg",
        kind="guidance_kind", choices=("auto",),
    )  # fmt: skip
    guidance_low: float = opt(0.0, "guide only where sigma/alpha is at least this", 0)
    guidance_high: float = opt(1e9, "and at most this", 0)
    guidance_rescale: float = opt(0.0, "bring the spread of guided images back to that of unguided ones, by this share", 0, 1)
    dynamic_threshold: float = opt(
        0.0, "divide the predicted image by this quantile of its values where that is above 1 (0.995); 0: clip", 0, 1
    )
    consistent: bool = opt(False, "at each step, make the predicted image shrink to exactly the small one", only="task=enlarge")


@dataclass(frozen=True)
class Which:
    """Which weights, and on what they run."""

    checkpoint_step: int = opt(-1, "the checkpoint of this step; -1: the newest complete one", -1)
    best: bool = opt(False, "the checkpoint that --eval_every found best")
    ema_rate: float = opt(-1.0, "the average of this rate; 0: the raw weights, -1: the first rate of the run", -1, 1)
    device: str = opt("auto", "cpu, cuda, cuda:1, mps; auto: the best there is")
    precision: str = opt("fp32", "arithmetic of the network", choices=("fp32", "bf16", "fp16"))
    batch_size: int = opt(64, "images computed at a time; they come out the same", 1)


@dataclass(frozen=True)
class Draw:
    """What to draw."""

    num_samples: int = opt(0, "images; 0: 64, or 10 of each class", 0)
    seeds: str = opt("", "seeds instead of a number of images, as 0-63 or 7,9,20-29")
    labels: str = opt("", "classes by name or number, comma-separated; empty: all")
    classifier: str = opt("", "the run of a classifier that guides the samples to their classes")
    classifier_scale: float = opt(1.0, "strength of the classifier's guidance", 0, only="classifier")
    autoguide: str = opt("", "a smaller run, or an earlier checkpoint of this one, to guide away from")
    autoguidance: float = opt(
        2.0, "how far to go from what that one draws (0) to what this one does (1), and beyond", 0, only="autoguide"
    )
    then: str = opt("", "super-resolution runs that enlarge the images, comma-separated")
    given: str = opt("", "the images given to the model (--task translate): a folder, an archive, one image or an npz")
    fit: bool = opt(False, "scale and crop them to the model's size, as in training", only="given")
    low_res: str = opt("", "the small images to enlarge (--task enlarge), a folder or an npz")
    high_res: str = opt("", "or full-size images, to be shrunk, enlarged again and compared")
    low_res_noise: float = opt(0.0, "noise put on the small images, for a model trained with it", 0, 1)
    find_grid: int = opt(0, "instead: find the best levels for so many steps, by --grid found_path or found_bound", 0, 59)
    out: str = opt("", "a grid.png, a file.npz or a folder of PNGs; empty: a grid in the run's samples/")


@dataclass(frozen=True)
class Edit:
    """What to make of images."""

    strength: float = opt(
        0.5, "how far back to noise: near 0 little changes, at 1 nothing of the image is left", low=0.001, high=1
    )
    mask: str = opt("", "a picture of the image's size: what is light in it is filled in, the rest stays as it is")
    between: bool = opt(False, "lead one image over into another, by DDIM's inversion of both")
    frames: int = opt(9, "images from the one to the other", low=2, high=1000)
    seeds: str = opt("", "one result for each seed, as 0-3 or 7,9; empty: 0")
    labels: str = opt("", "the class to draw, by name or number")
    out: str = opt("", "a sheet.png; between two images a strip.png or an animated.gif; empty: a new name in the run's samples/")


@dataclass(frozen=True)
class Measure:
    """What to measure."""

    num_samples: int = opt(0, "images to measure, chosen by the seed; 0: all", 0)
    seed: int = opt(0, "seed of this choice and of the noise", 0, 2**63 - 1)
    curve: str = opt("", "instead: bits/dim for several numbers of steps, on chains respaced to them, as 10,50,250,all")
    out: str = opt("", "where the numbers go; empty: nll.json or nll_curve.json in the run. Tables and a picture go beside it")
    ode: bool = opt(
        False, "instead of the bound: the likelihood by the probability-flow ODE, on which deterministic solvers move"
    )
    trace: str = opt(
        "auto",
        "its divergence, exactly (a backward pass for each dimension) or by a random probe; auto: exactly up to 64 dimensions",
        choices=("auto", "exact", "hutchinson"),
        only="ode",
    )
    dequantization: str = opt(
        "truncated_normal",
        "the noise within a pixel's bin that its density is of",
        choices=("uniform", "truncated_normal"),
        only="ode",
    )
    given: str = opt("", "the images given with those of DATA, of the same names (--task translate)")
    per_image: str = opt("", "also the bits/dim of each image, as a .csv or .npz")
    against: str = opt("", "another run, measured on the same images and noise: tells the difference to it")


@dataclass(frozen=True)
class Evaluate:
    """What to measure, and against what."""

    reference: str = opt("", "real images: a folder, an .npz or archive of them; or an .npz of their statistics (mu, sigma)")
    extractor: str = opt("lite0-128", "the network whose features are compared", kind="extractor")
    metrics: str = opt("", "some of these, comma-separated; empty: all that apply", kind="metrics", many=True)
    num_samples: int = opt(0, "images; 0: all of a file, 2048 of a run", 0)
    num_reference: int = opt(0, "reference images, drawn by the seed; 0: all", 0)
    labels: str = opt("", "a run's classes to draw, by name or number; empty: all")
    seed: int = opt(0, "a run's first seed, and that of the choice among more images than are compared", 0, 2**63 - 1)
    draws: int = opt(1, "sets of samples to draw from a run: figures are their mean, errors come from their spread", 1)
    save_statistics: str = opt("", "also write the reference's mu and sigma to this .npz, for other tools and later use")
    out: str = opt("", "where the figures go; empty: metrics.json in the run, or beside the samples")
    own: tuple[tuple[str, Any], ...] = ()  # the numbers of the extractor and the metrics that are chosen
