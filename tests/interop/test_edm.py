"""EDM's pickles: networks compared with outputs of EDM's own code, and files that would run something, or are damaged.

tests/goldens/edm.json holds what EDM's classes keep in small networks, as [class, numbers, parameters, buffers, modules], and
edm.npz their outputs, with weights by the rule of rules.json; both made by EDM's code, none of which is here.
"""

import builtins
import io
import os
import pickle
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from golden_rules import load, noise
from iddpm import build
from iddpm.cli.main import main, parser_of
from iddpm.config import Config
from iddpm.diffusion.schedule import Level
from iddpm.diffusion.solvers import run as walk
from iddpm.errors import UserError
from iddpm.interop.edm.pickled import unpickle
from iddpm.interop.edm.read import imported

NETWORKS = {"ddpmpp": "ddpmpp", "ddpmpp of classes": "ddpmpp", "ncsnpp": "ncsnpp", "adm": "unet"}
SIGMA = torch.tensor([0.05, 1.0, 20.0])


@pytest.fixture(autouse=True)
def theirs(monkeypatch) -> None:
    """Stand-ins of the modules that EDM's pickles name: good for writing, and the end of a test that calls them in reading."""

    def _reconstruct_persistent_obj(meta: Any) -> None:
        raise SystemExit("executed")

    class EasyDict(dict):
        pass

    for made, name in ((_reconstruct_persistent_obj, "torch_utils.persistence"), (EasyDict, "dnnlib.util")):
        made.__module__, made.__qualname__ = name, made.__name__
        module = ModuleType(name)
        setattr(module, made.__name__, made)
        monkeypatch.setitem(sys.modules, name.partition(".")[0], ModuleType(name.partition(".")[0]))
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(Persistent, "call", staticmethod(_reconstruct_persistent_obj))
    monkeypatch.setattr(Persistent, "settings", EasyDict)


class Persistent:
    """An object of a persistent class, as its pickle keeps it."""

    call: Callable[..., Any] = staticmethod(print)
    settings: type = dict

    def __init__(self, kind: str, state: dict[str, Any]):
        self.kind, self.state = kind, state

    def __reduce__(self) -> Any:
        source = "raise SystemExit('the source in a pickle was run')"
        meta = dict(type="class", version=6, module_src=source, class_name=self.kind, state=self.state)
        return type(self).call, (meta,)


def weights(name: str, shape: list[int]) -> torch.Tensor:
    w = np.asarray(np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).standard_normal(tuple(shape)), np.float32)
    if name.endswith(("freqs", "phases", "gain")):
        return torch.from_numpy(w)
    return torch.from_numpy(w / np.sqrt(np.prod(shape[1:])) if w.ndim > 1 else 0.1 * w + np.float32(name.endswith("weight")))


def module(node: list[Any], name: str = "", settings: dict[str, Any] | None = None) -> Any:
    """A module of the golden file, as PyTorch keeps its state."""
    kind, numbers, parameters, buffers, parts = node
    made = {k: torch.nn.Parameter(weights(f"{name}{k}", s), False) if s is not None else None for k, s in parameters.items()}
    kept = {k: weights(f"{name}{k}", s) if s is not None else None for k, s in buffers.items()}
    inner = {k: module(v, f"{name}{k}.", settings if k in ("model", "unet") else None) for k, v in parts.items()}
    if kind == "ModuleDict":  # of torch itself
        found = torch.nn.ModuleDict()
        found._modules.update(inner)
        return found
    numbers = {k: np.float64(v) if k == "skip_scale" else v for k, v in numbers.items()}
    more = dict(training=False, _parameters=made, _buffers=kept, _modules=inner, _non_persistent_buffers_set=set())
    return Persistent(kind, {**torch.nn.Module().__dict__, **more, **numbers, "_init_kwargs": settings or {}, "_init_args": ()})


def edm(name: str, **changes: Any) -> dict[str, Any]:
    row = load("edm.json")[name]
    settings = Persistent.settings({k: v for k, v in row["settings"].items() if k not in ("model_type", "use_fp16")} | changes)
    pipe = Persistent("AugmentPipe", dict(p=0.15, xflip=1e8))
    return dict(
        ema=module(row["tree"], settings=settings),
        loss_fn=Persistent("EDMLoss", dict(P_mean=-1.2)),
        augment_pipe=pipe if row["settings"].get("augment_dim") else None,
        dataset_kwargs=Persistent.settings(path="cifar10-32x32.zip", use_labels=True),
    )


def written(path: Path, content: Any, protocol: int = 4) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
    return path


# ---- what is read


def opened(path: Path) -> tuple[Config, torch.nn.Module]:
    saved, config, _ = imported(path)
    net = build.network(config).eval().requires_grad_(False)
    net.load_state_dict(saved.weights)
    return config, net


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_computes_what_it_does_in_edms_code(tmp_path, name):
    config, net = opened(written(tmp_path / "edm.pkl", edm(name)))
    m, golden = config.model, {k: torch.from_numpy(v) for k, v in load("edm.npz").items()}
    assert m.network == NETWORKS[name]
    sigma = SIGMA.double()
    level = Level(sigma.log(), torch.ones_like(sigma), sigma)
    x = noise(0, (3, 3, 8, 8)) * SIGMA[:, None, None, None]
    y = {"y": torch.tensor([0, 2, 1])} if m.class_cond else {}
    key = name.replace(" ", "_")

    def same(found: torch.Tensor, what: str) -> None:
        torch.testing.assert_close(found, golden[f"{key}.{what}"], rtol=1e-5, atol=1e-5)

    denoise = build.denoiser(config, net)
    same(denoise(x, level, cond=y).x0, "x0")
    if m.class_dropout:
        same(denoise(x, level, cond={"y": torch.full((3,), 3)}).x0, "no_class")
    if m.augment:
        assert m.augment == 0.15
        same(denoise(x, level, cond=y | {"augment": noise(1, (3, 9))}).x0, "augmented")
    grid = build.grid(config, "5")
    path = build.solver(config)(build.drawing(config, net, y), grid.start * noise(2, (3, 3, 8, 8)), grid, lambda k: None)
    same(walk(path), "drawn")  # by EDM's own sampler, deterministic


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_older_protocols_of_pickle_are_read(tmp_path, protocol):
    config, _ = opened(written(tmp_path / "edm.pkl", edm("ddpmpp"), protocol))
    assert (config.model.image_size, config.model.channel_mult, config.model.dropout) == ("8", "1,2", 0.13)


def test_the_command_line_makes_a_run_that_draws_and_is_measured(tmp_path, capsys):
    path, run = written(tmp_path / "edm.pkl", edm("ddpmpp of classes")), tmp_path / "run"
    assert main(["import", str(path), "--run", str(run), "--classes", "3"]) == 0
    assert "SongUNet as --network ddpmpp" in capsys.readouterr().out
    for solver in ("heun", "ipndm", "unipc", "dpmpp_3m", "ddim"):
        assert main(["sample", str(run), "--num_samples", "2", "--labels", "2", "--solver", solver, "--sampling_steps", "6"]) == 0
    np.savez(tmp_path / "images.npz", np.zeros((2, 8, 8, 3), np.uint8), np.array([0, 2]))
    for how in ([], ["--ode"]):
        assert main(["nll", str(run), str(tmp_path / "images.npz"), *how]) == 0


def test_flags_may_not_contradict_the_file(tmp_path, capsys):
    path = written(tmp_path / "edm.pkl", edm("ddpmpp"))
    for flags, said in (
        (["--image_size", "16"], "contradicts"),
        (["--published", "x"], "pickle of EDM"),
        (["--alone"], "pickle"),
    ):
        assert main(["import", str(path), "--run", str(tmp_path / "run"), *flags]) == 2
        assert said in capsys.readouterr().err


# ---- what is refused


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as e:
        imported(path)
    said = str(e.value)
    assert "\n" not in said
    assert said.isprintable()
    assert str(path) in said
    assert len(said) < len(str(path)) + 400
    return said


class Called:
    """A call of anything, as a pickle can ask for it."""

    def __init__(self, what: Any, *args: Any):
        self.what, self.args = what, args

    def __reduce__(self) -> Any:
        return self.what, self.args


def storage(content: bytes) -> Called:
    return Called(torch.storage._load_from_bytes, content)


def saved(content: Any) -> bytes:
    torch.save(content, file := io.BytesIO(), _use_new_zipfile_serialization=False)
    return file.getvalue()


def kept(count: int) -> bytes:
    """So many zeros, as torch keeps them inside a pickle."""
    held = torch.zeros(count).untyped_storage()
    return saved(torch.storage.TypedStorage(wrap_storage=held, dtype=torch.float32, _internal=True))


def flat(count: int) -> Called:
    return storage(kept(count))


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


FILE = b"\x80\x04"
PARAMETER = FILE + text("torch._utils") + text("_rebuild_parameter") + b"\x93"
HOSTILE: dict[str, Any] = {
    "os.system": Called(os.system, "exit 1"),
    "eval": Called(builtins.eval, "1"),
    "exec, by the old word": b"\x80\x02c__builtin__\nexec\n(X\x01\x00\x00\x001tR.",
    "getattr": Called(getattr, "", "join"),
    "an attribute of what is allowed": FILE + text("collections") + text("OrderedDict.fromkeys") + b"\x93.",
    "globals of what is allowed": FILE + text("torch._utils") + text("_rebuild_parameter.__globals__") + b"\x93.",
    "a call of what is no function": FILE + b"]" + b")R.",
    "a call of a record": FILE + b"}}\x86R.",
    "what is allowed, with other code": PARAMETER + b"N}X\x08\x00\x00\x00__code__Ns\x86b.",
    "an object of a function": PARAMETER + b")\x81.",
    "an object by the old word": b"(ios\nsystem\n.",
    "an object by the old word, after the sign of a pickle": b"\x80\x02(ios\nsystem\n.",
    "what another file knows": FILE + b"Pid\n.",
    "what is known by number": FILE + b"\x82\x01.",
    "numpy's memory": Called(np.frombuffer, b"1234"),
    "numpy's loader": Called(np.load, "/etc/passwd"),
    "torch.load": Called(torch.load, "/etc/passwd"),
    "a module of torch": torch.nn.Linear(2, 2),
    "a bomb in a storage": storage(saved(Called(os.system, "exit 1"))),
    "a dict as a storage": storage(saved({"a": 1})),
    "no storage": storage(b"\x80\x02K\x01."),
    "a storage that claims more": storage(kept(9).replace(b"K\t", b"\x8a\x06\0\0\0\0\0\x40", 1)),
    "a tensor larger than its numbers": Called(torch._utils._rebuild_tensor_v2, flat(4), 0, (2**20, 2**20), (0, 0), False, {}),
    "a tensor beyond its numbers": Called(torch._utils._rebuild_tensor_v2, flat(4), 3, (2,), (1,), False, {}),
    "a tensor before its numbers": Called(torch._utils._rebuild_tensor_v2, flat(4), -9, (2,), (1,), False, {}),
    "a tensor of no numbers": Called(torch._utils._rebuild_tensor_v2, "x", 0, (2,), (1,), False, {}),
    "bytes that it only claims": FILE + b"\x8e" + struct.pack("<Q", 2**62) + b"abc.",
    "an array of bytes that it only claims": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"abc.",
    "a frame that it only claims": FILE + b"\x95" + struct.pack("<Q", 2**62) + b"N.",
    "a number of many digits": b"\x80\x02I" + b"9" * 9999 + b"\n.",
    "tuples in tuples, as a key": FILE + b"}" + b")" + b"\x85" * 300_000 + b"Ns.",
    "tuples in tuples, in a set": FILE + b"\x8f(" + b")" + b"\x85" * 300_000 + b"\x90.",
    "no class": FILE + text("torch_utils.persistence") + text("_reconstruct_persistent_obj") + b"\x93}\x85R.",
    "a later protocol": b"\x80\x63N.",
    "words of no pickle": FILE + b"\xff\xfe.",
    "nothing on the stack": FILE + b".",
    "a terminal's commands": FILE + text("os") + text("\x1b]0;x\x07" * 50) + b"\x93.",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_refused_in_one_line_and_runs_nothing(tmp_path, monkeypatch, name):
    inside = HOSTILE[name]
    for where in (
        [inside] if isinstance(inside, bytes) else [inside, dict(ema=inside), dict(ema=edm("ddpmpp")["ema"], more=inside)]
    ):
        path = tmp_path / "x.pkl"
        written(path, where, 2 if name == "exec" else 4)
        with monkeypatch.context() as m:
            m.setattr(os, "system", lambda *a: pytest.fail("os.system was called"))
            refusal(path)


def test_a_text_named_many_times_makes_no_more_tensors_than_the_file_has_bytes(tmp_path):
    once = kept(100_000)
    assert "larger than the file" in refusal(written(tmp_path / "x.pkl", [storage(once) for _ in range(9)]))


def test_a_record_in_itself_and_records_by_the_thousand_are_refused(tmp_path):
    loop = edm("ddpmpp")
    enc = loop["ema"].state["_modules"]["model"].state["_modules"]["enc"]
    enc._modules["8x8_again"] = enc
    assert "weights are not those" in refusal(written(tmp_path / "loop.pkl", loop))
    wide = edm("ddpmpp")
    part = torch.nn.ModuleDict()
    for _ in range(7):
        outer = torch.nn.ModuleDict()
        outer._modules.update({str(k): part for k in range(30)})
        part = outer
    wide["ema"].state["_modules"]["model"].state["_modules"]["enc"] = part
    assert "more than 20000 parts" in refusal(written(tmp_path / "wide.pkl", wide))


def changed(name: str, change: Callable[[dict[str, Any]], Any], **settings: Any) -> dict[str, Any]:
    content = edm(name, **settings)
    change(content)
    return content


def model(content: dict[str, Any]) -> Any:
    return content["ema"].state["_modules"]["model"]


def block(content: dict[str, Any]) -> dict[str, Any]:
    return model(content).state["_modules"]["enc"]._modules["8x8_block0"].state


def bias(content: dict[str, Any]) -> torch.Tensor:
    return model(content).state["_modules"]["map_layer0"].state["_parameters"]["bias"]


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "VP": (lambda: dict(ema=Persistent("VPPrecond", {})), "VPPrecond"),
    "VE": (lambda: dict(ema=Persistent("VEPrecond", {})), "VEPrecond"),
    "a chain's": (lambda: dict(ema=Persistent("iDDPMPrecond", {})), "iDDPMPrecond"),
    "StyleGAN": (lambda: dict(G_ema=Persistent("Generator", {})), "no network as 'ema'"),
    "another network": (lambda: changed("ddpmpp", lambda c: setattr(model(c), "kind", "UViT")), "is UViT"),
    "no network": (lambda: changed("ddpmpp", lambda c: c["ema"].state.update(_modules={})), "is nothing"),
    "plain values": (lambda: [1, 2, {"a": None}], "no network as 'ema'"),
    "another encoder": (lambda: edm("ddpmpp", encoder_type="skip"), "encoder_type 'skip'"),
    "another embedding": (lambda: edm("ddpmpp", channel_mult_emb=8), "channel_mult_emb 8"),
    "settings of other weights": (lambda: edm("ddpmpp", num_blocks=2), "not those of its settings"),
    "a size of no image": (lambda: changed("ddpmpp", lambda c: c["ema"].state.update(img_resolution=10**9)), "img_resolution"),
    "a size of text": (lambda: changed("ddpmpp", lambda c: c["ema"].state.update(img_resolution="8")), "img_resolution"),
    "widths by the million": (lambda: edm("ddpmpp", channel_mult=[1] * 10**6), "channel_mult"),
    "a number not finite": (lambda: changed("ddpmpp", lambda c: c["ema"].state.update(sigma_data=float("nan"))), "sigma_data"),
    "code of another version": (lambda: changed("ddpmpp", lambda c: block(c).update(skip_scale=0.9)), "skip_scale"),
    "a scale of text": (lambda: changed("ddpmpp", lambda c: block(c).update(skip_scale="x")), "skip_scale"),
    "weights not finite": (lambda: changed("ddpmpp", lambda c: bias(c).fill_(float("nan"))), "not finite"),
    "narrow groups": (lambda: changed("adm", lambda c: block(c)["_modules"]["norm0"].state.update(num_groups=9)), "other groups"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_another_network_is_refused_by_its_name(tmp_path, name):
    make, said = WRONG[name]
    refused = refusal(written(tmp_path / "x.pkl", make()))
    assert said.lower() in refused.lower()


def test_a_file_cut_short_or_damaged_gives_one_line(tmp_path):
    """Cut and changed at places spread over the file; a change in the numbers of a weight alone may go unseen."""
    content = pickle.dumps(edm("ddpmpp"), 4)
    path, numbers = tmp_path / "x.pkl", np.random.default_rng(0)
    for at in sorted({0, 1, 2, 3, 50, *numbers.integers(len(content), size=20), len(content) - 1}):
        refusal(written(path, content[:at]))
    for at in [*range(2, 60, 3), *numbers.integers(len(content), size=20)]:
        damaged = bytearray(content)
        damaged[at] ^= int(numbers.integers(1, 256))
        written(path, bytes(damaged))
        try:
            imported(path)
        except UserError:
            refusal(path)


def test_the_command_line_ends_with_code_2(tmp_path, capsys):
    path = written(tmp_path / "x.pkl", Called(os.system, "exit 1"))
    assert main(["import", str(path), "--run", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "asks for posix.system" in said
    assert not (tmp_path / "run").exists()


def test_an_array_that_only_claims_its_size_takes_no_memory(tmp_path):
    assert np.asarray(unpickle(written(tmp_path / "x.pkl", Called(np.ndarray, (2**50,))))).size == 0


def test_plain_values_come_back_as_they_were(tmp_path):
    content = {"a": [1, 2.5, None, True, "text", b"bytes", (1, (2,))], "b": {3: {"x"}}, "c": np.float32(0.5)}
    assert unpickle(written(tmp_path / "x.pkl", content)) == content


# ---- the recipe


def test_the_recipes_commands_are_understood(tmp_path):
    """Each with its flags, as far as they are those of the verb, and its solver with its numbers."""
    recipe = (Path(__file__).parents[2] / "recipes" / "edm_cifar10.sh").read_text()
    rows = [line.split()[2:] for line in recipe.splitlines() if line.startswith("iddpm sample ")]
    assert len(rows) == 6
    _, config, _ = imported(written(tmp_path / "edm.pkl", edm("ddpmpp")))
    for row in rows:
        given = parser_of("sample").read(row)
        build.solver(
            config.updated({k: given[k] for k in ("solver", "sampling_steps", "grid", "order", "S_churn") if k in given})
        )
    words = next(line for line in recipe.splitlines() if "iddpm evaluate" in line).split()[2:]
    assert parser_of("evaluate").read(words)["extractor"] == "inception"
