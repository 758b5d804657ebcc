"""Small real runs for the tests: three classes of 8x8 grey pictures, and a network that trains in seconds."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from iddpm.config import Config
from iddpm.data import Images
from launcher import Launcher

torch.set_num_threads(1)

TINY = dict(
    image_size="8", image_channels=1, num_channels=16, num_res_blocks=1, channel_mult="1,2", attention_resolutions="4",
    num_heads=2, diffusion_steps=20, noise_schedule="cosine", learn_sigma=True, batch_size=6, lr=1e-3, sampling_steps="3",
    ema_rate="0.9,0.99", steps=4, save_interval=100, sample_interval=0, log_interval=1, device="cpu", precision="fp32",
)  # fmt: skip


SLOW = partial(pytest.param, marks=pytest.mark.slow)  # of a test's values those that `make test-slow` alone tries


def diagonal(rows: Iterable, columns: Iterable) -> list:
    """The pairs of a table as a test's values: each row and each column once or more, and the other pairs SLOW."""
    rows, columns = list(rows), list(columns)
    short = min(len(rows), len(columns))
    return [(a, b) if i % short == j % short else SLOW(a, b) for i, a in enumerate(rows) for j, b in enumerate(columns)]


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Callable[[str, Callable[[Path], None]], Path]:
    """A folder that a function fills, once for all of pytest-xdist's workers. Read it; do not change it."""
    base = tmp_path_factory.getbasetemp()

    def made(name: str, fill: Callable[[Path], None]) -> Path:
        root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
        root.mkdir(exist_ok=True)
        with open(root / ".lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not (root / ".made").exists():
                fill(root)
                (root / ".made").touch()
        return root

    return made


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """22 pictures in three folders: bars across, bars down, discs."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for kind in ("across", "disc", "down"):
        (root / kind).mkdir()
    y, x = np.mgrid[:8, :8]
    for k in range(22):
        kind = ("across", "disc", "down")[k % 3]
        shape = {"across": (y // 2) % 2, "down": (x // 2) % 2, "disc": (x - 3.5) ** 2 + (y - 3.5) ** 2 < 9}[kind]
        noisy = (shape * 200 + rng.integers(0, 50, (8, 8))).astype(np.uint8)
        Image.fromarray(noisy).save(root / kind / f"{k:03d}.png")
    return root


@pytest.fixture(scope="session")
def config(pictures) -> Config:
    """The tiny run's config, class-conditional."""
    flat = dict(TINY, class_cond=True, num_classes=3, classes=("across", "disc", "down"), path=str(pictures))
    return Config().updated(flat)


@pytest.fixture(scope="session")
def data(pictures) -> Images:
    return Images.open(pictures, image_size=(8, 8), channels=1)


@pytest.fixture(scope="session")
def run(config, data, tmp_path_factory) -> Path:
    """A finished tiny run. Read it; do not change it."""
    from iddpm.training.loop import train
    from iddpm.training.start import write_config

    folder = tmp_path_factory.mktemp("runs") / "tiny"
    write_config(folder, config)
    train(config, data, folder)
    return folder


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    """Starts processes of `iddpm` that have imported torch already: two seconds less for each."""
    with Launcher() as launcher:
        yield launcher


def flags(**settings: object) -> list[str]:
    """Settings as command-line flags."""
    return [token for k, v in settings.items() for token in (f"--{k}", str(v))]


def start(*args: object, **settings) -> subprocess.Popen:
    """`iddpm ARGS` as a real process."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    command = [sys.executable, "-m", "iddpm", *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **settings)


def torchrun(processes: int, *args: object, **settings) -> subprocess.Popen:
    """`torchrun --nproc-per-node N -m -- iddpm ARGS`, as a user would start it."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "--"]
    command = [*launcher, "iddpm", *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **settings)
