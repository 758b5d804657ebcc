"""Every public name of the original, by install(): it is there, and takes the same arguments."""

import argparse
import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from golden_rules import load
from iddpm.interop.openai import install

SIGNATURES = load("python_api.json")["signatures"]
MODULES = [(program, module) for program, modules in SIGNATURES.items() for module in modules]


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    """The names of both projects, for the length of a test."""
    before = dict(sys.modules)
    install()
    install("guided_diffusion")
    yield
    for name in set(sys.modules) - set(before):
        if name.split(".")[0] in ("improved_diffusion", "guided_diffusion", "blobfile"):
            del sys.modules[name]


def module(program: str, name: str) -> ModuleType:
    return importlib.import_module(f"{program}.{name}")


# ---- the committed list: name -> "a, b=1, *, c=2", or, of a class, method -> the same, or "value" or "property"


def faults(there: Any, arguments: str, where: str, method: bool) -> list[str]:
    """How a callable's arguments differ from the original's; further ones that may be left out are no fault."""
    ours = list(inspect.signature(there).parameters.values())
    if method and ours and ours[0].name == "self":
        ours = ours[1:]
    kinds = {p.kind for p in ours}
    catches = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds
    node = ast.parse(f"def f({arguments}): pass").body[0].args  # type: ignore[attr-defined]
    positional = [a.arg for a in node.args]
    defaults = dict(zip(positional[::-1], node.defaults[::-1]))
    defaults |= {a.arg: d for a, d in zip(node.kwonlyargs, node.kw_defaults) if d is not None}
    found = []
    named = {p.name: p for p in ours}
    for k, name in enumerate([*positional, *(a.arg for a in node.kwonlyargs)]):
        if name not in named:
            found += [] if catches else [f"{where}: {name} is missing"]
        elif k < len(positional) and (k >= len(ours) or ours[k].name != name):
            found.append(f"{where}: {name} is not argument {k}")
        elif name in defaults and named[name].default != value(there, defaults[name]):
            found.append(f"{where}: {name} is {named[name].default!r}, not {ast.unparse(defaults[name])}")
    known = {*positional, *(a.arg for a in node.kwonlyargs)}
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    asked = [p.name for p in ours if p.default is p.empty and p.kind not in variable and p.name not in known]
    return found + ([] if node.kwarg or node.vararg else [f"{where}: {name} is asked for" for name in asked])


def value(there: Any, default: ast.expr) -> Any:
    """A default: a literal, or the name of a constant of ours."""
    return getattr(sys.modules[there.__module__], default.id) if isinstance(default, ast.Name) else ast.literal_eval(default)


@pytest.mark.parametrize(("program", "name"), MODULES)
def test_every_name_is_there_with_its_arguments(program: str, name: str) -> None:
    ours, found = module(program, name), []
    for word, told in SIGNATURES[program][name].items():
        if not hasattr(ours, word):
            found.append(f"{word} is missing")
        elif isinstance(told, dict):
            for member, arguments in told.items():
                if not hasattr(getattr(ours, word), member):
                    found.append(f"{word}.{member} is missing")
                elif arguments not in ("value", "property"):
                    found += faults(getattr(getattr(ours, word), member), arguments, f"{word}.{member}", method=True)
        elif told != "value":
            found += faults(getattr(ours, word), told, word, method=False)
    assert found == []


def test_the_list_would_notice() -> None:
    """So that the test above can fail."""
    assert faults(lambda a, c=1: None, "a, b, c=2", "f", False) == [
        "f: b is missing",
        "f: c is not argument 2",
    ]
    assert faults(lambda a, c=1: None, "a, c=2", "f", False) == ["f: c is 1, not 2"]
    assert faults(lambda a, b: None, "a", "f", False) == ["f: b is asked for"]


# ---- defaults and constants


def test_the_image_flags_are_the_originals() -> None:
    assert module("improved_diffusion", "script_util").model_and_diffusion_defaults() == {
        "image_size": 64, "num_channels": 128, "num_res_blocks": 2, "num_heads": 4, "num_heads_upsample": -1,
        "attention_resolutions": "16,8", "dropout": 0.0, "learn_sigma": False, "sigma_small": False, "class_cond": False,
        "diffusion_steps": 1000, "noise_schedule": "linear", "timestep_respacing": "", "use_kl": False,
        "predict_xstart": False, "rescale_timesteps": True, "rescale_learned_sigmas": True, "use_checkpoint": False,
        "use_scale_shift_norm": True,
    }  # fmt: skip


@pytest.mark.parametrize("program", ["improved_diffusion", "guided_diffusion"])
@pytest.mark.parametrize("kind", ["model", "sr_model", "classifier"])
def test_defaults_are_what_the_function_beside_them_takes(program: str, kind: str) -> None:
    util = module(program, "script_util")
    create = (
        "create_classifier_and_diffusion" if kind == "classifier" else f"{kind.removesuffix('model')}create_model_and_diffusion"
    )
    flags = getattr(util, f"{kind}_and_diffusion_defaults")()
    inspect.signature(getattr(util, create)).bind(**flags)
    assert all(getattr(util, f"{kind}_and_diffusion_defaults")() is not flags for _ in range(2)), "each call its own"


def test_the_super_resolution_flags_are_the_originals_and_the_forgotten_one() -> None:
    util = module("improved_diffusion", "script_util")
    flags = util.model_and_diffusion_defaults() | {"large_size": 256, "small_size": 64}
    del flags["image_size"]
    assert util.sr_model_and_diffusion_defaults() == flags
    small = util.sr_create_model_and_diffusion(**flags | {"sigma_small": True, "num_channels": 32, "num_res_blocks": 1})[1]
    assert small.model_var_type.name == "FIXED_SMALL"


def test_guided_defaults_do_not_rescale() -> None:
    flags = module("guided_diffusion", "script_util").model_and_diffusion_defaults()
    assert not flags["rescale_timesteps"] and not flags["rescale_learned_sigmas"] and "sigma_small" not in flags
    assert {"channel_mult", "num_head_channels", "resblock_updown", "use_fp16", "use_new_attention_order"} <= set(flags)


@pytest.mark.parametrize("program", ["improved_diffusion", "guided_diffusion"])
def test_num_classes_is_read_when_a_network_is_made(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    util = module(program, "script_util")
    flags = util.model_and_diffusion_defaults() | {"num_channels": 32, "num_res_blocks": 1, "class_cond": True}
    assert util.create_model_and_diffusion(**flags)[0].label_emb.weight.shape[0] == 1000
    monkeypatch.setattr(util, "NUM_CLASSES", 7)
    assert util.create_model_and_diffusion(**flags)[0].label_emb.weight.shape[0] == 7


@pytest.mark.parametrize(
    ("flags", "mean", "var", "loss"),
    [
        ({}, "EPSILON", "FIXED_LARGE", "MSE"),
        ({"sigma_small": True, "rescale_learned_sigmas": True}, "EPSILON", "FIXED_SMALL", "RESCALED_MSE"),
        ({"learn_sigma": True, "predict_xstart": True}, "START_X", "LEARNED_RANGE", "MSE"),
        ({"use_kl": True, "rescale_learned_sigmas": True}, "EPSILON", "FIXED_LARGE", "RESCALED_KL"),
    ],
)
def test_flags_mean_what_they_did(flags: dict[str, bool], mean: str, var: str, loss: str) -> None:
    d = module("improved_diffusion", "script_util").create_gaussian_diffusion(steps=20, timestep_respacing="ddim5", **flags)
    assert (d.model_mean_type.name, d.model_var_type.name, d.loss_type.name) == (mean, var, loss)
    assert (d.num_timesteps, d.original_num_steps, d.timestep_map) == (5, 20, [0, 4, 8, 12, 16])


@pytest.mark.parametrize("steps", [1, 10, 20])
def test_a_linear_schedule_of_few_steps_works(steps: int) -> None:
    """The original fails below 20 steps, and divides by 0 at 20 (B20)."""
    d = module("improved_diffusion", "script_util").create_gaussian_diffusion(steps=steps, timestep_respacing="1")
    assert d.num_timesteps == 1
    x = d.p_sample_loop(lambda x, t: 0 * x, (1, 3, 2, 2), device="cpu")
    assert torch.isfinite(x).all()


# ---- argparse


def test_flags_are_parsed_by_the_type_of_their_default() -> None:
    util, parser = module("improved_diffusion", "script_util"), argparse.ArgumentParser()
    util.add_dict_to_argparser(parser, {"a": 1, "b": True, "c": "x", "d": None, "e": 0.5})
    args = parser.parse_args(["--a", "2", "--b", "No", "--d", "y", "--e", "1"])
    assert util.args_to_dict(args, "abcde") == {"a": 2, "b": False, "c": "x", "d": "y", "e": 1.0}
    with pytest.raises(argparse.ArgumentTypeError, match="maybe"):
        util.str2bool("maybe")


# ---- installing


def test_both_names_are_the_same_modules() -> None:
    from improved_diffusion import script_util as installed  # type: ignore[import-not-found]

    from iddpm.interop.openai import script_util as short
    from iddpm.interop.openai.python import script_util

    assert installed is short is script_util


def test_a_module_that_the_original_lacks_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("improved_diffusion.more")


def test_the_name_of_a_package_in_use_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "improved_diffusion", ModuleType("improved_diffusion"))
    with pytest.raises(ImportError, match="call install"):
        install()


def test_the_package_is_light_until_it_is_installed() -> None:
    code = "import sys, iddpm.interop.openai; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_scripts_find_a_blobfile(tmp_path: Any) -> None:
    bf = importlib.import_module("blobfile")
    path = bf.join(str(tmp_path), "a", "b.txt")
    with bf.BlobFile(path, "w") as file:
        file.write("x")
    assert bf.exists(path) and bf.isdir(bf.dirname(path)) and bf.listdir(str(tmp_path / "a")) == ["b.txt"]
    assert not bf.exists(path + "c") and bf.listdir(str(tmp_path / "c")) == []
    with bf.BlobFile(path, "rb") as file:
        assert file.read() == b"x"
