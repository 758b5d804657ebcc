"""Features to compare libraries on, and torch-fidelity's arithmetic."""

import warnings
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest

from inception_oracles import torch_fidelity

with warnings.catch_warnings():  # of what torch has deprecated and these still call as they load
    warnings.simplefilter("ignore")
    import ignite.metrics  # noqa: F401
    import torchmetrics.image.fid
    import torchmetrics.image.kid  # noqa: F401


@pytest.fixture
def fidelity() -> Callable[[str], ModuleType]:
    """A module of torch-fidelity by name."""
    return torch_fidelity


@pytest.fixture(scope="session")
def pair() -> tuple[np.ndarray, np.ndarray]:
    """Samples (300, 12) and a reference (300, 12): correlated, of other means and scales, all above zero as pooled features."""
    rng = np.random.default_rng(7)
    mix = rng.normal(size=(12, 12)) / 3
    return np.abs(rng.normal(size=(300, 12)) @ mix + 0.3), np.abs(1.2 * rng.normal(size=(300, 12)) @ mix.T)
