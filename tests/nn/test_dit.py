"""The transformer: what it starts as, where its patches lie, that positions count, and a grid of its patches' period."""

import pytest
import torch

from iddpm import build
from iddpm.config import Config, check
from iddpm.errors import UserError
from iddpm.nn.dit import DiT, rotary, turned
from patch_grid import patch_grid


def net(**changes) -> DiT:
    torch.manual_seed(0)
    settings = dict(image_size=(8, 12), in_channels=3, out_channels=3, patch=2, width=32, depth=2, heads=2) | changes
    size, cin, cout = (settings.pop(k) for k in ("image_size", "in_channels", "out_channels"))
    return DiT(size, cin, cout, **settings)


def awake(model: DiT) -> DiT:
    """With no weight at 0, as after training."""
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=generator)
    return model


X, T = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(2)), torch.tensor([10.0, 700.0])


def test_it_starts_at_zero_and_its_blocks_as_the_identity() -> None:
    assert (net()(X, T) == 0).all()
    block, h = net().blocks[0], torch.randn(2, 24, 32)
    assert torch.equal(block(h, torch.randn(2, 32), rotary(4, 6, 16)), h)


def test_a_patch_of_the_output_lies_where_its_token_does() -> None:
    """Without attention, a change of one patch changes that patch alone."""
    model = awake(net())
    for block in model.blocks:
        block.proj.weight.data.zero_(), block.proj.bias.data.zero_()
    other = X.clone()
    other[:, :, 2:4, 6:8] += 1
    changed = (model(X, T) != model(other, T)).any(dim=1).any(dim=0)
    where = torch.zeros(8, 12, dtype=torch.bool)
    where[2:4, 6:8] = True
    assert torch.equal(changed, where)


def test_attention_sees_how_far_not_where() -> None:
    """Rotary positions: scores of tokens moved together stay; of tokens moved apart they do not (Su et al. 2021)."""
    angles, width = rotary(5, 7, 16).reshape(5, 7, 8), 16
    q, k = torch.randn(2, 1, 1, 1, width, generator=torch.Generator().manual_seed(3))

    def score(a: tuple[int, int], b: tuple[int, int]) -> float:
        return float((turned(q, angles[a][None]) * turned(k, angles[b][None])).sum())

    assert score((0, 1), (2, 3)) == pytest.approx(score((2, 3), (4, 5)), abs=1e-5)
    assert abs(score((0, 1), (2, 3)) - score((0, 1), (2, 4))) > 1e-3
    assert abs(score((0, 1), (2, 3)) - score((0, 1), (3, 3))) > 1e-3


def test_time_class_and_small_image_count() -> None:
    model = awake(net(num_classes=3, given_channels=3))
    y, small = torch.tensor([0, 2]), torch.randn(2, 3, 4, 6)
    out = model(X, T, y, small)
    assert not torch.allclose(out, model(X, T + 50, y, small)) and not torch.allclose(out, model(X, T, 2 - y, small))
    assert not torch.allclose(out, model(X, T, y, small + 0.5))
    with pytest.raises(ValueError, match="give y"):
        model(X, T)


def test_recomputed_blocks_have_the_same_gradient() -> None:
    grads = []
    for again in (False, True):
        model = awake(net(use_checkpoint=again))
        model(X, T).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_a_grid_of_the_patches_period_is_seen() -> None:
    smooth = torch.linspace(0, 1, 64).expand(2, 1, 64, 64) + torch.linspace(0, 1, 64)[:, None]
    assert patch_grid(smooth, 4) == pytest.approx(1)
    blocks = smooth + torch.randn(2, 1, 16, 16).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert patch_grid(blocks, 4) > 10
    noise = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert patch_grid(noise, 4) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(patch_size=3), "choose a divisor"),
        (dict(width=100), "heads of a multiple of 4"),
        (dict(task="classify", class_cond=True, num_classes=3), "no classifier: take unet"),
    ],
)
def test_what_it_cannot_be_is_said(settings, words) -> None:
    with pytest.raises(UserError, match=words):
        build.network(check(Config().updated(dict(network="dit", image_size="8", **settings))))
