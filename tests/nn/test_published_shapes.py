"""Every published checkpoint: our networks have its tensors, by name, shape and order, so its weights load as they are."""

import ast
import hashlib
import json
from typing import Any

import pytest
import torch

from golden_rules import load, published_network

ROWS = load("published_shapes.json")["rows"]


def parsed(flags: str) -> dict[str, Any]:
    """ "--a 1 --b True --c 32,16" as {"a": 1, "b": True, "c": "32,16"}."""
    words = flags.split()
    return {name.removeprefix("--"): value_of(word) for name, word in zip(words[::2], words[1::2])}


def value_of(word: str) -> Any:
    try:
        value = ast.literal_eval(word)
    except ValueError:
        return word
    return word if isinstance(value, tuple) else value


@pytest.mark.parametrize("row", ROWS, ids=[row["file"] for row in ROWS])
def test_the_network_of_a_published_checkpoint_has_its_names_and_shapes_in_order(row: dict[str, Any]) -> None:
    flags = parsed(row["flags"])
    with torch.device("meta"):
        net = published_network(row["kind"], flags)
    shapes = [[name, list(tensor.shape)] for name, tensor in net.state_dict().items()]
    assert shapes[: len(row["first"])] == row["first"]
    assert shapes[-len(row["last"]) :] == row["last"]
    assert len(shapes) == row["tensors"]
    assert sum(p.numel() for p in net.parameters()) == row["parameters"]
    assert hashlib.sha256(json.dumps(shapes).encode()).hexdigest() == row["sha256"]
