"""A seeded script by the original's names, and the numbers it gets: weights, t, noise, losses, images, and a training run.

`python tests/interop/python_seeded.py` prints the numbers of whatever `improved_diffusion` it finds. Those of the original
(with stand-ins for blobfile and mpi4py, and numpy's old name np.int) are kept in tests/goldens/python_api.json.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

FLAGS = dict(
    image_size=32, num_channels=32, num_res_blocks=1, learn_sigma=True, class_cond=True, diffusion_steps=4,
    noise_schedule="cosine", dropout=0.1,
)  # fmt: skip
UPSAMPLER = dict(large_size=64, small_size=32, num_channels=32, num_res_blocks=1, attention_resolutions="16")


def digest(x: Any) -> list[float]:
    """Sum, sum of magnitudes, and the first three."""
    flat = torch.as_tensor(x).detach().double().flatten()
    return [flat.sum().item(), flat.abs().sum().item(), *flat[:3].tolist()]


def weights(net: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def alive(net: torch.nn.Module) -> torch.nn.Module:
    """The network with no layer left at 0."""
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net


def diffusion_numbers() -> dict[str, Any]:
    """What a seeded script draws, and what comes of it."""
    from improved_diffusion import resample, script_util

    torch.manual_seed(0)
    np.random.seed(0)
    net, diffusion = script_util.create_model_and_diffusion(**{**script_util.model_and_diffusion_defaults(), **FLAGS})
    found: dict[str, Any] = {"weights": digest(weights(net))}
    net, shape, cond = alive(net).eval(), (2, 3, 32, 32), {"y": torch.randint(0, 1000, (2,))}
    found["ancestral"] = digest(diffusion.p_sample_loop(net, shape, model_kwargs=cond))
    found["ddim"] = digest(diffusion.ddim_sample_loop(net, shape, model_kwargs=cond, eta=0.5))
    x = torch.rand(*shape) * 2 - 1
    bits = diffusion.calc_bpd_loop(net, x, model_kwargs=cond)
    found["bits"] = {name: digest(value) for name, value in bits.items()}
    sampler = resample.create_named_schedule_sampler("loss-second-moment", diffusion)
    draws = [sampler.sample(8, "cpu")]
    for _ in range(10):
        sampler.update_with_all_losses(range(4), np.random.rand(4).tolist())
    draws.append(sampler.sample(8, "cpu"))
    found["t"] = [[t.tolist(), w.tolist()] for t, w in draws]
    losses = diffusion.training_losses(net.train(), x, torch.tensor([0, 3]), model_kwargs=cond)
    found["losses"] = {name: value.tolist() for name, value in losses.items()}
    found["upsampler"] = digest(weights(script_util.sr_create_model_and_diffusion(**upsampler_flags())[0]))
    return found | {"next": [torch.rand(1).item(), np.random.rand()]}


def upsampler_flags() -> dict[str, Any]:
    from improved_diffusion import script_util

    return {**script_util.sr_model_and_diffusion_defaults(), **UPSAMPLER}


def write_images(folder: Path) -> None:
    """20 pictures of two classes."""
    for k in range(20):
        pixels = np.random.RandomState(k).randint(0, 256, (6, 5, 3)).astype(np.uint8)
        Image.fromarray(pixels).resize((40, 36)).save(folder / f"{'ab'[k % 2]}_{k:02d}.png")


def training_numbers(folder: Path) -> dict[str, Any]:
    """A seeded training run from a folder of images: its log's numbers, and where its weights end."""
    from improved_diffusion import dist_util, image_datasets, logger, resample, script_util, train_util

    dist_util.setup_dist()
    (folder / "images").mkdir()
    write_images(folder / "images")
    rows: list[dict[str, float]] = []
    with logger.scoped_configure(str(folder / "run"), ["log"]):
        logger.get_current().dumpkvs = lambda: (rows.append(dict(logger.getkvs())), logger.getkvs().clear())
        torch.manual_seed(0)
        np.random.seed(0)
        net, diffusion = script_util.create_model_and_diffusion(**{**script_util.model_and_diffusion_defaults(), **FLAGS})
        data = image_datasets.load_data(data_dir=str(folder / "images"), batch_size=8, image_size=32, class_cond=True)
        loop = train_util.TrainLoop(
            model=net, diffusion=diffusion, data=data, batch_size=8, microbatch=-1, lr=1e-3, ema_rate="0.9", log_interval=1,
            save_interval=1000, resume_checkpoint="", weight_decay=0.01, lr_anneal_steps=5,
            schedule_sampler=resample.create_named_schedule_sampler("loss-second-moment", diffusion),
        )  # fmt: skip
        loop.run_loop()
    return {
        "rows": [{name: float(row[name]) for name in sorted(row) if "_q" not in name} for row in rows],
        "weights": digest(weights(net)),
        "average": digest(torch.cat([p.flatten() for p in loop.ema_params[0]])),
        "last": sorted(p.name for p in (folder / "run").iterdir() if "000005" in p.name),
        "next": [torch.rand(1).item(), np.random.rand()],
    }


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = {"diffusion": diffusion_numbers(), "training": training_numbers(Path(folder))}
        print("NUMBERS", json.dumps(found), flush=True)
        os._exit(0)


if __name__ == "__main__":
    main()
