"""docs/results.md: what it says to run exists, and trains what its row says."""

import re
from pathlib import Path

import pytest

from iddpm.cli.flags import Parser
from iddpm.cli.train import VERB
from iddpm.config import Config, check
from iddpm.config.presets import PRESETS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "results.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line.startswith("| ")]
TRAINED = [row for row in ROWS if row[0] in ("1000", "4000")]
OBJECTIVES = {
    "simple": (False, "auto", "uniform"), "hybrid": (True, "auto", "uniform"), "vlb": (True, "vlb", "loss-second-moment"),
}  # fmt: skip


def trains(command):
    """The config of `iddpm train DATA COMMAND`."""
    parser = Parser(prog="iddpm train")
    VERB.parser(parser)
    given = parser.read(["DATA", *command.split()])
    preset, others = given["preset"], {k: v for k, v in given.items() if k not in ("preset", "data", "config", "run", "dry_run")}
    return check(Config().updated({**PRESETS[preset][1], **others}))


def test_every_recipe_and_preset_it_names_exists():
    recipes, presets = set(re.findall(r"recipes/[\w/.-]+\.sh", TEXT)), set(re.findall(r"--preset ([\w-]+)", TEXT)) - {"NAME"}
    assert len(recipes) >= 10 and all((ROOT / path).is_file() for path in recipes)
    assert presets == {"cifar10", "cifar10-vlb", "imagenet64"} <= set(PRESETS)


@pytest.mark.parametrize("row", TRAINED, ids=[" ".join(row[:4]) + f" {row[4]}" for row in TRAINED])
def test_the_command_of_a_published_row_trains_what_the_row_says(row):
    steps, schedule, objective, length, _, _, command, _, _ = row
    config = trains(command.split("`")[1])
    d = config.diffusion
    assert (d.diffusion_steps, d.noise_schedule) == (int(steps), schedule)
    assert (d.learn_sigma, d.objective, d.schedule_sampler) == OBJECTIVES[objective]
    assert config.train.steps == {"200K": 200_000, "500K": 500_000, "1.5M": 1_500_000}[length]
    if config.model.image_size == "32":
        assert config.model.dropout == {"linear": 0.1, "cosine": 0.3}[schedule]


def test_the_recipes_of_a_row_are_about_its_numbers():
    rows = [row for row in TRAINED if "recipes/published" in row[7]]
    assert len(rows) == 4
    for row in rows:
        text = (ROOT / row[7].strip("`")).read_text()
        assert f"{row[4]} bits/dim" in text and f"FID {row[5]}" in text
