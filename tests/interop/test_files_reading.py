"""Reading the original's files: what is not weights is refused in one line, nothing is executed, and memory stays small."""

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import SLOW, diagonal
from iddpm.cli.main import main
from iddpm.errors import UserError
from iddpm.interop.openai.formats import files
from interop.written import network, same, write

# ---- what is read


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("fp16", [False, True], ids=["fp32", "fp16, views of one flat tensor"])
def test_weights_come_back_bit_for_bit_in_their_order(tmp_path, legacy, fp16):
    source = write(tmp_path, legacy=legacy, fp16=fp16)
    assert same(files.read(source.model), source.weights)
    assert same(files.read(tmp_path / "ema_0.9_000010.pt"), source.averages[0.9])


def test_half_precision_weights_become_float32(tmp_path):
    torch.save({"w": torch.tensor([1.5, 0.1]).half()}, tmp_path / "half.pt")
    assert torch.equal(files.read(tmp_path / "half.pt")["w"], torch.tensor([1.5, 0.1]).half().float())


def test_a_file_that_is_replaced_while_it_is_mapped_keeps_its_numbers(tmp_path):
    path = tmp_path / "model000001.pt"
    torch.save({"w": torch.ones(4096)}, path)
    held = files.read(path)
    torch.save({"w": torch.zeros(4096)}, tmp_path / "new")
    os.replace(tmp_path / "new", path)
    assert held["w"].sum() == 4096


# ---- what is refused


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as e:
        files.read(path)
    assert "\n" not in str(e.value)
    assert str(path) in str(e.value)
    return str(e.value)


def test_an_optimizer_given_as_a_model_is_named_with_the_file_that_was_meant(tmp_path):
    source = write(tmp_path)
    assert "give model000010.pt" in refusal(source.folder / "opt000010.pt")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize(
    ("content", "name"),
    [
        ({"w": torch.zeros(2), "more": Bomb()}, "_Fail"),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        ({"w": np.zeros(2)}, "numpy._core.multiarray._reconstruct"),
        ({"f": os.system}, "posix.system"),
    ],
    ids=["a bomb", "a whole module", "a numpy array", "a function"],
)
def test_foreign_objects_are_named_and_not_executed(tmp_path, content, name, legacy):
    path = tmp_path / "model000001.pt"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    assert name in refusal(path)
    assert "state_dict" in refusal(path)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("share", [0.0005, 0.3, 0.9, 0.999])
def test_a_file_cut_short_is_called_that(tmp_path, share, legacy):
    path = tmp_path / "model000001.pt"
    torch.save({"a": torch.zeros(20_000), "b": torch.zeros(20_000)}, path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert "cut short" in refusal(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"hello", "no file of torch.save"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "no file of torch.save"),
        (pickle.dumps({"a": 1}), "no file of torch.save"),
        (pickle.dumps(Bomb()), "no file of torch.save"),
    ],
    ids=["empty", "text", "picture", "pickle", "pickled bomb"],
)
def test_other_files_are_called_what_they_are(tmp_path, content, said):
    path = tmp_path / "model000001.pt"
    path.write_bytes(content)
    assert said in refusal(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"epoch": 3, "state_dict": {"w": {"x": torch.zeros(2)}}}, "'epoch' in it is a int"),
        ({"model": {"w": torch.zeros(2)}, "ema": {"w": torch.zeros(2)}}, "['ema']"),
        ([torch.zeros(2)], "but a list"),
        ({}, "but a dict"),
    ],
    ids=["a bundle", "two sets of weights", "a list", "nothing"],
)
def test_what_is_no_state_dict_is_described(tmp_path, content, said):
    torch.save(content, tmp_path / "model000001.pt")
    assert said in refusal(tmp_path / "model000001.pt")


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    assert "no such file" in refusal(tmp_path / "model000009.pt")
    assert "a folder" in refusal(tmp_path)


def test_the_command_line_says_it_in_one_line_with_code_2(tmp_path, capsys):
    torch.save({"w": Bomb()}, tmp_path / "model.pt")
    assert main(["import", str(tmp_path / "model.pt"), "--run", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "run").exists()


# ---- memory

PEAK = """
import re, sys
from iddpm.cli.main import main
from iddpm.interop.openai.formats import files, optimizer, weights
import iddpm.store.checkpoint, iddpm.build, safetensors.torch
from pathlib import Path
from types import ModuleType

def status(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

before = status("VmRSS")
if sys.argv[1] == "read":
    total = sum(float(t.sum()) for t in files.read(Path(sys.argv[2])).values())  # touches every page
else:
    assert main(sys.argv[1:]) == 0
print(status("VmHWM") - before)
"""


def peak(*args: object) -> int:
    """The most memory, in bytes, that a process of its own needed for something, beyond what its imports take."""
    if not Path("/proc/self/status").exists():
        pytest.skip("measured by Linux's /proc")
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    run = subprocess.run([sys.executable, "-c", PEAK, *map(str, args)], capture_output=True, text=True, env=env, check=True)
    return int(run.stdout.split()[-1])


@pytest.mark.parametrize("legacy", [False, SLOW(True)], ids=["zip", "before torch 1.6"])
def test_reading_100_mb_needs_at_most_1_3_times_as_much_memory(tmp_path, legacy):
    path = tmp_path / "model000001.pt"
    torch.save({f"w{k}": torch.ones(1_250_000) for k in range(20)}, path, _use_new_zipfile_serialization=not legacy)
    assert path.stat().st_size > 100e6
    assert peak("read", path) <= 1.3 * path.stat().st_size


LARGE = dict(image_size=64, num_channels=128, num_res_blocks=3, learn_sigma=True, diffusion_steps=4000, noise_schedule="cosine")


@pytest.mark.slow
def test_reading_500_mb_needs_at_most_1_3_times_as_much_memory(tmp_path):
    path = tmp_path / "model000001.pt"
    torch.save({f"w{k}": torch.ones(1_310_720) for k in range(96)}, path)
    size = path.stat().st_size
    assert size > 500e6
    assert peak("read", path) <= 1.3 * size
    path.unlink()  # pytest would keep it


@pytest.mark.slow
def test_importing_500_mb_needs_at_most_1_3_times_as_much_memory(tmp_path):
    path = tmp_path / "imagenet64_uncond_100M_1500K.pt"
    torch.save(network(LARGE).state_dict(), path)
    size = path.stat().st_size
    assert size > 480e6
    assert peak("import", path, "--run", tmp_path / "run", "--published", path.stem) <= 1.3 * size
    path.unlink()
    shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model."])
@pytest.mark.parametrize("around", [dict, lambda w: {"epoch": 3, "state_dict": w, "optimizer": {"state": {}, "lr": 0.1}}])
def test_weights_saved_from_wrappers_are_taken(tmp_path, prefix, around):
    torch.save(around({f"{prefix}{k}": torch.ones(2) for k in "ab"}), tmp_path / "w.pt")
    assert list(files.read(tmp_path / "w.pt")) == ["a", "b"]


def test_of_a_file_with_an_average_beside_the_weights_the_average_is_taken(tmp_path):
    """As ema-pytorch keeps it."""
    kept = {"initted": torch.tensor(True), "online_model.a": torch.zeros(2), "ema_model.module.a": torch.ones(2)}
    torch.save(kept, tmp_path / "w.pt")
    assert {name: t.tolist() for name, t in files.read(tmp_path / "w.pt").items()} == {"a": [1, 1]}


def test_a_pickle_is_named_with_what_reads_it(tmp_path):
    (tmp_path / "edm.pkl").write_bytes(pickle.dumps({"ema": 1}))
    assert "iddpm import reads those of EDM" in refusal(tmp_path / "edm.pkl")


W = torch.ones(2)
OTHERS = {  # as their own programs save them
    "denoising-diffusion-pytorch": {
        "step": 3, "model": {"model.init_conv.weight": W, "alphas": W}, "opt": {"state": {0: {"step": 1.0, "exp_avg": W}}},
        "ema": {"initted": W > 0, "step": W[0], "online_model.model.init_conv.weight": W, "ema_model.model.init_conv.weight": W},
        "scaler": None, "version": "2.2.5",
    },
    "of k-diffusion's, iddpm has image_v1": {
        "config": {"model": {"type": "image_transformer_v1"}}, "model": {"patch_in.proj.weight": W, "mid_level.0.w": W},
        "model_ema": {"patch_in.proj.weight": W}, "epoch": 3, "step": 3, "gns_stats": None, "demo_gen": W,
    },
    "k-diffusion: give the .pth": {name: {"u_net.d_blocks.0.0.main.1.weight": W} for name in ("model", "model_ema")},
    "k-diffusion: give the .pth of its train.py": {"inner_model.timestep_embed.weight": W},
    "EDM: give its .pkl": {"model.map_layer0.weight": W, "model.map_layer1.weight": W},
    "diffusers: give its folder": {"down_blocks.0.resnets.0.conv1.weight": W},
}  # fmt: skip


@pytest.mark.parametrize("said", OTHERS)
def test_networks_of_others_are_named(tmp_path, capsys, said):
    torch.save(OTHERS[said], tmp_path / "m.pt")
    assert main(["import", str(tmp_path / "m.pt"), "--run", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("odd", [torch.eye(3).to_sparse(), torch.ones(2, dtype=torch.complex64)], ids=["sparse", "complex"])
def test_a_tensor_that_no_network_has_is_named(tmp_path, odd):
    torch.save({"a": torch.ones(2), "b": odd}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="'b' is sparse, quantised, complex"):
        files.read(tmp_path / "w.pt")


# ---- a run's files, damaged


def slot(**changes: Any) -> Callable[[dict], None]:
    return lambda content: content["state"][0].update(changes)


FIRST = "time_embed.0.weight"
DAMAGED: dict[str, tuple[str, Callable[[dict], Any]]] = {
    "no groups": ("opt", lambda c: c.update(param_groups=None)),
    "groups without parameters": ("opt", lambda c: c.update(param_groups=[{}])),
    "parameters by lists": ("opt", lambda c: c.update(param_groups=[{"params": [[1]]}])),
    "a list of states": ("opt", lambda c: c.update(state=[1])),
    "a state that is a number": ("opt", lambda c: c["state"].update({0: 3})),
    "no count": ("opt", lambda c: c["state"][0].pop("step")),
    "a count of text": ("opt", slot(step="x")),
    "two counts": ("opt", slot(step=torch.ones(2))),
    "a count below 0": ("opt", slot(step=-5)),
    "a count without end": ("opt", slot(step=float("inf"))),
    "no moment": ("opt", lambda c: c["state"][0].pop("exp_avg")),
    "a moment not finite": ("opt", lambda c: c["state"][0]["exp_avg"].fill_(float("nan"))),
    "a moment without numbers": ("opt", lambda c: slot(exp_avg=c["state"][0]["exp_avg"].to("meta"))(c)),
    "a moment larger than the file": ("opt", slot(exp_avg=torch.zeros(1).expand(10**12))),
    "weights not finite": ("model", lambda c: c[FIRST].fill_(float("nan"))),
    "weights without numbers": ("model", lambda c: c.update({FIRST: c[FIRST].to("meta")})),
    "whole numbers": ("model", lambda c: c.update({FIRST: c[FIRST].int()})),
    "a lone number": ("model", lambda c: c.update({FIRST: torch.tensor(1.0)})),
    "lone numbers": ("model", lambda c: c.update({name: torch.tensor(1.0) for name in c})),
    "no numbers": ("model", lambda c: c.update({name: torch.zeros(0, 3) for name in c})),
    "weights larger than the file": ("model", lambda c: c.update({FIRST: torch.zeros(1).expand(10**12)})),
    "a name of many lines": ("model", lambda c: c.update({"x\n" * 999: torch.ones(1)})),
    "a missing layer": ("model", lambda c: c.pop("input_blocks.1.0.emb_layers.1.weight")),
    "an average not finite": ("ema_0.9_", lambda c: c[FIRST].fill_(float("inf"))),
    "an average without numbers": ("ema_0.9_", lambda c: c.update({FIRST: c[FIRST].to("meta")})),
    "an average of text": ("ema_0.9_", lambda c: c.update({FIRST: "x"})),
}
FLAGS = ["--image_size", "32", "--num_heads", "2", "--diffusion_steps", "20", "--noise_schedule", "cosine"]


def one_line(folder: Path, capsys: Any) -> None:
    assert main(["import", str(folder / "model000010.pt"), "--run", str(folder / "run"), *FLAGS]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert len(said) < 900


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("written")).folder


@pytest.mark.parametrize("name", DAMAGED)
def test_a_runs_file_of_odd_content_gives_one_line(written, tmp_path, capsys, name):
    kind, change = DAMAGED[name]
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    path = tmp_path / f"{kind}000010.pt"
    change(content := torch.load(path))
    torch.save(content, path)
    one_line(tmp_path, capsys)


@pytest.mark.parametrize(("kind", "legacy"), diagonal(["model", "ema_0.9_", "opt"], [False, True]))
def test_a_runs_file_cut_short_gives_one_line(tmp_path, capsys, kind, legacy):
    write(tmp_path, legacy=legacy)
    path = tmp_path / f"{kind}000010.pt"
    content = path.read_bytes()
    for share in (0.0, 0.001, 0.2, 0.6, 0.99):
        path.write_bytes(content[: int(share * len(content))])
        one_line(tmp_path, capsys)


@pytest.mark.parametrize(("kind", "legacy"), diagonal(["model", "ema_0.9_", "opt"], [False, True]))
def test_a_runs_file_with_a_changed_byte_is_read_or_gives_one_line(tmp_path, kind, legacy):
    source, numbers = write(tmp_path, legacy=legacy), np.random.default_rng(0)
    path = tmp_path / f"{kind}000010.pt"
    content = path.read_bytes()
    for at in numbers.integers(min(6000, len(content)), size=15):
        damaged = bytearray(content)
        damaged[at] ^= int(numbers.integers(1, 256))
        path.write_bytes(damaged)
        with suppress(UserError):
            files.load_run(source.model)
