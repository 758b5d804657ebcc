"""improved-diffusion's Python names, commands and files, with this project's functions behind them.

The modules are named as there. `install()` lets a script that imports `improved_diffusion` run as it is.
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
    package = _module(name, __iddpm__=True, __path__=[], __doc__=__doc__)
    for part in MODULES:
        source = "guided" if name == "guided_diffusion" and part in GUIDED else part
        module = importlib.import_module(f"{__name__}.{source}")
        setattr(package, part, module)
        sys.modules[f"{name}.{part}"] = module
    if importlib.util.find_spec("blobfile") is None:
        sys.modules["blobfile"] = importlib.import_module(f"{__name__}.blobfile")


def _module(name: str, **content: object) -> ModuleType:
    module = sys.modules[name] = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, is_package="__path__" in content)
    vars(module).update(content)
    return module
