"""improved-diffusion's files, commands and Python names, with this project's functions behind them.

formats    its files and flags, read and written
commands   its commands, on our engine
python     its modules, named as there; `install()` lets a script that imports `improved_diffusion` run as it is
"""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

MODULES = (
    "dist_util", "fp16_util", "gaussian_diffusion", "image_datasets", "logger", "losses", "nn",
    "resample", "respace", "script_util", "train_util", "unet",
)  # fmt: skip
GUIDED = ("image_datasets", "script_util", "unet")  # where guided-diffusion's arguments and defaults are others


def install(name: str = "improved_diffusion") -> None:
    """Make this package and its modules importable as `name`; as "guided_diffusion" with that project's defaults.

    Where blobfile is absent, a small one that opens what fsspec can takes its place, for scripts that import it themselves.
    ImportError where another package of that name is imported already.
    """
    before = sys.modules.get(name)
    if before is not None and not hasattr(before, "__iddpm__"):
        raise ImportError(f"{name} is imported already, from {getattr(before, '__file__', '?')}: call install() before")
    package = sys.modules[name] = ModuleType(name, __doc__)
    package.__spec__ = ModuleSpec(name, None, is_package=True)
    vars(package).update(__iddpm__=True, __path__=[])
    for part in MODULES:
        source = "guided" if name == "guided_diffusion" and part in GUIDED else part
        module = importlib.import_module(f"{__name__}.python.{source}")
        setattr(package, part, module)
        sys.modules[f"{name}.{part}"] = module
    if importlib.util.find_spec("blobfile") is None:
        sys.modules["blobfile"] = importlib.import_module(f"{__name__}.python.blobfile")


def __getattr__(name: str) -> ModuleType:
    """The original's modules here as well as in `python`, imported when asked for: they need torch, this package does not."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.python.{name}")
