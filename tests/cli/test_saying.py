"""How verbs speak: JSON a line, nothing, or lines; on a terminal a bar; and what a shell completes."""

import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from conftest import TINY, flags
from iddpm.cli import original
from iddpm.cli.main import VERBS, main
from iddpm.training import loop

OWN = [name for name in VERBS if name not in original.VERBS]
SMALL = flags(sampling_steps=2, device="cpu")


@pytest.fixture(scope="module")
def powers(pictures, tmp_path_factory) -> Path:
    """A run with averages by powers of time."""
    run = tmp_path_factory.mktemp("powers") / "r"
    assert main(["train", str(pictures), "--run", str(run), *flags(**TINY | dict(ema_power="0.05,0.10"))]) == 0
    return run


def commands(pictures: Path, run: Path, powers: Path, out: Path) -> dict[str, tuple[list, set[str]]]:
    """A command of every verb, and the events that it must speak of, beside lines."""
    image = next(pictures.rglob("*.png"))
    return {
        "train": (
            [pictures, "--run", out / "t", *flags(**TINY | dict(log_interval=1))],
            {"images", "step", "saved", "samples", "done", "next"},
        ),
        "sample": ([run, "--num_samples", 2, "--out", out / "s.npz", *SMALL], {"progress", "wrote"}),
        "edit": ([run, image, "--strength", 0.5, "--labels", "disc", "--out", out / "e.png", *SMALL], {"wrote"}),
        "nll": ([run, pictures, "--num_samples", 4, "--out", out / "n.json", *SMALL], {"bits_per_dim", "progress", "wrote"}),
        "evaluate": (
            [pictures, "--reference", pictures, "--metrics", "kd", "--out", out / "m.json", "--device", "cpu"],
            {"figure", "wrote"},
        ),
        "report": ([run, "--out", out / "r.html"], {"wrote"}),
        "diagnose": ([run], {"diagnosed", "finding", "fine", "unknown"}),
        "ema": ([powers, "--std", 0.07, "--out", out / "a.safetensors"], {"wrote"}),
        "data": (["digits", out / "d"], {"next"}),
        "serve": ([run, "--host", "0.0.0.0"], {"error"}),  # which is told that it needs a token
        "studio": ([run, "--host", "0.0.0.0"], {"error"}),  # likewise
        "plan": (["--run", run, "--processes", 2], {"plan"}),
        "import": ([out / "x.safetensors", "--alone", "--run", out / "i"], {"error"}),
        "export": ([run, "--to", "safetensors", "--out", out / "w"], {"wrote"}),
        "completion": (["bash"], set()),
    }  # fmt: skip


@pytest.mark.parametrize("verb", OWN)
def test_every_verb_speaks_json_or_is_quiet(verb, pictures, run, powers, tmp_path, capsys):
    for how in ("--json", "--quiet"):
        (out := tmp_path / how).mkdir()
        argv, events = commands(pictures, run, powers, out)[verb]
        code = main([verb, *map(str, argv), how])
        told = capsys.readouterr()
        assert code == (2 if "error" in events else 0), told.err
        if how == "--quiet":
            assert told.out == ""
            continue
        found = [json.loads(line, parse_constant=pytest.fail) for line in told.out.splitlines()]
        assert events <= {o["event"] for o in found} <= events | {"line", "progress", "next", "verdict"}
        assert all(isinstance(o["text"], str) for o in found)
        assert all(Path(o["path"]).exists() for o in found if o["event"] == "wrote")


def test_numbers_are_those_of_the_log_and_what_is_no_number_is_null(pictures, tmp_path, capsys):
    argv = ["train", str(pictures), "--run", str(tmp_path / "r"), *flags(**TINY | dict(log_interval=1))]
    assert main([*argv, "--json"]) == 0
    told = [o for o in map(json.loads, capsys.readouterr().out.splitlines()) if o["event"] == "step"]
    rows = [row for row in map(json.loads, (tmp_path / "r" / "log.jsonl").read_text().splitlines()) if "loss" in row]
    assert [{k: v for k, v in o.items() if k not in ("event", "text")} for o in told] == rows


def test_errors_are_objects_too_and_the_two_ways_exclude_each_other(capsys):
    assert main(["sample", "nowhere", "--json"]) == 2
    told = capsys.readouterr()
    assert json.loads(told.out) == {"event": "error", "code": 2, "text": told.err.strip().removeprefix("iddpm: ")}
    assert main(["sample", "nowhere", "--json", "--quiet"]) == 2
    assert "give one" in capsys.readouterr().err


def test_names_in_another_encoding_are_json(run, tmp_path, capsys):
    out = tmp_path / os.fsdecode(b"caf\xe9.npz")
    assert main(["sample", str(run), "--num_samples", "1", "--out", str(out), *SMALL, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["path"] == str(out)


def test_a_long_step_is_told_of_by_time(pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loop, "PATIENCE", 0.0)
    assert main(["train", str(pictures), "--run", str(tmp_path / "r"), *flags(**TINY | dict(steps=3, log_interval=50))]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    assert [line.endswith("(of this step alone)") for line in lines] == [True, True, False]
    assert len((tmp_path / "r" / "log.jsonl").read_text().splitlines()) == 1


ENV = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src"), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


def test_a_terminal_has_a_bar_and_an_answer_to_ctrl_c_at_once(pictures, tmp_path):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    argv = ["train", pictures, "--run", tmp_path / "r", *flags(**TINY | dict(steps=10**6, log_interval=10**6))]
    process = subprocess.Popen([sys.executable, "-m", "iddpm", *map(str, argv)], env=ENV, stdout=theirs, stderr=theirs)
    said, limit, asked = "", time.monotonic() + 90, False
    while process.poll() is None and time.monotonic() < limit:
        said += os.read(ours, 65536).decode() if select.select([ours], [], [], 0.2)[0] else ""
        if not asked and re.search(r"\r +0% \|.*step \d\d+/1000000 ", said):
            process.send_signal(signal.SIGINT)
            asked = True
    process.kill() if process.poll() is None else None
    assert asked, said
    assert process.wait() == 75
    said += os.read(ours, 65536).decode() if select.select([ours], [], [], 0.2)[0] else ""
    answer, saved = said.index("finishing this step, then saving"), said.index("stopped at step")
    assert answer < saved


def test_files_and_pipes_have_no_control_characters(launcher, pictures, tmp_path):
    line = ("train", pictures, "--run", tmp_path / "r", *flags(**TINY))
    told = launcher.start(*line, said=tmp_path / "said").succeed()
    assert told and not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", told)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["iddpm", "sam"], "sample"),
        (["iddpm", "train", "--noise_s"], "--noise_schedule"),
        (["iddpm", "sample", "--solver", "dpmpp_2"], "dpmpp_2m dpmpp_2m_sde"),
        (["iddpm", "train", "--class_cond", ""], "True False"),
        (["iddpm", "nll", "--qu"], "--quiet"),
    ],
)
def test_bash_completes_verbs_flags_and_choices(words, found, capsys):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    typed = " ".join(word or "''" for word in words)
    ask = f'COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _iddpm; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == found
    assert not done.stderr


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_take_their_script(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "--noise_schedule" in script or "-l noise_schedule" in script
    if shutil.which(shell):
        subprocess.run([shell, "-c", script], check=True, capture_output=True)


def test_the_help_of_training_begins_with_ten_flags(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    first = capsys.readouterr().out.partition("What most people need")[2].partition("\n\n")[0]
    assert len(re.findall(r"^  --\w+", first, re.M)) == 10


def test_an_object_holds_whatever_there_is(capsys):
    from iddpm.saying import say, speaking

    with speaking(json=True, quiet=False):
        say("a", "b", value=float("nan"), path=Path("x"))
        print("half", end="")
        print(" a line")
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == {"event": "b", "value": None, "path": "x", "text": "a", "not_finite": ["value"]}
    assert second == {"event": "line", "text": "half a line"}
