"""What diffusers' UNet2DModel calls the layers of our U-Net, and how it keeps their weights."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from iddpm.nn.layers import AttentionBlock, Downsample, Upsample
from iddpm.nn.unet import UNet

ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
PARTS = {  # of a layer; of attention's qkv, which diffusers keeps in three, all at once
    "": "",
    ".in_layers.0": ".norm1",
    ".in_layers.2": ".conv1",
    ".emb_layers.1": ".time_emb_proj",
    ".out_layers.0": ".norm2",
    ".out_layers.3": ".conv2",
    ".skip_connection": ".conv_shortcut",
    ".norm": ".group_norm",
    ".qkv": ".to_qkv",
    ".proj_out": ".to_out.0",
    ".op": ".conv",
    ".conv": ".conv",
}


def names(net: UNet) -> dict[str, str]:
    """What UNet2DModel calls the parts of our network that may have weights, by our names."""
    modules = dict(net.named_modules())
    down = _placed(list(net.input_blocks.named_children())[1:], "input_blocks", "down")
    up = _placed(net.output_blocks.named_children(), "output_blocks", "up")
    layers = [*ENDS.items(), *down, *up]
    return {ours + part: theirs + PARTS[part] for ours, theirs in layers for part in PARTS if ours + part in modules}


def _placed(stages: Iterable[tuple[str, nn.Module]], ours: str, way: str) -> Iterator[tuple[str, str]]:
    """The layers of the stages of one way, and their places there: a level ends with what changes the size."""
    level = k = 0
    for name, stage in stages:
        resizes = False
        for j, layer in enumerate(stage.children()):
            resizes = isinstance(layer, Downsample | Upsample) or isinstance(
                getattr(layer, "resize", None), Downsample | Upsample
            )
            kind = f"{way}samplers.0" if resizes else f"attentions.{k}" if isinstance(layer, AttentionBlock) else f"resnets.{k}"
            yield f"{ours}.{name}.{j}", f"{way}_blocks.{level}.{kind}"
        level, k = (level + 1, 0) if resizes else (level, k + 1)


def to_theirs(tensors: Mapping[str, Tensor], net: UNet) -> dict[str, Tensor]:
    """Our weights under their names, attention's as linear maps of q, k and v."""
    found = dict[str, Tensor]()
    for ours, theirs in names(net).items():
        for kind in ("weight", "bias"):
            if (name := f"{ours}.{kind}") not in tensors:
                continue
            tensor = tensors[name].squeeze(2) if tensors[name].ndim == 3 else tensors[name]
            if ours.endswith(".qkv"):
                q, k, v = parted(tensor, net.get_submodule(ours.removesuffix(".qkv")))
                found |= {f"{theirs.replace('qkv', part)}.{kind}": t.contiguous() for part, t in zip("qkv", (q, k, v))}
            else:
                found[f"{theirs}.{kind}"] = tensor.contiguous()
    return found


def to_ours(tensors: Mapping[str, Tensor], net: UNet) -> dict[str, Tensor]:
    """Their weights under our names; those that are missing are left out."""
    found, wanted = {}, {name: t.shape for name, t in net.state_dict().items()}
    for ours, theirs in names(net).items():
        for kind in ("weight", "bias"):
            parts = [f"{theirs.replace('qkv', part)}.{kind}" for part in ("qkv" if ours.endswith(".qkv") else "-")]
            if (name := f"{ours}.{kind}") not in wanted or not all(part in tensors for part in parts):
                continue
            held = [tensors[part] for part in parts]
            tensor = joined(held, net.get_submodule(ours.removesuffix(".qkv"))) if len(held) == 3 else held[0]
            found[name] = tensor[..., None] if tensor.ndim == 2 and len(wanted[name]) == 3 else tensor
    return found


def parted(qkv: Tensor, layer: nn.Module) -> list[Tensor]:
    """q, k and v (C, ...), heads first, of the rows (3C, ...) of an attention block's qkv."""
    split, which = ((layer.heads, 3, -1), 1) if layer.heads_first else ((3, layer.heads, -1), 0)
    return [part.flatten(0, 1) for part in qkv.unflatten(0, split).unbind(which)]


def joined(parts: list[Tensor], layer: nn.Module) -> Tensor:
    """What `parted` takes apart."""
    by_head = [part.unflatten(0, (layer.heads, -1)) for part in parts]
    return torch.stack(by_head, dim=1 if layer.heads_first else 0).flatten(0, 2)
