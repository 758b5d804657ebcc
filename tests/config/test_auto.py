"""The rules of `--preset auto`: what they choose for some sets of images, and that all they can choose is a run."""

from collections.abc import Mapping
from typing import Any

import pytest

from iddpm import build, fit
from iddpm.config import Config, check
from iddpm.config.auto import KNOWN, SEEN, Facts, recipe

CIFAR = dict(images=50_000, height=32, width=32, alike=True, channels=3, classes=10, smallest=5000)
DIGITS = dict(images=1438, height=8, width=8, alike=True, channels=1, classes=10, smallest=139)
PHOTOS = dict(images=800, height=1200, width=1600, alike=False, channels=3, classes=0, smallest=0)


def cost(settings: Mapping[str, Any]) -> float:
    """As the square of the width and of the side, in patches."""
    side = int(settings["image_size"].lower().partition("x")[0]) // settings.get("unet_patch", 1)
    return 6e-7 * settings["num_channels"] ** 2 * side**2


def facts(seconds: float = 3600, gflops: float = 250, cuda: bool = False, **images: Any) -> Facts:
    return Facts(**images, seconds=seconds, gflops=gflops, cuda=cuda, cost=cost)


@pytest.mark.parametrize(
    ("images", "chosen"),
    [
        (CIFAR, dict(image_size="32", image_channels=3, class_cond=True, random_flip=True)),
        (DIGITS, dict(image_size="8", image_channels=1, class_cond=True, random_flip=False, dropout=0.1)),
        (PHOTOS, dict(image_size="64", class_cond=False, random_flip=True, dropout=0.1)),
        (dict(CIFAR, height=28, width=28), dict(image_size="28")),
        (dict(CIFAR, height=50, width=50), dict(image_size="48")),
        (dict(CIFAR, height=62, width=63), dict(image_size="56")),
        (dict(CIFAR, height=4, width=4), dict(image_size="8")),
        (dict(CIFAR, smallest=3), dict(class_cond=False)),
        (dict(CIFAR, classes=2000), dict(class_cond=False)),
    ],
)
def test_it_follows_from_the_images(images, chosen):
    found, _ = recipe(facts(**images), {})
    assert {name: found.get(name) for name in chosen} == chosen


def test_more_time_or_a_faster_device_takes_a_wider_network_that_sees_enough_images():
    widths = []
    for seconds in (60, 1200, 3600, 86400, 10 * 86400):
        found, _ = recipe(facts(seconds, **CIFAR), {})
        widths.append(found["num_channels"])
        enough = SEEN * max(1, (250 * seconds / KNOWN) ** 0.5)
        assert widths[-1] == min(widths) or 250 * seconds / cost(found) >= enough
    assert widths == sorted(widths) and widths[0] < widths[-1]
    faster, _ = recipe(facts(1200, gflops=1e5, cuda=True, **CIFAR), {})
    assert faster["num_channels"] > widths[1]


@pytest.mark.parametrize(
    ("side", "seconds", "size", "patch"),
    [(250, 3600, "128", 2), (250, 30 * 86400, "224", 1), (100, 600, "96", 2), (256, 86400, "256", 2), (64, 3600, "64", 1)],
)
def test_patches_on_a_fast_device_are_as_fine_as_the_time_allows(side, seconds, size, patch):
    found, _ = recipe(facts(seconds, gflops=1e5, cuda=True, **dict(CIFAR, height=side, width=side)), {})
    assert (found["image_size"], found["unet_patch"]) == (size, patch)


def test_odd_flags_have_sensible_company():
    few, many = (" ".join(recipe(facts(**dict(CIFAR, **own)), {})[1]) for own in ({"smallest": 3}, {"classes": 2000}))
    assert "one of the 10 has 3 images only" in few and "2000 are many" in many
    assert recipe(facts(**dict(CIFAR, smallest=3)), {"class_cond": True})[0]["class_dropout"] == 0.1
    assert recipe(facts(**CIFAR), {"batch_size": 4096})[0]["lr"] <= 2e-3
    assert recipe(facts(0, **CIFAR), {"steps": 20})[0]["lr_warmup_steps"] == 4
    assert recipe(facts(1e300, gflops=1e300, **CIFAR), {})[0]["batch_size"] == 128
    assert recipe(facts(**CIFAR), {"image_size": "64X64"})[0]["channel_mult"]
    cuda = recipe(facts(0, cuda=True, **CIFAR), {"steps": 20})[0]
    assert (cuda["num_channels"], cuda["batch_size"]) == (128, 128)


def test_a_flag_wins_and_what_follows_from_it_is_chosen_anew():
    found, lines = recipe(facts(**PHOTOS), dict(image_size="128", num_channels=48, lr=3e-4))
    assert not {"image_size", "num_channels", "lr"} & set(found)
    assert not any("--lr 0" in line for line in lines)
    wider, _ = recipe(facts(1e6, **CIFAR), {})
    assert wider["lr"] < recipe(facts(600, **CIFAR), {})[0]["lr"]


def test_few_images_seen_often_are_changed_and_the_network_is_told():
    short, long = (recipe(facts(seconds, **DIGITS), {})[0] for seconds in (5, 86400))
    assert "augment" not in short and (long["augment"], long["dropout"]) == (0.12, 0.1)
    assert not {"augment", "dropout"} & recipe(facts(3600, **CIFAR), {})[0].keys()
    assert "augment" not in recipe(facts(86400, **DIGITS), {"task": "enlarge", "small_size": "4"})[0]


def test_each_choice_is_told_with_its_reason():
    found, lines = recipe(facts(**CIFAR), {})
    told = " ".join(lines)
    assert all(f"--{name} {value}" in told for name, value in found.items())
    assert "50,000 images" in told and "10 classes" in told


@pytest.mark.parametrize("side", [8, 12, 20, 28, 32, 48, 64, 100, 256, 1000])
@pytest.mark.parametrize("images", [CIFAR, DIGITS, PHOTOS])
def test_whatever_the_size_it_is_a_run_whose_network_can_be_built(side, images):
    for given in ({}, {"image_size": str(side)}, {"num_channels": 48}, {"num_channels": 30, "image_size": str(side)}):
        found, _ = recipe(facts(60, **images | dict(height=side, width=side + 8)), given)
        config = Config().updated({**found, **given, "steps": 10})
        build.network(fit.require_fit(check(config)).updated({"num_classes": images["classes"]}))


def test_what_is_made_of_the_size_is_told():
    for images, told in (
        (CIFAR, "(all of the 50,000 images have 32x32 pixels)"),
        (PHOTOS, "(many of the 800 images have 1200x1600 pixels, and 64 at most suit this time and device)"),
        (dict(CIFAR, width=40), "have 32x40 pixels, of which the middle square is taken)"),
        (dict(CIFAR, height=50, width=50), "have 50x50 pixels, of which the middle square is taken, at 48)"),
    ):
        assert told in " ".join(recipe(facts(**images), {})[1])


def test_steps_that_take_weeks_are_told_at_once():
    many, few = (" ".join(recipe(facts(seconds=0, **CIFAR), {"steps": steps})[1]) for steps in (10**7, 1000))
    assert "days on this device; --time 8h" in many and "days" not in few
