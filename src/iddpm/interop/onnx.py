"""A run's network as an ONNX graph for any batch, checked in onnxruntime, with the levels that a solver walks beside it."""

import inspect
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iddpm import build, fit
from iddpm.config import Config, given_shape, image_size
from iddpm.diffusion.denoiser import Network
from iddpm.errors import UserError, readable, reason
from iddpm.interop.card import card
from iddpm.nn.layers import GroupNorm
from iddpm.sampling.open import restore
from iddpm.store.remote import write_file
from iddpm.store.weights import Weights

OPSET = 18
BATCHES = (1, 3)  # that the graph is checked at; it is traced with 2
NEAR = 1e-4


class PlainNorm(GroupNorm):
    """The same in the plain form: ours folds the batch into the groups, by which a graph would hold for one batch alone."""

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        h = F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        if scale is None or shift is None:
            return h
        return h * (1 + scale[:, :, None, None]) + shift[:, :, None, None]


class PlainRms(nn.RMSNorm):
    """The same in operations that every version of the exporter knows."""

    def forward(self, x: Tensor) -> Tensor:
        h = x * (x.square().mean(-1, keepdim=True) + (self.eps or 0.0)).rsqrt()
        return h if self.weight is None else h * self.weight


PLAIN: dict[type[nn.Module], type[nn.Module]] = {GroupNorm: PlainNorm, nn.RMSNorm: PlainRms}


def exported(weights: Weights, folder: Path) -> list[str]:
    """Write model.onnx, steps.npz and a model card; returns what to tell of them.

    UserError where a library is missing, or the graph does not compute what the network does.
    """
    try:
        import onnx  # noqa: F401  # torch's exporter asks for it
        import onnxruntime
    except ImportError as e:
        raise UserError(f"--to onnx needs {e.name}: pip install 'iddpm[export]'") from None
    config = weights.config
    fit.require_density(config, "--to onnx")
    graph = traced(network(weights), inputs(config, 2))
    net = restore(weights, torch.device("cpu"))
    with readable("the graph of this network", "is not run by onnxruntime", "try --to safetensors"):
        session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        differs = max(_difference(net, session, inputs(config, count)) for count in BATCHES)
    if not differs < NEAR:
        raise UserError(f"the graph differs from the network by {differs:.1e}: try other versions of torch, onnx and onnxruntime")

    files: dict[str, bytes | str] = {"model.onnx": graph, "README.md": card(weights, "onnx", _use(config))}
    if not config.task.classifies:
        files["steps.npz"] = steps(config)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_file(folder / name, content)
    checked = f"in onnxruntime, at {' and '.join(map(str, BATCHES))} images, within {differs:.0e} of the network"
    return [f"wrote in {folder}: {', '.join(files)} ({checked})", "next: docs/guides/formats.md draws with it, without torch"]


def network(weights: Weights) -> nn.Module:
    """The trained network with norms that hold for any batch."""
    with torch.device("meta"):
        net = build.network(weights.config)
    net.load_state_dict(weights.tensors, assign=True)
    for layer in net.modules():
        layer.__class__ = PLAIN.get(type(layer), type(layer))
    return net.eval().requires_grad_(False)


def inputs(config: Config, count: int) -> dict[str, Tensor]:
    """What the network is called with, by name, for so many images."""
    m, draw = config.model, torch.Generator().manual_seed(count)
    found = dict(x=torch.randn(count, m.image_channels, *image_size(m), generator=draw), t=torch.linspace(3, 700, count))
    if (shape := given_shape(m)) is not None:
        found["given"] = torch.randn(count, *shape, generator=draw)
    if m.class_cond and not config.task.classifies:
        found["y"] = torch.arange(count) % m.num_classes
    if m.low_res_noise:
        found["low_res_level"] = torch.linspace(0, 1, count)
    if m.trained_guidance:
        found["scale"] = torch.linspace(1, m.trained_guidance, count)
    return found


def traced(net: nn.Module, example: dict[str, Tensor]) -> bytes:
    """The graph, whose first dimension of every input is free.

    By torch's older exporter: a tiny U-Net takes it 0.6 s, the newer one, which also needs onnxscript, 7.8 s (docs/log.md).
    """
    told = [name for name in inspect.signature(net.forward).parameters if name in example]  # in which order it names them
    free, file = {name: {0: "batch"} for name in (*told, "output")}, io.BytesIO()
    more = {name: tensor for name, tensor in example.items() if name not in ("x", "t")}
    with warnings.catch_warnings():  # that it is the older one, and that the checks of shapes are left out of the graph
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                net, (example["x"], example["t"], more), file,  # type: ignore[arg-type]  # it takes a file as well
                input_names=told, output_names=["output"], dynamic_axes=free, opset_version=OPSET, dynamo=False,
            )  # fmt: skip
        except RuntimeError as e:  # of which the exporter's own errors are kinds
            raise UserError(f"torch's exporter cannot write this network as ONNX: {reason(e)}") from None
    return file.getvalue()


def _difference(net: Network, session: Any, given: dict[str, Tensor]) -> float:
    """How far the graph's output is from the network's, in units of the largest output where that is above 1."""
    ours = net(**{"time" if name == "t" else name: tensor for name, tensor in given.items()})
    (theirs,) = session.run(None, {name: tensor.numpy() for name, tensor in given.items()})
    return float((torch.from_numpy(theirs) - ours).abs().max() / ours.abs().max().clamp(min=1))


def steps(config: Config) -> bytes:
    """The levels of the run's sampling, noisiest first, as an npz: the first eight columns are all that DDIM needs.

    x0 = skip x + out net(inp x, time), and x at the next level is alpha_to x0 + sigma_to (x - alpha x0) / sigma. With them
    `start`, by which unit noise is multiplied, the `shape` of an image, and the number of `classes`.
    """
    grid = build.grid(config)
    c = build.parametrization(config)(grid.table)
    columns = dict(time=c.time, inp=torch.ones_like(c.skip) if c.inp is None else c.inp, skip=c.skip, out=c.out)
    columns |= {name: getattr(grid.table, name) for name in ("alpha", "sigma", "alpha_to", "sigma_to")}
    m, file = config.model, io.BytesIO()
    more = dict(start=grid.start, shape=(m.image_channels, *image_size(m)), classes=m.num_classes if m.class_cond else 0)
    np.savez(file, **{name: column.flip(0).numpy() for name, column in columns.items()}, **more)  # type: ignore[arg-type]
    return file.getvalue()


def _use(config: Config) -> str:
    names = ", ".join(f"`{name}` {str(list(t.shape)).replace('[0', '[batch')}" for name, t in inputs(config, 0).items())
    return f"Inputs of `model.onnx`: {names}. `steps.npz` holds the levels that a sampler walks.\n"
