"""Two processes of one thread each against one process of two threads: images per second of the same training, on one machine.

    python benchmarks/two_processes.py [--preset cifar10-tiny] [--batch 32] [--rounds 9]

Both are started once; then they take turns, a step each, and the one that waits uses no processor. A ratio of 1 means that
averaging gradients over gloo costs no more than sharing the arithmetic among threads.
"""

import argparse
import os
import socket
import statistics
import sys
import time

from common import Worker, interleaved, machine, ratio, reply

from iddpm.config import Config
from iddpm.config.presets import PRESETS


def worker(preset: str, batch_size: int) -> None:
    """Take a step for each line read, and say how long it took."""
    import torch

    from iddpm.parallel import processes
    from iddpm.store.log import Meter
    from iddpm.training.state import TrainState
    from iddpm.training.step import method_of, train_step
    from iddpm.training.trial import example

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    cpu = torch.device("cpu")
    with processes.session(cpu):
        config = Config().updated(PRESETS[preset][1] | dict(batch_size=batch_size, device="cpu", precision="fp32"))
        state, meter, batch = TrainState(config, cpu), Meter(), example(config, len(processes.share(batch_size)))
        method = method_of(config, state.parallel)
        reply(sum(p.numel() for p in state.params.values()))
        for _ in sys.stdin:
            processes.barrier()
            began = time.perf_counter()
            train_step(state, config, method, batch, meter)
            reply(time.perf_counter() - began)
        os._exit(0)


class Side:
    """Processes that take steps together."""

    def __init__(self, processes: int, threads: int, args: argparse.Namespace):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        command = [sys.executable, __file__, "--worker", "--preset", args.preset, "--batch", str(args.batch)]
        self.workers = []
        for rank in range(processes):
            env = dict(OMP_NUM_THREADS=str(threads))
            if processes > 1:
                env |= dict(
                    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
                )
            self.workers.append(Worker(command, env))

    def step(self) -> float:
        for process in self.workers:
            process.tell()
        return max(process.answer() for process in self.workers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="cifar10-tiny", choices=PRESETS)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.preset, args.batch)
    sides = [Side(2, 1, args), Side(1, 2, args)]
    try:
        weights = max(process.answer() for side in sides for process in side.workers)
        times = interleaved({"two": sides[0].step, "one": sides[1].step}, args.rounds, warm=2)
    finally:
        for process in (process for side in sides for process in side.workers):
            process.end()
    two, one = (statistics.median(column) for column in times.values())
    print(f"{args.preset}: {weights:,.0f} parameters, batch {args.batch}, float32, {args.rounds} rounds")
    print(f"two processes, one thread each   {two:.3f} s a step, {args.batch / two:.1f} images/s")
    print(f"one process, two threads         {one:.3f} s a step, {args.batch / one:.1f} images/s")
    print(f"two processes / one process, images per second: {ratio(times['one'], times['two'])}")
    print(machine())


if __name__ == "__main__":
    main()
