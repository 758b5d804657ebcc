"""Files of a reference's mean and covariance, as other tools exchange them."""

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from iddpm.errors import UserError
from iddpm.metrics.frechet import Gaussian
from iddpm.places import opened, replace

TAPS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # pytorch-fid's names, and guided-diffusion's for sFID


def read(path: Path, extractor: str, widths: Mapping[str, int]) -> dict[str, Gaussian]:
    """The Gaussians of a file by tap; none where it holds no statistics. UserError where they are of another extractor.

    An .npz with mu and sigma (pytorch-fid), with mu_s and sigma_s too (guided-diffusion), or torch-fidelity's .pt.
    """
    held = _read_pt(path) if path.suffix == ".pt" else _read_npz(path)
    if held is None:
        return {}
    made_by = json.loads(str(held["iddpm"]))["extractor"] if "iddpm" in held else extractor
    found = {}
    for tap, (mean, covariance) in TAPS.items():
        if mean in held and covariance in held and tap in widths:
            mu, sigma = np.asarray(held[mean], np.float64), np.asarray(held[covariance], np.float64)
            if mu.shape != (widths[tap],) or sigma.shape != 2 * (widths[tap],) or made_by != extractor:
                whose = f"of {made_by}" if made_by != extractor else f"of {mu.shape[-1] if mu.ndim else 1} features"
                raise UserError(f"{path} holds statistics {whose}, and {extractor} has {widths[tap]}: give its own --extractor")
            if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
                raise UserError(f"{path}: its {mean} or {covariance} is not finite")
            found[tap] = Gaussian(mu, sigma)
    return found


def has_images(path: Path) -> bool:
    """Whether an .npz also holds images, as guided-diffusion's reference batches do."""
    with opened(path) as raw, np.load(raw) as file:
        return "arr_0" in file


def write(path: Path, gaussians: Mapping[str, Gaussian], about: Mapping[str, Any]) -> None:
    """An .npz that pytorch-fid and guided-diffusion's evaluator also read; `about` holds at least extractor and n."""
    arrays: dict[str, Any] = {"iddpm": np.array(json.dumps(dict(about)))}
    for tap, gaussian in gaussians.items():
        arrays |= dict(zip(TAPS[tap], (gaussian.mean, gaussian.covariance)))
    replace(path, lambda file: np.savez(file, **arrays))


def _read_npz(path: Path) -> dict[str, Any] | None:
    try:
        with opened(path) as raw, np.load(raw) as file:
            if "mu" not in file or "sigma" not in file:
                return None
            names = {"iddpm", *(name for pair in TAPS.values() for name in pair)}
            return {name: file[name] for name in names & set(file.files)}
    except UserError:
        raise
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a readable .npz ({error})") from None


def _read_pt(path: Path) -> dict[str, Any] | None:
    doubles = np.zeros(0)
    arrays: list[Any] = [doubles.__reduce__()[0], np.ndarray, np.dtype, type(doubles.dtype), type(np.dtype(np.float32))]
    try:
        with opened(path) as raw, torch.serialization.safe_globals(arrays):  # data, and nothing that runs
            held = torch.load(raw, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise UserError(f"{path} is not a readable file of statistics ({str(error).splitlines()[0]})") from None
    return dict(held) if isinstance(held, dict) and "mu" in held and "sigma" in held else None
