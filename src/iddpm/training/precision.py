"""Which arithmetic is the faster on this machine: `--precision auto` times them on the run's own network before it begins."""

import math
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from iddpm import build, rng
from iddpm.config import Config, auto, image_size, total_steps
from iddpm.errors import UserError
from iddpm.parallel import processes
from iddpm.training.step import method_of
from iddpm.training.trial import example

AUTO, EXACT = "auto", "fp32"
GAIN = 1.1  # how many times as fast as fp32 another must be to be taken: it rounds more
ROUNDS, SECONDS = 3, 6.0  # of timing, at most
SLOW = 1.0  # seconds of one image's pass, which is then timed once
HOPELESS = 5  # times slower than fp32, of one convolution
SIDE = 64  # pixels of the images it is timed on, at most


def settle(config: Config, device: torch.device) -> tuple[Config, list[str]]:
    """The config with `--precision auto` replaced by what is faster here, and a line on why; every process calls it."""
    if config.train.precision != AUTO:
        return config, []
    if not (tried := others(device)):
        return config.updated({"precision": EXACT}), [f"precision: {EXACT} (this device has no faster one)"]
    seconds = measured(config, device, [EXACT, *tried])
    best = min(seconds, key=lambda name: seconds[name] * (1 if name == EXACT else GAIN))
    ratio = seconds[tried[0]] / seconds[EXACT]
    told = f"precision: {best} (on this machine {tried[0]} takes {ratio:.2f} of the time that {EXACT} takes)"
    if (config.train.steps or config.train.images) and max(image_size(config.model)) <= SIDE:  # larger ones are timed smaller
        steps, images = total_steps(config.train), len(processes.share(config.train.batch_size))
        length = auto.too_long(steps * images * seconds[best])
        told += f"; {steps:,} steps{length}" if length else ""
    return config.updated({"precision": best}), [told]


def others(device: torch.device) -> list[str]:
    """What may be faster than fp32 on a device: fp16 only where it has no bf16. Every process calls it, and has the same."""
    found: list[str] = processes.same([name for name in ("bf16", "fp16") if _runs(name, device)][:1])
    return found


def _runs(name: str, device: torch.device) -> bool:
    """Whether a device computes in a type itself, or says so."""
    if device.type == "cuda":
        return name == "fp16" or torch.cuda.is_bf16_supported(including_emulation=False)
    return name == "bf16" and device.type == "cpu" and not _emulated(torch.bfloat16)


def _emulated(dtype: torch.dtype) -> bool:
    """Whether a CPU has no instruction for a type: a small convolution is many times slower. A network would take minutes."""
    seconds = []
    for kind in (torch.float32, dtype):
        x, kernel = torch.ones(4, 64, 16, 16, dtype=kind), torch.ones(64, 64, 3, 3, dtype=kind)
        runs = []
        for _ in range(3):
            began = time.perf_counter()
            F.conv2d(x, kernel, padding=1)
            runs.append(time.perf_counter() - began)
        seconds.append(min(runs))
    return seconds[1] > HOPELESS * seconds[0]


def measured(config: Config, device: torch.device, names: list[str]) -> dict[str, float]:
    """The seconds that an image, of 64 pixels at most where the network takes such, takes forward and backward in each precision.

    The least of up to 3 rounds, in turn, of up to 16 images or about half a second each; of several processes the mean.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        net = build.network(config).to(device)
    for height, width in _sizes(*image_size(config.model)):
        sized = config.updated({"image_size": f"{height}x{width}"})
        passes = {name: _passes(sized.updated({"precision": name}), net, device) for name in names}
        try:
            one = _timed(passes[names[0]], 1, device)
            if one < SLOW:  # that may have been warming up
                one = _timed(passes[names[0]], 1, device)
            break
        except (ValueError, UserError):  # a network, or a task, of which this is no size
            if (height, width) == image_size(config.model):
                raise
    images = max(1, min(len(processes.share(config.train.batch_size)), 16, int(0.5 / one)))
    seconds = {name: _timed(run, images, device) for name, run in passes.items() if one < SLOW or name != names[0]}
    seconds = {names[0]: one, **seconds}
    began = time.perf_counter()
    for _ in range(ROUNDS):
        if time.perf_counter() - began + sum(seconds.values()) > SECONDS:
            break
        seconds = {name: min(seconds[name], _timed(run, images, device)) for name, run in passes.items()}
    each = torch.tensor(list(seconds.values()), dtype=torch.float64) / images
    processes.sum_(each)
    return dict(zip(names, (each / processes.world()).tolist()))


def _sizes(height: int, width: int) -> Iterator[tuple[int, int]]:
    """The size halved until no side is above 64 pixels, as far as that goes, then twice as large, up to the size itself."""
    halvings = max(0, math.ceil(math.log2(max(height, width) / SIDE)))
    return ((height >> k, width >> k) for k in range(halvings, -1, -1) if not (height % 2**k or width % 2**k))


def _passes(config: Config, net: torch.nn.Module, device: torch.device) -> Callable[[int], None]:
    _, denoiser, schedule, objective = method_of(config, net)

    def run(images: int) -> None:
        batch = example(config, images, device)
        u = rng.uniform(0, rng.TIME, 0, images)
        objective(denoiser, schedule, batch.x0, batch.eps, u, batch.cond)["loss"].sum().backward()
        net.zero_grad(set_to_none=True)

    return run


def _timed(run: Callable[[int], None], images: int, device: torch.device) -> float:
    began = time.perf_counter()
    run(images)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - began
