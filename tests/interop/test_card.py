"""The card beside exported weights."""

from pathlib import Path

import pytest
import torch

from iddpm.config import Config
from iddpm.interop import single
from iddpm.interop.card import card
from iddpm.store.weights import Weights


def weights(**settings: object) -> Weights:
    return Weights(Path("runs/some/w.safetensors"), {"a": torch.zeros(2)}, Config().updated(settings), dict(step=3, images=9))


def test_names_of_classes_stay_in_their_cell():
    text = card(weights(class_cond=True, num_classes=3, classes=("a|b", "two\nlines", r"c\d")), "iddpm", "")
    (line,) = [line for line in text.splitlines() if line.startswith("| classes")]
    assert line == r"| classes | 0 a\|b, 1 two lines, 2 c\\d |"


CLASSIFIER = dict(task="classify", class_cond=True, num_classes=2)


@pytest.mark.parametrize(
    ("settings", "use"), [({}, "iddpm sample model.safetensors"), (CLASSIFIER, "--classifier model.safetensors")]
)
def test_the_command_is_that_of_the_task(tmp_path, settings, use):
    *_, told = single.exported(weights(**settings), tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert f"`{use}`" in text or use in text
    assert str(tmp_path / "model.safetensors") in told
    assert ("image-generation" in text) == (not settings)
