"""Data, runs and results on a remote storage: a real S3 server on loopback, with faults on the wire."""

import json
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import s3
from conftest import TINY, flags
from data import test_tables as forms
from iddpm.cli import main as cli
from iddpm.config import Config
from iddpm.data import Images
from iddpm.errors import UserError
from iddpm.sampling import writers
from iddpm.sampling.job import Job
from iddpm.store import checkpoint, lock, log, shards
from iddpm.store import files as storage
from iddpm.store import remote as places
from iddpm.store.remote import Unreachable, place
from iddpm.store.weights import read_weights
from iddpm.training.loop import train

pytest.importorskip("s3fs")
FLAT = dict(TINY, class_cond=True, save_interval=2)


@pytest.fixture(scope="session")  # the drivers keep what they have connected to, so there is one server for all
def proxy():
    with s3.moto() as port, pytest.MonkeyPatch.context() as patch:
        proxy = s3.Proxy(port)
        for name, value in s3.ACCESS.items():
            patch.setenv(name, value)
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")  # what the driver itself tries again would hide ours
        yield proxy
        proxy.close()


@pytest.fixture
def bucket(proxy, request) -> Path:
    """An empty bucket of the test's own."""
    import s3fs

    proxy.reset()
    name = f"b{abs(hash(request.node.nodeid))}"
    s3fs.S3FileSystem().mkdir(name)
    yield place(f"s3://{name}")
    proxy.reset()


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(places, "PATIENCE", 1.0)


def put(folder: Path, target: Path) -> Path:
    """A local folder's files, there."""
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        (target / file.relative_to(folder).as_posix()).write_bytes(file.read_bytes())
    return target


def assert_same_state(a: checkpoint.Saved, b: checkpoint.Saved) -> None:
    assert dict(a.state, seconds=0) == dict(b.state, seconds=0)  # the time that each has taken
    assert a.tensors().keys() == b.tensors().keys()
    assert all(torch.equal(tensor, b.tensors()[name]) for name, tensor in a.tensors().items())


def steps(run: Path) -> list[int]:
    return [row["step"] for row in log.read_rows(run) if "event" not in row]


# ---- places


def test_a_local_name_is_a_path_and_an_address_is_kept_as_it_is(tmp_path):
    assert place("runs/a") == Path("runs/a") and place(f"file://{tmp_path}/a") == tmp_path / "a"
    path = place("memory://bucket/runs/a.b")
    assert str(path) == "memory://bucket/runs/a.b" and str(path.parent / "c") == "memory://bucket/runs/c"
    assert (path.name, path.suffix, str(path.with_name("d"))) == ("a.b", ".b", "memory://bucket/runs/d")
    assert str(path.relative_to(path.parents[1])) == "runs/a.b" and place(path) is path


def test_an_empty_name_is_not_the_folder_one_is_in(run, capsys):
    for argv in (["nll", str(run), ""], ["nll", "", str(run)], ["data", "check", ""], ["sample", ""], ["edit", "", "a.png"]):
        assert cli.main(argv) == 2
        assert "an empty text" in capsys.readouterr().err, argv


def test_an_address_is_never_a_local_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError, match="not on this machine"):
        open(place("memory://a/b"), "w").close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("address", "line"),
    [
        ("nosuch://a/b", "nosuch:// is unknown to fsspec"),
        ("s3://", "names no place"),
        ("s3://no-such-bucket/data", "s3://no-such-bucket/data does not exist"),
    ],
)
def test_an_address_that_leads_nowhere_is_one_line(proxy, capsys, address, line):
    assert cli.main(["train", address, "--run", "memory://nowhere/run", *flags(**FLAT)]) == 2
    err = capsys.readouterr().err
    assert line in err and len(err.splitlines()) == 1


def test_a_missing_driver_is_one_line_with_what_to_install(monkeypatch, capsys):
    import fsspec

    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda *a, **k: (_ for _ in ()).throw(ImportError("Install s3fs")))
    assert cli.main(["sample", "s3://never-asked/run"]) == 2
    assert capsys.readouterr().err == (
        "iddpm: s3://never-asked/run: the driver of s3:// is not installed: pip install 'iddpm[s3]'\n"
    )


def test_training_into_a_bucket_that_is_not_there_is_one_line(proxy, pictures, capsys):
    assert cli.main(["train", str(pictures), "--run", "s3://no-such-bucket/run", *flags(**FLAT)]) == 2
    err = capsys.readouterr().err
    assert "s3://no-such-bucket/run/.lock cannot be written: The specified bucket does not exist" in err
    assert len(err.splitlines()) == 1


def test_of_what_is_written_in_pieces_a_failure_leaves_nothing(bucket):
    def blocks():
        yield b"half"
        raise RuntimeError("the other half")

    with pytest.raises(RuntimeError, match="other half"):
        (bucket / "a").stream(blocks)
    assert not (bucket / "a").exists()


@pytest.mark.parametrize("fault", ["500", "reset"])
def test_a_file_of_several_parts_outlasts_faults(bucket, proxy, tmp_path, fault):
    content = np.random.default_rng(0).bytes(60 << 20)  # s3fs sends parts of 50 MiB
    turn = iter(range(1000))
    proxy.rule = lambda method, path: fault if next(turn) in (1, 3) else None  # they begin, send a part ... and end
    (bucket / "a").stream(lambda: (content[k : k + (9 << 20)] for k in range(0, len(content), 9 << 20)))
    assert len(proxy.failed) == 2
    proxy.rule = lambda method, path: None
    assert places.fetch(bucket / "a").read_bytes() == content


# ---- data


def test_images_and_labels_are_those_of_the_same_local_folder(bucket, pictures, tmp_path):
    local, there = Images.open(pictures, (8, 8), 1), Images.open(str(put(pictures, bucket / "data")), (8, 8), 1)
    assert np.array_equal(there.batch(np.arange(22)), local.batch(np.arange(22)))
    assert np.array_equal(there.labels, local.labels) and (there.classes, there.rule) == (local.classes, local.rule)
    assert there.describe() == local.describe()
    names = sorted(p.relative_to(pictures).as_posix() for p in pictures.rglob("*.png"))
    (bucket / "data" / "labels.csv").write_text("".join(f"{name},{k % 2}\n" for k, name in enumerate(names)))
    (bucket / "data" / ".hidden" / "x.png").write_bytes(b"")
    labelled = Images.open(bucket / "data", (8, 8), 1, cache_bytes=0)
    assert labelled.rule == "labels.csv" and labelled.labels.tolist() == [k % 2 for k in range(22)]
    assert np.array_equal(labelled.batch([3, 1]), local.batch([3, 1]))


def test_an_image_that_does_not_come_is_no_broken_image(bucket, proxy, pictures, hasty):
    put(pictures, bucket / "data")
    (bucket / "data" / "disc" / "001.png").write_bytes(b"damaged")
    proxy.rule = lambda method, path: "half" if path.endswith("001.png") and len(proxy.failed) < 2 else None
    with pytest.warns(UserWarning, match="1 of 22 images are broken"):
        Images.open(bucket / "data", (8, 8), 1)
    proxy.rule = lambda method, path: "500" if path.endswith("004.png") else None
    with pytest.raises(Unreachable, match=r"004.png cannot be reached"):
        Images.open(bucket / "data", (8, 8), 1)


# ---- runs


@pytest.fixture(scope="module")
def undisturbed(config, data, tmp_path_factory) -> Path:
    """A local run of 6 steps."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train(config.updated(dict(steps=6, save_interval=2)), data, folder)
    return folder


def test_a_run_killed_amid_an_upload_ends_as_an_undisturbed_local_one(launcher, bucket, proxy, pictures, undisturbed, tmp_path):
    """All on S3: the data and the run. The kill comes while a file of step 4 is on the wire."""
    data, run = put(pictures, bucket / "data"), bucket / "runs" / "a"
    proxy.rule = lambda method, path: "hang" if method == "PUT" and "step_00000004/state/optimizer" in path else None
    env = s3.ACCESS | {name: os.environ[name] for name in ("AWS_ENDPOINT_URL", "AWS_MAX_ATTEMPTS")}
    line = ("train", data, "--run", run, *flags(**dict(FLAT, steps=6)))
    process = launcher.start(*line, said=tmp_path / "said", env=env)
    assert proxy.hanging.wait(120), process.said.read_text()
    process.kill()
    process.wait()
    proxy.reset()
    assert (run / "checkpoints" / "step_00000004" / "weights.safetensors").exists()
    with pytest.raises(UserError, match="step_00000004: incomplete"):
        read_weights(run, step=4)
    assert read_weights(run).about["step"] == 2
    out = launcher.start("train", data, "--run", run, said=tmp_path / "said", env=env).succeed()
    assert f"resuming {run} at step 2" in out
    assert "passed over step_00000004: incomplete (it has no manifest.json: its saving was cut short)" in out
    assert f"took over {run} from process {process.pids[0]}" in out
    folder, passed_over = checkpoint.newest(run)
    assert folder == run / "checkpoints" / "step_00000006" and not passed_over
    assert_same_state(checkpoint.load(folder), checkpoint.load(checkpoint.newest(undisturbed)[0]))
    assert steps(run) == [1, 2, 3, 4, 5, 6] and any("passed over" in r.get("event", "") for r in log.read_rows(run))
    assert (run / "progress.csv").read_text().count("\n") == 7
    assert (run / "samples" / "step_00000006.png").read_bytes()[:4] == b"\x89PNG"
    assert Config.from_json((run / "config.json").read_text(), "").data.path == str(data)
    assert not (run / ".lock").exists()


def test_faults_on_the_wire_now_and_then_change_nothing(bucket, proxy, config, data, undisturbed):
    turn, kinds = iter(range(100_000)), ("500", "reset", "half")

    def rule(method: str, path: str) -> str | None:
        k = next(turn)
        kind = kinds[k // 4 % 3]
        return None if k % 4 or (kind == "half" and method != "GET") else kind

    proxy.rule = rule
    train(config.updated(dict(steps=6, save_interval=2)), data, bucket / "run", sheets=False)
    assert {method for method, _ in proxy.failed} >= {"PUT", "GET", "HEAD"} and len(proxy.failed) > 10
    folder, passed_over = checkpoint.newest(bucket / "run")
    assert not passed_over
    assert_same_state(checkpoint.load(folder), checkpoint.load(checkpoint.newest(undisturbed)[0]))


@pytest.mark.parametrize(
    ("fault", "line"), [("500", "cannot be reached, tried for"), ("reset", "cannot be reached"), ("403", "access denied")]
)
def test_a_fault_that_lasts_is_one_line_and_the_earlier_checkpoint_is_whole(
    bucket, proxy, pictures, undisturbed, capsys, hasty, fault, line
):
    run = bucket / "run"
    proxy.rule = lambda method, path: fault if method in ("PUT", "POST") and "step_00000004" in path else None
    command = ["train", str(pictures), "--run", str(run), *flags(**dict(FLAT, steps=6))]
    assert cli.main(command) == 2
    err = capsys.readouterr().err
    assert line in err and err.endswith("the checkpoint before it is whole\n") and len(err.splitlines()) == 1
    proxy.reset()
    folder, _ = checkpoint.newest(run)
    assert folder.name == "step_00000002" and steps(run)[:4] == [1, 2, 3, 4]
    assert_same_state(checkpoint.load(folder), checkpoint.load(storage.step_dir(undisturbed, 2)))
    assert cli.main(command) == 0 and f"resuming {run} at step 2" in capsys.readouterr().out


def test_no_answer_is_not_taken_for_an_absent_or_damaged_checkpoint(bucket, proxy, run, hasty, capsys):
    there = put(run, bucket / "run")
    for part in ("manifest.json", "state/optimizer", "config.json", "list-type"):
        proxy.rule = lambda method, path, part=part: (
            "500" if part in path or (part == "list-type" and path.count("/") == 1) else None
        )
        assert cli.main(["train", "--run", str(there), "--steps", "5"]) == 2
        err = capsys.readouterr().err
        assert "cannot be reached" in err and len(err.splitlines()) == 1, part
    proxy.reset()
    assert [p.name for p in storage.step_dirs(there)] == ["step_00000004"]


def test_a_damaged_checkpoint_is_passed_over_and_named(bucket, undisturbed):
    run = put(undisturbed, bucket / "run")
    file = run / "checkpoints" / "step_00000006" / "state" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    shorter = run / "checkpoints" / "step_00000004" / "weights.safetensors"
    shorter.write_bytes(shorter.read_bytes()[:-1])
    found, passed_over = checkpoint.newest(run)
    assert found.name == "step_00000002"
    assert passed_over == [
        "passed over step_00000006: state/optimizer.safetensors is damaged",
        "passed over step_00000004: weights.safetensors is damaged",
    ]


def test_parts_of_several_processes_are_put_together(bucket, tmp_path):
    whole, entries = torch.arange(35.0).reshape(7, 5), {}
    folder = storage.step_dir(bucket / "run", 1)
    for rank, (a, b) in enumerate([(0, 3), (3, 7)]):
        entries |= shards.write(folder, {"weights": {"w": shards.Part(whole[a:b], (a, 0), (7, 5))}}, rank, lambda group: {})
    assert torch.equal(shards.tensors(folder, entries)["weights:w"][()], whole)
    made = shards.assemble(folder, entries, "weights", {"who": "me"})
    storage.commit(folder, folder, made)
    assert storage.verify(folder) is None and torch.equal(shards.tensors(folder)["weights:w"], whole)
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "weights.safetensors"]
    assert storage.metadata(folder / "weights.safetensors") == {"who": "me"}


def test_only_the_newest_are_kept(bucket, config, data):
    train(config.updated(dict(steps=4, save_interval=1, keep=2)), data, bucket / "run", sheets=False)
    assert [p.name for p in storage.step_dirs(bucket / "run")] == ["step_00000003", "step_00000004"]


@pytest.mark.parametrize("where", ["local", "s3"])
def test_a_checkpoint_that_was_passed_over_does_not_push_out_whole_ones(bucket, undisturbed, config, data, tmp_path, where):
    """With --keep 1, a damaged one of step 6 would otherwise count as the newest, and that of step 5 be deleted."""
    run = put(undisturbed, bucket / "run" if where == "s3" else shutil.copytree(undisturbed, tmp_path / "run"))
    (run / "checkpoints" / "step_00000006" / "weights.safetensors").write_bytes(b"damaged")
    train(config.updated(dict(steps=5, keep=1)), data, run, say=lambda line: None, sheets=False)
    assert checkpoint.newest(run)[0].name == "step_00000005"


def test_a_log_is_there_before_the_checkpoint_it_leads_to(bucket, proxy, config, data):
    train(config.updated(dict(steps=2, save_interval=1)), data, bucket / "run", sheets=False)
    order = [path.partition("/run/")[2] for method, path in proxy.seen if method == "PUT"]
    for step in (1, 2):
        before = order[: order.index(f"checkpoints/step_{step:08d}/manifest.json")]
        assert {"log.jsonl", "progress.csv"} <= set(before)


def test_a_log_comes_with_its_rows_and_a_fault_meanwhile_loses_nothing(bucket, proxy, monkeypatch, hasty, capfd):
    monkeypatch.setattr(log, "EVERY", 0.0)
    with log.copied():
        logger = log.Logger(bucket / "run")
        proxy.rule = lambda method, path: "500"
        logger.row(step=1, loss=0.5)
        logger.event(1, "a remark")
        assert capfd.readouterr().err.count("the log waits on this machine") == 1
        proxy.reset()
        logger.row(step=2, loss=0.25)
        assert steps(bucket / "run") == [1, 2]
        monkeypatch.setattr(log, "EVERY", 1000.0)
        logger.row(step=3, loss=0.125)
        assert steps(bucket / "run") == [1, 2]
    assert steps(bucket / "run") == [1, 2, 3]
    assert log.Logger(bucket / "run", 1).path.read_text() == "".join(
        (bucket / "run" / "log.jsonl").read_text().splitlines(True)[:2]
    )


# ---- results


def run_both(command, local, there, capsys):
    """A command on both, each writing to its own place; what they printed."""
    printed = []
    for folder in (local, there):
        assert cli.main([str(part).replace("ROOT", str(folder)) for part in command]) == 0, capsys.readouterr().err
        printed.append(capsys.readouterr().out.replace(str(folder), "ROOT"))
    return printed


@pytest.fixture
def both(bucket, run, pictures, tmp_path):
    for source, name in ((run, "run"), (pictures, "data")):
        put(shutil.copytree(source, tmp_path / name), bucket / name)
    return tmp_path, bucket


def test_samples_are_those_of_a_local_run_in_every_form(both, proxy, capsys):
    local, there = both
    for out in ("a/x.npz", "a/y.png", "a/z"):
        command = ["sample", "ROOT/run", "--out", f"ROOT/{out}", *flags(num_samples=5, batch_size=2, device="cpu")]
        one, other = run_both(command, local, there, capsys)
        assert one == other
    assert (there / "a" / "x.npz").read_bytes()[:2] == b"PK"
    with np.load(local / "a" / "x.npz") as a, np.load(places.opened(there / "a" / "x.npz")) as b:
        assert a.files == b.files and all(np.array_equal(a[k], b[k]) for k in a.files)
    names = sorted(p.name for p in (local / "a" / "z").iterdir())
    assert sorted(p.name for p in (there / "a" / "z").iterdir()) == names and len(names) == 7
    for name in ["y.png", *(f"z/{name}" for name in names if name != "job.json")]:
        assert (there / "a" / name).read_bytes() == (local / "a" / name).read_bytes(), name
    assert sorted(p.name for p in (there / "a").iterdir()) == ["x.npz", "y.png", "z"]
    fetched = [path.rpartition("/")[2] for method, path in proxy.seen if method == "GET" and "/step_" in path]
    assert fetched.count("weights-ema-0.9.safetensors") == 3  # once for each command
    assert set(fetched) == {"manifest.json", "weights.safetensors", "weights-ema-0.9.safetensors"}  # of weights, the header


@pytest.mark.parametrize("out", ["x.npz", "folder"])
def test_a_job_that_was_cut_short_goes_on_where_it_was(bucket, config, out):
    job = Job(range(5), [k % 3 for k in range(5)])
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1)).astype(np.uint8)
    writer = writers.writer(bucket / out, config, job, {"job": 1})
    writer.write(images[:2])
    writer.write(images[2:4])
    again = writers.writer(bucket / out, config, job, {"job": 1})
    assert again.done == 4
    again.write(images[4:])
    assert np.array_equal(again.held(), images)
    again.close()
    if out == "x.npz":
        with np.load(places.opened(bucket / out)) as file:
            assert np.array_equal(file["arr_0"], images) and file["arr_1"].tolist() == list(job.labels)
        assert writers.writer(bucket / out, config, job, {"job": 1}).done == 0
    else:
        with Image.open(places.opened(bucket / out / "down_000002.png")) as file:
            assert np.array_equal(np.asarray(file), images[2, :, :, 0])


def test_likelihoods_are_those_of_a_local_run(both, capsys):
    local, there = both
    command = ["nll", "ROOT/run", "ROOT/data", *flags(num_samples=4, device="cpu", out="ROOT/o/n.json", per_image="ROOT/o/i.csv")]
    run_both(command, local, there, capsys)
    a, b = (json.loads((folder / "o" / "n.json").read_text()) for folder in (local, there))
    assert (b.pop("weights"), b.pop("data")) == tuple(a.pop(k).replace(str(local), str(there)) for k in ("weights", "data"))
    assert a == b and (there / "o" / "i.csv").read_bytes() == (local / "o" / "i.csv").read_bytes()
    assert sorted(p.name for p in (there / "o").iterdir()) == sorted(p.name for p in (local / "o").iterdir())


def test_samples_are_measured_as_those_of_a_local_run(both, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    local, there = both
    command = ["evaluate", "ROOT/run", "--reference", "ROOT/data", *flags(num_samples=8, device="cpu", metrics="kd,memorisation")]
    one, other = run_both(command, local, there, capsys)
    where = ("cannot keep features", "features, for other metrics")  # they lie elsewhere
    shown, others = ([line for line in text.splitlines() if not any(w in line for w in where)] for text in (one, other))
    assert shown == others and len(other.splitlines()) == len(others) + 3
    assert len(list((tmp_path / "cache" / "iddpm").iterdir())) == 2
    a, b = (json.loads((folder / "run" / "metrics.json").read_text())["figures"] for folder in (local, there))
    assert [(row["name"], row["value"]) for row in a] == [(row["name"], row["value"]) for row in b]
    assert (there / "run" / "neighbours.csv").read_bytes() == (local / "run" / "neighbours.csv").read_bytes()


# ---- the lock


def test_a_second_trainer_is_refused_and_the_lock_is_given_back(bucket):
    with lock.held(bucket / "run"):
        with pytest.raises(UserError, match=f"is being trained by process {os.getpid()} on"), lock.held(bucket / "run"):
            pass
        assert (bucket / "run" / ".lock").exists()
    assert not (bucket / "run").exists()


def test_of_many_that_start_at_once_one_holds_the_lock(bucket, monkeypatch):
    results, begin, end = [], threading.Barrier(6), threading.Event()
    numbers = iter(range(6))
    monkeypatch.setattr(lock, "_me", lambda: {"host": "here", "pid": next(numbers), "began": "1"})
    monkeypatch.setattr(lock, "_began", lambda pid: "1")

    def take() -> None:
        begin.wait()
        try:
            with lock.held(bucket / "run"):
                results.append("held")
                end.wait(30)
        except UserError:
            results.append("refused")

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    while len(results) < 6:
        time.sleep(0.02)
    end.set()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["held"] + ["refused"] * 5


@pytest.mark.parametrize("changed", [dict(pid=2**22 + 1), dict(host="elsewhere"), dict(boot="another machine of this name")])
def test_a_stale_lock_is_taken_over_once_it_may_be(bucket, monkeypatch, changed):
    monkeypatch.setattr(lock, "SETTLE", 0.0)
    (bucket / ".lock").write_text(json.dumps(lock._me() | {"boot": lock._boot()} | changed))
    if "pid" not in changed:  # of another machine there is only its silence
        with pytest.raises(UserError, match="is being trained"), lock.held(bucket):
            pass
        monkeypatch.setattr(lock, "STALE", -1.0)
    said = []
    with lock.held(bucket, said.append):
        assert len(said) == 1 and said[0].startswith(f"took over {bucket}")
    assert list(bucket.iterdir()) == []


def test_a_holder_gives_signs_of_life_and_says_when_it_has_lost_the_lock(bucket, monkeypatch, capfd):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    with lock.held(bucket):
        first, deadline = (bucket / ".lock").modified(), time.monotonic() + 20
        while (bucket / ".lock").modified() == first:  # whole seconds
            assert time.monotonic() < deadline
            time.sleep(0.1)
        other = lock._me() | {"host": "elsewhere"}
        err = ""
        while "is now also trained by" not in err:
            (bucket / ".lock").write_text(json.dumps(other))  # a beat under way may still write over it
            assert time.monotonic() < deadline
            time.sleep(0.1)
            err += capfd.readouterr().err
    assert json.loads((bucket / ".lock").read_text()) == other


# ---- sources


@pytest.mark.parametrize("form", [f for f in forms.FORMS if f not in (forms.lsun, forms.datasets_folder)])
def test_every_form_is_read_from_there_as_from_this_machine(bucket, tmp_path, form):
    local = form(tmp_path)
    put(tmp_path, bucket / "set")
    there = bucket / "set" if local == tmp_path else bucket / "set" / local.relative_to(tmp_path).as_posix()
    ours, theirs = Images.open(local, forms.SIZE, cache_bytes=0), Images.open(there, forms.SIZE, cache_bytes=0)
    order = np.random.default_rng(0).permutation(len(ours))
    assert (theirs.batch(order) == ours.batch(order)).all()
    assert theirs.classes == ours.classes
    assert (theirs.labels is None and ours.labels is None) or (theirs.labels == ours.labels).all()


@pytest.mark.parametrize("form", [forms.lsun, forms.datasets_folder])
def test_what_is_mapped_into_memory_must_lie_on_this_machine(bucket, tmp_path, form):
    local = form(tmp_path)
    put(tmp_path, bucket / "set")
    with pytest.raises(UserError, match="copy it here"):
        Images.open(bucket / "set" if local == tmp_path else bucket / "set" / local.name, forms.SIZE)
