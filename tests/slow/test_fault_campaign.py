"""Many real deaths: of processes at random moments, of a worker under torchrun, of the link between two hosts.

`pytest -m slow -s tests/slow/test_fault_campaign.py` prints the counts that docs/log.md holds.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

import campaign
from conftest import flags
from launcher import Launcher

pytestmark = pytest.mark.slow

SRC = Path(__file__).parents[2] / "src"


@pytest.fixture(scope="module")
def launcher():
    with Launcher() as launcher:
        yield launcher


# ---- kill -9 at random moments


@pytest.fixture(scope="module")
def tally():
    kills, runs, differing = [], [], []
    yield kills, runs, differing
    print(f"\n{len(runs)} runs, {campaign.report(kills)}; tensors, numbers or losses that differ: {len(differing)}")


@pytest.mark.parametrize("name", campaign.SETTINGS)
def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(launcher, pictures, tmp_path, tally, name):
    """Ten kills at random moments and three more once a save has begun, in as many runs as they take."""
    settings, rng = campaign.SETTINGS[name], random.Random(name)
    quiet = campaign.undisturbed(launcher, pictures, tmp_path / "quiet", settings)
    moments = campaign.delays(rng, 0.6 * quiet.seconds, 10, 3)
    for run, kills, differing in campaign.until_all(launcher, pictures, quiet, settings, moments):
        for total, new in zip(tally, (kills, [run], differing)):
            total += new
        assert not differing and not campaign.asides(run), (run, kills)


def test_at_least_fifty_kills_of_which_ten_fell_inside_a_save(tally):
    kills, runs, differing = tally
    assert len(kills) >= 50 and sum(kill.where == "inside a save" for kill in kills) >= 10
    assert len(runs) >= len(campaign.SETTINGS) and not differing


@pytest.mark.parametrize("shard", [0, -1], ids=["whole", "sharded"])
def test_a_run_on_two_processes_killed_one_at_a_time_ends_as_one_that_was_not(launcher, pictures, tmp_path, shard):
    settings, rng = dict(shard=shard, dropout=0.1, grad_clip=1), random.Random(shard)
    quiet = campaign.undisturbed(launcher, pictures, tmp_path / "quiet", settings, processes=2)
    kills = []
    for rank in (0, 1):
        moments = [rng.uniform(0.3, 0.9) * quiet.seconds for _ in range(3)]
        kills += campaign.killed(launcher, pictures, tmp_path / f"run{rank}", settings, moments, 2, rank)
        assert not campaign.differing(tmp_path / f"run{rank}", quiet.run)
    assert len(kills) >= 2
    print(f"\ntwo processes, {'sharded' if shard else 'whole'}: {len(kills)} kills of one of them, 0 tensors or numbers differ")


# ---- torchrun


def torchrun(*args: object, within: tuple[str, ...] = (), said: Path, **environment: str) -> subprocess.Popen:
    env = {k: v for k, v in os.environ.items() if k != "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SRC)} | environment
    command = [*within, sys.executable, "-m", "torch.distributed.run", *map(str, args)]
    with open(said, "a") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env)


def train_of(run: Path, pictures: Path, **settings: object) -> list[object]:
    settings = campaign.RUN | dict(dropout=0.1, steps=40, save_interval=8) | settings
    return ["-m", "--", "iddpm", "train", pictures, "--run", run, *flags(**settings)]


def until(text: str, said: Path, *processes: subprocess.Popen, seconds: float = 120, times: int = 1) -> None:
    """Wait until the processes have said something so many times."""
    limit = time.monotonic() + seconds
    while len(re.findall(text, said.read_text())) < times:
        assert time.monotonic() < limit, f"{text!r} not said within {seconds} s:\n{said.read_text()[-3000:]}"
        assert all(p.poll() is None for p in processes), said.read_text()[-3000:]
        time.sleep(0.01)


def workers(launcher: subprocess.Popen) -> dict[int, int]:
    """The process number of each rank under torchrun."""
    out = {}
    for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        found = re.search(rb"\0RANK=(\d+)\0", b"\0" + Path(f"/proc/{child}/environ").read_bytes())
        if found:
            out[int(found[1])] = int(child)
    return out


@pytest.fixture(scope="module")
def quiet(launcher, pictures, tmp_path_factory):
    """Two processes that nothing disturbs."""
    run = tmp_path_factory.mktemp("quiet") / "r"
    launcher.start(*train_of(run, pictures)[3:], said=run.with_suffix(".out"), processes=2).succeed()
    return run


@pytest.mark.parametrize(
    ("rank", "variable"), [(1, {}), (0, {}), (1, {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})], ids=["1", "0", "1, variable set"]
)
def test_a_worker_killed_under_torchrun_starts_again_by_itself(pictures, tmp_path, quiet, rank, variable):
    run, said = tmp_path / "r", tmp_path / "said"
    launcher = torchrun(
        "--standalone", "--nproc-per-node", 2, "--max-restarts", 3, *train_of(run, pictures), said=said, **variable
    )
    until("saved .*step_00000016", said, launcher)
    os.kill(workers(launcher)[rank], signal.SIGKILL)
    died = time.monotonic()
    assert launcher.wait(100) == 0, said.read_text()[-3000:]
    text = said.read_text()
    restarts = len(re.findall("resuming ", text))
    print(f"\nrank {rank} killed under torchrun {variable}: {restarts} restart, done {time.monotonic() - died:.0f} s later")
    assert restarts == 1
    assert not campaign.differing(run, quiet)


def test_torchrun_that_is_asked_to_end_has_all_saved(pictures, tmp_path, quiet):
    """SIGTERM to the launcher, as Slurm sends it; the same command then goes on to the end."""
    run, said = tmp_path / "r", tmp_path / "said"
    command = ("--standalone", "--nproc-per-node", 2, *train_of(run, pictures, save_interval=1000))
    launcher = torchrun(*command, said=said)
    until("step 10/", said, launcher)
    launcher.send_signal(signal.SIGTERM)
    code = launcher.wait(120)
    print(f"\nSIGTERM to torchrun: it ends with code {code}")
    assert code != 0 and "all is saved" in said.read_text()
    assert torchrun(*command, said=said).wait(120) == 0, said.read_text()[-3000:]
    assert "resuming " in said.read_text()
    assert not campaign.differing(run, quiet)


# ---- two hosts


@contextmanager
def two_hosts(*names: str):
    """Two network namespaces with a link between them: 10.77.0.1 and 10.77.0.2, on the interface veth0."""

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    for name in names:
        ip("netns", "add", name)
    try:
        ip("link", "add", "veth0", "netns", names[0], "type", "veth", "peer", "name", "veth0", "netns", names[1])
        for k, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.77.0.{k}/24", "dev", "veth0")
            ip("-n", name, "link", "set", "veth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield lambda state: ip("-n", names[0], "link", "set", "veth0", state)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


needs_namespaces = pytest.mark.skipif(
    not shutil.which("ip") or os.geteuid() != 0
    or subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode != 0,
    reason="needs iproute2 and the right to make network namespaces",
)  # fmt: skip


def on_two_hosts(hosts: tuple[str, str], run: Path, pictures: Path, said: Path, **settings: object) -> list[subprocess.Popen]:
    started = []
    for k, host in enumerate(hosts):
        within = ("ip", "netns", "exec", host, "unshare", "--uts", "sh", "-c", f'hostname {host}; exec "$@"', "sh")
        rendezvous = ["--nnodes", 2, "--nproc-per-node", 1, "--max-restarts", 5, "--rdzv-backend", "c10d", "--rdzv-id", "cut",
                      "--rdzv-endpoint", "10.77.0.1:29400", "--rdzv-conf", f"is_host={1 - k}",
                      "--local-addr", f"10.77.0.{k + 1}"]  # fmt: skip
        command = (*rendezvous, *train_of(run, pictures, **settings))
        started.append(torchrun(*command, within=within, said=said, GLOO_SOCKET_IFNAME="veth0"))
    return started


@needs_namespaces
@pytest.mark.parametrize(("cut", "timeout"), [(5, 60), (20, 4)], ids=["shorter than the timeout", "longer than the timeout"])
def test_a_link_between_two_hosts_that_is_cut_and_restored(pictures, tmp_path, quiet, cut, timeout):
    hosts, run, said = (f"iddpm-a{os.getpid()}", f"iddpm-b{os.getpid()}"), tmp_path / "r", tmp_path / "said"
    with two_hosts(*hosts) as link:
        both = on_two_hosts(hosts, run, pictures, said, timeout=timeout)
        try:
            until("saved .*step_00000016", said, *both)
            link("down")
            began = time.monotonic()
            time.sleep(cut)
            link("up")
            codes = [p.wait(300) for p in both]
            seconds = time.monotonic() - began
        finally:
            for p in both:
                p.kill()
    text = said.read_text()
    print(f"\nlink cut for {cut} s, --timeout {timeout}: codes {codes}, {len(re.findall('resuming ', text))} restarts, "
          f"ended {seconds:.0f} s after the cut; {re.findall('iddpm: waited.*', text)}")  # fmt: skip
    assert codes == [0, 0], text[-3000:]
    assert not campaign.differing(run, quiet)


# ---- Slurm's script, on one node, with stand-ins for Slurm's own two commands


def test_the_script_for_slurm_saves_and_queues_again_and_then_goes_on(pictures, tmp_path, quiet):
    commands = {
        "srun": 'shift; exec "$@"',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
        "scontrol": f'case $1 in show) echo localhost;; *) echo "$@" >> {tmp_path}/queue;; esac',
    }
    for name, line in commands.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    run, said = tmp_path / "r", tmp_path / "said"
    env = os.environ | dict(
        PATH=f"{tmp_path}:{os.environ['PATH']}", PYTHONPATH=str(SRC), OMP_NUM_THREADS="1", SLURM_JOB_ID="7", SLURM_NNODES="1",
        SLURM_JOB_NODELIST="here", SLURM_GPUS_ON_NODE="2",
    )  # fmt: skip
    script = ["bash", str(SRC.parent / "recipes" / "slurm.sh"), *map(str, train_of(run, pictures, save_interval=1000)[4:])]
    with open(said, "a") as file:
        job = subprocess.Popen(script, stdout=file, stderr=file, env=env)
        until("step 10/", said, job)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(120) == 0 and (tmp_path / "queue").read_text() == "requeue 7\n", said.read_text()[-3000:]
        assert "all is saved" in said.read_text()
        subprocess.run(script, stdout=file, stderr=file, env=env | {"SLURM_RESTART_COUNT": "1"}, check=True, timeout=120)
    assert "resuming " in said.read_text() and not campaign.differing(run, quiet)
