"""Real processes that die: the run, or the images, of one that did not. The long campaign is in slow/."""

import json
import random
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import numpy as np
import pytest
import torch.distributed as dist
from PIL import Image
from safetensors.numpy import load_file, save_file

import campaign
from conftest import SLOW, TINY, flags
from iddpm.parallel import processes
from iddpm.store.log import read_rows


def test_a_run_killed_three_times_ends_in_every_number_of_one_that_was_not(launcher, pictures, tmp_path):
    settings = campaign.SETTINGS["dropout, law of t"]
    quiet = campaign.undisturbed(launcher, pictures, tmp_path / "quiet", settings)
    moments, total = [random.Random(5).uniform(0.3, 0.7) * quiet.seconds, None, 0.4 * quiet.seconds], 0
    for run, kills, differing in campaign.until_all(launcher, pictures, quiet, settings, moments):
        assert not differing and not campaign.asides(run), campaign.report(kills)
        assert [row["step"] for row in read_rows(run)] == list(range(1, 25))
        total += len(kills)
    assert total == 3


def test_the_comparison_sees_one_bit_of_one_weight_and_one_number(run, tmp_path):
    """The campaign's own measure is no constant."""
    other = shutil.copytree(run, tmp_path / "other")
    assert not campaign.differing(run, other)
    file = max((other / "checkpoints").glob("step_*")) / "weights.safetensors"
    arrays = load_file(file)
    name = max(arrays)
    arrays[name].reshape(-1).view(np.uint32)[-1] ^= 1
    save_file(arrays, file)
    state = file.with_name("state") / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"images": 23}))
    assert sorted(campaign.differing(run, other)) == ["state.json: images", f"weights.safetensors: {name}"]


def test_a_process_killed_before_the_run_had_a_config_leaves_a_folder_to_start_in(launcher, pictures, tmp_path):
    run = tmp_path / "r"
    run.mkdir()
    (run / ".lock").write_text(json.dumps(dict(host=socket.gethostname(), pid=999_999_999, began="1")))
    said = launcher.start("train", pictures, "--run", run, *flags(**dict(TINY, steps=1)), said=tmp_path / "said").succeed()
    assert "took over" in said and "done: " in said


# ---- workers that torchrun starts again


@pytest.fixture
def agent(monkeypatch):
    """The store of an agent, which outlives its workers."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    return store


def meet(ranks: range, world: int, seconds: float = 20) -> list:
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(lambda k: processes._meet(k, world, timedelta(seconds=seconds)), ranks))


def test_workers_that_are_started_again_meet_apart_from_what_the_dead_have_left(agent):
    for generation in range(3):
        agent.set("ask/2", "the word of one that died before it was answered")
        stores = meet(range(3), 3)
        assert not stores[0].check(["address"])
        stores[0].set("address", str(generation))
        assert [int(store.get("address")) for store in stores] == [generation] * 3


def test_a_worker_that_does_not_come_is_named(agent):
    with pytest.raises(TimeoutError, match=r"no sign of rank 1, 2 in 0 s"):
        meet(range(1), 3, seconds=0.2)


# ---- samples


@pytest.fixture(scope="module")
def long_run(config, data, tmp_path_factory):
    """A run with a chain long enough to be killed in."""
    from iddpm.training.loop import train
    from iddpm.training.start import write_config

    config, folder = config.updated(dict(diffusion_steps=40, steps=1)), tmp_path_factory.mktemp("runs") / "long"
    write_config(folder, config)
    train(config, data, folder)
    return folder


N, BATCH = 26, 2
JOB = flags(num_samples=N, batch_size=BATCH, sampling_steps="all", device="cpu")


@pytest.fixture(scope="module")
def images(launcher, long_run, tmp_path_factory):
    """All images of one process that nothing disturbed, and their classes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    launcher.start("sample", long_run, "--out", folder / "a.npz", *JOB, said=folder / "out").succeed()
    with np.load(folder / "a.npz") as file:
        assert file["arr_0"].shape == (N, 8, 8, 1)
        return file["arr_0"].astype(int), file["arr_1"].tolist()


def there(out) -> int:
    """How many images of a job are on the disk."""
    if not out.suffix:
        return len(list(out.glob("[!.]*.png")))
    return sum(len(np.load(part)) for part in out.with_name(f"{out.name}.partial").glob("[0-9]*.npy"))


@pytest.mark.parametrize("name", ["drawn.npz", SLOW("drawn")])
def test_a_sample_job_killed_twice_and_shared_anew_draws_each_image_once(launcher, long_run, images, tmp_path, name):
    """Two processes, of which one is killed; then one, which is killed; then three to the end."""
    out, said = tmp_path / name, tmp_path / "said"
    reached = []
    for count, kill_at, rank in ((2, 4, random.Random(name).randrange(2)), (1, 10, 0)):
        job = launcher.start("sample", long_run, "--out", out, *JOB, said=said, processes=count)
        while there(out) < kill_at and job.running():
            time.sleep(0.002)
        job.kill(rank)
        codes = job.wait()
        assert codes[rank] == -9 and 0 not in codes
        reached.append(there(out))
    assert 4 <= reached[0] <= reached[1] < N and reached[1] >= 10, reached
    text = launcher.start("sample", long_run, "--out", out, *JOB, said=said, processes=3).succeed()
    assert f"{reached[1]} of {N} images are there already" in text
    pixels, labels = images
    drawn = read(out, labels)
    assert drawn.shape == pixels.shape and abs(drawn - pixels).max() <= 1


def read(out, labels) -> np.ndarray:
    """The images in the order of their seeds, and nothing beside them."""
    if out.suffix:
        assert [p.name for p in out.parent.glob("*drawn*")] == [out.name]
        with np.load(out) as file:
            assert file["arr_1"].tolist() == labels
            return file["arr_0"].astype(int)
    names = [f"{('across', 'disc', 'down')[y]}_{seed:06d}.png" for seed, y in enumerate(labels)]
    assert {p.name for p in out.iterdir()} == {*names, "job.json", "labels.csv"}
    return np.stack([np.asarray(Image.open(out / name)) for name in names]).astype(int)[..., None]
