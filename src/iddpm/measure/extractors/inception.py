"""Inception-v3 as FID, sFID and the Inception Score know it: TensorFlow's graph of 2015-12-05, in its port to torch.

Its weights are in no package: a file the user gives, under the names that pytorch-fid and torch-fidelity share. Three things
tell this network from the paper's (Szegedy et al. 2016) and from torchvision's: average pools leave the padding out of their
count, the last block pools by maximum, and there are 1008 classes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iddpm.errors import UserError
from iddpm.measure.extractors import weights as files
from iddpm.measure.extractors.interface import Extractor
from iddpm.measure.extractors.resize import tensorflow_bilinear

FILE = "pt_inception-2015-12-05-6726825d.pth"
ADDRESS = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
ALIAS = "weights-inception-2015-12-05-6726825d.pth"  # torch-fidelity's name of the same file
VERSION = 1  # of what is computed here; another one makes cached statistics void
SIDE = 299
WIDTHS = {"pool": 2048, "spatial": 7 * 17 * 17}
NORM = ("weight", "bias", "running_mean", "running_var")


class Conv(nn.Conv2d):
    """A convolution with the published one's BatchNorm folded into it, and ReLU."""

    def __init__(self, width: int, out: int, kernel: int | tuple[int, int] = 1, stride: int = 1, padding: bool = True):
        high, wide = (kernel, kernel) if isinstance(kernel, int) else kernel
        around = (high // 2, wide // 2) if padding and stride == 1 else (0, 0)
        super().__init__(width, out, (high, wide), stride, around)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(super().forward(x))


def mean3(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def max3(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 1, 1)


class A(nn.Module):
    """35x35: branches of 1x1, 5x5, twice 3x3, pool."""

    def __init__(self, width: int, pooled: int):
        super().__init__()
        self.branch1x1 = Conv(width, 64)
        self.branch5x5_1, self.branch5x5_2 = Conv(width, 48), Conv(48, 64, 5)
        self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3 = Conv(width, 64), Conv(64, 96, 3), Conv(96, 96, 3)
        self.branch_pool = Conv(width, pooled)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, self.branch_pool(mean3(x))], 1)


class B(nn.Module):
    """35x35 to 17x17."""

    def __init__(self, width: int):
        super().__init__()
        self.branch3x3 = Conv(width, 384, 3, stride=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(width, 64), Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class C(nn.Module):
    """17x17: branches of 1x1, 7x7 and twice 7x7 (each as a row and a column), pool."""

    def __init__(self, m: int, width: int = 768):
        super().__init__()
        row, column = (1, 7), (7, 1)
        self.branch1x1 = Conv(width, 192)
        self.branch7x7_1, self.branch7x7_2, self.branch7x7_3 = Conv(width, m), Conv(m, m, row), Conv(m, 192, column)
        self.branch7x7dbl_1, self.branch7x7dbl_2, self.branch7x7dbl_3 = Conv(width, m), Conv(m, m, column), Conv(m, m, row)
        self.branch7x7dbl_4, self.branch7x7dbl_5 = Conv(m, m, column), Conv(m, 192, row)
        self.branch_pool = Conv(width, 192)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(mean3(x))], 1)


class D(nn.Module):
    """17x17 to 8x8."""

    def __init__(self, width: int = 768):
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Conv(width, 192), Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1, self.branch7x7x3_2 = Conv(width, 192), Conv(192, 192, (1, 7))
        self.branch7x7x3_3, self.branch7x7x3_4 = Conv(192, 192, (7, 1)), Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, 2)], 1)


class E(nn.Module):
    """8x8: branches of 1x1, 3x3 and twice 3x3 (whose last is a row beside a column), pool."""

    def __init__(self, width: int, pool: Callable[[Tensor], Tensor]):
        super().__init__()
        row, column = (1, 3), (3, 1)
        self.pool = pool
        self.branch1x1 = Conv(width, 320)
        self.branch3x3_1, self.branch3x3_2a, self.branch3x3_2b = Conv(width, 384), Conv(384, 384, row), Conv(384, 384, column)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(width, 448), Conv(448, 384, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = Conv(384, 384, row), Conv(384, 384, column)
        self.branch_pool = Conv(width, 192)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        single = torch.cat([self.branch3x3_2a(single), self.branch3x3_2b(single)], 1)
        double = torch.cat([self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)], 1)
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(self.pool(x))], 1)


class Inception(nn.Module):
    """The network: images (n, 3, 299, 299) in about [-1, 1] to the features of `WIDTHS`.

    "pool" is the graph's pool_3, the input of FID (Heusel et al. 2017). "spatial" is sFID's (Nash et al. 2021): the first 7
    channels of the tensor mixed_6/conv:0, which OpenAI's evaluator takes, in its order (row, column, channel), so that its
    statistics can be read. Certain: the graph's mixed_6 is Mixed_6d here, not 6e (torch-fidelity's table of conversion), and
    `conv` is its 1x1 branch. Inferred: that the tensor lies behind BatchNorm and ReLU; the graph's list of nodes has conv
    after conv/batchnorm and no other node that could be the ReLU, and NVIDIA's port, read by other measurers, does so too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padding=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padding=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = A(192, 32), A(256, 64), A(288, 64)
        self.Mixed_6a = B(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = C(128), C(160), C(160), C(192)
        self.Mixed_7a = D()
        self.Mixed_7b, self.Mixed_7c = E(1280, mean3), E(2048, max3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # n 64 147 147
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))  # n 192 71 71
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))  # n 288 35 35
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # n 768 17 17
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # n 17*17*7: the 1x1 branch comes first in x
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))  # n 2048 8 8
        return {"pool": x.mean((2, 3)), "spatial": spatial}


def load(state: Mapping[str, Tensor], source: str) -> tuple[Inception, Tensor]:
    """The network with the published tensors, and the last layer's matrix (1008, 2048) float64.

    Each BatchNorm (eps 0.001) goes into its convolution: gamma / sqrt(var + eps) times the weights, and what is left is a bias.
    UserError, naming what is missing, for the weights of another network.
    """
    with torch.device("meta"):  # no time for an initialisation that nobody sees
        net = Inception()
    folded = {name: module for name, module in net.named_modules() if isinstance(module, Conv)}
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (1008, WIDTHS["pool"]), "fc.bias": (1008,)}
    for name, conv in folded.items():
        shapes |= {f"{name}.conv.weight": tuple(conv.weight.shape)} | {f"{name}.bn.{n}": (conv.out_channels,) for n in NORM}
    _require(state, shapes, source)
    tensors = {}
    for name in folded:
        gamma, beta, mean, var = (state[f"{name}.bn.{n}"].double() for n in NORM)
        gain = gamma / (var + 0.001).sqrt()
        weight = (state[f"{name}.conv.weight"].double() * gain.view(-1, 1, 1, 1)).float()
        tensors[f"{name}.weight"] = weight.contiguous(memory_format=torch.channels_last)  # 1.4 times as fast on a CPU
        tensors[f"{name}.bias"] = (beta - mean * gain).float()
    net.load_state_dict(tensors, assign=True)
    return net.eval().requires_grad_(False), state["fc.weight"].double()


def _require(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Refuse all but the tensors of these shapes and BatchNorm's counters, which decide nothing."""
    fix = f"give {FILE}, from {ADDRESS}"
    missing = [name for name in shapes if name not in state]
    unknown = [name for name in state if name not in shapes and not name.endswith("num_batches_tracked")]
    if any(name.startswith("AuxLogits.") for name in unknown):
        raise UserError(f"{source} is torchvision's Inception-v3 (it has AuxLogits), whose features are not FID's: {fix}")
    for names, verb in ((missing, "lacks"), (unknown, "has more than")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{source} {verb} the weights of FID's Inception ({names[0]}{more}): {fix}")
    for name, shape in shapes.items():
        if tuple(state[name].shape) != shape:
            found = tuple(state[name].shape)
            raise UserError(f"{source} is of another Inception: {name} is {found}, not {shape}: {fix}")


def _tensorflow(images: Tensor) -> Tensor:
    """As the graph does it by itself, and torch-fidelity: what published FIDs are of."""
    return (tensorflow_bilinear(images.float(), SIDE) - 128) / 128


def _pytorch_fid(images: Tensor) -> Tensor:
    """Pixel centres where they belong, and a scale that reaches 1: near the others' figures, and not equal to them."""
    return 2 * F.interpolate(images.float() / 255, (SIDE, SIDE), mode="bilinear", align_corners=False) - 1


@dataclass(frozen=True)
class OpenInception:
    """Inception-v3, of FID, sFID and IS; its weights in a file."""

    inception_weights: Annotated[str, "the file of Inception's weights; empty: where torch keeps what it downloads"] = ""

    def __call__(self, device: torch.device) -> Extractor:
        return _open("inception", "tensorflow", _tensorflow, self.inception_weights, device)


@dataclass(frozen=True)
class OpenPytorchFid:
    """Inception-v3 on images scaled as pytorch-fid does, which gives nearly the same figures."""

    inception_weights: Annotated[str, "the file of Inception's weights; empty: where torch keeps what it downloads"] = ""

    def __call__(self, device: torch.device) -> Extractor:
        return _open("inception-pytorch-fid", "pytorch-fid", _pytorch_fid, self.inception_weights, device)


def _open(name: str, pipeline: str, prepare: Callable[[Tensor], Tensor], weights: str, device: torch.device) -> Extractor:
    """An extractor by the way in which images are prepared, with weights from a file.

    Without a path the file is looked for as `weights.find` says. Class probabilities leave the last layer's bias out, as the
    first implementation (Salimans et al. 2016), OpenAI's and torch-fidelity do. UserError for no file, or another network's.
    """
    path = files.find(weights, "IDDPM_INCEPTION_WEIGHTS", FILE, ADDRESS, "Inception", ALIAS)
    net, last = load(files.read(path), weights or str(path))
    net = net.to(device)
    chunk = 8 if device.type == "cpu" else 64  # images, of about 15 MB each; 8 are faster on a CPU than 64

    @torch.inference_mode()
    def network(images: Tensor) -> dict[str, Tensor]:
        assert images.dtype == torch.uint8 and images.shape[1] == 3, (images.dtype, images.shape)
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):  # TF32 has 10 bits of mantissa
            parts = [net(prepare(part).contiguous(memory_format=torch.channels_last)) for part in images.to(device).split(chunk)]
        return {tap: torch.cat([part[tap] for part in parts]) for tap in WIDTHS}

    identity = f"inception-v3 {pipeline} v{VERSION} {files.digest(path)}"
    return Extractor(name, identity, WIDTHS, network, device, partial(_probabilities, last))


def _probabilities(last: Tensor, pool: Tensor) -> Tensor:
    """softmax(W pool), without the bias: (n, 2048) to (n, 1008) float64 on the CPU."""
    return (pool.cpu().double() @ last.T).softmax(1)


EXTRACTORS: dict[str, Callable[..., Callable[[torch.device], Extractor]]] = {
    "inception": OpenInception,
    "inception-pytorch-fid": OpenPytorchFid,
}
