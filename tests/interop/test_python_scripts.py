"""Scripts written against improved_diffusion run after install(): this project's own, with the calls of the original's five."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from interop.python_seeded import write_images
from launcher import Launcher

HEAD = """
import argparse, os, sys
import blobfile as bf
import numpy as np
import torch as th
import torch.distributed as dist
import torch.nn.functional as F
from improved_diffusion import dist_util, logger
from improved_diffusion.image_datasets import load_data
from improved_diffusion.resample import create_named_schedule_sampler
from improved_diffusion.script_util import (
    NUM_CLASSES, add_dict_to_argparser, args_to_dict, create_model_and_diffusion, model_and_diffusion_defaults,
    sr_create_model_and_diffusion, sr_model_and_diffusion_defaults,
)
from improved_diffusion.train_util import TrainLoop

TRAIN = dict(
    data_dir="", schedule_sampler="uniform", lr=1e-4, weight_decay=0.0, lr_anneal_steps=0, batch_size=1, microbatch=-1,
    ema_rate="0.9999", log_interval=10, save_interval=10000, resume_checkpoint="", use_fp16=False, fp16_scale_growth=1e-3,
)

def parsed(flags, more):
    parser = argparse.ArgumentParser()
    add_dict_to_argparser(parser, {**more, **flags})
    args = parser.parse_args()
    dist_util.setup_dist()
    logger.configure()
    return args, args_to_dict(args, flags.keys())

def ready(model, path):
    model.load_state_dict(dist_util.load_state_dict(path, map_location="cpu"))
    return model.to(dist_util.dev()).eval()

def train(args, model, diffusion, data):
    sampler = create_named_schedule_sampler(args.schedule_sampler, diffusion)
    own = {name: getattr(args, name) for name in TRAIN if name not in ("data_dir", "schedule_sampler")}
    TrainLoop(model=model.to(dist_util.dev()), diffusion=diffusion, data=data, schedule_sampler=sampler, **own).run_loop()

def gathered(x):
    parts = [th.zeros_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return np.concatenate([part.cpu().numpy() for part in parts])

def to_bytes(x):
    return ((x + 1) * 127.5).clamp(0, 255).to(th.uint8).permute(0, 2, 3, 1).contiguous()

def save(name, *arrays):
    if dist.get_rank() == 0:
        np.savez(os.path.join(logger.get_dir(), name), *arrays)
    dist.barrier()
"""
SCRIPTS = {
    "image_train": """
args, flags = parsed(model_and_diffusion_defaults(), TRAIN)
model, diffusion = create_model_and_diffusion(**flags)
data = load_data(data_dir=args.data_dir, batch_size=args.batch_size, image_size=args.image_size, class_cond=args.class_cond)
train(args, model, diffusion, data)
""",
    "image_sample": """
more = dict(clip_denoised=True, num_samples=10000, batch_size=16, use_ddim=False, model_path="")
args, flags = parsed(model_and_diffusion_defaults(), more)
model, diffusion = create_model_and_diffusion(**flags)
model, images, labels = ready(model, args.model_path), [], []
while sum(map(len, images)) < args.num_samples:
    y = th.randint(low=0, high=NUM_CLASSES, size=(args.batch_size,), device=dist_util.dev())
    loop = diffusion.ddim_sample_loop if args.use_ddim else diffusion.p_sample_loop
    shape = (args.batch_size, 3, args.image_size, args.image_size)
    images.append(gathered(to_bytes(loop(model, shape, clip_denoised=args.clip_denoised, model_kwargs={"y": y}))))
    labels.append(gathered(y))
save("samples.npz", np.concatenate(images)[: args.num_samples], np.concatenate(labels)[: args.num_samples])
""",
    "image_nll": """
more = dict(data_dir="", clip_denoised=True, num_samples=1000, batch_size=1, model_path="")
args, flags = parsed(model_and_diffusion_defaults(), more)
model, diffusion = create_model_and_diffusion(**flags)
model, terms, done = ready(model, args.model_path), {"vb": [], "mse": [], "xstart_mse": []}, 0
data = load_data(
    data_dir=args.data_dir, batch_size=args.batch_size, image_size=args.image_size, class_cond=args.class_cond,
    deterministic=True,
)
while done < args.num_samples:
    batch, cond = next(data)
    cond = {k: v.to(dist_util.dev()) for k, v in cond.items()}
    found = diffusion.calc_bpd_loop(model, batch.to(dist_util.dev()), clip_denoised=args.clip_denoised, model_kwargs=cond)
    for name, parts in terms.items():
        mean = found[name].mean(dim=0) / dist.get_world_size()
        dist.all_reduce(mean)
        parts.append(mean.detach().cpu().numpy())
    done += dist.get_world_size() * len(batch)
for name, parts in terms.items():
    save(f"{name}_terms.npz", np.mean(np.stack(parts), axis=0))
""",
    "super_res_train": """
args, flags = parsed(sr_model_and_diffusion_defaults(), TRAIN)
model, diffusion = sr_create_model_and_diffusion(**flags)
def pairs():
    for large, cond in load_data(
        data_dir=args.data_dir, batch_size=args.batch_size, image_size=args.large_size, class_cond=args.class_cond
    ):
        yield large, {**cond, "low_res": F.interpolate(large, args.small_size, mode="area")}
train(args, model, diffusion, pairs())
""",
    "super_res_sample": """
args, flags = parsed(sr_model_and_diffusion_defaults(), dict(base_samples="", batch_size=16, model_path=""))
model, diffusion = sr_create_model_and_diffusion(**flags)
with bf.BlobFile(args.base_samples, "rb") as file:
    held = np.load(file)
    base, y = th.from_numpy(held["arr_0"]), th.from_numpy(held["arr_1"])
cond = {"low_res": base[: args.batch_size].float().permute(0, 3, 1, 2) / 127.5 - 1, "y": y[: args.batch_size]}
shape = (args.batch_size, 3, args.large_size, args.large_size)
x = diffusion.p_sample_loop(ready(model, args.model_path), shape, model_kwargs=cond, progress=False)
save("large.npz", gathered(to_bytes(x)))
""",
}
IMAGE = "--image_size 32 --num_channels 32 --num_res_blocks 1 --class_cond True --diffusion_steps 3 --learn_sigma True"
UP = "--large_size 64 --small_size 32 --num_channels 32 --num_res_blocks 1 --class_cond True --diffusion_steps 2"
TRAINING = "--batch_size 2 --lr_anneal_steps 2 --log_interval 1 --microbatch 1 --ema_rate 0.9"

LAUNCH = """
import runpy, sys, warnings
warnings.simplefilter("error")
from iddpm.interop.openai import install
install()
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
Run = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def run(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a script in a process of its own that only adds install(); gives its log folder."""
    root = tmp_path_factory.mktemp("scripts")
    (root / "images").mkdir()
    write_images(root / "images")

    def start(name: str, flags: str) -> Path:
        script, folder = root / f"{name}.py", root / name
        script.write_text(HEAD + SCRIPTS[name])
        given = flags.replace("DATA", str(root / "images")).replace("RUN", str(root)).split()
        err, env = root / f"{name}.err", {"OPENAI_LOGDIR": str(folder)}
        done = launcher.start(script, *given, said=root / f"{name}.out", err=err, env=env, program=LAUNCH)
        assert done.wait() == [0] and not err.read_text().strip(), err.read_text()[-3000:]
        return folder

    return start


@pytest.fixture(scope="module")
def trained(run: Run) -> Path:
    return run("image_train", f"--data_dir DATA {IMAGE} {TRAINING} --schedule_sampler loss-second-moment")


@pytest.fixture(scope="module")
def sampled(run: Run, trained: Path) -> Path:
    return run("image_sample", f"--model_path {trained}/ema_0.9_000002.pt {IMAGE} --num_samples 3 --batch_size 2 --use_ddim True")


def test_a_training_script_leaves_the_original_files(trained: Path) -> None:
    names = {p.name for p in trained.iterdir()}
    numbers = ("000000.pt", "000002.pt")
    assert names == {"log.txt", "progress.csv", *(f"{n}{k}" for n in ("model", "ema_0.9_", "opt") for k in numbers)}
    assert (trained / "progress.csv").read_text().splitlines()[0].startswith("grad_norm,loss,")


def test_a_sampling_script_gives_images_and_labels(sampled: Path) -> None:
    held = np.load(sampled / "samples.npz")
    assert held["arr_0"].shape == (3, 32, 32, 3) and held["arr_0"].dtype == np.uint8 and held["arr_0"].std() > 0
    assert held["arr_1"].shape == (3,) and held["arr_1"].dtype == np.int64 and held["arr_1"].max() > 9, "of all 1000"


def test_a_likelihood_script_gives_its_terms(run: Run, trained: Path) -> None:
    folder = run("image_nll", f"--data_dir DATA --model_path {trained}/model000002.pt {IMAGE} --num_samples 4 --batch_size 2")
    vb = np.load(folder / "vb_terms.npz")["arr_0"]
    assert vb.shape == (3,) and (vb > 0).all()
    assert np.load(folder / "mse_terms.npz")["arr_0"].shape == np.load(folder / "xstart_mse_terms.npz")["arr_0"].shape == (3,)


def test_super_resolution_scripts_train_and_enlarge(run: Run, sampled: Path) -> None:
    folder = run("super_res_train", f"--data_dir DATA {UP} {TRAINING}")
    assert (folder / "model000002.pt").exists()
    enlarged = run(
        "super_res_sample", f"--model_path {folder}/model000002.pt {UP} --batch_size 2 --base_samples {sampled}/samples.npz"
    )
    assert np.load(enlarged / "large.npz")["arr_0"].shape == (2, 64, 64, 3)
