"""`--preset auto`: looks at the images and measures the device, for the rules of config/auto.py."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from iddpm import build
from iddpm.config import Config, Diffusion, auto, every_field, fields_of, names, seconds_of
from iddpm.data import Images
from iddpm.data.decode import MODES
from iddpm.data.own import Dataset, image_of, labels_of
from iddpm.data.preparation import Preparation
from iddpm.errors import UserError
from iddpm.parallel import processes
from iddpm.training import precision, trial
from iddpm.words import many

NAME = "auto"  # of the preset
LOOKED_AT = 16  # images
# What is timed to know a device: small, but of the kind that is to be trained.
PROBE = dict(image_size="16", num_channels=64, num_res_blocks=1, channel_mult="1,2", attention_resolutions="8", batch_size=16)
PROBE_CUDA = dict(PROBE, image_size="32", num_channels=128, batch_size=64)


def applies(preset: str, given: Mapping[str, Any]) -> bool:
    """Whether a new run's recipe is chosen for it: where that is asked for, or nothing is said of one."""
    return NAME in preset.split(",") or not (preset or given.get("init_from") or any(map(of_a_recipe, given)))


def of_a_recipe(name: str) -> bool:
    """Whether a flag makes a command a recipe of its own, beside which nothing is chosen: of the network, or of the process."""
    process, f = fields_of(Diffusion), every_field().get(name)
    if f is None:
        return False
    if name == "augment":  # an effort for few images, whatever the network
        return False
    return name == "network" or name in process or "network" in f.only or not {"network", *process}.isdisjoint(f.rows)


def choose(path: str, given: Mapping[str, Any], own: Dataset | None = None) -> tuple[dict[str, Any], list[str]]:
    """The settings of a run on these images beside those given, and a line on each group of them. It takes about 5 s."""
    device, seconds = build.device(given.get("device", "auto")), seconds_of(given.get("time", ""), "time")
    facts = auto.Facts(**_look(path, given, own), cuda=device.type == "cuda", seconds=seconds, gflops=_gflops(device), cost=_cost)
    return auto.recipe(facts, given)


def _look(path: str, given: Mapping[str, Any], own: Dataset | None) -> dict[str, Any]:
    """The facts of a data set."""
    if own is not None:
        count, labels = len(own), labels_of(own)
        looked_at = [_seen(image_of(own[k])) for k in _few(count)]
    else:
        how = Preparation(floats=given.get("floats", ""), only=names(given.get("only_classes", "")))
        found = Images.open(path, (8, 8), on_broken="skip", cache_bytes=0, labels=given.get("labels", "auto"), how=how)
        count, labels, looked_at, broken = len(found), found.labels, [], ""
        for k in _few(count):
            try:
                held = found.source.pixels(found.names[k])
                plain = held is None or (held.dtype == np.uint8 and held.shape[2] in MODES)
                looked_at.append(_seen(found.picture(k)) if held is None or plain else (held.shape[:2], held.shape[2]))
            except UserError as e:  # of a broken one is told when all are read
                broken = broken or str(e)
        if not looked_at:
            raise UserError(f"none of {many(len(_few(count)), 'image')} looked at is readable; the first problem: {broken}")
    sizes = [size for size, _ in looked_at]
    (size, how_many), *_ = Counter(sizes).most_common(1)
    if how_many < len(sizes):  # of various sizes the middle one, by its shorter side
        size = sorted(sizes, key=min)[len(sizes) // 2]
    per_class = np.bincount(labels)[np.unique(labels)] if labels is not None and len(labels) else np.zeros(0, int)
    return dict(
        images=count, height=size[0], width=size[1], alike=how_many == len(sizes), channels=max(depth for _, depth in looked_at),
        classes=len(per_class), smallest=int(per_class.min()) if len(per_class) else 0,
    )  # fmt: skip


def _few(count: int) -> list[int]:
    few: list[int] = np.linspace(0, count - 1, min(LOOKED_AT, count)).round().astype(int).tolist()
    return few


def _seen(image: Any) -> tuple[tuple[int, int], int]:
    """(height, width) of an image, and its channels: of a picture 1 where it is grey, else 3; an array is taken as it is."""
    if isinstance(image, Image.Image):
        array = np.asarray(image.convert("RGB"))
        return array.shape[:2], 1 if (array[..., :1] == array).all() else 3
    array = np.asarray(image)
    if array.ndim not in (2, 3):
        raise UserError(f"an image of the data set has the shape {array.shape}: give (H, W), (H, W, C), or floats (C, H, W)")
    array = array.transpose(1, 2, 0) if array.dtype.kind == "f" and array.ndim == 3 else array
    return array.shape[:2], 1 if array.ndim == 2 else array.shape[2]


def _cost(settings: Mapping[str, Any]) -> float:
    """10^9 operations of training on one image: three times those of a call of the network."""
    known = every_field()
    own = {name: value for name, value in settings.items() if name in known}
    config = Config().updated(own | dict(class_cond=False, num_classes=2))
    with torch.device("meta"):
        net, one = build.network(config), trial.example(config, 1, "meta")
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            net(one.x0, torch.zeros(1), **one.cond)
    return 3 * counted.get_total_flops() / 1e9


def _gflops(device: torch.device) -> float:
    """10^9 operations a second that training takes on all processes' devices, in the faster precision; every one calls it."""
    config = Config().updated(PROBE_CUDA if device.type == "cuda" else PROBE)
    seconds = precision.measured(config, device, [precision.EXACT, *precision.others(device)])
    return processes.world() * _cost(config.flat()) / min(seconds.values())
