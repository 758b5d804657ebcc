"""One training step of ours against one of openai/improved-diffusion, side by side on this machine.

    git clone https://github.com/openai/improved-diffusion
    python benchmarks/train_step.py --original improved-diffusion [--what network] [--rounds 11]

Both train the same network (image_size 32, num_channels 64, num_res_blocks 2, learn_sigma) from the same weights on the same
random images: cosine schedule, T = 4000, hybrid objective, AdamW, one EMA, float32. A round times one step of each; it prints
the medians and their ratio. `--what network` times only the network, forward and backward. On a shared machine set
OMP_WAIT_POLICY=passive, or threads that wait for each other spin.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor, nn

from iddpm.diffusion.denoiser import Denoiser, learned_range
from iddpm.diffusion.grid import Chain
from iddpm.diffusion.objective import hybrid
from iddpm.diffusion.parametrization import eps
from iddpm.diffusion.schedule import Cosine
from iddpm.nn import UNet, attention_rates, channel_mult_for
from iddpm.training.ema import EMA

LR, EMA_RATE, STEPS = 1e-4, 0.9999, 4000


def ours(args: argparse.Namespace) -> Callable[[], None]:
    """One of our steps."""
    mult = channel_mult_for(32)
    net = UNet(3, 64, 6, 2, attention_rates((16, 8), 32, len(mult)), channel_mult=mult, num_heads=4)
    x0, shape = images(args), (args.batch, 3, 32, 32)
    if args.what == "network":
        return network_only(net, x0)
    denoiser, chain = Denoiser(net, eps, learned_range), Chain(Cosine(STEPS))
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.0)
    ema = EMA(dict(net.named_parameters()), [EMA_RATE], warmup=False)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        u = torch.rand(args.batch, dtype=torch.float64)
        hybrid(denoiser, chain, x0, torch.randn(shape), u)["loss"].mean().backward()
        optimizer.step()
        ema.update()

    return step


def original(args: argparse.Namespace) -> Callable[[], None]:
    """One step of the original's TrainLoop, without its logging."""
    sys.modules["mpi4py"] = ModuleType("mpi4py")  # imported there, and not needed by one process
    sys.modules["mpi4py"].MPI = SimpleNamespace()  # type: ignore[attr-defined]
    sys.path.insert(0, str(args.original))
    from improved_diffusion.nn import update_ema
    from improved_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults

    flags = dict(
        image_size=32, num_channels=64, num_res_blocks=2, learn_sigma=True, noise_schedule="cosine", diffusion_steps=STEPS
    )
    net, diffusion = create_model_and_diffusion(**model_and_diffusion_defaults() | flags)
    x0 = images(args)
    if args.what == "network":
        return network_only(net, x0)
    params = list(net.parameters())
    optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=0.0)
    averages = copy.deepcopy(params)

    def step() -> None:
        for p in params:  # its zero_grad keeps the tensors
            if p.grad is not None:
                p.grad.detach_().zero_()
        t = torch.randint(STEPS, (args.batch,))
        diffusion.training_losses(net, x0, t)["loss"].mean().backward()
        optimizer.step()
        update_ema(averages, params, rate=EMA_RATE)

    return step


def network_only(net: nn.Module, x0: Tensor) -> Callable[[], None]:
    """Forward and backward, from weights that leave no layer at 0, where arithmetic can be cheaper."""
    torch.manual_seed(0)
    for p in net.parameters():
        nn.init.normal_(p, std=p[0].numel() ** -0.5) if p.ndim > 1 else None
    t = torch.rand(len(x0)) * 1000

    def step() -> None:
        net.zero_grad(set_to_none=True)
        net(x0, t).square().mean().backward()

    return step


def images(args: argparse.Namespace) -> Tensor:
    return torch.rand((args.batch, 3, 32, 32), generator=torch.Generator().manual_seed(0)) * 2 - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", type=Path, required=True, help="a checkout of openai/improved-diffusion")
    parser.add_argument("--what", choices=("step", "network"), default="step")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    sides = {}
    for side in (original, ours):
        torch.manual_seed(0)  # the same initial weights: both draw them in the same order
        sides[side.__name__] = side(args)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for k in range(args.rounds + 2):
        for name, step in sides.items():
            began = time.perf_counter()
            step()
            if k >= 2:  # two rounds to warm up: the optimizer's state, the allocator
                times[name].append(1000 * (time.perf_counter() - began))
    median = {name: statistics.median(ms) for name, ms in times.items()}
    for name, ms in times.items():
        print(f"{name:10} median {median[name]:7.0f} ms   best {min(ms):7.0f} ms   of {args.rounds}")
    best = min(times["ours"]) / min(times["original"])
    print(f"ours / original: {median['ours'] / median['original']:.3f} by the median, {best:.3f} by the best")
    print(f"{args.what}, batch {args.batch}, {args.threads} threads, torch {torch.__version__}")


if __name__ == "__main__":
    main()
