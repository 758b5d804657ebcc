"""`iddpm plan`: what a training run would need, without its hardware and without its data."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iddpm.cli.flags import Parser, Verb
from iddpm.config import Config, check, fields_of, image_size, make, opt
from iddpm.config.presets import PRESETS
from iddpm.errors import UserError

if TYPE_CHECKING:
    from iddpm.training.plan import Plan

MIB, GIB = 2**20, 2**30
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

    processes: int = opt(1, "how many, one process each", low=1)
    memory_gb: float = opt(0.0, "memory of one, in GiB: which microbatch fits? (CUDA itself takes about 1)", low=0)
    device_tflops: float = opt(0.0, "speed of one on paper, in TFLOP/s at this --precision: how long does the run take?", low=0)
    efficiency: float = opt(0.4, "the share of it that training gets", low=0.001, high=1)
    measure: bool = opt(False, "instead, time real steps on the --device of this machine")
    bandwidth_gbs: float = opt(0.0, "what one can send at a time, in GB/s: how long does communication take?", low=0)
    json: str = opt("", "also write all numbers to this file")


def _parser(parser: Parser) -> None:
    parser.add_argument("--preset", default="", help="a recipe to plan", metavar="NAME")
    parser.add_argument("--run", default="", help="a run to plan anew: its folder", metavar="DIR")
    parser.add_argument("--num_classes", default=0, type=int, help="with --class_cond: the classes of the data", metavar="N")
    parser.add_fields(Devices)
    for _, group in Config().groups():
        parser.add_fields(type(group))
    parser.epilog = (
        "Memory is that of a training step's tensors, right to a few percent on a CPU (benchmarks/plan_memory.md). Unless\n"
        "--device cpu is given it is worked out for CUDA, where the allocator's gaps, cuDNN's workspaces and CUDA itself come\n"
        "on top; nothing of this was run on CUDA. Checkpoints written in the background take host memory as well, sample sheets\n"
        "a further copy of the weights."
    )


def _plan(preset: str, run: str, num_classes: int, **given: Any) -> None:
    devices = make(Devices, given)
    flags = {k: v for k, v in given.items() if k not in fields_of(Devices)}
    if not (preset or run or flags):
        raise UserError(
            "plan what? iddpm plan --preset NAME, --run DIR, or flags of iddpm train (--image_size 64 --num_channels 128 ...); "
            f"then --processes N, --memory_gb M, --device_tflops X. Presets: {', '.join(PRESETS)}"
        )
    _check(devices, given)
    config = _config(preset, run, num_classes, flags)

    from iddpm import build
    from iddpm.training import trial
    from iddpm.training.plan import plan

    device = build.device(config.train.device) if devices.measure else None
    cuda = device.type != "cpu" if device else config.train.device != "cpu"
    planned = plan(config, devices.processes, cuda)
    micro = planned.micro
    if devices.memory_gb:
        micro = min(micro, _largest(planned, config, devices))
    facts = _facts(planned, config, devices)
    print("\n".join([*_what(planned, config), "", *_memory(planned, config, cuda), *_room(planned, config, devices)]))
    if planned.traffic:
        print("\n".join(["", *_communication(planned)]))
    if device:
        print(f"\ntiming real steps on {device} ...", flush=True)
        speed = trial.speed(config, device, planned.micro)
        seconds = speed.step(planned.images)
        rate = planned.flops[config.model.use_checkpoint].both * planned.images / seconds
        said = f"{seconds:.3g} s for {planned.images} images, {_si(rate)}FLOP/s, from real steps of {speed.images} on {device}"
    elif devices.device_tflops:
        rate = devices.device_tflops * 1e12 * devices.efficiency
        seconds = planned.flops[config.model.use_checkpoint].both * planned.images / rate
        said = f"{devices.device_tflops:g} TFLOP/s x {devices.efficiency:g}: {seconds:.3g} s for {planned.images} images"
    if device or devices.device_tflops:
        facts["speed"] = _speed(planned, config, devices, seconds)
        print("\n".join(["", *_pace(facts["speed"], said)]))
    else:
        print("\nspeed: give --device_tflops X (and --bandwidth_gbs B), or --measure")
    if devices.json:
        Path(devices.json).write_text(json.dumps(facts, indent=1))
        print(f"\nwrote {devices.json}")
    print(f"\nnext: {_next(preset, run, flags, devices.processes, micro if micro < planned.micro else 0)}")


# ---- what is asked


def _check(devices: Devices, given: dict[str, Any]) -> None:
    if devices.measure and devices.device_tflops:
        raise UserError("--measure and --device_tflops both say how fast a device is: give one")
    if "efficiency" in given and not devices.device_tflops:
        raise UserError("--efficiency has no effect without --device_tflops")
    if devices.bandwidth_gbs and devices.processes == 1:
        raise UserError("--bandwidth_gbs has no effect with one process: give --processes N")


def _config(preset: str, run: str, num_classes: int, flags: dict[str, Any]) -> Config:
    if bool(flags.get("steps")) != bool(flags.get("images")):  # one of them replaces the other, wherever that came from
        flags = {"steps": 0, "images": 0, **flags}
    if num_classes:
        flags = flags | {"num_classes": num_classes}
    if preset and run:
        raise UserError("--preset and --run both name a config: give one")
    if run:
        return _config_of_run(Path(run), flags)
    if preset and preset not in PRESETS:
        raise UserError(f"--preset {preset} is not one of: {', '.join(PRESETS)}")
    config = Config()
    if source := flags.get("init_from"):
        from iddpm.store.checkpoint import read_weights

        other = read_weights(Path(source)).config
        config = config.updated({k: getattr(g, k) for g in (other.model, other.diffusion, other.sample) for k in fields_of(g)})
    config = check(config.updated({**(PRESETS[preset][1] if preset else {}), **flags, "preset": preset}))
    if config.model.class_cond and not config.model.num_classes:
        raise UserError("--class_cond: of how many classes? add --num_classes N (iddpm train finds them in the data)")
    if num_classes and not config.model.class_cond:
        raise UserError(f"--num_classes {num_classes} has no effect without --class_cond True")
    return config


def _config_of_run(run: Path, flags: dict[str, Any]) -> Config:
    record = run / "config.json"
    if not record.exists():
        raise UserError(f"{run} is no run of iddpm: it has no config.json")
    config = Config.from_json(record.read_text(), str(record))
    now, metas = config.flat(), {k: m for _, g in config.groups() for k, (_, _, m) in fields_of(g).items()}
    if fixed := [k for k, v in flags.items() if v != now[k] and metas[k]["fixed"]]:
        k = fixed[0]
        raise UserError(f"--{k} {flags[k]}: {run} was trained with {now[k]}, which cannot change; plan without --run")
    return check(config.updated(flags))


# ---- what is answered


def _what(planned: "Plan", config: Config) -> Iterator[str]:
    (n, d), m, t = planned.layout, config.model, config.train
    sharing = (
        "DDP, each holds all" if d == 1 else "FSDP2, all share one copy" if d == n else f"FSDP2, {n // d} copies of {d} shards"
    )
    height, width = image_size(m)
    yield f"network      {m.network} for {height}x{width}, {planned.parameters:,} weights, {t.precision}"
    yield f"processes    {n}" + (f" ({sharing})" if n > 1 else "")
    yield f"step         {t.batch_size} images, {planned.images} a process, {planned.micro} at a time"
    off, on = planned.flops[False], planned.flops[True]
    both = f"{_si(off.both)}FLOP forward and backward, {_si(on.both)}FLOP with --use_checkpoint"
    yield f"an image     {_si(off.forward)}FLOP forward, {both}"


def _memory(planned: "Plan", config: Config, cuda: bool) -> Iterator[str]:
    columns = [planned.need[on].parts(planned.micro) for on in (False, True)]
    chosen = ["*" if on == config.model.use_checkpoint else " " for on in (False, True)]
    kind = "as CUDA's kernels keep things" if cuda else "as a CPU's kernels keep things"
    yield f"{'MiB of a device':34}{'plain' + chosen[0]:>12}{'use_checkpoint' + chosen[1]:>18}    {kind}"
    for name, shown in PARTS.items():
        if any(column[name] for column in columns):
            yield f"  {shown:32}{columns[0][name] / MIB:>11,.1f} {columns[1][name] / MIB:>17,.1f}"
    peaks = [planned.need[on].peak(planned.micro) / MIB for on in (False, True)]
    yield f"  {'at the fullest moment':32}{peaks[0]:>11,.1f} {peaks[1]:>17,.1f}   (not all parts are there at once; * the run's)"
    if planned.layout.shard > 1:
        yield f"  validation and sample sheets gather all {4 * planned.parameters / MIB:,.1f} MiB of the weights on each device"


def _room(planned: "Plan", config: Config, devices: Devices) -> Iterator[str]:
    if not devices.memory_gb:
        return
    plain, recomputed = (planned.need[on].largest(devices.memory_gb * GIB) for on in (False, True))
    yield f"  {f'images at a time in {devices.memory_gb:g} GiB':32}{plain:>11,} {recomputed:>17,}"
    fits = recomputed if config.model.use_checkpoint else plain
    if fits < planned.micro:
        yield f"  {planned.micro} at a time do not fit: --microbatch {fits}" + (
            f", or {min(recomputed, planned.images)} with --use_checkpoint True" if recomputed > fits else ""
        )


def _largest(planned: "Plan", config: Config, devices: Devices) -> int:
    """The largest microbatch that fits; UserError where one image does not, with what would help."""
    recompute = config.model.use_checkpoint
    largest = planned.need[recompute].largest(devices.memory_gb * GIB)
    if largest:
        return largest
    alone = planned.need[recompute].peak(1)
    held = sum(planned.need[recompute].parts(1)[part] for part in ("weights", "gradients", "optimizer", "averages"))
    ways = [f"more than {alone / GIB:.2f} GiB"]
    if not recompute and planned.need[True].peak(1) <= devices.memory_gb * GIB:
        ways.append("--use_checkpoint True")
    if planned.layout.shard < planned.layout.processes:
        ways.append("try --shard -1")
    raise UserError(
        f"--memory_gb {devices.memory_gb:g} cannot take one image at a time, which needs {alone / GIB:.2f} GiB "
        f"({held / GIB:.2f} of them for weights, gradients, optimizer and averages): take {' or '.join(ways)}"
    )


def _communication(planned: "Plan") -> Iterator[str]:
    yield f"{'MiB of communication a step':34}{'in all':>12}{'sent by a device':>18}"
    for what, payload, sent in planned.traffic:
        yield f"  {what:32}{payload / MIB:>11,.1f} {sent / MIB:>17,.1f}"


def _speed(planned: "Plan", config: Config, devices: Devices, seconds: float) -> dict[str, Any]:
    """Seconds of a step, images per second and days, with communication wholly hidden behind arithmetic, and not at all."""
    t = config.train
    talk = sum(traffic.sent for traffic in planned.traffic) / (devices.bandwidth_gbs * 1e9) if devices.bandwidth_gbs else 0.0
    total = t.images or t.steps * t.batch_size
    steps = {"hidden": max(seconds, talk), "not_hidden": seconds + talk}
    return {
        "compute_seconds": seconds,
        "communication_seconds": talk if devices.bandwidth_gbs or not planned.traffic else None,
        "images_per_second": {k: t.batch_size / s for k, s in steps.items()},
        "total_images": total,
        "days": {k: total / t.batch_size * s / 86400 for k, s in steps.items()} if total else None,
    }


def _pace(speed: dict[str, Any], said: str) -> Iterator[str]:
    talk = speed["communication_seconds"]
    yield f"speed        {said}" + (
        "; communication not counted: give --bandwidth_gbs B" if talk is None else f"; communication {talk:.3g} s" if talk else ""
    )
    low, high = (speed["images_per_second"][k] for k in ("not_hidden", "hidden"))
    span = f"{low:,.4g} to {high:,.4g} images/s (communication not hidden behind arithmetic, and hidden)"
    yield f"             {span if talk else f'{high:,.4g} images/s'}"
    if speed["days"]:
        short, long = (speed["days"][k] for k in ("hidden", "not_hidden"))
        days = f"{short:,.3g} to {long:,.3g} days" if talk else f"{short:,.3g} days"
        yield f"run          {speed['total_images']:,} images: {days}"
    else:
        yield "run          give --steps N or --images N to know how long it takes"


def _facts(planned: "Plan", config: Config, devices: Devices) -> dict[str, Any]:
    """All numbers, for --json; bytes, operations and seconds."""
    memory = {}
    for on, need in planned.need.items():
        memory[f"use_checkpoint={on}"] = need.parts(planned.micro) | {"peak": need.peak(planned.micro)}
        if devices.memory_gb:
            memory[f"use_checkpoint={on}"]["largest_microbatch"] = need.largest(devices.memory_gb * GIB)
    off, on_ = planned.flops[False], planned.flops[True]
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
        "assumed": {k: getattr(devices, k) for k in ("memory_gb", "device_tflops", "efficiency", "measure", "bandwidth_gbs")},
    }


def _next(preset: str, run: str, flags: dict[str, Any], processes: int, micro: int) -> str:
    if micro:
        flags = flags | {"microbatch": micro}
    what = f"--run {run}" if run else f"DATA --preset {preset}" if preset else "DATA"
    command = " ".join(["iddpm train", what, *(f"--{k} {v}" for k, v in flags.items())])
    if processes == 1:
        return command
    here = max(d for d in range(1, 9) if processes % d == 0)  # torchrun's own count of devices a machine may differ
    nodes = f"--nnodes {processes // here} --rdzv-backend c10d --rdzv-endpoint HOST:29400 " if processes > 8 else ""
    return f"torchrun {nodes}--nproc-per-node {here if nodes else processes} -m -- {command}"  # without --, it reads --run itself


def _si(value: float) -> str:
    power = min(int(math.log10(max(value, 1)) // 3), 5)
    return f"{value / 1000**power:.3g} {['', 'k', 'M', 'G', 'T', 'P'][power]}"


VERB = Verb(_plan, _parser, "--preset NAME", "what a run needs (memory, time, communication) on any number of devices")
