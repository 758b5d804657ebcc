"""Defects B2, B3, B10, B11 and B23: what two processes do, and what they did by the original's rules.

Each writes down what it reads, sends and holds; the tests look at that.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from iddpm.interop.openai.formats import files
from iddpm.interop.openai.python import logger
from iddpm.parallel import processes, shard
from iddpm.training.state import TrainState
from interop.test_defects import TINY, TRAIN, command, held, rows
from interop.written import same

CPU = torch.device("cpu")


class Recorder:
    """What one of the processes reads, sends to the others, and holds."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.sent, self.read, self.states = 0, list[str](), list[TrainState]()
        self.load, self.patch = files.load, patch
        send, broadcast, made = dist.broadcast_object_list, dist.broadcast, TrainState.__init__

        def sending(box: list[Any], *args: Any, **kwargs: Any) -> None:
            self.sent += len(pickle.dumps(box))
            send(box, *args, **kwargs)

        def broadcasting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.sent += tensor.nbytes
            return broadcast(tensor, *args, **kwargs)

        def making(state: TrainState, *args: Any) -> None:
            made(state, *args)
            self.states.append(state)

        def reading(path: Path) -> Any:
            self.read.append(path.name)
            return self.load(path)

        patch.setattr(dist, "broadcast_object_list", sending)
        patch.setattr(dist, "broadcast", broadcasting)
        patch.setattr(TrainState, "__init__", making)
        patch.setattr(files, "load", reading)

    def run(self, folder: Path, data: str, **settings: object) -> dict[str, Any]:
        """Facts of a training command."""
        self.sent, self.read = 0, []
        code = command(folder, "image_train", data_dir=data, **TINY, **TRAIN | {"batch_size": 2} | settings)
        weights = [p.double().sum().item() for p in self.states[-1].params.values()]
        return dict(code=code, weights=weights, sent=self.sent, read=self.read)


def rank_0_alone_loads(patch: pytest.MonkeyPatch, load: Callable[[Path], Any]) -> None:
    """By a function in which all must take part; here they are waited for 2 seconds."""
    everyone = dist.new_group(timeout=timedelta(seconds=2))

    def old(path: Path) -> Any:
        dist.barrier(everyone)
        return load(path)

    newest = files.Store.newest
    patch.setattr(files, "load", old)
    patch.setattr(files.Store, "newest", lambda self: newest(self) if processes.rank() == 0 else (None, []))


def one_message(path: Path) -> Any:
    """The original's load_state_dict: rank 0 reads a file and sends it to the others."""
    box = [path.read_bytes() if processes.rank() == 0 else None]
    dist.broadcast_object_list(box)
    aside = path.with_name(f"{path.name}.{processes.rank()}")
    aside.write_bytes(box[0])
    return torch.load(aside, weights_only=True)


def unpadded(rows: Tensor) -> None:
    parts = [rows.new_zeros(2) for _ in range(2)]
    if processes.rank() == 0:  # it has one row, the other two
        dist.all_gather(parts, rows)


def two(data: str, folder: str) -> None:
    """The part of one of two processes; its facts go to FOLDER/RANK.json."""
    root, facts = Path(folder), dict[str, Any]()
    with processes.session(CPU), pytest.MonkeyPatch.context() as patch:
        rank, recorder = processes.rank(), Recorder(patch)

        def copied(name: str) -> Path:
            if rank == 0:
                (root / name).mkdir()
                for path in (root / "whole").glob("*000002*"):
                    shutil.copy(path, root / name)
            processes.barrier()
            return root / name / "model000002.pt"

        facts["whole"] = recorder.run(root / "whole", data, steps=3)
        resume = copied("resumed")
        facts["resumed"] = recorder.run(resume.parent, data, resume_checkpoint=resume, steps=3)
        facts["gathered"] = processes.gather(torch.full((1 + rank,), rank)).tolist()
        patch.delenv("OPENAI_LOGDIR", raising=False)
        with logger.scoped_configure(format_strs=["log"]):
            processes.barrier()
            facts["log"] = [logger.get_dir(), *sorted(os.listdir(logger.get_dir()))]

        with patch.context() as old:
            old.setattr(shard, "spread", lambda net, *shard: net)
            old.setattr(processes, "sum_", lambda *tensors: None)
            facts["apart"] = recorder.run(root / "apart", data, steps=1)
        with patch.context() as old:
            resume = copied("message")
            old.setattr(files, "load", one_message)
            facts["message"] = recorder.run(resume.parent, data, resume_checkpoint=resume, steps=3)
        try:
            unpadded(torch.arange(1 + rank))
        except (RuntimeError, ValueError) as e:
            facts["unpadded"] = str(e)
        resume = copied("hung")
        rank_0_alone_loads(patch, recorder.load)
        try:
            recorder.run(resume.parent, data, resume_checkpoint=resume, steps=3)
        except RuntimeError as e:
            facts["hung"] = str(e)
        (root / f"{rank}.json").write_text(json.dumps(facts))
        os._exit(0)  # of a hung pair, each must go alone


@pytest.fixture(scope="module")
def pair(launcher, pictures, tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of two processes, and the facts of each."""
    root = tmp_path_factory.mktemp("pair")
    program = "import sys; from interop.test_defects_processes import two; two(*sys.argv[1:])"
    how = dict(processes=2, env={"TMPDIR": str(root)}, program=program)
    text = launcher.start(pictures, root, said=root / "said", **how).succeed()
    found = [root / f"{rank}.json" for rank in range(2)]
    assert all(path.exists() for path in found), text[-3000:]
    return root, [json.loads(path.read_text()) for path in found]


# ---- B2, B3


def test_b02_a_run_on_two_processes_resumes_and_is_the_run_that_was_not_interrupted(pair):
    root, facts = pair
    assert [f["resumed"]["code"] for f in facts] == [0, 0]
    for kind in ("model", "ema_0.9_"):
        assert same(held(root / "resumed", 3, kind), held(root / "whole", 3, kind))


def test_b02_where_rank_0_alone_loads_the_processes_wait_for_each_other(pair):
    """The old rule: the file is read by rank 0, in a function in which all must take part."""
    assert "timed out" in pair[1][0]["hung"].lower()


def test_b03_each_process_reads_the_files_and_no_weights_are_sent(pair):
    size = (pair[0] / "whole" / "model000002.pt").stat().st_size
    for facts in pair[1]:
        assert {"model000002.pt", "ema_0.9_000002.pt", "opt000002.pt"} <= set(facts["resumed"]["read"])
        assert facts["resumed"]["sent"] < size / 50


def test_b03_in_one_message_all_of_the_file_is_sent(pair):
    """The old rule."""
    size = (pair[0] / "whole" / "model000002.pt").stat().st_size
    assert [f["message"]["code"] for f in pair[1]] == [0, 0]
    assert pair[1][0]["message"]["sent"] > size


# ---- B10, B11


def test_b10_two_processes_on_cpus_hold_the_same_weights(pair):
    zero, one = (facts["whole"]["weights"] for facts in pair[1])
    assert zero == one


def test_b10_without_averaging_their_gradients_they_part(pair):
    """The old rule: DistributedDataParallel on CUDA only."""
    zero, one = (facts["apart"]["weights"] for facts in pair[1])
    assert [facts["apart"]["code"] for facts in pair[1]] == [0, 0]
    assert zero != one


def test_b11_rows_of_unequal_length_are_gathered_in_the_order_of_the_processes(pair):
    assert [facts["gathered"] for facts in pair[1]] == [[0, 1, 1], [0, 1, 1]]


def test_b11_unpadded_rows_raise(pair):
    """The old rule."""
    assert "unpadded" in pair[1][0] and "unpadded" not in pair[1][1]


# ---- B23


def test_b23_two_processes_are_one_run_in_the_files_of_one(pair, pictures, tmp_path):
    """Their numbers are those of one process with their batches together; each but the first has a log of its own."""
    assert command(tmp_path, "image_train", data_dir=pictures, **TINY, **TRAIN | {"steps": 1}) == 0
    (alone,), together = rows(tmp_path), rows(pair[0] / "whole")[0]
    for name in ("loss", "mse", "vb", "grad_norm", "samples"):
        assert float(together[name]) == pytest.approx(float(alone[name]), rel=1e-5), name
    assert {p.name for p in (pair[0] / "whole").glob("*.[tc]*")} == {"log.txt", "log-rank001.txt", "progress.csv"}


def test_b23_the_numbers_of_the_first_process_alone_are_others(pair):
    """The old rule."""
    together, first = rows(pair[0] / "whole")[0], rows(pair[0] / "apart")[0]
    assert float(first["loss"]) != pytest.approx(float(together["loss"]), rel=1e-3)


def test_b23_without_a_folder_given_they_share_one(pair):
    zero, one = (facts["log"] for facts in pair[1])
    assert zero == one and zero[1:] == ["log-rank001.txt", "log.txt"]
