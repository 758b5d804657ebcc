"""Checkpoint files as the original writes them: plain torch code, a real AdamW, and nothing of what reads them."""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from iddpm import build
from iddpm.interop.openai.formats import flags

FLAGS = dict(
    image_size=32, num_channels=16, num_res_blocks=1, num_heads=2, attention_resolutions="16", learn_sigma=True,
    diffusion_steps=20, noise_schedule="cosine",
)  # fmt: skip


class Written(NamedTuple):
    """What was written, and where."""

    folder: Path
    net: nn.Module
    averages: dict[float, dict[str, Tensor]]
    optimizer: torch.optim.AdamW
    digits: str

    @property
    def model(self) -> Path:
        return self.folder / f"model{self.digits}.pt"

    @property
    def weights(self) -> dict[str, Tensor]:
        return dict(self.net.state_dict())


def network(settings: dict[str, Any], kind: str = "images", program: str = "improved", seed: int = 0) -> nn.Module:
    """A network of the original's flags, none of whose weights are zero."""
    torch.manual_seed(seed)
    net = build.network(flags.to_config(kind, settings, program))
    for p in net.parameters():
        p.data.normal_(0, 0.05)
    return net


def write(
    folder: Path,
    number: int = 10,
    updates: int = 11,
    rates: tuple[float, ...] = (0.9, 0.99),
    fp16: bool = False,
    legacy: bool = False,
    settings: dict[str, Any] = FLAGS,
    kind: str = "images",
    program: str = "improved",
) -> Written:
    """Some updates by AdamW on random gradients, then the files of number `number`."""
    net = network(settings, kind, program)
    params = list(net.parameters())
    masters = [nn.Parameter(torch.cat([p.detach().flatten() for p in params]))] if fp16 else params
    optimizer = torch.optim.AdamW(masters, lr=1e-3)
    averages = {rate: [p.detach().clone() for p in masters] for rate in rates}
    for _ in range(updates):
        for p in masters:
            p.grad = torch.randn_like(p)
        optimizer.step()
        for rate, average in averages.items():
            for a, p in zip(average, masters):
                a.mul_(rate).add_(p.detach(), alpha=1 - rate)
    names, digits = [name for name, _ in net.named_parameters()], f"{number:06d}"

    def named(tensors: list[Tensor]) -> dict[str, Tensor]:
        """In the network's shapes; under fp16 each is a view of the one flat tensor, as in the original."""
        if not fp16:
            return dict(zip(names, tensors))
        parts = tensors[0].detach().split([p.numel() for p in params])
        return {name: part.view(p.shape) for name, part, p in zip(names, parts, params)}

    net.load_state_dict(named([p.detach() for p in masters]))
    found = {rate: named(average) for rate, average in averages.items()}
    folder.mkdir(parents=True, exist_ok=True)
    content = {f"model{digits}.pt": named([p.detach() for p in masters]), f"opt{digits}.pt": optimizer.state_dict()}
    for rate, average in found.items():
        content[f"ema_{rate}_{digits}.pt"] = average
    for name, value in content.items():
        torch.save(copy.copy(value), folder / name, _use_new_zipfile_serialization=not legacy)
    return Written(folder, net, found, optimizer, digits)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether the same names hold the same bits, in the same order."""
    return list(a) == list(b) and all(torch.equal(x, b[k]) and x.dtype == b[k].dtype for k, x in a.items())
