"""A run's weights as one .safetensors file, config and provenance inside, with a model card: as `iddpm sample FILE` reads it."""

import json
from pathlib import Path

from safetensors.torch import save

from iddpm.interop.card import card
from iddpm.store.remote import write_file
from iddpm.store.weights import Weights


def exported(weights: Weights, folder: Path) -> list[str]:
    """Write model.safetensors and the card; returns what to tell of them."""
    about = {"format": "pt", "iddpm": json.dumps(weights.about), "config": weights.config.to_json()}
    file = folder / "model.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    write_file(file, save(weights.tensors, about))
    command = weights.config.task.next.format(run=file, data="IMAGES")
    write_file(folder / "README.md", card(weights, "iddpm", f"To use it: `{command.replace(str(file), file.name)}`\n"))
    return [f"wrote in {folder}: {file.name}, README.md", f"next: {command}"]
