"""Other programs that are told the numbers of a run beside its own log: TensorBoard, Weights & Biases, MLflow.

They are told by a thread, and may be slow, unreachable or full: training never waits for one, and goes on without it.
"""

import os
import queue
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from iddpm.config.choices import row
from iddpm.errors import UserError, reason
from iddpm.store import remote as places

ROWS = 1000  # that wait to be told; beyond it rows are left out
PATIENCE = 30.0  # seconds that the end of a run waits for what is not told yet
DRAWN = "log_to.txt"  # in a run's folder
QUIET = ("step", "time")  # of a row: no numbers of their own


class Sink(Protocol):
    """One of these programs, to which a run is open."""

    def row(self, step: int, values: Mapping[str, float]) -> None:
        """Tell the numbers of a step."""

    def close(self) -> None:
        """Nothing more is told."""


class TensorBoard:
    """Events in RUN/tensorboard; a run that goes on from a step hides what was told beyond it."""

    def __init__(self, folder: Path, run: Path, step: int, config: Mapping[str, Any]):
        self.writer = summary_writer(folder / "tensorboard", "--log_to tensorboard", purge_step=step)

    def row(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A run of Weights & Biases, in the project of WANDB_PROJECT or iddpm; WANDB_MODE=offline keeps it on this machine."""

    def __init__(self, folder: Path, run: Path, step: int, config: Mapping[str, Any]):
        wandb = _module("wandb", "wandb")
        name = name_of(folder, run)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "iddpm"), name=run.name, id=name, resume="allow", dir=str(folder),
            config=dict(config), settings=wandb.Settings(silent=True),
        )  # fmt: skip
        self.run.define_metric("*", step_metric="step")  # not its own count of steps, which may not go back on a resume

    def row(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({"step": step, **values})

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """A run of MLflow, in the experiment of MLFLOW_EXPERIMENT_NAME or iddpm, on the server of MLFLOW_TRACKING_URI."""

    def __init__(self, folder: Path, run: Path, step: int, config: Mapping[str, Any]):
        mlflow = _module("mlflow", "mlflow")
        if not (address := os.environ.get("MLFLOW_TRACKING_URI")):
            raise UserError("--log_to mlflow: where is the server? set MLFLOW_TRACKING_URI, as http://localhost:5000")
        self.metric, name = mlflow.entities.Metric, name_of(folder, run)
        self.client = client = mlflow.MlflowClient(address)
        wanted = os.environ.get("MLFLOW_EXPERIMENT_NAME", "iddpm")
        known = client.get_experiment_by_name(wanted)
        experiment = known.experiment_id if known else client.create_experiment(wanted)
        found = client.search_runs([experiment], f"tags.iddpm_run = '{name}'")
        if found:
            self.id = found[0].info.run_id
            client.update_run(self.id, status="RUNNING")
        else:
            self.id = client.create_run(experiment, run_name=run.name, tags={"iddpm_run": name}).info.run_id
            for key, value in config.items():
                client.log_param(self.id, key, str(value)[:500])

    def row(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self.client.log_batch(self.id, metrics=[self.metric(name, value, now, step) for name, value in values.items()])

    def close(self) -> None:
        self.client.set_terminated(self.id)


SINKS: dict[str, Callable[[Path, Path, int, Mapping[str, Any]], Sink]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": MLflow,
}


class Sinks:
    """Those of a run. UserError where one cannot be opened, before the training begins; later faults are a line each."""

    def __init__(self, names: str, folder: Path, run: Path, step: int, config: Mapping[str, Any]):
        chosen = dict.fromkeys(part.strip() for part in names.split(",") if part.strip())
        self.open: dict[str, Sink] = {}
        for name in chosen:
            try:
                self.open[name] = row("log_to", name)(folder, run, step, config)
            except Exception as e:  # whatever such a program raises: its server, its key, its disk
                for other, sink in list(self.open.items()):
                    self._try(other, sink.close)
                raise e if isinstance(e, UserError) else UserError(f"--log_to {name}: {reason(e)}") from None
        self.rows: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(ROWS)
        self.lost = 0
        self.thread = threading.Thread(target=self._tell, name="sinks", daemon=True)
        self.thread.start()

    def row(self, values: Mapping[str, Any]) -> None:
        """Have a row of the log told."""
        numbers = {name: value for name, value in values.items() if name not in QUIET and isinstance(value, (int, float))}
        try:
            self.rows.put_nowait((values["step"], numbers))
        except queue.Full:
            self.lost += 1

    def close(self) -> None:
        """Tell what waits, for some seconds."""
        if self.lost:
            _say(f"{self.lost} rows were not told to {', '.join(self.open)}, which did not keep up; log.jsonl has them all")
        try:
            self.rows.put(None, timeout=PATIENCE)
            self.thread.join(PATIENCE)
        except queue.Full:
            pass
        if self.thread.is_alive():
            _say(f"--log_to {', '.join(self.open)} does not answer: what was not told to it is in log.jsonl")

    def _tell(self) -> None:
        while (row := self.rows.get()) is not None:
            for name, sink in list(self.open.items()):
                self._try(name, lambda sink=sink, row=row: sink.row(*row))  # type: ignore[misc]
        for name, sink in list(self.open.items()):
            self._try(name, sink.close)

    def _try(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as e:  # whatever it is: the run and its own log are worth more
            _say(f"--log_to {name} is told nothing more: {reason(e)}")
            del self.open[name]


def name_of(folder: Path, run: Path) -> str:
    """A name by which a run is known again when it goes on, of letters and digits.

    It is of the run's path, and of a number drawn once and kept in the run: runs of other machines, and those that come in the
    place of one, have the same path, and a copy has the same number.
    """
    import hashlib

    where = str(run) if places.remote(run) else str(run.resolve())
    kept = next((path for path in (folder / DRAWN, run / DRAWN) if path.exists()), None)
    drawn = kept.read_bytes() if kept else secrets.token_hex(8).encode()
    places.write_file(folder / DRAWN, drawn)
    return hashlib.sha256(where.encode("utf-8", "surrogateescape") + drawn).hexdigest()[:16]


def summary_writer(folder: Path, what: str, **settings: Any) -> Any:
    """tensorboardX's writer of events; UserError, naming `what` needs it, where its extra is not installed."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UserError(f"{what} needs its extra: pip install 'iddpm[tensorboard]'") from None
    return SummaryWriter(str(folder), **settings)


def _module(name: str, extra: str) -> Any:
    try:
        return __import__(name)
    except ImportError:
        raise UserError(f"--log_to {name} needs its extra: pip install 'iddpm[{extra}]'") from None


def _say(line: str) -> None:
    print(line, file=sys.stderr)
