"""AdamW's state as the original's opt%06d.pt has it, and as ours: NAME.exp_avg, NAME.exp_avg_sq, NAME.step of each parameter.

improved-diffusion's fp16 keeps the float32 masters of all parameters in one flat one, in their order; guided-diffusion's in two,
the first of what has one dimension, the second of the rest.
"""

from collections.abc import Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor

from iddpm.config import Config
from iddpm.errors import UserError, readable
from iddpm.interop.openai.formats.weights import Shapes
from iddpm.records import fits
from iddpm.store.checkpoint import Saved

MOMENTS = ("exp_avg", "exp_avg_sq")


def groups(shapes: Shapes, layout: str) -> list[list[str]]:
    """The names in each of the optimizer's parameters: `each` one, `flat` all, `guided` vectors and the rest apart."""
    if layout == "each":
        return [[name] for name in shapes]
    if layout == "flat":
        return [list(shapes)]
    return [[n for n, s in shapes.items() if len(s) <= 1], [n for n, s in shapes.items() if len(s) > 1]]


def layout_of(config: Config) -> str:
    """How the original lays out the optimizer of a config's run."""
    if config.train.precision != "fp16":
        return "each"
    m = config.model
    guided = config.task.classifies or m.resblock_updown or m.new_attention_order or m.num_head_channels > 0
    return "guided" if guided else "flat"


class Group(TypedDict):
    """The parameters of a group, by number."""

    params: list[int]


class File(TypedDict):
    """What is read of an opt file."""

    state: dict[int, dict[str, Any]]
    param_groups: list[Group]


def slots_of(found: Any, shapes: Shapes, source: str) -> tuple[dict[str, Tensor], int]:
    """What an opt file holds, as NAME.SLOT of parameters of these shapes, and how many updates were made.

    However it lies there: by parameter, or flat as under fp16. UserError where it is of other parameters, or damaged.
    """
    if not isinstance(found, dict) or not {"state", "param_groups"} <= set(found):
        raise UserError(f"{source} holds no optimizer's state")
    with readable(source, "holds no optimizer's state", "bring it back from a copy, or --alone imports the weights without it"):
        file: File = fits(found, File)
        steps = [_count(slots["step"]) for slots in file["state"].values()]
    # Numbers run through all groups in order; a parameter that never had a gradient has no state.
    order = [p for group in file["param_groups"] for p in group["params"]]
    state = {k: file["state"][p] for k, p in enumerate(order) if p in file["state"]}
    layout = {1: "flat", 2: "guided", len(shapes): "each"}.get(len(order))
    if layout is None:
        raise UserError(f"{source} is of {len(order)} parameters, the network has {len(shapes)}: they do not belong together")
    for k, names in enumerate(groups(shapes, layout)):
        want = sum(torch.Size(shapes[name]).numel() for name in names)
        if k in state and not all(_is_moment(state[k].get(s), want) for s in MOMENTS):
            raise UserError(f"{source} is of another network, or damaged: it does not fit {names[0]}")
    return unflatten(state, shapes, layout), max(steps, default=0)


def _count(step: Any) -> int:
    """A number of updates, kept as a number or as a tensor of one; ValueError for another."""
    count = int(float(step))
    if not 0 <= count < 2**53:
        raise ValueError(f"{count} updates")
    return count


def _is_moment(value: Any, count: int) -> bool:
    """Whether this is a tensor of so many finite numbers."""
    plain = isinstance(value, Tensor) and value.layout == torch.strided and value.is_floating_point() and not value.is_meta
    return plain and value.numel() == count and bool(torch.isfinite(value.sum()) or torch.isfinite(value).all())


def flatten(slots: Mapping[str, Tensor], shapes: Shapes, layout: str) -> dict[int, dict[str, Tensor]]:
    """An optimizer's state by number, as AdamW keeps it, from our NAME.exp_avg, NAME.exp_avg_sq and NAME.step.

    UserError where parameters that are to be one were not stepped together.
    """
    state: dict[int, dict[str, Tensor]] = {}
    for k, names in enumerate(groups(shapes, layout)):
        steps = {float(slots.get(f"{name}.step", -1)) for name in names}
        if len(steps) > 1:
            raise UserError("these parameters were not all stepped together: they cannot be one flat parameter")
        if steps <= {-1.0}:  # never, for want of a gradient
            continue
        state[k] = {"step": torch.tensor(steps.pop())}
        for slot in MOMENTS:
            parts = [slots[f"{name}.{slot}"].detach().cpu() for name in names]
            whole = parts[0] if layout == "each" else torch.cat([part.flatten() for part in parts])
            state[k][slot] = whole.view(1, -1) if layout == "guided" and k else whole
    return state


def unflatten(state: Mapping[int, Mapping[str, Any]], shapes: Shapes, layout: str) -> dict[str, Tensor]:
    """The reverse of `flatten`; the parts of a flat parameter are views of it."""
    slots: dict[str, Tensor] = {}
    for k, names in enumerate(groups(shapes, layout)):
        if k not in state:
            continue
        sizes = [torch.Size(shapes[name]) for name in names]
        for slot in MOMENTS:
            parts = state[k][slot].flatten().split([size.numel() for size in sizes])
            slots |= {f"{name}.{slot}": part.view(size) for name, part, size in zip(names, parts, sizes)}
        # one number for each: AdamW counts it up in place
        slots |= {f"{name}.step": torch.tensor(float(state[k]["step"])) for name in names}
    return slots


def optimizer_file(saved: Saved, config: Config, shapes: Shapes) -> dict[str, Any]:
    """The state_dict that torch's AdamW would have on the parameters, or on the flat ones, that the original gives it."""
    t, layout = config.train, layout_of(config)
    # AdamW itself writes the settings, so that whichever torch reads the file finds the keys that it expects.
    dummies = [torch.zeros(0) for _ in groups(shapes, layout)]
    adam = torch.optim.AdamW(dummies, lr=t.lr, betas=(0.9, t.adam_beta2), weight_decay=t.weight_decay)
    return {"state": flatten(saved.optimizer, shapes, layout), "param_groups": adam.state_dict()["param_groups"]}
