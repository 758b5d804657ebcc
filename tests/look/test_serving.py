"""`iddpm serve` in a process of its own: the images of `iddpm sample`, whoever asks beside, and what it refuses."""

import asyncio
import io
import json
import re
import signal
import socket
import zipfile
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from conftest import flags
from iddpm.cli.main import main
from iddpm.config import Config
from iddpm.errors import UserError
from iddpm.look.serving.app import _order, app
from iddpm.look.serving.desk import Desk, Full, Order
from iddpm.sampling.job import Job
from look import studios
from look.studios import serving

HOW = flags(sampling_steps=3, device="cpu")


@pytest.fixture(scope="module")
def server(launcher, run, tmp_path_factory):
    said = tmp_path_factory.mktemp("serve") / "said"
    with serving(launcher, said, "serve", run, "--max_images", 16, "--batch_size", 5, *HOW[:2]) as address:
        yield address


def ask(address: str, body: object = None, path: str = "/samples", **headers: str) -> tuple[int, bytes]:
    return studios.ask(address, path, body, **headers)


def test_the_images_are_those_of_sample_whoever_asks_beside(server, run, tmp_path):
    assert main(["sample", str(run), "--num_samples", "12", "--out", str(tmp_path / "x.npz"), *HOW]) == 0
    expected = np.load(tmp_path / "x.npz")
    with ThreadPoolExecutor(8) as pool:
        parts = [f"{k},{(k + 5) % 12}" for k in range(8)]
        answers = list(pool.map(lambda seeds: ask(server, {"seeds": seeds, "format": "npz"}), parts))
    for seeds, (code, content) in zip(parts, answers):
        found, rows = np.load(io.BytesIO(content)), [int(seed) for seed in seeds.split(",")]
        assert code == 200
        assert abs(found["arr_0"].astype(int) - expected["arr_0"][rows]).max() <= 1
        assert (found["arr_1"] == expected["arr_1"][rows]).all()
        assert found["classes"].tolist() == expected["classes"].tolist() == ["across", "disc", "down"]


def test_sheets_and_archives_and_other_settings(server):
    code, sheet = ask(server, {"num_samples": 3})
    assert code == 200 and Image.open(io.BytesIO(sheet)).format == "PNG"
    code, packed = ask(server, {"seeds": "7-8", "labels": "disc", "format": "zip", "solver": "ddim", "sampling_steps": "2"})
    assert code == 200 and zipfile.ZipFile(io.BytesIO(packed)).namelist() == ["000007.png", "000008.png"]
    two, three = (ask(server, {"seeds": "7", "sampling_steps": str(n), "format": "npz"})[1] for n in (2, 3))
    assert (np.load(io.BytesIO(two))["arr_0"] != np.load(io.BytesIO(three))["arr_0"]).any()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "the body is no JSON"),
        ([], "send an object"),
        ({"num_sample": 3}, "did you mean num_samples?"),
        ({"num_samples": 10**9}, "ask for 1 to 16 at a time"),
        ({"num_samples": "3"}, "num_samples: Expected `int`"),
        ({"num_samples": 2, "seeds": "1"}, "give one"),
        ({"guidance": float("nan")}, "out of range"),
        ({"solver": "magic"}, "is not one of"),
        ({"guidance_kind": "apg"}, "no effect without --guidance"),
        ({"labels": "unicorn"}, "the model knows"),
        ({"model": "../../etc/passwd"}, "is not one of: r"),
        ({"format": "exe"}, "is not one of: png, npz, zip"),
        ({"device": "cuda"}, "unknown setting"),
        (b'{"num_samples": 1, "num_samples": 2}', "it says two things of 'num_samples'"),
    ],
    ids=str,
)
def test_what_is_wrong_is_one_sentence(server, run, body, says):
    code, content = ask(server, body)
    error = json.loads(content)["error"]
    assert code == 400 and says.replace(": r", f": {run.name}") in error and "\n" not in error


def test_foreign_pages_names_and_large_bodies_are_refused(server):
    assert ask(server, {}, Origin="http://evil.example")[0] == 403
    assert ask(server, {}, Host="evil.example")[0] == 400
    assert ask(server, {}, Origin=server)[0] == 200
    assert ask(server, b"x" * (1 << 17))[0] == 413
    code, content = ask(server, path="/health")
    assert code == 200 and json.loads(content)["waiting"] == 0
    code, content = ask(server, path="/metrics")
    assert code == 200 and re.search(rb'^iddpm_requests_total\{code="200"\} \d+$', content, re.M)


def test_other_addresses_and_methods_are_told_in_json(server):
    for path, code in (("/nope", 404), ("/samples", 405)):
        got, content = ask(server, path=path)
        assert got == code and "there are POST /samples" in json.loads(content)["error"]


def test_more_than_may_ever_wait_is_no_request_to_repeat():
    desk = Desk(batch=4, most=2)
    scope = dict(type="http", method="POST", path="/samples", headers=[(b"host", b"127.0.0.1")], query_string=b"", root_path="")
    sent = []

    async def receive():
        return {"type": "http.request", "body": b'{"num_samples": 3}'}

    async def send(message):
        sent.append(message)

    asyncio.run(app({"m": None}, desk, 64, "127.0.0.1", "")(scope, receive, send))
    desk.close()
    assert sent[0]["status"] == 400 and b"3 images: ask for 1 to 2 at a time" in sent[1]["body"]


def test_beyond_this_machine_a_token_is_needed(launcher, run, tmp_path, capsys):
    assert main(["serve", str(run), "--host", "0.0.0.0", *HOW]) == 2
    assert "give --token_file" in capsys.readouterr().err
    (tmp_path / "token").write_text("secret\n")
    line = ("serve", run, "--host", "0.0.0.0", "--token_file", tmp_path / "token", *HOW[:2])
    with serving(launcher, tmp_path / "said", *line, end=signal.SIGINT) as address:
        assert ask(address, {})[0] == 401
        assert ask(address, {}, Authorization="Bearer other")[0] == 401
        assert ask(address, {}, Authorization="Bearer secret")[0] == 200


def test_a_port_in_use_is_one_line(run, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", str(run), "--port", str(taken.getsockname()[1]), *HOW]) == 2
    assert "give another --port" in capsys.readouterr().err
    assert main(["serve", str(run), "--port", "70000", *HOW]) == 2
    assert "give another --port" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b" \n", b"\xff\xfe", b"two\nlines"], ids=repr)
def test_a_file_without_a_token_is_refused_wherever_it_listens(run, tmp_path, capsys, content):
    (tmp_path / "token").write_bytes(content)
    assert main(["serve", str(run), "--token_file", str(tmp_path / "token"), *HOW]) == 2
    assert "holds no token" in capsys.readouterr().err


def test_more_than_may_wait_is_refused_and_a_fault_is_of_its_own_orders(monkeypatch):
    from iddpm.look.serving import desk as desks

    class Painted:
        def __init__(self, n):
            self.n = n

        def cpu(self):
            return self

        def numpy(self):
            return np.zeros((self.n, 1, 1, 1), np.uint8)

    batches = []

    def painter(config, net, device):
        def paint(job):
            batches.append(list(job.seeds))
            if config == "bad":
                raise RuntimeError("no memory")
            return Painted(len(job.seeds))

        return paint

    monkeypatch.setattr(desks, "painter", painter)
    opened = type("Opened", (), {"net": None, "device": None})()
    desk = Desk(batch=4, most=8)
    with desk.changed:  # nothing is drawn until all are there
        asked = (("a", range(3)), ("bad", range(2)), ("a", range(7, 10)))
        orders = [Order(opened, config, Job(seeds, [-1] * len(seeds))) for config, seeds in asked]
        for order in orders:
            desk.orders.append(order)
        with pytest.raises(Full):
            desk.take(Order(opened, "a", Job([1], [-1])))
        desk.changed.notify()
    assert orders[0].images.result(10).shape == orders[2].images.result(10).shape == (3, 1, 1, 1)
    with pytest.raises(Exception, match="no memory"):
        orders[1].images.result(10)
    assert batches == [[0, 1, 2, 7], [0, 1], [8, 9]]
    desk.close()


def test_no_number_of_images_is_too_large_to_be_refused():
    with pytest.raises(UserError, match="ask for 1 to 4"):
        _order(dict(num_samples=10**30), {"m": None}, 4)


def test_a_zip_takes_no_images_that_png_cannot_hold():
    opened = SimpleNamespace(config=Config().updated(dict(image_channels=5)))
    with pytest.raises(UserError, match="take npz"):
        _order(dict(format="zip"), {"m": opened}, 4)
