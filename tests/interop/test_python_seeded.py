"""A seeded script draws and gets what it did with the original: weights, t, noise, images, a training run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

import interop.python_seeded as script
from golden_rules import load
from iddpm.interop.openai import install
from iddpm.interop.openai.python import logger


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    install()
    yield
    if dist.is_initialized():  # the script set it up
        dist.destroy_process_group()


def agree(ours: Any, published: Any, where: str = "") -> None:
    """All numbers within 1e-4, all else alike."""
    if isinstance(published, dict):
        assert set(ours) == set(published), where
        for name in published:
            agree(ours[name], published[name], f"{where}/{name}")
    elif isinstance(published, list) and not all(isinstance(p, (int, float)) for p in published):
        assert len(ours) == len(published), where
        for k, (a, b) in enumerate(zip(ours, published)):
            agree(a, b, f"{where}[{k}]")
    elif isinstance(published, str):
        assert ours == published, where
    else:
        np.testing.assert_allclose(ours, published, rtol=1e-4, atol=1e-4, err_msg=where)


def test_a_seeded_script_gets_the_same_weights_steps_noise_and_images() -> None:
    agree(script.diffusion_numbers(), load("python_api.json")["seeded"]["diffusion"])


def test_a_seeded_training_run_ends_at_the_same_weights(tmp_path: Path) -> None:
    with logger.scoped_configure(str(tmp_path), [""]):
        agree(script.training_numbers(tmp_path), load("python_api.json")["seeded"]["training"])
