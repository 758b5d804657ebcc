"""The same run on any number of processes, whole or sharded, and from one to another.

Meeting costs more than these runs, so each number of processes is started once, and does one job after another.
"""

import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from conftest import TINY
from iddpm.config import Config
from iddpm.data import Images
from iddpm.errors import UserError
from iddpm.parallel import processes
from iddpm.store import checkpoint
from iddpm.store.log import read_rows
from iddpm.store.weights import read_weights
from iddpm.training.state import TrainState
from launcher import Launcher

RUN = dict(
    TINY, class_cond=True, num_classes=3, classes=("across", "disc", "down"), schedule_sampler="loss-second-moment",
    weighting="uncertainty", ema_power="0.1", random_flip=True, grad_clip=1, batch_size=7, steps=8, validation_interval=4,
    sampling_steps="2",
)  # fmt: skip


class Job(NamedTuple):
    run: Path
    settings: dict
    copy: Path | None = None  # a run to go on from


def do(launcher: Launcher, processes: int, *jobs: Job) -> str:
    """What they said."""
    told = json.dumps([[str(j.run), j.settings, str(j.copy or "")] for j in jobs])
    program = "import sys; from parallel.test_sharded import main; main(sys.argv[1])"
    said = jobs[0].run.with_suffix(".said")
    return launcher.start(told, said=said, processes=processes, program=program).succeed(240)


def main(told: str) -> None:
    """What each process does."""
    from iddpm.training.loop import train

    warnings.simplefilter("error", UserWarning)
    torch.set_num_threads(1)
    with processes.session(torch.device("cpu")):
        for run, settings, copy in json.loads(told):
            name = Path(run).name
            config = Config().updated(RUN | settings)
            if copy and processes.rank() == 0:
                shutil.copytree(copy, run)
            processes.barrier()
            if copy:
                assert_restored(config, Path(run))
            data = Images.open(config.data.path, (8, 8), 1, config.data.on_broken, int(config.data.cache_gb * 2**30))
            held_out = Images.open(config.data.path, (8, 8), 1)
            if name.startswith("vanished"):  # from here on, with what is left of a data set that nothing else reads
                processes.barrier()
                data.files[5].unlink(missing_ok=True)
                warnings.filterwarnings("ignore", ".*stands in for it")
            with poisoned(name):
                try:
                    train(config, data, Path(run), held_out=held_out, say=lambda line: None)
                except UserError as e:
                    print(f"{run}: {e}")
        sys.stdout.flush()
        os._exit(0)


def assert_restored(config: Config, run: Path) -> None:
    """Processes that restore a state have, together, all of it, bit for bit."""
    held, _ = checkpoint.Folder(run).newest()
    state = TrainState(config, torch.device("cpu"))
    state.restore(held, config)
    ours, stored = state.to_saved(), checkpoint.load(checkpoint.newest(run)[0])
    assert ours.state == stored.state
    assert ours.tensors().keys() == stored.tensors().keys()
    for name, tensor in stored.tensors().items():
        assert torch.equal(ours.tensors()[name], tensor), name


@contextmanager
def poisoned(name: str) -> Iterator[None]:
    """In a run of that name, the noise of the last image of the global batches of steps 3 and 4 is not a number."""
    from iddpm.training import loop as train

    ahead = train.ahead

    def poison(config, data, order, start, *rest):
        for step, batch in enumerate(ahead(config, data, order, start, *rest), start):
            if step in (3, 4) and processes.rank() == processes.world() - 1:
                batch.eps[-1] = torch.nan
            yield batch

    train.ahead = poison if name.startswith("poisoned") else ahead
    yield
    train.ahead = ahead


def rows(run: Path) -> list[dict]:
    return [row for row in read_rows(run) if "event" not in row]


def assert_same_run(run: Path, other: Path) -> None:
    """The numbers of each step, to rounding, and what the last checkpoint holds.

    Not the weights: the gradient of some is 0 but for rounding, and Adam's step is as long for those as for any other.
    """
    for a, b in zip(rows(other), rows(run), strict=True):
        assert a["step"] == b["step"]
        assert {k for k in a if "_q" in k} == {k for k in b if "_q" in k}
        assert a.keys() - {"time", "images_per_second"} == b.keys() - {"time", "images_per_second"}
        for name in {"loss", "mse", "vb", "grad_norm", "val_loss"} & a.keys():
            assert b[name] == (a[name] and pytest.approx(a[name], rel=1e-5)), (name, a["step"])  # None: not finite
    a, b = (checkpoint.load(checkpoint.newest(r)[0]) for r in (run, other))
    assert dict(a.state, seconds=0) == dict(b.state, seconds=0)
    assert {n: t.shape for n, t in a.tensors().items()} == {n: t.shape for n, t in b.tensors().items()}


@pytest.fixture(scope="module")
def folder(launcher, made_once, pictures) -> Path:
    """The runs of one, two and three processes, by name."""
    return made_once("several", lambda root: make(launcher, root, pictures))


def make(launcher: Launcher, root: Path, pictures: Path) -> None:
    base = dict(path=str(pictures))
    half = base | dict(steps=4)
    held = base | dict(network="unet_mp", steps=5, lr=0.01)
    vanish = base | dict(cache_gb=0, random_flip=False)
    for k in (1, 2, 3):
        shutil.copytree(pictures, root / f"pictures{k}")
    do(
        launcher,
        1,
        Job(root / "one", base),
        Job(root / "held-one", held),
        Job(root / "poisoned1", base),
        Job(root / "vanished1", vanish | dict(path=str(root / "pictures1"))),
    )
    out = do(
        launcher,
        2,
        Job(root / "poisoned2", base | dict(shard=-1)),
        Job(root / "vanished2", vanish | dict(path=str(root / "pictures2"))),
        Job(root / "vanished-fail", vanish | dict(path=str(root / "pictures3"), on_broken="fail")),
        Job(root / "ddp2", base | dict(microbatch=1)),
        Job(root / "held-ddp2", held),
        Job(root / "held-fsdp2", held | dict(shard=-1)),
        Job(root / "fsdp2", base | dict(shard=-1, microbatch=2, sample_interval=4)),
        Job(root / "ddp2-half", half),
        Job(root / "fsdp2-half", half | dict(shard=2)),
    )
    (root / "said").write_text(out)
    do(
        launcher,
        3,
        Job(root / "ddp3", base),
        Job(root / "fsdp3", base | dict(shard=3, microbatch=1)),
        Job(root / "fsdp2-then-fsdp3", base | dict(shard=-1), copy=root / "fsdp2-half"),
        Job(root / "ddp2-then-fsdp3", base | dict(shard=-1, microbatch=2), copy=root / "ddp2-half"),
    )
    do(launcher, 1, Job(root / "fsdp2-then-one", base, copy=root / "fsdp2-half"))


RUNS = ["ddp2", "fsdp2", "ddp3", "fsdp3", "fsdp2-then-fsdp3", "ddp2-then-fsdp3", "fsdp2-then-one"]


@pytest.mark.parametrize("name", RUNS)
def test_any_number_of_processes_whole_or_sharded_gives_the_run_of_one(folder, name):
    assert_same_run(folder / name, folder / "one")


def test_the_checkpoint_of_a_sharded_run_holds_parts_of_the_optimizer_and_whole_weights(folder):
    step = checkpoint.newest(folder / "fsdp3")[0]
    files = {p.relative_to(step).as_posix() for p in step.rglob("*") if p.is_file()}
    assert files == {
        "manifest.json", "weights.safetensors", "weights-ema-0.9.safetensors", "weights-ema-0.99.safetensors", "state/state.json",
        *(f"state/optimizer.rank{k:05d}.safetensors" for k in range(3)),
    }  # fmt: skip
    assert set(json.loads((step / "manifest.json").read_text())) == files - {"manifest.json"}
    weights = read_weights(folder / "fsdp3", ema_rate=0)
    assert weights.about["step"] == 8
    assert {k: v.shape for k, v in weights.tensors.items()} == {
        k: v.shape for k, v in read_weights(folder / "one").tensors.items()
    }


def test_samples_drawn_on_the_way_of_a_sharded_run_leave_it_alone(folder):
    assert sorted(p.name for p in (folder / "fsdp2" / "samples").iterdir()) == ["step_00000004.png", "step_00000008.png"]


def test_a_gradient_that_is_not_finite_on_one_process_is_skipped_and_counted_on_all(folder):
    assert_same_run(folder / "poisoned2", folder / "poisoned1")
    assert [row["skipped"] for row in rows(folder / "poisoned2")] == [0, 0, 0, 1, 2, 2, 2, 2]


def test_a_file_that_vanishes_has_the_same_stand_in_on_any_number_of_processes(folder):
    assert_same_run(folder / "vanished2", folder / "vanished1")


def test_a_file_that_vanishes_ends_the_run_of_every_process_alike_where_it_is_to_fail(folder):
    said = re.findall(r"/\S+vanished-fail: .*?remove it", (folder / "said").read_text())  # two processes may share a line
    assert len(said) == 2 and said[0] == said[1]
    assert "No such file" in said[0]
    saved, _ = checkpoint.Folder(folder / "vanished-fail").newest()
    assert [row["step"] for row in rows(folder / "vanished-fail")][-1:] == ([saved.step] if saved else [])


@pytest.mark.parametrize("name", ["held-ddp2", "held-fsdp2"])
def test_weights_that_are_held_at_unit_size_are_so_in_several_processes(folder, name):
    assert_same_run(folder / name, folder / "held-one")
    tensors = read_weights(folder / name, ema_rate=0).tensors
    kernels = torch.cat([t.flatten(1).square().mean(1) for t in tensors.values() if t.ndim == 4])
    torch.testing.assert_close(kernels, torch.ones_like(kernels), rtol=1e-3, atol=0)
    labels = tensors["label_emb.weight"].square().mean(0)
    torch.testing.assert_close(labels, torch.ones_like(labels), rtol=1e-3, atol=0)


@pytest.mark.slow
def test_a_mesh_of_two_by_two_gives_the_run_of_one(launcher, folder, pictures, tmp_path):
    do(
        launcher,
        4,
        Job(tmp_path / "r", dict(path=str(pictures), shard=2)),
        Job(tmp_path / "c", dict(path=str(pictures), shard=2, steps=4)),
    )
    do(launcher, 2, Job(tmp_path / "then", dict(path=str(pictures)), copy=tmp_path / "c"))
    assert_same_run(tmp_path / "r", folder / "one")
    assert_same_run(tmp_path / "then", folder / "one")
    names = sorted(p.name for p in (checkpoint.newest(tmp_path / "r")[0] / "state").iterdir())
    assert names == ["optimizer.rank00000.safetensors", "optimizer.rank00001.safetensors", "state.json"]  # one replica saves


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sharding_in_half_precision_stays_close_to_replicas(launcher, pictures, tmp_path, precision):
    settings = dict(path=str(pictures), precision=precision, use_checkpoint=True)
    do(launcher, 2, Job(tmp_path / "ddp", settings), Job(tmp_path / "fsdp", settings | dict(shard=-1)))
    for a, b in zip(rows(tmp_path / "ddp"), rows(tmp_path / "fsdp"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-3), a["step"]
