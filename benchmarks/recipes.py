"""The peers' own recipes on a folder of 32-pixel images, stopped at a time: what `quality.py` compares with.

    python benchmarks/recipes.py NAME JOB     # a worker; JOB is a `Job` as JSON. It writes NAME.npz of images by kind of weights

Each is what its documentation gives as the command or the example to begin with; a choice that this machine forces is told.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import reply
from contestants import example_loader, forever, import_original, mend_torchvision, quiet
from torch import Tensor, nn


@dataclass(frozen=True)
class Job:
    data: str  # a folder of images
    out: str  # a folder to write to
    seconds: float  # of training, from the process's start
    seed: int
    samples: int
    calls: int
    original: str = ""  # the checkout
    flags: str = ""  # of the original, after those that it recommends
    cache: str = ""  # a folder for the copy that diffusers' example makes of the data


Draw = Callable[[int], Tensor]  # so many images (n, 3, 32, 32) in [-1, 1]
BATCH = 64  # that are drawn at once


def original(job: Job, left: Callable[[], bool]) -> tuple[int, dict[str, Draw]]:
    """improved-diffusion's README for CIFAR-10, L_hybrid; drawn by its strided ancestral sampling.

    Of its average (0.9999, without warm-up) hardly anything is left of few steps, so the plain weights are drawn with, too.
    """
    import_original(job.original)
    from improved_diffusion import dist_util, logger
    from improved_diffusion.image_datasets import load_data
    from improved_diffusion.resample import create_named_schedule_sampler
    from improved_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults
    from improved_diffusion.train_util import TrainLoop

    given = "--image_size 32 --num_channels 128 --num_res_blocks 3 --learn_sigma True --dropout 0.3"
    given += " --diffusion_steps 4000 --noise_schedule cosine --lr 1e-4 --batch_size 128"
    words = f"{given} {job.flags}".split()
    flags = {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2])}
    training = dict(batch_size=int(flags.pop("batch_size")), lr=float(flags.pop("lr")))
    training |= dict(microbatch=int(flags.pop("microbatch", -1)), ema_rate=flags.pop("ema_rate", "0.9999"))
    model = model_and_diffusion_defaults()
    model |= {
        name: value == "True" if isinstance(model[name], bool) else type(model[name])(value) for name, value in flags.items()
    }
    dist_util.setup_dist()
    logger.configure(tempfile.mkdtemp(), format_strs=[])
    net, diffusion = create_model_and_diffusion(**model)
    images = load_data(data_dir=job.data, batch_size=training["batch_size"], image_size=32)
    loop = TrainLoop(
        model=net, diffusion=diffusion, data=images, log_interval=10**9, save_interval=10**9, resume_checkpoint="",
        schedule_sampler=create_named_schedule_sampler("uniform", diffusion), **training,
    )  # fmt: skip
    steps = 0
    while left():
        loop.run_step(*next(images))
        steps += 1
    strided = create_model_and_diffusion(**model | dict(timestep_respacing=str(job.calls)))[1]

    def draw(weights: dict[str, Tensor]) -> Draw:
        def drawn(n: int) -> Tensor:
            net.load_state_dict(weights)
            net.eval()
            return strided.p_sample_loop(net, (n, 3, 32, 32))

        return drawn

    raw = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    return steps, {"ema": draw(loop._master_params_to_state_dict(loop.ema_params[0])), "raw": draw(raw)}


def diffusers(job: Job, left: Callable[[], bool]) -> tuple[int, dict[str, Draw]]:
    """The example of unconditional training, by its defaults and the flags of its README, at 32 pixels; drawn by DDIM."""
    mend_torchvision()
    from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, UNet2DModel
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    blocks = ["Down"] * 4 + ["AttnDown", "Down"]
    net = UNet2DModel(
        sample_size=32, in_channels=3, out_channels=3, layers_per_block=2, block_out_channels=(128, 128, 256, 256, 512, 512),
        down_block_types=tuple(f"{kind}Block2D" for kind in blocks),
        up_block_types=tuple(f"{kind.replace('Down', 'Up')}Block2D" for kind in reversed(blocks)),
    )  # fmt: skip
    noising, loader = DDPMScheduler(num_train_timesteps=1000), example_loader(Path(job.data), 16, job.cache)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    rates = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=100 * len(loader))
    ema = EMAModel(net.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=3 / 4)
    steps, images = 0, forever(loader)
    while left():
        x0: Any = next(images)["input"]  # type: ignore[index]
        noise, t = torch.randn_like(x0), torch.randint(1000, (len(x0),))
        nn.functional.mse_loss(net(noising.add_noise(x0, noise, t), t).sample, noise).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        ema.step(net.parameters())
        steps += 1
    ema.copy_to(net.parameters())
    pipeline = DDIMPipeline(net.eval(), DDIMScheduler.from_config(noising.config))
    pipeline.set_progress_bar_config(disable=True)

    def draw(n: int) -> Tensor:
        drawn = pipeline(n, num_inference_steps=job.calls, output_type="np").images
        return torch.from_numpy(drawn).movedim(3, 1) * 2 - 1

    return steps, {"ema": draw}


def ddpm_pytorch(job: Job, left: Callable[[], bool]) -> tuple[int, dict[str, Draw]]:
    """denoising-diffusion-pytorch's Trainer as its README calls it, at 32 pixels, without amp, whose fp16 needs a GPU; DDIM."""
    mend_torchvision()
    from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet

    net = Unet(dim=64, dim_mults=(1, 2, 4, 8), flash_attn=True)
    diffusion = GaussianDiffusion(net, image_size=32, timesteps=1000, sampling_timesteps=job.calls)
    trainer = Trainer(
        diffusion, job.data, train_batch_size=32, train_lr=8e-5, gradient_accumulate_every=2, ema_decay=0.995, train_num_steps=0,
        calculate_fid=False, save_and_sample_every=10**9, results_folder=tempfile.mkdtemp(),
    )  # fmt: skip
    with quiet():
        while left():
            trainer.train_num_steps = trainer.step + 1
            trainer.train()
    averaged = trainer.ema.ema_model.eval()

    def draw(n: int) -> Tensor:
        with quiet():
            return averaged.sample(batch_size=n) * 2 - 1

    return trainer.step, {"ema": draw}


RECIPES = {"original": original, "diffusers": diffusers, "denoising-diffusion-pytorch": ddpm_pytorch}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("job")
    args = parser.parse_args()
    job, began = Job(**json.loads(args.job)), time.monotonic()
    torch.manual_seed(job.seed)
    taken = count()

    def left() -> bool:
        """Whether there is time for another step; always for a first."""
        return not next(taken) or time.monotonic() - began < job.seconds

    steps, draws = RECIPES[args.name](job, left)
    trained = time.monotonic() - began
    for name, draw in draws.items():
        torch.manual_seed(job.seed)
        with torch.inference_mode():
            parts = [draw(min(BATCH, job.samples - k)) for k in range(0, job.samples, BATCH)]
        pixels = ((torch.cat(parts).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(1, 3)
        np.savez(Path(job.out) / f"{name}.npz", pixels.numpy())
    reply(dict(steps=steps, train_seconds=trained, draw_seconds=time.monotonic() - began - trained))
    sys.stdout.flush()
    os._exit(0)  # loaders' processes may still wait


if __name__ == "__main__":
    main()
