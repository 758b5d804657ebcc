"""Files of a reference's mean and covariance, as other tools exchange them."""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch

from iddpm.data.pickled import unpickle
from iddpm.errors import UserError, readable
from iddpm.measure.extractors import Extractor
from iddpm.measure.extractors.weights import loading
from iddpm.measure.metrics.moments import Gaussian
from iddpm.records import LARGEST, Count, decode
from iddpm.store.remote import opened, replace

TAPS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # pytorch-fid's names, and guided-diffusion's for sFID


class About(TypedDict, total=False):
    """What ours say of themselves."""

    extractor: str
    identity: str
    n: Count


def read(path: Path, extractor: Extractor) -> dict[str, Gaussian] | None:
    """The Gaussians of a file by tap; None where it holds none. UserError where they are not of this extractor.

    An .npz with mu and sigma (pytorch-fid), with mu_s and sigma_s too (guided-diffusion), or torch-fidelity's .pt. Files of other
    tools do not say what they are of: their widths alone are looked at.
    """
    held = _read_pt(path) if path.suffix == ".pt" else _read_npz(path)
    if held is None:
        return None
    about = held.get("iddpm", {})
    if (made_by := about.get("extractor", extractor.name)) != extractor.name:
        raise UserError(f"{path} holds statistics of {made_by}, not of {extractor.name}: give its own --extractor")
    if (identity := about.get("identity", extractor.identity)) != extractor.identity:
        raise UserError(
            f"{path} holds statistics of {made_by} with other weights or another version ({identity}, here "
            f"{extractor.identity}): give the weights that it was made with, or make it anew with --save_statistics"
        )
    gaussians = {}
    for tap, (mean, covariance) in TAPS.items():
        if mean in held and covariance in held and tap in extractor.widths:
            mu, sigma = (np.asarray(held[name], np.float64) for name in (mean, covariance))
            _check(path, mu, sigma, extractor.name, extractor.widths[tap])
            gaussians[tap] = Gaussian(mu, sigma, about.get("n"))
    return gaussians


def _check(path: Path, mu: np.ndarray, sigma: np.ndarray, extractor: str, width: int) -> None:
    if mu.shape != (width,):
        found = mu.shape[-1] if mu.ndim else 1
        raise UserError(f"{path} holds statistics of {found} features, and {extractor} has {width}: give its own --extractor")
    if sigma.shape != (width, width):
        raise UserError(f"{path} holds a covariance of shape {sigma.shape} beside a mean of {width} features: make it anew")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(f"{path} holds statistics that are not finite: make them anew")
    if not np.allclose(sigma, sigma.T, rtol=1e-4, atol=1e-6 * np.abs(sigma).max()):
        raise UserError(f"{path} holds a covariance that is not symmetric: make it anew")


def has_images(path: Path) -> bool:
    """Whether an .npz also holds images, as guided-diffusion's reference batches do."""
    with readable(path, "is not a readable .npz"), opened(path) as raw, np.load(raw) as file:
        return "arr_0" in file


def write(path: Path, gaussians: Mapping[str, Gaussian], about: Mapping[str, Any]) -> None:
    """An .npz that pytorch-fid and guided-diffusion's evaluator also read; `about` holds at least extractor and n."""
    arrays: dict[str, Any] = {"iddpm": np.array(json.dumps(dict(about)))}
    for tap, gaussian in gaussians.items():
        arrays |= dict(zip(TAPS[tap], (gaussian.mean, gaussian.covariance)))
    replace(path, lambda file: np.savez(file, **arrays))


def _read_npz(path: Path) -> dict[str, Any] | None:
    with readable(path, "is not a readable .npz"), opened(path) as raw, np.load(raw) as file:
        if "mu" not in file or "sigma" not in file:
            return None
        held: dict[str, Any] = {name: file[name] for pair in TAPS.values() for name in pair if name in file}
        if "iddpm" in file:
            held["iddpm"] = decode(str(file["iddpm"]), About, f"{path} is not a readable .npz: its record")
        return held


def _read_pt(path: Path) -> dict[str, Any] | None:
    """torch-fidelity's dict of numpy arrays, by our own reader: torch's would call numpy with whatever the file says."""
    with loading(path, "give a file of statistics (mu, sigma), as torch-fidelity saves it"), opened(path) as raw:
        try:
            with zipfile.ZipFile(raw) as file, file.open(_pickle_in(file)) as held:
                found = unpickle(held)
        except Exception:  # tensors, an old form or damage, of which torch tells
            raw.seek(0)
            found = torch.load(raw, map_location="cpu", weights_only=True)
    return dict(found) if isinstance(found, dict) and "mu" in found and "sigma" in found else None


def _pickle_in(file: zipfile.ZipFile) -> str:
    names = [name for name in file.namelist() if name.endswith("/data.pkl")]
    if len(names) != 1 or file.getinfo(names[0]).file_size > LARGEST:
        raise ValueError("no file of torch.save")
    return names[0]
