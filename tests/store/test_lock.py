"""One trainer per run folder, and no lock that outlives its holder for long."""

import json
import multiprocessing
import os
import shutil
import signal
import time

import pytest

from conftest import TINY, flags
from iddpm.cli.main import main
from iddpm.errors import UserError
from iddpm.store import lock


def holder(path, **changed):
    record = {"host": lock.socket.gethostname(), "pid": os.getpid(), "began": lock._began(os.getpid())} | changed
    (path / ".lock").write_text(json.dumps(record))
    return record


def test_a_run_that_is_being_trained_is_refused_and_left_alone(tmp_path):
    with lock.held(tmp_path):
        with pytest.raises(UserError, match=f"is being trained by process {os.getpid()} on"):
            with lock.held(tmp_path):
                pass
        assert (tmp_path / ".lock").exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changed", "age"),
    [(dict(began="1"), 0), (dict(pid=2**22 + 1), 0), (dict(host="elsewhere"), 121)],
    ids=["another process has its number", "no such process", "another host, silent"],
)
def test_a_stale_lock_is_taken_over_and_said(tmp_path, changed, age):
    holder(tmp_path, **changed)
    then = os.stat(tmp_path / ".lock").st_mtime - age
    os.utime(tmp_path / ".lock", (then, then))
    said = []
    with lock.held(tmp_path, said.append):
        assert len(said) == 1 and said[0].startswith(f"took over {tmp_path}")
    assert list(tmp_path.iterdir()) == []


def test_a_lock_of_another_host_that_gives_signs_is_respected(tmp_path):
    holder(tmp_path, host="elsewhere")
    with pytest.raises(UserError, match="on elsewhere"), lock.held(tmp_path):
        pass
    assert (tmp_path / ".lock").exists()


def test_the_holder_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    with lock.held(tmp_path):
        os.utime(tmp_path / ".lock", (0, 0))
        ended = lock.threading.Event()
        for _ in range(100):
            if os.stat(tmp_path / ".lock").st_mtime > 0:
                break
            ended.wait(0.05)
        assert os.stat(tmp_path / ".lock").st_mtime > 0


def test_a_holder_that_is_alive_is_respected_where_the_file_system_has_no_locks(tmp_path, monkeypatch):
    monkeypatch.setattr("iddpm.store.remote.fcntl.flock", lambda *args: (_ for _ in ()).throw(OSError("no locks")))
    with lock.held(tmp_path):
        with pytest.raises(UserError, match=f"is being trained by process {os.getpid()} on"), lock.held(tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []


def test_nothing_needs_hard_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *args: (_ for _ in ()).throw(PermissionError("no hard links")))
    holder(tmp_path, pid=2**22 + 1)
    with lock.held(tmp_path, lambda line: None):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_copy_of_a_run_that_is_being_trained_is_free(tmp_path):
    said = []
    with lock.held(tmp_path):
        copy = shutil.copytree(tmp_path, tmp_path.with_name("copy"))
        with lock.held(copy, said.append):
            pass
    assert not said and list(copy.iterdir()) == []


def test_the_lock_of_a_run_renamed_while_it_is_held_goes_with_it(tmp_path):
    run = tmp_path / "run"
    with lock.held(run):
        run.rename(tmp_path / "moved")
        with pytest.raises(UserError, match="is being trained"), lock.held(tmp_path / "moved"):
            pass
        with lock.held(run):  # another run of the old name
            assert (run / ".lock").exists()
        assert not (run / ".lock").exists() and (tmp_path / "moved" / ".lock").exists()


HOLDS = """
import sys, time
from pathlib import Path
from iddpm.store import lock
with lock.held(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_is_gone_as_soon_as_its_process_is(launcher, tmp_path):
    process = launcher.start(tmp_path, said=tmp_path.with_suffix(".said"), program=HOLDS)
    assert process.until("held") == "held\n"
    pid = process.pids[0]
    with pytest.raises(UserError, match=f"by process {pid} on"), lock.held(tmp_path):
        pass
    process.kill()
    process.wait()
    said = []
    with lock.held(tmp_path, said.append):
        assert said == [f"took over {tmp_path} from process {pid} on {lock.socket.gethostname()}, which is gone"]


def take(folder, begin, end, results):
    begin.wait()
    try:
        with lock.held(folder, lambda line: None):
            results.put("held")
            end.wait()
    except UserError:
        results.put("refused")
        end.wait()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_of_many_that_start_at_once_on_a_stale_lock_one_holds_it(tmp_path):
    context, n = multiprocessing.get_context("fork"), 6
    for _ in range(5):
        holder(tmp_path, pid=2**22 + 1)
        begin, end, results = context.Barrier(n), context.Event(), context.SimpleQueue()
        processes = [context.Process(target=take, args=(tmp_path, begin, end, results)) for _ in range(n)]
        for process in processes:
            process.start()
        assert sorted(results.get() for _ in range(n)) == ["held"] + ["refused"] * (n - 1)
        end.set()
        for process in processes:
            process.join(30)
        assert list(tmp_path.iterdir()) == []


def test_a_second_trainer_is_one_line_and_the_first_goes_on(launcher, pictures, tmp_path, capsys):
    command = ("train", pictures, "--run", tmp_path / "r", *flags(**dict(TINY, steps=100_000, log_interval=1)))
    first = launcher.start(*command, said=tmp_path / "said")
    first.until("step 1/")
    config = (tmp_path / "r" / "config.json").read_text()
    assert main([*map(str, command), "--lr", "0.5"]) == 2
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1 and f"is being trained by process {first.pids[0]}" in err
    assert (tmp_path / "r" / "config.json").read_text() == config
    first.kill(number=signal.SIGTERM)
    assert first.wait() == [75] and "all is saved" in first.said.read_text()
    assert not (tmp_path / "r" / ".lock").exists()


@pytest.mark.parametrize("hours", [5, 500_000])
def test_a_lock_dated_in_the_future_does_not_keep_a_run_for_ever(tmp_path, monkeypatch, hours):
    monkeypatch.setattr(lock, "BEAT", 0.1)
    (tmp_path / ".lock").write_text('{"host": "another", "pid": 7, "began": "1"}')
    os.utime(tmp_path / ".lock", (time.time() + 3600 * hours,) * 2)
    said = []
    with lock.held(tmp_path, said.append):
        assert said == [f"took over {tmp_path} from process 7 on another, which is gone"]


def test_an_empty_lock_is_nobodys(tmp_path):
    (tmp_path / ".lock").write_bytes(b"")
    with lock.held(tmp_path):
        pass
