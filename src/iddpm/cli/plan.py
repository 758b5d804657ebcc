"""`iddpm plan`: what a training run would need, without its hardware and without its data."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iddpm.cli.flags import Parser, Verb
from iddpm.config import ENDS, Config, check, ema_rates, ema_widths, fields_of, image_size, make, seconds_of
from iddpm.config.fields import opt
from iddpm.config.presets import PRESETS
from iddpm.errors import UserError
from iddpm.saying import say
from iddpm.words import duration, size

if TYPE_CHECKING:
    from iddpm.training.plan import Plan

MIB, GIB = 2**20, 2**30
CLASSES = {"digits": 10, "digits-classifier": 10}  # of the data that a preset is for
PARTS = {  # of iddpm.training.plan.Need, and how the table calls them
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "AdamW's two averages",
    "averages": "averaged weights (EMA)",
    "batch": "images and noise",
    "unreduced": "gradients of earlier microbatches",
    "activations": "activations",
    "copies": "convolutions' own copies",
    "gathered": "FSDP: gathered weights, buffers",
    "temporaries": "AdamW's temporaries",
}


@dataclass(frozen=True)
class Devices:
    """The devices, and what is known of them."""

    processes: int = opt(1, "number of devices, with one process on each", low=1)
    memory_gb: float = opt(0.0, "memory of a device in GiB (of which CUDA takes about 1): tells which microbatch fits", low=0)
    device_tflops: float = opt(0.0, "nominal TFLOP/s of a device at this --precision: tells how long the run takes", low=0)
    efficiency: float = opt(0.4, "share of the nominal speed that training reaches", low=0.001, high=1, only="device_tflops")
    measure: bool = opt(False, "instead, time real steps on the --device of this machine")
    bandwidth_gbs: float = opt(0.0, "what a device can send, in GB/s: tells how long communication takes", low=0)


def _parser(parser: Parser) -> None:
    parser.add_argument("--preset", default="", help="a recipe to plan, or several, comma-separated", metavar="NAME")
    parser.add_argument("--run", default="", help="the folder of a run, to plan how it would go on elsewhere", metavar="DIR")
    parser.add_flag("num_classes", int, "with --class_cond: how many classes the data has", default=0)
    parser.add_fields(Devices)
    for group in Config().parts:
        parser.add_fields(type(group))
    parser.epilog = (
        "Memory is that of a training step's tensors, right to a few percent on a CPU (benchmarks/plan_memory.md). Unless\n"
        "--device cpu is given it is worked out for CUDA, where the allocator's gaps, cuDNN's workspaces and CUDA itself come\n"
        "on top; nothing of this was run on CUDA. Checkpoints written in the background take host memory as well, sample sheets\n"
        "a further copy of the weights."
    )


def _plan(preset: str, run: str, num_classes: int, **given: Any) -> None:
    devices = make(Devices, {k: v for k, v in given.items() if k in fields_of(Devices)})
    flags = {k: v for k, v in given.items() if k not in fields_of(Devices)}
    _check(devices, asked=bool(preset or run or flags))
    from iddpm import build
    from iddpm.training import trial
    from iddpm.training.plan import plan

    config = _config(preset, run, num_classes, flags)
    # CUDA's kernels keep more under autocast than a CPU's, so it matters where the run is to be; "auto" here stands for CUDA.
    device = build.device(config.train.device) if devices.measure else None
    cuda = (device.type if device else config.train.device) != "cpu"
    planned = plan(config, devices.processes, cuda)
    facts = _facts(planned, config, devices)
    micro = _fitting(planned, config, facts["memory"], devices.memory_gb) if devices.memory_gb else planned.micro
    _say(*_what(planned, config), "", *_memory(planned, config, facts["memory"], devices.memory_gb, cuda))
    _say(*_communication(planned), "")
    work = planned.passes[config.model.use_checkpoint].both * planned.images  # FLOP of a step
    if device:
        _say(f"timing real steps on {device} ...")
        real = trial.speed(config, device, planned.micro)
        seconds = real.step(planned.images)
        how = f"{_si(work / seconds)}FLOP/s, from real steps of {real.images} on {device}"
    elif devices.device_tflops:
        seconds = work / (devices.device_tflops * 1e12 * devices.efficiency)
        how = f"of {devices.device_tflops:g} TFLOP/s x {devices.efficiency:g}"
    if device or devices.device_tflops:
        facts["speed"] = _speed(planned, config, devices, seconds)
        _say(*_pace(facts["speed"], f"{seconds:.3g} s for {planned.images} images, {how}"))
    else:
        _say("time         not known: --measure times steps here; --device_tflops X (and --bandwidth_gbs B) works it out")
    say("", "plan", **facts)
    fitting = {"microbatch": micro} if micro < planned.micro else {}
    ends = any(getattr(config.train, name) for name in ENDS)
    _say("", f"next: {_next(preset, run, flags | fitting, devices.processes, ends)}")


def _say(*lines: str) -> None:
    print("\n".join(lines), flush=True)


# ---- what is asked


def _check(devices: Devices, asked: bool) -> None:
    if not asked:
        raise UserError(
            "plan what? iddpm plan --preset NAME, --run DIR, or flags of iddpm train (--image_size 64 --num_channels 128 ...); "
            f"then --processes N, --memory_gb M, --device_tflops X. Presets: {', '.join(PRESETS)}"
        )
    if devices.measure and devices.device_tflops:
        raise UserError("--measure and --device_tflops both say how fast a device is: give one")
    if devices.bandwidth_gbs and devices.processes == 1:
        raise UserError("--bandwidth_gbs has no effect with one process: give --processes N")


def _config(preset: str, run: str, num_classes: int, flags: dict[str, Any]) -> Config:
    """The config that the same flags would train, of data that need not be there."""
    from iddpm import fit
    from iddpm.training import start

    if preset and run:
        raise UserError("--preset and --run both name a config: give one")
    given = flags | ({"num_classes": num_classes} if num_classes else {})
    if run:
        record = Path(run) / "config.json"
        if not record.exists():
            raise UserError(f"{run} is no run of iddpm: it has no config.json")
        return start.resumed(Config.from_json(record.read_text(), str(record)), given, Path(run))[0]
    if "auto" in preset.split(","):
        raise UserError("--preset auto is chosen for images: iddpm train DATA --dry_run; or plan one of the others")
    config = fit.require_fit(check(start.new(preset, given)))
    if config.model.class_cond and not config.model.num_classes:
        known = [CLASSES[name] for name in preset.split(",") if name in CLASSES]
        if not known:
            raise UserError("--class_cond: of how many classes? add --num_classes N (iddpm train finds them in the data)")
        config = config.updated({"num_classes": known[0]})
    if num_classes and not config.model.class_cond:
        raise UserError(f"--num_classes {num_classes} has no effect without --class_cond True")
    return config


# ---- what is answered


def _what(planned: "Plan", config: Config) -> Iterator[str]:
    (n, d), m, settings = planned.layout, config.model, config.train
    ddp, fsdp = "DDP, each holds all", f"FSDP2, {n // d} copies of {d} shards" if d < n else "FSDP2, all share one copy"
    height, width = image_size(m)
    precision = "fp32, unless the run's own timing takes bf16" if settings.precision == "auto" else settings.precision
    yield f"network      {m.network} for {height}x{width}, {planned.parameters:,} weights, {precision}"
    yield f"processes    {n}" + (f" ({fsdp if d > 1 else ddp})" if n > 1 else "")
    yield f"step         {settings.batch_size} images, {planned.images} a process, {planned.micro} at a time"
    off, on = planned.passes[False], planned.passes[True]
    both = f"{_si(off.both)}FLOP forward and backward, {_si(on.both)}FLOP with --use_checkpoint"
    averages = len(ema_rates(settings)) + len(ema_widths(settings))
    more = ", and one from before the decay" if settings.lr_decay and settings.keep else ""
    disk = size(4 * planned.parameters * (3 + averages))
    yield f"checkpoint   {disk} on the disk: weights, {averages} averages, AdamW's two; --keep {settings.keep} of them stay{more}"
    yield f"an image     {_si(off.forward)}FLOP forward, {both}"


def _memory(planned: "Plan", config: Config, facts: dict[str, dict[str, int]], room: float, cuda: bool) -> Iterator[str]:
    """A table of MiB, without and with --use_checkpoint; then what fits in `room` GiB, where that is given."""
    recompute, micro = config.model.use_checkpoint, planned.micro
    plain, saving = facts.values()
    heads = "plain" + " *"[not recompute], "use_checkpoint" + " *"[recompute]
    kind = "as CUDA's kernels keep things" if cuda else "as a CPU's kernels keep things"
    yield f"{'MiB of a device':34}{heads[0]:>12}{heads[1]:>18}    {kind}"
    for name, shown in PARTS.items():
        if plain[name] or saving[name]:
            yield f"  {shown:32}{plain[name] / MIB:>11,.1f} {saving[name] / MIB:>17,.1f}"
    peaks = f"{plain['peak'] / MIB:>11,.1f} {saving['peak'] / MIB:>17,.1f}"
    yield f"  {'at the fullest moment':32}{peaks}   (not all parts are there at once; * the run's)"
    if planned.layout.shard > 1:
        yield f"  validation and sample sheets gather all {4 * planned.parameters / MIB:,.1f} MiB of the weights on each device"
    if not room:
        return
    fits = [memory["largest_microbatch"] for memory in facts.values()]
    yield f"  {f'images at a time in {room:g} GiB':32}{fits[0]:>11,} {fits[1]:>17,}"
    if fits[recompute] < micro:
        more = f", or {min(fits[1], planned.images)} with --use_checkpoint True" if fits[1] > fits[recompute] else ""
        yield f"  {micro} at a time do not fit: --microbatch {fits[recompute]}{more}"


def _fitting(planned: "Plan", config: Config, facts: dict[str, dict[str, int]], room: float) -> int:
    """The microbatch that fits in `room` GiB; UserError where one image does not, with what would help."""
    need = planned.need[config.model.use_checkpoint]
    if largest := facts[f"use_checkpoint={config.model.use_checkpoint}"]["largest_microbatch"]:
        return min(largest, planned.micro)
    # What does not shrink with the microbatch: only sharding it out helps against that.
    held = sum(need.parts(1)[part] for part in ("weights", "gradients", "optimizer", "averages"))
    ways = [f"more than {need.peak(1) / GIB:.2f} GiB"]
    if facts["use_checkpoint=True"]["largest_microbatch"]:
        ways.append("--use_checkpoint True")
    if planned.layout.shard < planned.layout.processes:
        ways.append("try --shard -1")
    raise UserError(
        f"--memory_gb {room:g} cannot take one image at a time, which needs {need.peak(1) / GIB:.2f} GiB "
        f"({held / GIB:.2f} of them for weights, gradients, optimizer and averages): take {' or '.join(ways)}"
    )


def _communication(planned: "Plan") -> Iterator[str]:
    if planned.traffic:
        yield ""
        yield f"{'MiB of communication a step':34}{'in all':>12}{'sent by a device':>18}"
    for what, payload, sent in planned.traffic:
        yield f"  {what:32}{payload / MIB:>11,.1f} {sent / MIB:>17,.1f}"


def _speed(planned: "Plan", config: Config, devices: Devices, seconds: float) -> dict[str, Any]:
    """Seconds of a step, images per second and days, with communication wholly hidden behind arithmetic, and not at all."""
    n, known = config.train.batch_size, devices.bandwidth_gbs or not planned.traffic
    # DDP and FSDP send while the backward pass computes. How much of it that hides depends on the network between devices.
    talk = sum(t.sent for t in planned.traffic) / (devices.bandwidth_gbs * 1e9) if devices.bandwidth_gbs else 0.0
    steps = {"hidden": max(seconds, talk), "not_hidden": seconds + talk}
    time = seconds_of(config.train.time, "time")
    total = config.train.images or config.train.steps * n or int(time / steps["not_hidden"]) * n
    return {
        "compute_seconds": seconds,
        "communication_seconds": talk if known else None,
        "images_per_second": {k: n / s for k, s in steps.items()},
        "total_images": total,
        "days": {k: (time or total / n * s) / 86400 for k, s in steps.items()} if total else None,
    }


def _pace(speed: dict[str, Any], said: str) -> Iterator[str]:
    talk, rate, days = speed["communication_seconds"], speed["images_per_second"], speed["days"]
    if talk is None:
        said += "; communication not counted: give --bandwidth_gbs B"
    elif talk:
        said += f"; communication {talk:.3g} s"
    yield f"speed        {said}"
    low = f"{rate['not_hidden']:,.4g} to " if talk else ""
    hidden = " (communication not hidden behind arithmetic, and hidden)" if talk else ""
    yield f"             {low}{rate['hidden']:,.4g} images/s{hidden}"
    if days:
        ends = dict.fromkeys(duration(86400 * days[k]) for k in ("hidden", *(["not_hidden"] if talk else [])))
        yield f"run          {speed['total_images']:,} images: {' to '.join(ends)}"
    else:
        yield "run          give --time 8h, --steps N or --images N: when does it end?"


def _facts(planned: "Plan", config: Config, devices: Devices) -> dict[str, Any]:
    """All numbers, of the object "plan" of --json; bytes, operations and seconds."""
    memory: dict[str, dict[str, int]] = {}
    for on, need in planned.need.items():
        memory[f"use_checkpoint={on}"] = need.parts(planned.micro) | {"peak": need.peak(planned.micro)}
        if devices.memory_gb:
            memory[f"use_checkpoint={on}"]["largest_microbatch"] = need.largest(devices.memory_gb * GIB)
    off, on_ = planned.passes[False], planned.passes[True]
    return {
        "preset": config.preset,
        "processes": planned.layout.processes,
        "shard": planned.layout.shard,
        "parameters": planned.parameters,
        "batch_size": config.train.batch_size,
        "images_per_process": planned.images,
        "microbatch": planned.micro,
        "use_checkpoint": config.model.use_checkpoint,
        "flops_per_image": {"forward": off.forward, "forward_backward": off.both, "forward_backward_use_checkpoint": on_.both},
        "memory": memory,
        "communication": [traffic._asdict() for traffic in planned.traffic],
        "assumed": {k: v for k, v in vars(devices).items() if k not in ("processes", "json")},
    }


def _next(preset: str, run: str, flags: dict[str, Any], processes: int, ends: bool) -> str:
    what = f"--run {run}" if run else f"DATA --preset {preset}" if preset else "DATA"
    what += "" if ends else " --steps N"
    command = " ".join(["iddpm train", what, *(f"--{k} {v}" for k, v in flags.items())])
    if processes == 1:
        return command
    # Nodes of up to 8 devices, alike; torchrun reads its own flags up to the first --.
    here = max(d for d in range(1, 9) if processes % d == 0)
    nodes = f"--nnodes {processes // here} --rdzv-backend c10d --rdzv-endpoint HOST:29400 " if processes > 8 else ""
    return f"torchrun {nodes}--nproc-per-node {here if nodes else processes} -m -- {command}"


def _si(value: float) -> str:
    power = min(int(math.log10(max(value, 1)) // 3), 5)
    return f"{value / 1000**power:.3g} {['', 'k', 'M', 'G', 'T', 'P'][power]}"


VERB = Verb(
    _plan, _parser, "--preset NAME", "what a run needs (memory, disk, communication; with a speed, time) on any number of devices"
)
