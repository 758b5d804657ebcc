"""Sheets of images: where each image lies."""

import numpy as np
import pytest

from iddpm.sampling.sheets import WIDE, comparison


@pytest.mark.parametrize(("side", "columns"), [(8, 1), (8, 40), (256, 9), (2000, 3)])
def test_a_comparison_of_many_columns_goes_on_below(side, columns):
    grey = {f"seed {k}": np.full((2, side, side, 3), 10 + 5 * k, np.uint8) for k in range(columns)}
    sheet = np.asarray(comparison(grey))
    cell = max(96, side)
    assert sheet.shape[1] <= max(WIDE, cell + 8)
    across = (sheet.shape[1] - 4) // (cell + 4)
    band = 16 + 4 + 2 * (cell + 4)
    assert sheet.shape[0] == -(-columns // across) * band
    for k in range(columns):
        for r in range(2):
            top, left = k // across * band + 20 + r * (cell + 4), 4 + k % across * (cell + 4)
            assert (sheet[top : top + cell, left : left + cell] == 10 + 5 * k).all()
