"""Made the runs in this folder and what was expected of them: run at commit 69db1f9, with the code of that time.

    cd AN_EMPTY_FOLDER && PYTHONPATH=CHECKOUT/src:CHECKOUT/tests OMP_NUM_THREADS=1 python CHECKOUT/tests/earlier/make.py

Never run it again with later code: then the fixtures would only show that the code agrees with itself. A later format gets
fixtures of its own, beside these. What the tests of today share with that time is here: the training images and the commands.
"""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

HERE = Path(__file__).parent
RUNS = ("classes", "enlarge", "judge")
MORE = 3  # optimizer steps that a resumed run takes
EVERY = 5  # of the weights after these steps, every fifth number is kept, and the sha256 of all
NUMBERS = ("bits_per_dim", "prior", "decoder", "rest", "vb", "x0_mse", "eps_mse")  # kept of what nll writes
IMAGES = "pictures"  # the runs remember this relative path: what uses them works in a folder that holds the images

COMMON = dict(
    image_size="8", num_channels=2, num_res_blocks=1, batch_size=8, lr=1e-2, lr_warmup_steps=5, lr_anneal_steps=44, seed=3,
    device="cpu", save_interval=1000, sample_interval=0, log_interval=20, steps=40, cache_gb=0.1,
)  # fmt: skip
SETTINGS: dict[str, dict[str, object]] = {
    # 40 steps of 8 images fill the histories of the law of t (10 losses of each of 10 t), so that it is no longer uniform
    "classes": dict(
        COMMON, image_channels=1, class_cond=True, channel_mult="1,2", attention_resolutions="", num_heads=2, learn_sigma=True,
        diffusion_steps=10, noise_schedule="cosine", schedule_sampler="loss-second-moment", ema_rate="0.9,0.99", random_flip=True,
        sampling_steps="5",
    ),
    "enlarge": dict(
        COMMON, network="super_res", small_size="4", low_res_noise=0.2, image_channels=3, channel_mult="1", num_heads=1,
        attention_resolutions="", diffusion_steps=30, parametrization="v", schedule_sampler="stratified", ema_rate="0.9",
        solver="ddim", sampling_steps="4", consistent=True,
    ),
    "judge": dict(
        COMMON, network="classifier", image_channels=1, class_cond=True, channel_mult="1,2", attention_resolutions="4",
        num_head_channels=2, diffusion_steps=10, noise_schedule="cosine", sampling_steps="all", ema_rate="0.9", grad_clip=1.0,
        weight_decay=0.05,
    ),
}  # fmt: skip

# name: what follows `iddpm`, in a folder that holds the runs and the images; --out is added
SAMPLES = {
    "classes-ancestral": ["sample", "classes", "--seeds", "0-5"],
    "classes-all-steps": ["sample", "classes", "--seeds", "7,9", "--sampling_steps", "all", "--ema_rate", "0.99"],
    "classes-ddim": ["sample", "classes", "--seeds", "0-5", "--solver", "ddim", "--sampling_steps", "ddim5", "--ema_rate", "0"],
    "classes-ddim-eta": ["sample", "classes", "--seeds", "0-2", "--solver", "ddim", "--eta", "0.5", "--labels", "disc"],
    "guided-ancestral": ["sample", "classes", "--seeds", "0-5", "--classifier", "judge", "--classifier_scale", "3"],
    "guided-ddim": ["sample", "classes", "--seeds", "0-2", "--classifier", "judge", "--solver", "ddim",
                    "--sampling_steps", "ddim5", "--classifier_scale", "3"],
    "enlarge-ddim": ["sample", "enlarge", "--high_res", IMAGES, "--num_samples", "3"],
    "enlarge-ancestral": ["sample", "enlarge", "--high_res", IMAGES, "--seeds", "1,4", "--solver", "ancestral",
                          "--consistent", "False", "--low_res_noise", "0.1"],
}  # fmt: skip
BOUNDS = {
    "classes": ["nll", "classes", IMAGES, "--num_samples", "6", "--sampling_steps", "all"],
    "classes-respaced": ["nll", "classes", IMAGES, "--num_samples", "4", "--sampling_steps", "5", "--ema_rate", "0.99"],
    "enlarge": ["nll", "enlarge", IMAGES, "--num_samples", "4", "--sampling_steps", "all"],
}


def pictures(folder: Path) -> None:
    """21 colour pictures of 8x8 pixels in three folders, by rule: bars across, bars down and discs, with noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:8, :8]
    for k in range(21):
        kind = ("across", "disc", "down")[k % 3]
        shape = {"across": (y // 2) % 2, "down": (x // 2) % 2, "disc": (x - 3.5) ** 2 + (y - 3.5) ** 2 < 9}[kind]
        levels = shape[..., None] * rng.integers(120, 200, 3) + rng.integers(0, 50, (8, 8, 3))
        (folder / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(levels.astype(np.uint8)).save(folder / kind / f"{k:03d}.png")


def resume(run: str) -> list[str]:
    """The command that takes MORE steps of a run."""
    return ["train", "--run", run, "--steps", str(int(str(COMMON["steps"])) + MORE)]


def trained(run: Path) -> dict[str, np.ndarray]:
    """The weights and averages of the newest checkpoint, by file: each one vector, its tensors in the order of their names."""
    from safetensors.numpy import load_file

    newest = max((run / "checkpoints").glob("step_*"))
    files = {path.stem: load_file(path) for path in sorted(newest.glob("weights*.safetensors"))}
    return {name: np.concatenate([tensors[k].ravel() for k in sorted(tensors)]) for name, tensors in files.items()}


def has_gradient(checkpoint: Path) -> np.ndarray:
    """Which weights, in the order of `trained`, had a gradient beyond rounding errors: of 1e-6 or more (root mean square).

    There is a gap: the others of these runs are all below 3e-7, and these from 2e-6.
    """
    from safetensors.numpy import load_file

    slots = load_file(checkpoint / "state" / "optimizer.safetensors")
    squares = np.concatenate([slots[name].ravel() for name in sorted(slots) if name.endswith(".exp_avg_sq")])
    return squares > (1 - 0.999 ** int(str(COMMON["steps"]))) * 1e-12  # Adam's average begins at 0


def sha256(vector: np.ndarray) -> str:
    return hashlib.sha256(vector.astype("<f4").tobytes()).hexdigest()


def kernels() -> str:
    """What this machine's arithmetic is: the sha256 of a small computation of the kinds of layers that the networks have.

    torch takes other kernels on other CPUs, and these round otherwise. Where this is equal, a run goes on to the very bit
    (on one thread, as here).
    """
    rng = np.random.default_rng(1)

    def array(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).requires_grad_()

    results: list[torch.Tensor] = []
    for ch, side in ((2, 8), (4, 4), (6, 8), (8, 4)):
        x, leaves = array(8, ch, side, side), [array(2 * ch, ch, 3, 3), array(3 * ch, 2 * ch), array(8, 8)]
        h = F.conv2d(F.silu(F.group_norm(x, ch)), leaves[0], padding=1)
        qkv = F.linear(h.flatten(2).transpose(1, 2), leaves[1]).unflatten(2, (3, 2, -1)).transpose(1, 3)
        h = F.scaled_dot_product_attention(*qkv.unbind(2))
        h = F.linear(F.interpolate(h.mean((1, 3))[:, None], 8), leaves[2])
        loss = (h.sin() + h.exp().log1p()).square().mean() + F.cross_entropy(h[:, 0], torch.arange(8))
        optimizer = torch.optim.AdamW(leaves, lr=1e-3, weight_decay=0.05)
        loss.backward()
        optimizer.step()
        results += [loss, x.grad, *leaves]
    return hashlib.sha256(b"".join(r.detach().contiguous().numpy().tobytes() for r in results)).hexdigest()


def _ask(*argv: object) -> None:
    from iddpm.cli.main import main

    assert main([str(a) for a in argv]) == 0, argv


def _make() -> None:
    torch.set_num_threads(1)
    pictures(Path(IMAGES))
    for run in RUNS:
        _ask("train", IMAGES, "--run", run, *(token for k, v in SETTINGS[run].items() for token in (f"--{k}", v)))
        shutil.rmtree(HERE / run, ignore_errors=True)
        shutil.copytree(run, HERE / run, ignore=shutil.ignore_patterns("samples", ".*"))
    arrays: dict[str, np.ndarray] = {}
    for name, argv in SAMPLES.items():
        _ask(*argv, "--out", f"{name}.npz")
        arrays[name] = np.load(f"{name}.npz")["arr_0"]
    bounds: dict[str, dict[str, object]] = {}
    for name, argv in BOUNDS.items():
        _ask(*argv, "--out", f"{name}.json")
        measured = json.loads(Path(f"{name}.json").read_text())
        bounds[name] = {k: measured[k] for k in NUMBERS}
    sums: dict[str, str] = {}
    for run in RUNS:
        _ask(*resume(run))
        for name, vector in trained(Path(run)).items():
            arrays[f"{run}:{name}"], sums[f"{run}:{name}"] = vector[::EVERY], sha256(vector)
    np.savez_compressed(HERE / "expected.npz", **arrays)  # type: ignore[arg-type]
    numbers = dict(kernels=kernels(), torch=torch.__version__, weights=sums, nll=bounds)
    (HERE / "expected.json").write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    _make()
