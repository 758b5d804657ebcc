"""Reading the original's files: what is not weights is refused in one line, nothing is executed, and memory stays small."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

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


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
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


def test_a_pickle_of_edm_is_named_and_not_executed(tmp_path, monkeypatch):
    """Made by the rule of its torch_utils.persistence: a call of one function with the class, its source and its state."""
    module = ModuleType("torch_utils.persistence")
    exec("def _reconstruct_persistent_obj(meta): raise SystemExit('executed')", module.__dict__)
    module._reconstruct_persistent_obj.__module__ = module.__name__
    monkeypatch.setitem(sys.modules, "torch_utils", ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, module.__name__, module)

    class Network:
        def __reduce__(self):
            state = dict(_init_kwargs=dict(img_resolution=32, model_type="SongUNet"))
            meta = dict(type="class", version=6, module_src="raise SystemExit", class_name="EDMPrecond", state=state)
            return module._reconstruct_persistent_obj, (meta,)

    path = tmp_path / "edm-cifar10-32x32-cond-vp.pkl"
    path.write_bytes(pickle.dumps(dict(ema=Network(), loss_fn=None)))
    assert "EDMPrecond, SongUNet" in refusal(path)


def test_networks_of_others_are_named(tmp_path, capsys):
    torch.save({"model": {"model.init_conv.weight": torch.ones(2), "betas": torch.ones(2)}, "step": 3}, tmp_path / "m.pt")
    assert main(["import", str(tmp_path / "m.pt"), "--run", str(tmp_path / "run")]) == 2
    assert "denoising-diffusion-pytorch" in capsys.readouterr().err


@pytest.mark.parametrize("odd", [torch.eye(3).to_sparse(), torch.ones(2, dtype=torch.complex64)], ids=["sparse", "complex"])
def test_a_tensor_that_no_network_has_is_named(tmp_path, odd):
    torch.save({"a": torch.ones(2), "b": odd}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="'b' is sparse, quantised or complex"):
        files.read(tmp_path / "w.pt")
