"""Train, sample and measure diffusion models of images.

    model = iddpm.load("runs/tiny")             # a run, a checkpoint, a .safetensors file
    images = model.sample(16, solver="ddim", sampling_steps=50)
    iddpm.train("photos", image_size=64, steps=20_000)
    iddpm.evaluate(images, reference="photos")

torch is imported by the first use, not by `import iddpm`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iddpm.config.choices import add
    from iddpm.errors import UserError
    from iddpm.library import Model, evaluate, load, train

__version__ = "0.1.0"
__all__ = ["Model", "UserError", "add", "evaluate", "load", "train"]

_FROM = {"UserError": "iddpm.errors", "add": "iddpm.config.choices"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'iddpm' has no attribute {name!r}")
    return getattr(import_module(_FROM.get(name, "iddpm.library")), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
