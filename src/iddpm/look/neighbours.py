"""Which real images samples are nearest to, for people to look at."""

import csv
import io
from pathlib import Path

import numpy as np

from iddpm.measure.features import Features
from iddpm.sampling.sheets import comparison
from iddpm.store.remote import replace

SHOWN = 8  # rows of the picture


def write(samples: Features, real: Features, numbers: np.ndarray, distances: np.ndarray, table: Path, picture: Path) -> None:
    """From the rows of the nearest real images of each sample (n, k): a table of the first, and a picture of some."""
    order = np.argsort(distances[:, 0], kind="stable")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["sample", "nearest real image", "distance"])
    for k in order:
        theirs = real.images.title(int(real.chosen[numbers[k, 0]]))
        writer.writerow([samples.images.title(int(samples.chosen[k])), theirs, f"{distances[k, 0]:.6g}"])
    replace(table, lambda file: file.write(text.getvalue().encode()))
    first = order[:SHOWN]
    columns = {"sample": _pictures(samples, first)}
    for j in range(numbers.shape[1]):
        columns["nearest" if j == 0 else f"{j + 1}."] = _pictures(real, numbers[first, j])
    sheet = comparison(columns)
    replace(picture, lambda file: sheet.save(file, format="PNG"))


def _pictures(features: Features, rows: np.ndarray) -> np.ndarray:
    """(n, H, W, C) uint8."""
    return features.images.take(features.chosen[rows].tolist()).transpose(0, 2, 3, 1)
