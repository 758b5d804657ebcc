"""Inception-v3 as FID, sFID and the Inception Score know it: TensorFlow's graph of 2015-12-05, in its port to torch.

Its weights are in no package: a file the user gives, under the names that pytorch-fid and torch-fidelity share. Three things
tell this network from the paper's (Szegedy et al. 2016) and from torchvision's: average pools leave the padding out of their
count, the last block pools by maximum, and there are 1008 classes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iddpm.errors import UserError
from iddpm.measure.extractors import weights as files
from iddpm.measure.extractors.interface import Extractor, in_parts
from iddpm.measure.extractors.resize import tensorflow_bilinear

FILE = "pt_inception-2015-12-05-6726825d.pth"
ADDRESS = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
ALIAS = "weights-inception-2015-12-05-6726825d.pth"  # torch-fidelity's name of the same file
VERSION = 1  # of what is computed here; another one makes cached statistics void
SIDE = 299
WIDTHS = {"pool": 2048, "spatial": 7 * 17 * 17}


class Conv(nn.Conv2d):
    """A convolution with the published one's BatchNorm folded into it, and ReLU."""

    def __init__(self, width: int, out: int, kernel: int | tuple[int, int] = 1, stride: int = 1, padding: bool = True):
        high, wide = (kernel, kernel) if isinstance(kernel, int) else kernel
        around = (high // 2, wide // 2) if padding and stride == 1 else (0, 0)
        super().__init__(width, out, (high, wide), stride, around)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(super().forward(x))


mean3 = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
max3 = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
halved = partial(F.max_pool2d, kernel_size=3, stride=2)


class Mixed(nn.Module):
    """Branches side by side, the last one behind a pool; its convolutions come one after the other, the last with the stride.

    Each is (channels, kernel), or (channels, kernel, kernel): two side by side, as only a branch's last ones are. Their published
    names are NAME of one alone, NAME_1, NAME_2 ... of several, and NAME_2a, NAME_2b of two side by side.
    """

    def __init__(self, width: int, pool: Callable[[Tensor], Tensor], stride: int = 1, **branches: Sequence[tuple[Any, ...]]):
        super().__init__()
        self.pool, self.branches = pool, list[list[list[Conv]]]()
        for name, rows in branches.items():
            before, branch = width, list[list[Conv]]()
            for k, (out, *kernels) in enumerate(rows, 1):
                branch.append([Conv(before, out, kernel, stride if k == len(rows) else 1) for kernel in kernels])
                title, before = f"{name}_{k}" if len(rows) > 1 else name, out
                for letter, conv in zip("ab" if len(kernels) > 1 else [""], branch[-1]):
                    self.add_module(title + letter, conv)
            self.branches.append(branch)

    def forward(self, x: Tensor) -> Tensor:
        *others, last = self.branches
        found = [y for branch in others for y in _through(branch, x)]
        return torch.cat([*found, *_through(last, self.pool(x))], 1)


def _through(branch: list[list[Conv]], x: Tensor) -> list[Tensor]:
    found = [x]
    for convs in branch:
        found = [conv(found[0]) for conv in convs]
    return found


ROW, COLUMN = (1, 7), (7, 1)  # a kernel of 7x7 as two
CROSS = (1, 3), (3, 1)


def at35(width: int, pooled: int) -> Mixed:
    return Mixed(
        width, mean3, branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)], branch3x3dbl=[(64, 1), (96, 3), (96, 3)],
        branch_pool=[(pooled, 1)],
    )  # fmt: skip


def at17(m: int) -> Mixed:
    return Mixed(
        768, mean3, branch1x1=[(192, 1)], branch7x7=[(m, 1), (m, ROW), (192, COLUMN)],
        branch7x7dbl=[(m, 1), (m, COLUMN), (m, ROW), (m, COLUMN), (192, ROW)], branch_pool=[(192, 1)],
    )  # fmt: skip


def at8(width: int, pool: Callable[[Tensor], Tensor]) -> Mixed:
    return Mixed(
        width, pool, branch1x1=[(320, 1)], branch3x3=[(384, 1), (384, *CROSS)],
        branch3x3dbl=[(448, 1), (384, 3), (384, *CROSS)], branch_pool=[(192, 1)],
    )  # fmt: skip


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
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = at35(192, 32), at35(256, 64), at35(288, 64)
        double = [(64, 1), (96, 3), (96, 3)]
        self.Mixed_6a = Mixed(288, halved, 2, branch3x3=[(384, 3)], branch3x3dbl=double, branch_pool=[])
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = at17(128), at17(160), at17(160), at17(192)
        seven = [(192, 1), (192, ROW), (192, COLUMN), (192, 3)]
        self.Mixed_7a = Mixed(768, halved, 2, branch3x3=[(192, 1), (320, 3)], branch7x7x3=seven, branch_pool=[])
        self.Mixed_7b, self.Mixed_7c = at8(1280, mean3), at8(2048, max3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # n 64 147 147
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(halved(x)))  # n 192 71 71
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(halved(x))))  # n 288 35 35
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # n 768 17 17
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # n 17*17*7: the 1x1 branch comes first in x
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))  # n 2048 8 8
        return {"pool": x.mean((2, 3)), "spatial": spatial}


def load(state: Mapping[str, Tensor], source: str) -> tuple[Inception, Tensor]:
    """The network with the published tensors, and the last layer's matrix (1008, 2048) float64.

    UserError, naming what is missing, for the weights of another network.
    """
    with torch.device("meta"):  # no time for an initialisation that nobody sees
        net = Inception()
    folded = {name: module for name, module in net.named_modules() if isinstance(module, Conv)}
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (1008, WIDTHS["pool"]), "fc.bias": (1008,)}
    for name, conv in folded.items():
        shapes |= {f"{name}.conv.weight": tuple(conv.weight.shape)} | {f"{name}.bn.{n}": (conv.out_channels,) for n in files.NORM}
    _require(state, shapes, source)
    tensors = {}
    for name in folded:
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = files.folded(state, f"{name}.conv", f"{name}.bn")
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
    """Inception-v3, of FID, sFID and IS; its weights in a file.

    Without a path the file is looked for as `weights.find` says. Class probabilities leave the last layer's bias out, as the
    first implementation (Salimans et al. 2016), OpenAI's and torch-fidelity do. UserError for no file, or another network's.
    """

    inception_weights: Annotated[str, "the file of Inception's weights; empty: where torch keeps what it downloads"] = ""
    how: ClassVar[tuple[str, str, Callable[[Tensor], Tensor]]] = ("inception", "tensorflow", _tensorflow)

    def __call__(self, device: torch.device) -> Extractor:
        path = files.find(self.inception_weights, "IDDPM_INCEPTION_WEIGHTS", FILE, ADDRESS, "Inception", ALIAS)
        net, last = load(files.read(path), self.inception_weights or str(path))
        net, (name, pipeline, prepare) = net.to(device), self.how

        def network(images: Tensor) -> Mapping[str, Tensor]:
            return net(prepare(images).contiguous(memory_format=torch.channels_last))

        chunk = 8 if device.type == "cpu" else 64  # images, of about 15 MB each; 8 are faster on a CPU than 64
        identity = f"inception-v3 {pipeline} v{VERSION} {files.digest(path)}"
        return Extractor(name, identity, WIDTHS, in_parts(network, chunk, device), device, partial(_probabilities, last))


@dataclass(frozen=True)
class OpenPytorchFid(OpenInception):
    """Inception-v3 on images scaled as pytorch-fid does, which gives nearly the same figures."""

    inception_weights: Annotated[str, "the file of Inception's weights; empty: where torch keeps what it downloads"] = ""
    how = ("inception-pytorch-fid", "pytorch-fid", _pytorch_fid)


def _probabilities(last: Tensor, pool: Tensor) -> Tensor:
    """softmax(W pool), without the bias: (n, 2048) to (n, 1008) float64 on the CPU."""
    return (pool.cpu().double() @ last.T).softmax(1)


EXTRACTORS: dict[str, Callable[..., Callable[[torch.device], Extractor]]] = {
    "inception": OpenInception,
    "inception-pytorch-fid": OpenPytorchFid,
}
