"""Images in an .npz as the original's commands write them: arr_0 uint8 (N, H, W, C), and arr_1 labels where there are any."""

import zipfile
from pathlib import Path

import numpy as np

from iddpm.errors import UserError
from iddpm.places import opened


def read_npz(path: Path, size: tuple[int, int], channels: int) -> tuple[np.ndarray, np.ndarray | None]:
    """The images (N, C, H, W) uint8 and labels (N,) int64 of an .npz; UserError where they are not of this size and type."""
    try:
        with opened(path) as raw, np.load(raw) as file:
            if "arr_0" not in file:
                raise UserError(f"{path} holds no arr_0 but {', '.join(file.files) or 'nothing'}: give an .npz of samples")
            images = file["arr_0"]
            labels = file["arr_1"].astype(np.int64) if "arr_1" in file else None
    except UserError:
        raise
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a readable .npz ({error})") from None
    wanted = (*size, channels)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != wanted or not len(images):
        shape = " x ".join(map(str, images.shape))
        raise UserError(f"{path} holds {images.dtype} {shape}; uint8 images N x {' x '.join(map(str, wanted))} are needed")
    if labels is not None and (labels.shape != (len(images),) or labels.min() < 0):
        raise UserError(f"{path}: arr_1 must hold one label from 0 for each of the {len(images)} images")
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)), labels
