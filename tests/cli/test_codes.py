"""How a command ends: its code, its one line, and what its streams and signals may not do."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from conftest import TINY, flags
from iddpm.cli import main as cli
from iddpm.cli.main import main

LONG = {k: v for k, v in TINY.items() if k != "steps"} | dict(steps=10**6, save_interval=10**6, sampling_steps=2)


def until(path: Path, text: str) -> None:
    ended = time.monotonic() + 60
    while text not in (path.read_text() if path.exists() else "") and time.monotonic() < ended:
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_signal_saves_a_training_and_ends_it_with_75(launcher, pictures, tmp_path, number):
    process = launcher.start("train", pictures, "--run", tmp_path / "r", *flags(**LONG), said=tmp_path / "said")
    until(tmp_path / "r" / "log.jsonl", '"step": 3,')
    process.kill(number=number)
    assert process.wait() == [75] and "the same command goes on from here" in process.said.read_text()
    assert list((tmp_path / "r" / "checkpoints").glob("step_*"))


def test_nohup_is_respected(launcher, pictures, tmp_path):
    nohup = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); entry()"  # all that it does
    command = ("train", pictures, "--run", tmp_path / "r", *flags(**LONG))
    process = launcher.start(*command, said=tmp_path / "said", program=nohup)
    until(tmp_path / "r" / "log.jsonl", '"step": 3,')
    process.kill(number=signal.SIGHUP)
    time.sleep(0.5)
    assert process.running()
    process.kill(number=signal.SIGTERM)
    assert process.wait() == [75]


@pytest.mark.parametrize("verb", ["sample", "nll"])
def test_what_is_stopped_goes_on_by_the_same_command(launcher, run, pictures, tmp_path, verb):
    rest = {
        "sample": ["--num_samples", 16, "--batch_size", 1, "--out", tmp_path / "x.npz"],
        "nll": [pictures, "--out", tmp_path / "n.json"],
    }
    command = (verb, run, *rest[verb], "--sampling_steps", 20, "--device", "cpu")
    process = launcher.start(*command, said=tmp_path / "said")
    while process.running() and not list(tmp_path.glob("*.partial*")):
        time.sleep(0.01)
    process.kill(number=signal.SIGTERM)
    last = "iddpm: interrupted; the same command goes on from here"
    assert process.wait() == [75] and process.said.read_text().strip().splitlines()[-1] == last
    launcher.start(*command, said=tmp_path / "again").succeed()


@pytest.mark.parametrize("streams", ["read to the first line", "closed"])
def test_streams_that_go_away_end_no_training(launcher, pictures, tmp_path, streams):
    command = ("train", pictures, "--run", tmp_path / "r", *flags(**TINY))
    if streams == "closed":
        line = f"{sys.executable} -m iddpm {' '.join(map(str, command))} <&- >&- 2>&-"
        env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src"), "OMP_NUM_THREADS": "1"}
        subprocess.run(["bash", "-c", line], env=env, capture_output=True, timeout=120)
    else:
        head = (
            "import os, subprocess; p = subprocess.Popen(['head', '-1'], stdin=-1); os.dup2(p.stdin.fileno(), 1); p.stdin.close()"
        )
        launcher.start(*command, said=tmp_path / "said", program=f"{head}; entry()").wait()
    assert (tmp_path / "r" / "checkpoints" / "step_00000004").is_dir()
    assert (tmp_path / "r" / "config.json").read_text().startswith("{")


def test_names_in_another_encoding_are_printed_and_kept(launcher, tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/d/caf\xe9"))
    folder.mkdir(parents=True)
    for k in range(3):
        Image.new("L", (8, 8), 50 * k).save(folder / os.fsdecode(b"\xe9%d.png" % k))
    (folder / os.fsdecode(b"bad\xe9.png")).write_text("x")
    strict = "import sys; [s.reconfigure(encoding='utf-8', errors='strict') for s in (sys.stdout, sys.stderr)]; entry()"
    rest = ["--per_image", tmp_path / "q.csv", *flags(sampling_steps=2, device="cpu"), "--out", tmp_path / "n.json"]
    for command in (
        ["train", tmp_path / "d", "--run", tmp_path / "r", *flags(**{**TINY, "steps": 1})],
        ["nll", tmp_path / "r", tmp_path / "d", *rest],
    ):
        process = launcher.start(*command, said=tmp_path / "out", err=tmp_path / "err", program=strict)
        assert process.wait() == [0], (tmp_path / "err").read_bytes()
        told = (tmp_path / "err").read_bytes()
        assert b"note: 1 of 4 " in told and b"Warning" not in told
    assert b"caf\xe9/\xe91.png" in (tmp_path / "q.csv").read_bytes()


@pytest.mark.parametrize("out", ["/", "..", ""])
def test_a_data_set_needs_a_folder_with_a_name(out, capsys):
    assert main(["data", "digits", out]) == 2
    assert "has no name: give a new folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), RuntimeError("std::bad_alloc")]
)
def test_out_of_memory_is_one_line(error, monkeypatch, capsys):
    def verb(**_):
        raise error

    monkeypatch.setitem(cli.VERBS, "data", cli.VERBS["data"]._replace(run=verb))
    assert main(["data", "digits", "x"]) == 2
    assert capsys.readouterr().err.startswith("iddpm: out of memory: train with a smaller --microbatch")


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "DATA", "--steps", "1", "--image_size", "²"],
        ["train", "DATA", "--steps", "9" * 5000],
        ["train", "DATA", "--steps", str(2**64)],
        ["train", "DATA", "--steps", "1", "--cache_gb", "1e300"],
        ["train", "DATA", "--steps", "1", "--fp16_scale_growth", "1e6"],
        ["train", "DATA", "--steps", "1", "--channel_mult", "inf"],
        ["train", "DATA", "--steps", "1", "--channel_mult", ","],
        ["train", "DATA", "--steps", "1", "--num_head_channels", "0"],
        ["train", "DATA", "--steps", "1", "--device", "meta"],
        ["sample", "RUN", "--sampling_steps", "²"],
        ["sample", "RUN", "--seeds", "²"],
        ["sample", "RUN", "--seeds", str(2**64)],
        ["sample", "RUN", "--seeds", "0-99999999999"],
    ],
    ids=lambda argv: " ".join(argv[-2:])[:40],
)
def test_odd_numbers_are_one_line(argv, run, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([{"DATA": str(pictures), "RUN": str(run)}.get(a, a) for a in argv]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", [2**32, 2**63, 2**64 - 1])
def test_seeds_of_other_programs_are_taken(run, tmp_path, capsys, seed):
    assert (
        main(["sample", str(run), "--seeds", str(seed), "--out", str(tmp_path / "x"), *flags(sampling_steps=2, device="cpu")])
        == 0
    )


def test_a_rank_without_its_world_is_one_line(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    assert main(["sample", str(run), "--out", str(tmp_path / "x.png"), "--device", "cpu"]) == 2
    assert "RANK is set and WORLD_SIZE is not: start by torchrun" in capsys.readouterr().err


def test_help_of_a_verb_both_ways_and_the_codes_in_it(capsys):
    with pytest.raises(SystemExit):
        main(["help", "nll"])
    text = capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["nll", "--help"])
    assert capsys.readouterr().out == text and "75 stopped (Ctrl-C, SIGTERM, SIGHUP)" in text


def test_no_flag_is_called_like_one_that_is_far_from_it(run, capsys):
    assert main(["sample", str(run), "--temperature", "3"]) == 2
    assert "did you mean" not in capsys.readouterr().err
    assert main(["sample", str(run), "--guidance_scale", "3"]) == 2
    assert "did you mean --guidance?" in capsys.readouterr().err
    assert main(["sample", str(run), "--sampling_step", "3"]) == 2
    assert "did you mean --sampling_steps?" in capsys.readouterr().err
