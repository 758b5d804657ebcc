"""Every command and every program that README and docs show is run, page by page and in their order, in small.

What a line says stays; flags of size are written behind it, and where a flag may be given once only its value is changed.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

import s3
from documented import ELSEWHERE, PAGES, ROOT, Shown, shown
from inception_oracles import ORACLES
from interop.test_edm import theirs  # noqa: F401  # autouse: modules by which EDM's pickles are written
from launcher import Launcher, Started
from prepared import FLAGS, MADE, NETWORK, bring, named

# ---- what is changed of a line

SMALLER = (  # in any line: a value that decides how long it takes
    (r"--time 58m", "--time 45s"),  # one by the clock; what 10 steps take, and what goes before them, is 12 s on a busy machine
    (r"--time 8h(?!.*--dry_run)", "--steps 2"),
    (r"(train\b.*--(?:steps|lr_anneal_steps)) \d+", r"\1 2"),
    (r"--nproc-per-node \d+", "--nproc-per-node 2"),
    (r"_500000\.pt", "_000002.pt"),  # what two steps have written
    (r"--eval_every \d+", "--eval_every 2"),
    (r"(packed --image_size) 64", r"\1 16"),
)
OLD = "--image_size 16 --num_channels 32 --num_res_blocks 1 --diffusion_steps 8"
FEW = "--num_samples 4"

# Of these lines, by their beginning, the first that fits is taken: what is written behind.
BEHIND = {
    "iddpm train DATA --run runs/mine": "--steps 5",  # goes on with a run of 3 steps that was imported
    "iddpm train my_photos --time 8h --run runs/mine": "--batch_size 2 --num_workers 1 --sampling_steps 3 --ema_power 0.05,0.10",
    "iddpm train PHOTOS --task enlarge": f"{NETWORK} --image_size 16 --small_size 8",  # PSNR and SSIM want 11 pixels
    "iddpm train PHOTOS --task classify": f"{NETWORK}",
    "iddpm train PHOTOS --task": f"{NETWORK}",
    "iddpm train PHOTOS --init_from": "--batch_size 4 --num_workers 1",
    "iddpm train PHOTOS --eval_every": f"{NETWORK} --steps 2 --eval_samples 8 --diffusion_steps 20",
    "iddpm train my_photos --eval_every": f"{NETWORK} --steps 2 --eval_samples 8 --diffusion_steps 20",
    "iddpm train my_photos --preset none": f"{NETWORK} --steps 2 --diffusion_steps 20",
    "iddpm train data/digits/train --preset digits": "--steps 4 --batch_size 8 --num_workers 1 --sampling_steps 3",
    "iddpm train s3://": NETWORK,
    "iddpm train PHOTOS --preset cifar10-tiny,edm": f"{NETWORK} --steps 2",
    "iddpm train data/cifar10/train --preset": f"{NETWORK} --steps 2",
    "iddpm train PHOTOS --preset": NETWORK,
    "iddpm train": "--batch_size 2 --num_workers 1 --sampling_steps 3",  # the recipe is chosen for the images and the time
    "torchrun --nproc-per-node 8 -m -- iddpm train PHOTOS": f"{NETWORK} --steps 2",
    "torchrun --standalone": f"{NETWORK} --steps 2",
    "torchrun --nproc-per-node 8 -m -- iddpm image_train": f"{OLD} --batch_size 2 --lr_anneal_steps 2",
    "OPENAI_LOGDIR=logs iddpm image_train": f"{OLD} --batch_size 4 --steps 2",
    "OPENAI_LOGDIR=logs iddpm image_sample": f"{OLD} {FEW} --timestep_respacing 4",
    "OPENAI_LOGDIR=logs iddpm image_nll": f"{OLD} {FEW} --batch_size 4",
    "python -c": f"{OLD} --batch_size 2 --lr_anneal_steps 2",
    "iddpm sample runs/cifar10": f"{FEW} --sampling_steps 2",  # the published network, in its own size
    "iddpm nll runs/cifar10": f"{FEW} --sampling_steps 2",
    "iddpm edit RUN": "--labels cat",
    "iddpm evaluate x.npz": "",
    "iddpm evaluate samples.npz": "",
    "iddpm evaluate up.npz": "",
    "iddpm evaluate": "--num_samples 24 --sampling_steps 3",
    "iddpm ema": "--num_samples 24 --sampling_steps 3",
    "iddpm studio": "--port PORT",
}


def small(line: str) -> str:
    """A line with what makes it take seconds."""
    behind = next((flags for begin, flags in BEHIND.items() if line.startswith(begin)), None)
    if behind is None and re.match(r"iddpm (sample|nll)", line) and not re.search(r"--(seeds|given|high_res)", line):
        behind = FEW if re.search("--(curve|sampling_steps)", line) or "sample" in line else f"{FEW} --sampling_steps 5"
    for pattern, value in SMALLER:
        line = re.sub(pattern, value, line)
    return line.replace(" ...", "") + f" {behind}" * bool(behind)


PROGRAMS = ((r'time="8h"', "steps=2, batch_size=2, sampling_steps=3"),)  # the same for programs
FOLDER = {"docs/guides/formats.md": {"import numpy": "digits"}}  # where a program looks for files that a command wrote
MORE = {"docs/guides/studio.md": ("runs/mine",)}  # what a page assumes and does not name

# ---- how a line is run

# What the shell makes of the words after `iddpm`: one file of JSON for each call.
ASK = "import json, os, sys; json.dump([sys.argv[1:], dict(os.environ)], open('asked.json', 'w'))"
SHELL = f"""
set -e
shopt -s nullglob
iddpm() {{ "{sys.executable}" -S -E -c "{ASK}" "$@"; }}
open() {{ test -s "$1"; }}
"""


class Page:
    """A folder with what a page assumes, and what its lines have done there."""

    def __init__(self, folder: Path, launcher: Launcher, env: dict[str, str]):
        self.folder, self.launcher, self.settings, self.count = folder, launcher, "", 0
        self.env, self.serving = env, list[Started]()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = str(free.getsockname()[1])

    def run(self, line: str) -> None:
        """A line of the shell; a failure says which, and what it told."""
        line = re.sub(r"\b(PORT|8765)\b", self.port, line)
        asked, begun = self.folder / "asked.json", time.monotonic()
        asked.unlink(missing_ok=True)
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        self.count += 1
        env = os.environ | self.env | FLAGS | {"PATH": path, "OPENAI_LOGDIR": f"logs{self.count}"}
        script = SHELL + self.settings + line + "\n"
        done = subprocess.run(["bash", "-c", script], cwd=self.folder, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, (line, done.stdout, done.stderr)
        told = done.stdout + done.stderr
        if asked.exists():
            told = self.ask(line, *json.loads(asked.read_text()))
        elif re.fullmatch(r'\w+="[^"]*"', line):
            self.settings += f"{line}\n"
        assert "Traceback" not in told, (line, told)
        for name in re.findall(r"(?:--out|>|--csv) ([^\s:]+)(?!\S)", line):
            assert (self.folder / name).exists(), (line, told)
            if name.endswith(".png"):
                Image.open(self.folder / name).load()
        print(f"{time.monotonic() - begun:5.1f} s  {line}", flush=True)

    def ask(self, line: str, words: list[str], env: dict[str, str]) -> str:
        said = self.folder.with_suffix(f".said{len(list(self.folder.parent.glob('*.said*')))}")
        started = self.launcher.start(*words, said=said, cwd=self.folder, env=env)
        if words[0] not in ("serve", "studio"):
            codes, told = started.wait(300), said.read_text()
            assert codes == [0], (line, codes, told)
            return told
        self.serving.append(started)
        for _ in range(600):
            assert started.running(), (line, said.read_text())
            if f":{self.port}" in said.read_text():
                break
            time.sleep(0.1)
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/{'health' * (words[0] == 'serve')}", timeout=60) as answer:
            assert answer.status == 200
        return said.read_text()

    def program(self, text: str, inside: str) -> None:
        """A Python program, as a file of its own would be run."""
        for pattern, value in PROGRAMS:
            text = re.sub(pattern, value, text)
        env = os.environ | self.env
        command = [sys.executable, "-W", "error", "-c", text]
        done = subprocess.run(command, cwd=self.folder / inside, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, (text, done.stdout, done.stderr)

    def end(self) -> None:
        for started in self.serving:
            started.kill(number=signal.SIGTERM)
            assert started.wait(60) == [0], started.said.read_text()


@contextlib.contextmanager
def bucket(page: str, folder: Path) -> Iterator[dict[str, str]]:
    """Of the page on remote storages: a server on this machine, with a bucket and images in it."""
    if page != "docs/guides/remote.md":
        yield {}
        return
    with s3.moto() as port:
        env = s3.ACCESS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
        code = "import s3fs; fs = s3fs.S3FileSystem(); fs.mkdir('bucket'); fs.put('photos', 'bucket/data', recursive=True)"
        subprocess.run([sys.executable, "-c", code], cwd=folder, env=os.environ | env, check=True)
        yield env


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Where things are made of which pages take copies."""
    return tmp_path_factory.mktemp("world")


def makes(rows: list[Shown]) -> set[str]:
    """What the lines of a page write themselves."""
    patterns = (r"--run (\S+)", r"iddpm data digits (\S+)", r"OPENAI_LOGDIR=(\S+)")
    return {name for row in rows for pattern in patterns for name in re.findall(pattern, row.text)}


def run_by_page() -> dict[str, list[Shown]]:
    found: dict[str, list[Shown]] = {}
    for path in PAGES:
        rows = [row for row in shown(path) if not row.excluded and not (row.python and row.page in ELSEWHERE)]
        if rows:
            found[rows[0].page] = rows
    return found


@pytest.mark.slow
@pytest.mark.parametrize("page", run_by_page())
def test_what_a_page_shows_runs(page, world, launcher, tmp_path):
    rows, folder = run_by_page()[page], tmp_path / "page"
    folder.mkdir()
    paths = [str(ROOT / "src"), *([str(ORACLES)] if "diffusers" in str(rows) else [])]
    env = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}

    def command(where: Path, line: str) -> None:
        Page(where, launcher, env).run(line)

    assumed = {name for row in rows for name in named(row.text)} - makes(rows) | set(MORE.get(page, ()))
    for name in sorted(assumed | ({"photos"} if "s3://" in str(rows) else set())):
        bring(name, world, folder, command)
    with bucket(page, folder) as more:
        it = Page(folder, launcher, env | more)
        try:
            for row in rows:
                print(row, flush=True)
                if row.python:
                    inside = FOLDER.get(page, {})
                    it.program(row.text, next((where for begin, where in inside.items() if row.text.startswith(begin)), "."))
                else:
                    it.run(small(row.text))
        finally:
            it.end()


def test_every_row_of_the_tables_belongs_to_a_line():
    rows = [row for rows in run_by_page().values() for row in rows]
    assert [begin for begin in BEHIND if not any(row.text.startswith(begin) for row in rows)] == []
    needed = {name for row in rows for name in named(row.text)}
    needed |= {name for made in MADE.values() if isinstance(made, str) for name in named(made)}
    assert set(MADE) - needed == set()
