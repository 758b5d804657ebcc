"""Batches of images from a folder, as the original's endless generator, decoded by `iddpm.data`."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from iddpm.data import Images
from iddpm.data.sources import open_source
from iddpm.data.sources.folder import Folder
from iddpm.errors import UserError
from iddpm.interop.openai.python import logger
from iddpm.measure.ahead import ahead
from iddpm.parallel.processes import rank, world

CROP = 0.8  # the smallest share of an image's side that a random crop shows


def load_data(
    *, data_dir: str, batch_size: int, image_size: int, class_cond: bool = False, deterministic: bool = False,
    random_crop: bool = False, random_flip: bool | None = False,
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:  # fmt: skip
    """Endless pairs of images (B, 3, H, W) in [-1, 1] and {} or {"y": classes (B,) int64}, of this process's share.

    random_crop shows 80 to 100 % of each side, random_flip mirrors half of the images (None: where not deterministic).
    Classes are the file names up to "_" if every name has one, else the sub-folders; the log says which. The order, and the
    numbers that an epoch takes from torch's global generator for it, are those of the original's DataLoader. UserError, at
    once, for a folder without images, and where a process's share is smaller than a batch.
    """
    if not data_dir:
        raise UserError("unspecified data directory: give --data_dir")
    side = math.ceil(image_size / CROP) if random_crop else image_size
    images = Images.open(data_dir, (side, side), labels="original" if class_cond else "none")
    logger.log(images.describe())
    classes = None if images.labels is None else images.labels.tolist()
    data = ImageDataset(side, [str(f) for f in images.files], classes, rank(), world(), _images=images)
    if len(data) < batch_size:
        shares = f", shared among {world()} processes," if world() > 1 else ""
        raise UserError(f"{data_dir} has {len(images)} images{shares}: too few for a batch of {batch_size}; lower --batch_size")
    return _batches(data, batch_size, image_size, not deterministic, not deterministic if random_flip is None else random_flip)


def _batches(
    data: "ImageDataset", batch_size: int, size: int, shuffle: bool, flip: bool
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    def read(chosen: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        indices, draws = chosen
        x, y = data.batch(indices.numpy())
        if flip:
            x = torch.where(draws[:, :1, None, None] < 0.5, x.flip(-1), x)
        if size < data.resolution:
            x = torch.stack([_cut(image, size, *row[1:].tolist()) for image, row in zip(x, draws)])
        return x, ({} if y is None else {"y": y})

    while True:
        _draw_seed()  # a DataLoader's base seed
        own = torch.Generator().manual_seed(_draw_seed() if shuffle else 0)
        order = torch.randperm(len(data), generator=own) if shuffle else torch.arange(len(data))
        draws = torch.rand(len(data), 4, generator=own)
        whole = len(data) - len(data) % batch_size
        yield from ahead(read, list(zip(order[:whole].split(batch_size), draws[:whole].split(batch_size))))


def _cut(x: Tensor, size: int, share: float, down: float, right: float) -> Tensor:
    """A square window of an image (3, H, H), scaled to `size`; share, down and right in [0, 1] say which."""
    side = round(x.shape[1] * (CROP + (1 - CROP) * share))
    top, left = (round(z * (x.shape[1] - side)) for z in (down, right))
    window = x[None, :, top : top + side, left : left + side]
    return F.interpolate(window, (size, size), mode="bicubic", antialias=True)[0].clamp(-1, 1)


def _draw_seed() -> int:
    return int(torch.empty((), dtype=torch.int64).random_().item())


def _list_image_files_recursively(data_dir: str) -> list[str]:
    source = open_source(Path(data_dir))
    return [str(source.path / name) for name in source.names]


class ImageDataset(Dataset):
    """One image at a time, (3, H, W) float32 in [-1, 1] and {} or {"y": class}, of every num_shards-th path from `shard`."""

    def __init__(
        self, resolution: int, image_paths: Sequence[str], classes: Sequence[int] | None = None, shard: int = 0,
        num_shards: int = 1, _images: Images | None = None,
    ):  # fmt: skip
        self.resolution, self.local_images = resolution, image_paths[shard:][::num_shards]
        self.local_classes = None if classes is None else classes[shard:][::num_shards]
        self._images = _images or Images(Folder(Path(), list(image_paths)), (resolution, resolution))
        self._indices = np.arange(len(image_paths))[shard:][::num_shards]

    def __len__(self) -> int:
        return len(self.local_images)

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """Images (B, 3, H, W) and classes (B,)."""
        x = torch.from_numpy(self._images.batch(self._indices[indices])).float() / 127.5 - 1
        return x, None if self.local_classes is None else torch.tensor(self.local_classes)[indices]

    def __getitem__(self, idx: int) -> tuple[np.ndarray, dict[str, Any]]:
        x, y = self.batch(np.array([idx]))
        return x[0].numpy(), ({} if y is None else {"y": y[0].numpy()})
