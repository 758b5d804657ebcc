"""Classifier guidance against the published loops, and against a closed form."""

from typing import Any

import pytest
import torch

from golden_rules import Stub, load, noise
from iddpm.diffusion.denoiser import Denoiser, learned_range
from iddpm.diffusion.guidance import classifier_gradient
from iddpm.diffusion.parametrization import PARAMETRIZATIONS
from iddpm.diffusion.schedule import Chain, Cosine, respace
from iddpm.diffusion.solvers import ancestral, ddim, run

SHAPE = (4, 3, 8, 8)


@pytest.mark.parametrize("golden", load("guided_sampling.json"), ids=lambda g: g["key"])
def test_guided_loops_end_where_the_published_ones_do(golden: dict[str, Any]) -> None:
    chain = Chain(Cosine(golden["T"]), respace(golden["T"], golden["respacing"]), rescale_time=False)
    denoiser = Denoiser(Stub(6), chain, PARAMETRIZATIONS["eps"], learned_range, clip=True)
    solver = ddim if golden["respacing"].startswith("ddim") else ancestral

    def draw(k: int) -> torch.Tensor:
        return noise(k, SHAPE)

    def gradient(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        return golden["guide"] * x.cos() * (1 + chain.at(i, x).time / 40)

    x = run(solver(denoiser, draw(0), draw, gradient=gradient))
    torch.testing.assert_close(x, torch.from_numpy(load("guided_sampling.npz")[golden["key"]]), atol=1e-5, rtol=1e-5)


def test_the_gradient_of_a_linear_classifier_is_its_closed_form() -> None:
    """logits = W x: the gradient of log softmax is w_y minus the mean of the rows under p; also inside inference mode."""
    w = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    x, y = noise(0, (2, 3, 2, 2)), torch.tensor([1, 4])
    with torch.inference_mode():
        gradient = classifier_gradient(lambda x, t: x.flatten(1) @ w.T, Chain(Cosine(10)), y, scale=3.0)
        got = gradient(x, torch.tensor([0, 9]))
    p = (x.flatten(1) @ w.T).softmax(1)
    torch.testing.assert_close(got.flatten(1), 3 * (w[y] - p @ w))
