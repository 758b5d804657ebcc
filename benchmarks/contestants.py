"""This project and its peers, each training, sampling and saving a network of one size: what `speed.py` asks them by turns.

    python benchmarks/contestants.py NAME SIZE      # a worker; SIZE is a `Size` as JSON. It answers lines of JSON on its input.

The networks are as alike as each library's own options allow: 32 pixels, the widths (1, 2, 2, 2) times the channels, attention of
4 heads at 16 and 8 pixels. A peer is imported in its own function, so a worker needs the libraries of its contestant alone.
"""

import argparse
import contextlib
import copy
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from common import reply, resident, seconds_of
from torch import Tensor, nn


@dataclass(frozen=True)
class Size:
    """Of the network and its batch."""

    channels: int = 64
    blocks: int = 2
    batch: int = 16
    dropout: float = 0.0
    precision: str = "fp32"
    original: str = ""  # a checkout of openai/improved-diffusion


class Contestant(NamedTuple):
    """What a library does, on the CPU. None: it does not do that."""

    net: nn.Module
    step: Callable[[], None]  # of training, on the same random images each time
    sample: Callable[[int], object]  # a batch in so many calls of the network
    nll: Callable[[int], object] | None  # the bound of a batch on a chain of so many steps
    save: Callable[[Path], object]  # weights, average and optimizer, into an empty folder
    restore: Callable[[Path], object]
    batches: Callable[[Path], Iterator[object]]  # of the images of a folder, for ever, as its training reads them


WIDTHS, STEPS, LR = (1, 2, 2, 2), 4000, 1e-4


def images(size: Size) -> Tensor:
    """In [-1, 1]."""
    return torch.rand((size.batch, 3, 32, 32), generator=torch.Generator().manual_seed(0)) * 2 - 1


def autocast(size: Size) -> contextlib.AbstractContextManager[object]:
    return torch.autocast("cpu", torch.bfloat16) if size.precision == "bf16" else contextlib.nullcontext()


def ours(size: Size) -> Contestant:
    """The real step of `iddpm train`, painter of `iddpm sample`, and checkpoints, which are verified and flushed to the disk."""
    from iddpm import build
    from iddpm.config import Config
    from iddpm.data import Images, Order
    from iddpm.data.batches import Batch, ahead
    from iddpm.measure.bound import bits_per_dim
    from iddpm.measure.likelihood import in_memory
    from iddpm.sampling.draw import painter
    from iddpm.sampling.images import as_pixels
    from iddpm.sampling.job import job
    from iddpm.store import checkpoint
    from iddpm.store import files as storage
    from iddpm.store.log import Meter
    from iddpm.training.state import TrainState
    from iddpm.training.step import method_of, train_step

    flags = dict(image_size="32", num_channels=size.channels, num_res_blocks=size.blocks, dropout=size.dropout, learn_sigma=True)
    flags |= dict(noise_schedule="cosine", diffusion_steps=STEPS, batch_size=size.batch, precision=size.precision, lr=LR)
    config = Config().updated(flags | dict(device="cpu", steps=1_000_000))
    cpu, meter, x0 = torch.device("cpu"), Meter(), images(size)
    state = TrainState(config, cpu)
    method = method_of(config, state.parallel, state)
    net = build.in_precision(state.net, cpu, size.precision)

    def sample(calls: int) -> object:
        state.net.eval()
        changed = config.updated(dict(sampling_steps=str(calls)))
        return painter(changed, net, cpu)(job(changed, range(size.batch)))

    def nll(steps: int) -> object:
        state.net.eval()
        changed = config.updated(dict(sampling_steps=str(steps)))
        data = in_memory(changed, as_pixels(x0).numpy(), None)
        return bits_per_dim(changed, net, data, cpu, batch_size=size.batch, say=lambda line: None).total

    def save(folder: Path) -> None:
        saves = checkpoint.Folder(folder, background=True)
        saves.begin(config, state.tensors(), state.numbers())
        saves.settle(wait=True)
        saves.close()

    def restore(folder: Path) -> None:
        newest, _ = checkpoint.newest(folder)  # which verifies it
        assert newest == storage.step_dirs(folder)[-1]
        state.restore(checkpoint.load(newest), config)

    def batches(folder: Path) -> Iterator[object]:
        data = Images.open(folder, (32, 32))
        return ahead(config, data, Order(len(data), 0), 0, 0, 1_000_000)

    def step() -> None:
        train_step(state, config, method, Batch(x0, torch.randn_like(x0), {}), meter)

    return Contestant(state.net, step, sample, nll, save, restore, batches)


def original(size: Size) -> Contestant:
    """improved-diffusion: the step of its TrainLoop without the logging, its loops of sampling and bound, its three files."""
    import_original(size.original)
    from improved_diffusion.image_datasets import load_data
    from improved_diffusion.nn import update_ema
    from improved_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults

    flags = dict(image_size=32, num_channels=size.channels, num_res_blocks=size.blocks, dropout=size.dropout, learn_sigma=True)
    flags |= dict(noise_schedule="cosine", diffusion_steps=STEPS)
    flags = model_and_diffusion_defaults() | flags
    net, diffusion = create_model_and_diffusion(**flags)
    params, x0 = list(net.parameters()), images(size)
    optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=0.0)
    averages = copy.deepcopy(params)

    def step() -> None:
        net.train()
        for p in params:  # its zero_grad keeps the tensors
            if p.grad is not None:
                p.grad.detach_().zero_()
        diffusion.training_losses(net, x0, torch.randint(STEPS, (size.batch,)))["loss"].mean().backward()
        optimizer.step()
        update_ema(averages, params, rate=0.9999)

    def respaced(steps: int) -> Any:
        net.eval()
        return create_model_and_diffusion(**flags | dict(timestep_respacing=str(steps)))[1]

    def save(folder: Path) -> None:
        named = [name for name, _ in net.named_parameters()]
        for name, held in (("model", net.state_dict()), ("ema", dict(zip(named, averages))), ("opt", optimizer.state_dict())):
            torch.save(held, folder / f"{name}.pt")

    def restore(folder: Path) -> None:
        net.load_state_dict(torch.load(folder / "model.pt"))
        for average, held in zip(averages, torch.load(folder / "ema.pt").values()):
            average.data.copy_(held)
        optimizer.load_state_dict(torch.load(folder / "opt.pt"))

    def batches(folder: Path) -> Iterator[object]:
        return load_data(data_dir=str(folder), batch_size=size.batch, image_size=32)

    return Contestant(
        net, step, lambda calls: respaced(calls).p_sample_loop(net, tuple(x0.shape)),
        lambda steps: respaced(steps).calc_bpd_loop(net, x0), save, restore, batches,
    )  # fmt: skip


def diffusers(size: Size) -> Contestant:
    """UNet2DModel with the losses, the EMA and the data of its example of unconditional training."""
    mend_torchvision()
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel

    widths = tuple(size.channels * mult for mult in WIDTHS)
    plain, attends = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"), ("Up", "AttnUp", "AttnUp", "Up")
    net = UNet2DModel(
        sample_size=32, block_out_channels=widths, layers_per_block=size.blocks, down_block_types=plain, dropout=size.dropout,
        up_block_types=tuple(f"{kind}Block2D" for kind in attends), attention_head_dim=widths[-1] // 4,
        norm_num_groups=min(32, size.channels), resnet_time_scale_shift="scale_shift",
    )  # fmt: skip
    scheduler, x0 = DDPMScheduler(num_train_timesteps=1000), images(size)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
    ema = EMAModel(net.parameters(), use_ema_warmup=True, model_cls=UNet2DModel, model_config=net.config)

    def step() -> None:
        net.train()
        noise, t = torch.randn_like(x0), torch.randint(1000, (size.batch,))
        with autocast(size):
            loss = nn.functional.mse_loss(net(scheduler.add_noise(x0, noise, t), t).sample.float(), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(net.parameters())

    pipeline = DDPMPipeline(net, scheduler)
    pipeline.set_progress_bar_config(disable=True)

    def sample(calls: int) -> object:
        net.eval()
        with autocast(size):
            return pipeline(size.batch, num_inference_steps=calls, output_type="np")

    def save(folder: Path) -> None:
        net.save_pretrained(folder / "unet")
        ema.save_pretrained(folder / "unet_ema")
        torch.save(optimizer.state_dict(), folder / "optimizer.bin")

    def restore(folder: Path) -> None:
        net.load_state_dict(UNet2DModel.from_pretrained(folder / "unet").state_dict())
        ema.load_state_dict(EMAModel.from_pretrained(folder / "unet_ema", UNet2DModel).state_dict())
        optimizer.load_state_dict(torch.load(folder / "optimizer.bin"))

    return Contestant(
        net,
        step,
        sample,
        None,
        save,
        restore,
        lambda folder: forever(example_loader(folder, size.batch, str(folder.parent / "cache"))),
    )


def ddpm_pytorch(size: Size) -> Contestant:
    """denoising-diffusion-pytorch: the step of its Trainer without accelerate's wrapping, its DDIM, its one file."""
    mend_torchvision()
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from denoising_diffusion_pytorch.denoising_diffusion_pytorch import Dataset
    from ema_pytorch import EMA

    attends = (False, True, True, False)
    net = Unet(dim=size.channels, dim_mults=WIDTHS, full_attn=attends, flash_attn=True, dropout=size.dropout)  # 2 blocks always
    diffusion, x0 = GaussianDiffusion(net, image_size=32), images(size) / 2 + 0.5
    optimizer, ema = torch.optim.Adam(net.parameters(), lr=LR, betas=(0.9, 0.99)), EMA(diffusion, beta=0.995, update_every=10)

    def step() -> None:
        diffusion.train()
        with autocast(size):
            loss = diffusion(x0)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    def sample(calls: int) -> object:
        diffusion.eval()
        diffusion.sampling_timesteps, diffusion.is_ddim_sampling = calls, True
        with autocast(size), quiet():
            return diffusion.sample(batch_size=size.batch)

    held = dict(model=diffusion, opt=optimizer, ema=ema)

    def restore(folder: Path) -> None:
        for name, state in torch.load(folder / "model-1.pt", weights_only=True).items():
            held[name].load_state_dict(state)

    def batches(folder: Path) -> Iterator[object]:
        data = Dataset(folder, 32, augment_horizontal_flip=True, convert_image_to="RGB")
        return forever(torch.utils.data.DataLoader(data, size.batch, shuffle=True, num_workers=os.cpu_count() or 1))

    return Contestant(
        net, step, sample, None, lambda folder: torch.save({k: v.state_dict() for k, v in held.items()}, folder / "model-1.pt"),
        restore, batches,
    )  # fmt: skip


CONTESTANTS: dict[str, Callable[[Size], Contestant]] = {
    "ours": ours,
    "original": original,
    "diffusers": diffusers,
    "denoising-diffusion-pytorch": ddpm_pytorch,
}


# ---- what the peers need


def import_original(checkout: str) -> None:
    """Make improved_diffusion importable from a checkout, in one process, with or without mpi4py and blobfile."""
    alone = SimpleNamespace(Get_rank=lambda: 0, Get_size=lambda: 1, rank=0, size=1, bcast=lambda value, root=0: value)
    sys.modules["mpi4py"] = ModuleType("mpi4py")
    sys.modules["mpi4py"].MPI = SimpleNamespace(COMM_WORLD=alone)  # type: ignore[attr-defined]
    blobfile = ModuleType("blobfile")
    vars(blobfile).update(
        listdir=os.listdir, join=os.path.join, basename=os.path.basename, dirname=os.path.dirname, isdir=os.path.isdir,
        exists=os.path.exists, makedirs=lambda path: os.makedirs(path, exist_ok=True), BlobFile=open,
    )  # fmt: skip
    sys.modules["blobfile"] = blobfile
    sys.path.insert(0, checkout)


def mend_torchvision() -> None:
    """Where torch and torchvision are builds that do not fit, name the operators that it misses and nobody here calls."""
    if "torchvision" in sys.modules or not importlib.util.find_spec("torchvision"):
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        mend_torchvision.kept = library  # type: ignore[attr-defined]  # it lasts as long as the object


def example_loader(folder: Path, batch: int, cache: str) -> Any:
    """The data of diffusers' example of unconditional training at 32 pixels: images of [-1, 1] under "input"."""
    mend_torchvision()
    from datasets import load_dataset
    from torchvision import transforms as t

    steps = [t.Resize(32, interpolation=t.InterpolationMode.BILINEAR), t.CenterCrop(32), t.RandomHorizontalFlip()]
    change = t.Compose([*steps, t.ToTensor(), t.Normalize([0.5], [0.5])])
    with quiet():
        data = load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=cache)
    data.set_transform(lambda rows: {"input": [change(image.convert("RGB")) for image in rows["image"]]})
    return torch.utils.data.DataLoader(data, batch, shuffle=True)


def forever(loader: Any) -> Iterator[object]:
    while True:
        yield from loader


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


# ---- a worker


def facts(contestant: Contestant) -> dict[str, float]:
    """Weights, floating-point operations of a step (a multiply and an add are two), and bytes of memory at the most."""
    from torch.utils.flop_counter import FlopCounterMode

    peak = resident("VmHWM")
    with FlopCounterMode(display=False) as counter:
        contestant.step()
    return dict(weights=sum(p.numel() for p in contestant.net.parameters()), flops=counter.get_total_flops(), peak=peak)


def work(contestant: Contestant, size: Size) -> dict[str, Callable[..., object]]:
    """What can be asked, by name."""
    reading: list[Iterator[object]] = []

    def epoch(folder: str, images: int, again: bool = False) -> None:
        if not again:
            reading[:] = [contestant.batches(Path(folder))]
        for _ in islice(reading[0], images // size.batch):
            pass

    def stored(name: str) -> Callable[[str], None]:
        def do(folder: str) -> None:
            if name == "save":
                Path(folder).mkdir(parents=True)
            getattr(contestant, name)(Path(folder))

        return do

    known: dict[str, Callable[..., object]] = dict(step=contestant.step, sample=contestant.sample, epoch=epoch)
    known |= dict(save=stored("save"), restore=stored("restore"))
    return known | (dict(nll=contestant.nll) if contestant.nll else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=CONTESTANTS)
    parser.add_argument("size")
    args = parser.parse_args()
    size, before = Size(**json.loads(args.size)), resident()
    torch.manual_seed(0)
    contestant = CONTESTANTS[args.name](size)
    contestant.step()
    known = work(contestant, size)
    reply(dict(ready=time.time(), imported=before, knows=list(known)))
    for line in sys.stdin:
        asked = json.loads(line)
        name = asked.pop("do")
        if name == "facts":
            reply(facts(contestant))
        else:
            reply(seconds_of(lambda: known[name](**asked)))  # noqa: B023
    os._exit(0)  # loaders' processes may still wait


def command(name: str, size: Size, python: str = sys.executable) -> list[str]:
    return [python, str(Path(__file__)), name, json.dumps(asdict(size))]


if __name__ == "__main__":
    main()
