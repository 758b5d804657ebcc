"""DINOv2's vision transformers (Oquab et al. 2023), whose class token FD-DINOv2 is of (Stein et al. 2023).

Published figures are of ViT-L/14 without registers. What Stein et al.'s program dgm-eval does, as read in its source, is done
here: images scaled to 224 x 224 whatever their shape, by Pillow's bicubic filter on 8 bits; ImageNet's mean and deviation;
then the published network, whose output is the normalised class token. EDM2's program rounds nothing while it scales, and calls
that nearly the same.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iddpm.errors import UserError
from iddpm.measure.extractors import weights as files
from iddpm.measure.extractors.interface import Extractor, in_parts

VERSION = 1  # of what is computed here: a change beyond rounding counts it up, and so retires statistics in caches
FILE = "dinov2_vitl14_pretrain.pth"
ADDRESS = f"https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/{FILE}"
SIZES = {(384, 12): "s", (768, 12): "b", (1024, 24): "l", (1536, 40): "g"}  # width and depth
SIDE, PATCH, HEAD = 224, 14, 64
CHUNK = 32  # images at a time: about 300 MB of ViT-L's hidden layers
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of [0, 1]


class Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, first: int | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)  # each b h n 64
        return self.proj(F.scaled_dot_product_attention(q[:, :, :first], k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """The largest size's: w3(silu(a) b), where w12 gives a and b (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(a) * b)


class Block(nn.Module):
    def __init__(self, width: int, mlp: Callable[[], nn.Module]):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.attn, self.mlp = Attention(width), mlp()
        self.ls1, self.ls2 = (nn.ParameterDict({"gamma": torch.ones(width)}) for _ in range(2))

    def forward(self, x: Tensor, first: int | None = None) -> Tensor:
        """Tokens (b, n, d) to as many, or to the `first` of them alone."""
        x = x[:, :first] + self.ls1["gamma"] * self.attn(self.norm1(x), first)
        return x + self.ls2["gamma"] * self.mlp(self.norm2(x))


class DINOv2(nn.Module):
    """The transformer, under the published names, and of the size that published weights have."""

    def __init__(self, state: dict[str, Tensor]):
        super().__init__()
        width = state["cls_token"].shape[-1]
        gated = "blocks.0.mlp.w3.weight" in state
        hidden = state[f"blocks.0.mlp.{'w3' if gated else 'fc2'}.weight"].shape[1]
        mlp = partial(SwiGLU if gated else MLP, width, hidden)
        self.cls_token, self.pos_embed = (nn.Parameter(torch.empty(state[name].shape)) for name in ("cls_token", "pos_embed"))
        registers = state.get("register_tokens")
        self.register_tokens = None if registers is None else nn.Parameter(torch.empty(registers.shape))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, PATCH, PATCH)})
        self.blocks = nn.ModuleList([Block(width, mlp) for name in state if name.endswith(".norm1.weight")])
        self.norm = nn.LayerNorm(width, 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Images (b, 3, 14 g, 14 g), normalised, to class tokens (b, d); pos_embed must be of g x g patches."""
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)  # b g*g d
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        if self.register_tokens is not None:  # which have no place
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], 1)
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x)
        return self.norm(last(x, first=1)[:, 0])  # nobody sees the other tokens


def positions(embedding: Tensor, side: int, registers: bool) -> Tensor:
    """Embeddings (1, 1 + g^2, d), of the class token and g x g patches, resampled to side x side patches.

    The models without registers resample by bicubic interpolation of the scale (side + 0.1)/g, with 0.1 against rounding; so
    output i lies at (i + 1/2) g/(side + 0.1) - 1/2, and published figures contain that. The models with registers resample as
    images are, antialiased and without the 0.1.
    """
    g = round((embedding.shape[1] - 1) ** 0.5)
    if side == g:
        return embedding
    square = embedding[:, 1:].unflatten(1, (g, g)).permute(0, 3, 1, 2)  # 1 d g g
    if registers:
        square = F.interpolate(square, (side, side), mode="bicubic", antialias=True)
    else:
        square = F.interpolate(square, scale_factor=(side + 0.1) / g, mode="bicubic")
    return torch.cat([embedding[:, :1], square.flatten(2).transpose(1, 2)], 1)


def pillow_bicubic(images: Tensor, size: int) -> Tensor:
    """Images (n, c, H, W) uint8 to (n, c, size, size) float in 0..255, as Pillow does: rows first, rounded, then columns."""
    x = images.float()
    for shape in ((x.shape[2], size), (size, size)):
        x = F.interpolate(x, shape, mode="bicubic", antialias=True).add_(0.5).floor_().clamp_(0, 255)
    return x


def load(state: dict[str, Tensor], source: str) -> DINOv2:
    """The network for images of 224 x 224 with published weights by name; UserError for those of another one."""
    fix = f"give {FILE}, from {ADDRESS}"
    state = {name: tensor.float() for name, tensor in state.items() if name != "mask_token"}  # which is for training alone
    try:
        with torch.device("meta"):  # no time for an initialisation that nobody sees
            net = DINOv2(state)
        net.load_state_dict(state, assign=True)
        net.pos_embed = nn.Parameter(positions(net.pos_embed, SIDE // PATCH, net.register_tokens is not None))
    except (KeyError, RuntimeError, IndexError) as e:
        reason = str(e).split("\n\t")[-1].strip("'")
        raise UserError(f"{source} holds no weights of DINOv2 ({reason[:150]}): {fix}") from None
    if (size := _size(net)) not in SIZES:
        raise UserError(f"{source} has {size[1]} blocks of width {size[0]}, which no DINOv2 has: {fix}")
    return net.eval().requires_grad_(False)


def _size(net: DINOv2) -> tuple[int, int]:
    return net.cls_token.shape[-1], len(net.blocks)


@dataclass(frozen=True)
class OpenDINOv2:
    """DINOv2's vision transformer, of FD-DINOv2; its weights in a file.

    Figures call it dinov2-vitl14 (or s, b, g, and -reg with registers: the weights decide). Without a path the file of ViT-L is
    looked for as `weights.find` says. UserError for no file, or one of another network.
    """

    dinov2_weights: Annotated[str, "the file of DINOv2's weights; empty: where torch keeps what it downloads"] = ""

    def __call__(self, device: torch.device) -> Extractor:
        path = files.find(self.dinov2_weights, "IDDPM_DINOV2_WEIGHTS", FILE, ADDRESS, "DINOv2")
        net = load(files.read(path), self.dinov2_weights or str(path)).to(device)
        name = f"dinov2-vit{SIZES[_size(net)]}14" + ("" if net.register_tokens is None else "-reg")
        mean, deviation = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, DEVIATION))

        def network(images: Tensor) -> dict[str, Tensor]:
            return {"pool": net((pillow_bicubic(images, SIDE) / 255 - mean) / deviation)}

        identity = f"{name} pillow-bicubic v{VERSION} {files.digest(path)}"
        return Extractor(name, identity, {"pool": _size(net)[0]}, in_parts(network, CHUNK, device), device)


EXTRACTORS: dict[str, Callable[..., Callable[[torch.device], Extractor]]] = {"dinov2": OpenDINOv2}
