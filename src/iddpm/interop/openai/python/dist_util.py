"""Many processes, as the original's scripts ask for them: under torchrun, or one alone. MPI is not needed."""

import atexit
import os
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from iddpm.errors import UserError
from iddpm.interop.openai.python.blobfile import BlobFile
from iddpm.parallel.processes import rank, session, world

GPUS_PER_NODE = 8  # for launchers that give no LOCAL_RANK: the GPU of a rank is rank % GPUS_PER_NODE
SETUP_RETRY_COUNT = 3  # the original's, which does not use it either
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_joined = ExitStack()


def setup_dist() -> None:
    """Join torchrun's processes, or be a group of one; UserError under mpiexec, where each would be alone unawares."""
    if dist.is_initialized():
        return
    atexit.register(_leave)
    if "RANK" in os.environ:
        _joined.enter_context(session(dev()))
        return
    for name in MPI_SIZES:
        if (size := int(os.environ.get(name, 1))) > 1:
            raise UserError(f"mpiexec started {size} processes: use torchrun --nproc-per-node {size} SCRIPT instead")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # no port, no host name


def _leave() -> None:
    _joined.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def dev() -> torch.device:
    """This process's device."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", rank() % GPUS_PER_NODE))
    return torch.device("cuda", local % torch.cuda.device_count())


def load_state_dict(path: str, **kwargs: Any) -> Any:
    """What torch.save wrote, tensors and plain values only. Each process reads for itself, so any of them may call it."""
    with BlobFile(path, "rb") as file:
        return torch.load(file, **(kwargs | {"weights_only": True}))


@torch.no_grad()
def sync_params(params: Iterable[Tensor]) -> None:
    """Give every process rank 0's values."""
    if world() > 1:
        for p in params:
            dist.broadcast(p, 0)
