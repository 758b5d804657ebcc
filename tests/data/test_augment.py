"""Changes to training images: what they do to pixels, that they are told, and that a network without them draws the same."""

import numpy as np
import pytest
import torch

from iddpm import build
from iddpm.cli.main import main
from iddpm.config import Config
from iddpm.data import Order
from iddpm.data.augment import augmented
from iddpm.data.batches import make_batch
from iddpm.nn.unet import CHANGES


class Numbers:
    """Stands in for a generator: which of the six changes are made, and how."""

    def __init__(self, on=(), normal=(0, 0, 0, 0), angles=(0.5, 0.5)):
        self.on, self.normal, self.angles = on, normal, angles

    def random(self, count):
        return np.array([0.0 if k in self.on else 1.0 for k in range(6)] if count == 6 else self.angles)

    def standard_normal(self, count):
        return np.array(self.normal, float)


def waves(height=16, width=16):
    """A smooth image (2, H, W): of resampling it keeps all but a little."""
    down, right = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([torch.sin(0.3 * down + 0.2 * right), torch.cos(0.25 * right) * down / height])


@pytest.mark.parametrize(
    ("numbers", "same", "told"),
    [
        (Numbers(), lambda x: x, {}),
        (Numbers({0}), lambda x: x.flip(-1), {0: 1}),
        (Numbers({1}), lambda x: x.flip(-2), {1: 1}),
        (Numbers({3}, angles=(0.75, 0.5)), lambda x: x.rot90(1, (-2, -1)), {3: -1, 4: 1}),
        (Numbers({5}, (0, 0, 1, 0)), lambda x: torch.cat([x[..., 2:], x[..., -2:].flip(-1)], -1), {7: 1}),
        (Numbers({5}, (0, 0, 0, -1)), lambda x: torch.cat([x[:, :2].flip(-2), x[:, :-2]], -2), {8: -1}),
    ],
)
def test_a_change_is_what_it_is_called_and_is_told(numbers, same, told):
    x = waves()
    changed, numbers_told = augmented(x, 0.5, numbers)
    inside = slice(1, -1)
    torch.testing.assert_close(changed[:, inside, inside], same(x)[:, inside, inside], rtol=0, atol=0.02)
    assert numbers_told.tolist() == pytest.approx([told.get(k, 0) for k in range(CHANGES)], abs=1e-6)


def test_scaled_and_stretched_images_show_the_function_at_other_places():
    down, right = torch.meshgrid(torch.arange(16) - 7.5, torch.arange(16) - 7.5, indexing="ij")
    x = torch.stack([0.05 * down, 0.05 * right])
    inside = slice(5, 11)
    for numbers, by_down, by_right in (
        (Numbers({2}, (-1, 0, 0, 0)), 2**-0.2, 2**-0.2),
        (Numbers({4}, (0, -1, 0, 0)), 2**0.2, 2**-0.2),  # along 0: the horizontal
        (Numbers({4}, (0, -1, 0, 0), (0.5, 0.75)), 2**-0.2, 2**0.2),  # along a right angle
    ):
        changed, told = augmented(x, 0.5, numbers)
        factors = torch.tensor([by_down, by_right])[:, None, None]
        torch.testing.assert_close(changed[:, inside, inside], (x * factors)[:, inside, inside], rtol=0, atol=5e-3)
        assert told.norm() == pytest.approx(1)


@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_turning_back_comes_to_the_same_image_whatever_the_sides(size):
    x = waves(*size)
    half, _ = augmented(x, 0.5, Numbers({3}, angles=(1.0, 0.5)))  # half a turn: both mirrors
    torch.testing.assert_close(half, x.flip(-1, -2), rtol=0, atol=0.02)


def test_each_of_six_changes_comes_with_its_share_and_nothing_is_told_of_an_unchanged_image():
    x, generator = waves(8, 8), np.random.default_rng(0)
    made = [augmented(x, 0.2, generator) for _ in range(1000)]
    told = torch.stack([t for _, t in made])
    groups = (told[:, :1], told[:, 1:2], told[:, 2:3], told[:, 3:5], told[:, 5:7], told[:, 7:])
    for group in groups:
        assert float((group != 0).any(1).float().mean()) == pytest.approx(0.2, abs=0.04)
    same = [torch.equal(image, x) for image, _ in made]
    assert same == (told == 0).all(1).tolist()
    assert sum(same) / 1000 == pytest.approx(0.8**6, abs=0.05)


SMALL = dict(image_size="8", image_channels=1, num_channels=32, num_res_blocks=1, channel_mult="1,2", attention_resolutions="",
             num_heads=1, batch_size=6, augment=0.5)  # fmt: skip


class Data:
    labels, classes, rule = None, (), "none"

    def batch(self, indices):
        return np.random.default_rng(0).integers(0, 256, (len(indices), 1, 8, 8), np.uint8)


def test_batches_tell_the_network_in_training_and_hold_back_in_validation():
    config = Config().updated(SMALL)
    order = Order(6, 0)
    batch, again, held_out = (make_batch(config, Data(), order, 3, 0, train) for train in (True, True, False))
    plain = make_batch(config.updated({"augment": 0.0}), Data(), order, 3, 0)
    assert torch.equal(batch.x0, again.x0) and torch.equal(batch.cond["augment"], again.cond["augment"])
    assert batch.cond["augment"].shape == (6, CHANGES)
    told = (batch.cond["augment"] != 0).any(1)
    assert torch.equal(batch.x0[~told], plain.x0[~told]) and not torch.equal(batch.x0[told], plain.x0[told])
    assert torch.equal(held_out.x0, plain.x0) and "augment" not in held_out.cond | plain.cond


def test_a_network_reads_what_it_is_told_and_draws_as_if_nothing_was_changed():
    config = Config().updated(SMALL)
    net = build.network(config)
    for p in net.parameters():
        torch.nn.init.normal_(p, 0, 0.05)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 700.0])
    none = net(x, t, augment=torch.zeros(2, CHANGES))
    torch.testing.assert_close(net(x, t), none)
    assert (net(x, t, augment=torch.ones(2, CHANGES)) - none).abs().max() > 1e-3
    with pytest.raises(AttributeError):
        build.network(config.updated({"augment": 0.0}))(x, t, augment=torch.zeros(2, CHANGES))


@pytest.mark.parametrize("other", [{"network": "dit"}, {"task": "translate", "given": "x"}])
def test_networks_that_cannot_be_told_are_refused(other, tmp_path, capsys):
    flags = [f"--{name}={value}" for name, value in {"augment": 0.1, "steps": 1, "preset": "none", **other}.items()]
    assert main(["train", str(tmp_path), "--run", str(tmp_path / "r"), *flags]) == 2
    assert "--augment has no effect" in capsys.readouterr().err
