"""Attention within reach, against loops over single tokens in float64."""

import pytest
import torch
from torch import Tensor

from iddpm.nn.reach import everywhere, neighbours, reach, windows


def drawn(height: int, width: int) -> list[Tensor]:
    made = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, height, width, 8, generator=made, requires_grad=True) for _ in range(3)]


def one_by_one(q: Tensor, k: Tensor, v: Tensor, seen: dict[tuple[int, int], list[tuple[int, int]]]) -> Tensor:
    """Each token's attention to those that it sees."""
    out = torch.zeros_like(q, dtype=torch.float64)
    for (y, x), places in seen.items():
        flat = torch.tensor([i * q.shape[3] + j for i, j in places])
        keys, values = (z.flatten(2, 3)[:, :, flat].double() for z in (k, v))
        weights = (q[:, :, y, x, None].double() * keys).sum(3).softmax(2)
        out[:, :, y, x] = (weights[..., None] * values).sum(2)
    return out


def around(height: int, width: int, size: int) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """A square about each token, moved inside at the edges."""
    first = [[min(max(i - size // 2, 0), n - size) for i in range(n)] for n in (height, width)]
    square = [(i, j) for i in range(size) for j in range(size)]
    return {(y, x): [(first[0][y] + i, first[1][x] + j) for i, j in square] for y in range(height) for x in range(width)}


def window_of(height: int, width: int, size: int, by: int) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """Those with which a token shares a window, where all windows lie `by` further to the top and the left; cut at the edges."""
    places = [(y, x) for y in range(height) for x in range(width)]
    return {
        (y, x): [(i, j) for i, j in places if (i + by) // size == (y + by) // size and (j + by) // size == (x + by) // size]
        for y, x in places
    }


def same(found: Tensor, wanted: Tensor, leaves: list[Tensor]) -> None:
    """Both outputs, and the gradients through both, are equal."""
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)
    back = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    pairs = zip(*(torch.autograd.grad(out, leaves, back.to(out.dtype)) for out in (found, wanted)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(7, 7, 7), (9, 5, 5), (16, 8, 3), (18, 12, 7), (17, 4, 3), (18, 9, 9), (17, 1, 1)],
)
def test_each_token_attends_to_a_square_about_it_that_stays_inside(height, width, size):
    leaves = drawn(height, width)
    same(neighbours(*leaves, size), one_by_one(*leaves, around(height, width, size)), leaves)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("height", "width", "size"), [(8, 8, 4), (6, 12, 3), (4, 8, 4), (10, 5, 5), (3, 2, 1)])
def test_each_token_attends_to_its_window(height, width, size, shifted):
    leaves = drawn(height, width)
    seen = window_of(height, width, size, size // 2 if shifted else 0)
    same(windows(*leaves, size, shifted), one_by_one(*leaves, seen), leaves)


def test_a_neighbourhood_of_all_is_attention_to_all():
    q, k, v = drawn(7, 7)
    torch.testing.assert_close(neighbours(q, k, v, 7), everywhere(q, k, v))


@pytest.mark.parametrize(
    ("text", "found"), [("global", ("global", 0)), ("none", ("none", 0)), ("neighborhood:3", ("neighborhood", 3))]
)
def test_reach_is_read(text, found):
    assert reach(text, (4, 6)) == found


@pytest.mark.parametrize(
    "text", ["", "local", "global:3", "neighborhood", "neighborhood:", "neighborhood:4", "neighborhood:5", "neighborhood:-3",
             "neighborhood:x", "window", "window:0", "window:4", "window:3", "none:1", "window:2:2", "window:²"],
)  # fmt: skip
def test_what_no_level_can_do_is_refused(text):
    with pytest.raises(ValueError, match="--level_attention"):
        reach(text, (4, 6))
