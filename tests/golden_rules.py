"""The rules by which the golden inputs and weights are made (tests/goldens/rules.json), so that only outputs need files."""

import json
import zlib
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)
FOLDER = Path(__file__).parent / "goldens"
SEED: int = json.loads((FOLDER / "rules.json").read_text())["seed"]


@cache
def load(name: str) -> Any:
    """tests/goldens/`name`: the JSON of a .json, a dict of arrays of an .npz. Shared between tests: do not write to it."""
    path = FOLDER / name
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return dict(arrays)
    return json.loads(path.read_text())


def noise(k: int, shape: tuple[int, ...]) -> Tensor:
    """The k-th Gaussian draw, float32; in a loop k counts the draws in call order."""
    return torch.from_numpy(np.random.RandomState(SEED + k).standard_normal(tuple(shape)).astype(np.float32))


def image_tensor(k: int, shape: tuple[int, ...]) -> Tensor:
    """The k-th stand-in for a batch of images, uniform in [-1, 1], float32."""
    return torch.from_numpy(np.random.RandomState(SEED + 500_000 + k).uniform(-1, 1, tuple(shape)).astype(np.float32))


@torch.no_grad()
def fill(module: M) -> M:
    """Give every parameter the weights that follow from its name, and return the module."""
    for name, p in module.named_parameters():
        w = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).standard_normal(tuple(p.shape)).astype(np.float32)
        if w.ndim > 1:
            w /= np.sqrt(np.prod(w.shape[1:]))
        else:
            w = 0.1 * w + float(name.endswith("weight"))
        p.copy_(torch.from_numpy(w))
    return module


class Stub:
    """A network without weights: out[:, c] = 0.7 sin(1.7 x[:, c mod 3] + 0.1 c + t / 250), t as the network receives it."""

    def __init__(self, out_channels: int = 3) -> None:
        self.out_channels = out_channels

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        c = torch.arange(self.out_channels, device=x.device)
        phase = 0.1 * c.to(x.dtype).view(1, -1, 1, 1) + t.to(x.dtype).view(-1, 1, 1, 1) / 250
        return 0.7 * torch.sin(1.7 * x[:, c % 3] + phase)
