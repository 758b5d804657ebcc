"""The original's logger: its files, its table, its means, its variables."""

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iddpm.interop.openai.python import logger


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No logger, no variables; and none is left open."""
    for name in ("OPENAI_LOGDIR", "OPENAI_LOG_FORMAT", "OPENAI_LOG_FORMAT_MPI", *logger.RANKS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(logger.Logger, "CURRENT", None)
    monkeypatch.setattr(logger.Logger, "DEFAULT", None)
    yield
    if logger.Logger.CURRENT is not None:
        logger.Logger.CURRENT.close()


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_the_table_looks_as_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger.configure(str(tmp_path))
    capsys.readouterr()
    logger.logkvs({"loss": np.float32(0.123456), "Step": 12000, "text": "abc", "a_name_that_is_longer_than_thirty_letters": 1e-5})
    logger.dumpkvs()
    table = [
        "---------------------------------------------",
        "| a_name_that_is_longer_than_... | 1e-05    |",
        "| loss                           | 0.123    |",
        "| Step                           | 1.2e+04  |",
        "| text                           | abc      |",
        "---------------------------------------------",
    ]
    assert capsys.readouterr().out.splitlines() == table
    assert (tmp_path / "log.txt").read_text().splitlines() == [f"Logging to {tmp_path}", *table]


def test_means_are_of_what_was_added_and_a_row_starts_empty(tmp_path: Path) -> None:
    logger.configure(str(tmp_path), ["csv"])
    for value in (1.0, 2.0, 6.0):
        logger.logkv_mean("loss", value)
    logger.logkv("step", 1)
    assert logger.getkvs() == {"loss": 3.0, "step": 1}
    assert logger.dumpkvs() == {"loss": 3.0, "step": 1} and logger.getkvs() == {}


def test_a_table_grows_columns_and_is_continued_by_the_next_run(tmp_path: Path) -> None:
    """B5: the original empties log.txt and progress.csv of a resumed run."""
    for step in (1, 2):
        logger.configure(str(tmp_path), ["csv", "log", "json"])
        logger.logkvs({"step": step, f"new_{step}": step / 2})
        logger.dumpkvs()
        logger.logkv("step", step + 0.5)
        logger.dumpkvs()
        logger.get_current().close()
    assert (tmp_path / "progress.csv").read_text().splitlines() == ["new_1,step,new_2", "0.5,1,", ",1.5,", ",2,1.0", ",2.5,"]
    assert (tmp_path / "log.txt").read_text().count("Logging to") == 2
    kept = [json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines()]
    assert kept == [{"new_1": 0.5, "step": 1}, {"step": 1.5}, {"new_2": 1.0, "step": 2}, {"step": 2.5}]


def test_lines_below_the_level_are_left_out(tmp_path: Path) -> None:
    logger.configure(str(tmp_path), ["log"])
    logger.debug("a")
    logger.info("b", 1)
    logger.set_level(logger.ERROR)
    logger.warn("c")
    logger.error("d")
    logger.log("e", level=logger.DEBUG)
    assert (tmp_path / "log.txt").read_text().splitlines()[1:] == ["b 1", "d"]


def test_the_folder_and_formats_come_from_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "a"))
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "json,,log")
    logger.log("configured by its first use")
    assert logger.get_dir() == str(tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["log.txt", "progress.json"]


@pytest.mark.parametrize("name", logger.RANKS)
def test_other_processes_log_to_files_of_their_own(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """B23: torchrun's RANK counts as well."""
    monkeypatch.setenv(name, "3")
    logger.configure(str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["log-rank003.txt"]


def test_without_a_folder_it_is_a_new_one_of_the_temporary_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logger.tempfile, "gettempdir", lambda: str(tmp_path))
    logger.configure(format_strs=["log"])
    name = Path(logger.get_dir()).relative_to(tmp_path).as_posix()
    assert name.startswith("openai-20") and len(name) == len("openai-2021-02-03-04-05-06-789012")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="asks Linux when the launcher started")
def test_the_processes_of_a_launcher_share_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """B23: the original makes one for each."""
    monkeypatch.setenv("RANK", "0")
    assert logger._started() == logger._started()
    monkeypatch.delenv("RANK")
    assert logger._started() != logger._started()


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stdout, log, json, csv, tensorboard"):
        logger.configure(str(tmp_path), ["xml"])


def test_scopes_and_resets_close_and_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "outer"))
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "log")
    outer = logger.get_current()
    with logger.scoped_configure(str(tmp_path / "inner"), ["log"]):
        inner = logger.get_current()
        assert logger.get_dir() == str(tmp_path / "inner")
    assert logger.get_current() is outer and inner.output_formats[0].file.closed
    logger.configure(str(tmp_path / "inner"), ["log"])
    logger.reset()
    assert logger.get_current() is outer


def test_time_spent_is_added_up(tmp_path: Path) -> None:
    logger.configure(str(tmp_path), [""])

    @logger.profile("work")
    def work(x: int) -> int:
        return x + 1

    assert work(1) == 2 and work.__name__ == "work"
    once = logger.getkvs()["wait_work"]
    with logger.profile_kv("work"):
        pass
    assert logger.getkvs()["wait_work"] > once > 0


def test_rows_may_be_averaged_over_a_communicator(tmp_path: Path) -> None:
    class Comm:
        rank = 0

        def gather(self, mine: Any) -> Any:
            return [mine, {"loss": (5.0, 3), "text": ("x", 1)}]

    logger.configure(str(tmp_path), [""], comm=Comm())
    logger.logkv_mean("loss", 1.0)
    with pytest.warns(UserWarning, match="text='x' is no number"):
        assert logger.dumpkvs() == {"loss": 4.0}
    Comm.rank = 1
    assert logger.mpi_weighted_mean(Comm(), {}) == {}
    logger.set_comm(None)
    assert logger.dumpkvs() == {}


def test_tensorboard_gets_the_numbers_at_their_step(tmp_path: Path) -> None:
    """B20: the original's needs TensorFlow 1."""
    logger.configure(str(tmp_path), ["tensorboard"])
    logger.logkvs({"step": 7, "loss": 0.25})
    logger.dumpkvs()
    logger.get_current().close()
    (event,) = (tmp_path / "tb").glob("events*")
    assert b"loss" in event.read_bytes()
    assert logger.get_current().output_formats[0].step == 7


def test_tensorboard_that_is_not_installed_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ValueError, match="pip install"):
        logger.configure(str(tmp_path), ["tensorboard"])
