"""`iddpm studio` over HTTP: it shows what the runs hold, draws what `iddpm sample` draws, and names what it refuses."""

import base64
import io
import json
import shutil
import threading
import time
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import TINY, flags
from iddpm.cli.main import main
from iddpm.look.studio.turns import Turns
from look.studios import ask, events, serving

HOW = dict(sampling_steps="3", solver="ddim")


@pytest.fixture(scope="module")
def home(run, pictures, tmp_path_factory) -> Path:
    """A folder of runs: a good one, its twin of another name, one that is empty, one that is damaged, three of other tasks."""
    folder = tmp_path_factory.mktemp("home")
    for name in ("good", "twin"):
        shutil.copytree(run, folder / name)
    for name in ("enlarge", "judge"):
        shutil.copytree(Path(__file__).parents[1] / "earlier" / name, folder / name)
    (folder / "damaged").mkdir()
    (folder / "damaged" / "config.json").write_text("{")
    (folder / "empty").mkdir()
    (folder / "empty" / "config.json").write_text((run / "config.json").read_text())
    pairs = dict(TINY, task="translate", given=pictures, given_channels=3, learn_sigma=False, sampling_steps="3")
    assert main(["train", str(pictures), "--run", str(folder / "translate"), *flags(**pairs)]) == 0
    return folder


@pytest.fixture(scope="module")
def server(launcher, home, pictures, tmp_path_factory):
    with serving(launcher, tmp_path_factory.mktemp("studio") / "said", "studio", home, "--data", pictures) as address:
        yield address


def got(server: str, path: str, body: object = None) -> dict:
    code, content = ask(server, path, body)
    assert code == 200, content
    return json.loads(content)


def picture(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def png(array: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return picture(file.getvalue())


def pixels(address: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))))


def test_the_runs_are_listed_whatever_state_they_are_in(server):
    rows = {row["name"]: row for row in got(server, "/api/listing")["runs"]}
    assert rows.keys() == {"good", "twin", "damaged", "empty", "enlarge", "judge", "translate"}
    assert rows["good"]["progress"] == "step 4 of 4, finished" and rows["good"]["draws"]
    assert "config.json" in rows["damaged"]["fault"] and not rows["empty"]["draws"]


def test_a_view_is_the_report_and_goes_on_with_the_log(server, home):
    found = got(server, "/api/view?run=good&run=damaged")
    assert "<h1>good</h1>" in found["html"] and "damaged" in found["html"] and "<script" not in found["html"]
    before = got(server, "/api/curves?run=good")
    assert before["mark"] == got(server, "/api/view?run=good")["mark"]
    rows = [json.loads(line) for line in (home / "good" / "log.jsonl").read_text().splitlines()]
    row = next(row for row in reversed(rows) if "loss" in row)
    with (home / "good" / "log.jsonl").open("a") as log:
        log.write(json.dumps(row | {"step": 5, "loss": 0.125}) + "\n")
    after = got(server, "/api/curves?run=good")
    assert after["mark"] == before["mark"]  # no more than the curves has changed
    assert any(group["y"].get("loss", [0])[-1] == 0.125 and group["x"]["step"][-1] == 5 for group in after["runs"][0])
    both = got(server, "/api/view?run=good&run=twin")
    assert "2 runs compared" in both["html"] and len(both["data"]["runs"]) == 2


def test_what_is_drawn_is_what_sample_draws_and_is_seen_to_form(server, home, tmp_path):
    code, content = ask(server, "/api/draw", dict(kind="draw", model="good", seeds="0-5", **HOW))
    told = events(content)
    assert code == 200 and told[-1]["seconds"] > 0
    steps = [event for event in told if "x" in event]
    assert [steps[0]["done"], steps[0]["of"]] == [1, 3] and (pixels(steps[0]["x"]) != pixels(steps[0]["x0"])).any()
    how = flags(num_samples=6, out=tmp_path / "x.npz", device="cpu", **HOW)
    assert main(["sample", str(home / "good"), *how]) == 0
    drawn = np.stack([pixels(image) for image in told[-1]["images"]])
    assert abs(drawn.astype(int) - np.load(tmp_path / "x.npz")["arr_0"][..., 0]).max() <= 1


def test_an_edit_keeps_what_the_mask_does_not_cover(server):
    image, mask = np.full((8, 8), 200, np.uint8), np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 255
    asked = dict(kind="edit", model="good", seeds="0-1", labels="disc", image=png(image), mask=png(mask), strength=1.0, **HOW)
    drawn = [pixels(found) for found in events(ask(server, "/api/draw", asked)[1])[-1]["images"]]
    assert all(abs(one[:, :4].astype(int) - 200).max() <= 1 for one in drawn)
    assert (drawn[0][:, 4:] != drawn[1][:, 4:]).any()
    between = dict(kind="between", model="good", seeds="3,7", labels="disc", frames=4, **HOW)
    told = events(ask(server, "/api/draw", between)[1])
    assert len(told[-1]["images"]) == 4 and pixels(told[-1]["sheet"]).shape == (8, 32)


def test_an_uploaded_picture_is_enlarged(server):
    about = got(server, "/api/model?run=enlarge")
    assert about["kinds"] == ["given"] and about["task"] == "enlarge"
    _, *small = about["given"]
    image = np.random.default_rng(0).integers(0, 256, (*small, 3), np.uint8)
    labels = dict(labels=about["classes"][0]) if about["classes"] else {}
    asked = dict(kind="given", model="enlarge", seeds="0-1", image=png(image), sampling_steps="2", **labels)
    told = events(ask(server, "/api/draw", asked)[1])
    drawn = [pixels(one) for one in told[-1]["images"]]
    assert len(drawn) == 2 and drawn[0].shape[:2] == tuple(about["size"]) and (drawn[0] != drawn[1]).any()


def test_an_uploaded_picture_is_translated_as_by_sample(server, home, tmp_path):
    image = np.random.default_rng(1).integers(0, 256, (8, 8, 3), np.uint8)
    asked = dict(kind="given", model="translate", seeds="0", image=png(image), **HOW)
    (drawn,) = events(ask(server, "/api/draw", asked)[1])[-1]["images"]
    Image.fromarray(image).save(tmp_path / "given.png")
    given = flags(given=tmp_path / "given.png", out=tmp_path / "out.npz", device="cpu", **HOW)
    assert main(["sample", str(home / "translate"), *given]) == 0
    assert abs(pixels(drawn).astype(int) - np.load(tmp_path / "out.npz")["arr_0"][0, ..., 0]).max() <= 1


def test_a_large_photo_is_fitted_and_told(server):
    found = got(server, "/api/picture", dict(model="good", image=png(np.zeros((300, 500, 3), np.uint8))))
    assert pixels(found["image"]).shape == (8, 8) and "500x300 pixels, scaled and cropped to 8x8" in found["note"]


def bomb() -> bytes:
    """A PNG whose head claims 60,000 x 60,000 pixels."""
    content = bytearray(base64.b64decode(png(np.zeros((1, 1), np.uint8)).partition(",")[2]))
    content[16:24] = (60_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/api/picture", dict(model="good", image=picture(bomb())), "3600 million pixels"),
        ("/api/picture", dict(model="good", image=picture(b"%!PS-Adobe no picture")), "of no known format"),
        ("/api/picture", dict(model="good", image=picture(b"\x89PNG\r\n\x1a\n" + b"x" * 50)), "cannot be read"),
        ("/api/picture", dict(model="good", image="data:,%"), "did not arrive whole"),
        ("/api/draw", dict(kind="draw", model="../../etc"), "there is no run"),
        ("/api/draw", dict(kind="draw", model="empty"), "no complete checkpoint"),
        ("/api/draw", dict(kind="draw", model="good", solver="magic"), "is not one of"),
        ("/api/draw", dict(kind="draw", model="good", seeds="0-999"), "ask for 1 to 16"),
        ("/api/draw", dict(kind="given", model="good"), "cannot do this"),
        ("/api/draw", dict(kind="draw", model="good", classifier="/etc"), "unknown setting"),
        ("/api/draw", dict(kind="draw", model="good", step=3), "no checkpoint of step 3"),
        ("/api/draw", dict(kind="draw", model="good", step=-7), "step -7"),
        ("/api/draw", dict(kind="draw", model="good", labels="a\nb"), "in one line"),
        ("/api/draw", b'{"kind": "edit", "model": "good", "strength": NaN}', "strength: above 0"),
        ("/api/draw", b'{"kind": "edit", "model": "good", "strength": 1e999}', "strength: above 0"),
        ("/api/draw", dict(kind="between", model="good", frames=-1, seeds="0,1"), "frames: 2 to"),
        ("/api/draw", b"[", "no JSON"),
        ("/api/draw", b"[" * 100_000, "no JSON"),
        ("/api/view?run=nobody", None, "there is no run 'nobody'"),
        ("/api/view", None, "choose 1 to 8 runs"),
        ("/api/model?run=judge", None, "is a classifier"),
        ("/api/draw", dict(kind="draw", model="enlarge"), "cannot do this"),
        ("/api/model?run=damaged", None, "no complete checkpoint"),
        ("/api/train", dict(action="begin", run="../x", data="pictures0"), "letters, digits"),
        ("/api/train", dict(action="begin", run="x", data="/etc"), "are not among those given"),
        ("/api/train", dict(action="begin", run="x", data="d", init_from="/etc/passwd"), "unknown setting 'init_from'"),
        ("/api/train", dict(action="begin", run="x", data="pictures0", validation="/etc"), "validation: a share"),
        ("/api/train", dict(action="stop", run="good"), "no training of good"),
        ("/api/train", dict(action="burn", run="good"), "action is one of"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_what_is_wrong_is_one_sentence(server, path, body, says):
    code, content = ask(server, path, body)
    error = json.loads(content)["error"]
    assert code == 400 and says in error and "\n" not in error, error


def test_other_origins_names_and_huge_bodies_are_refused(server):
    assert ask(server, "/api/train", {}, Origin="http://evil.example")[0] == 403
    assert ask(server, "/api/listing", None, Host="evil.example")[0] == 400
    assert ask(server, "/api/picture", b"x" * (25 << 20))[0] == 413
    assert ask(server, "/files/..%2f..%2fapp.py")[0] == 404
    with urllib.request.urlopen(server) as answer:
        assert "script-src 'self'" in answer.headers["content-security-policy"]
    assert ask(server, "/api/listing")[0] == 200  # and the rest works


def test_beyond_this_machine_a_token_is_needed(launcher, run, tmp_path, capsys):
    assert main(["studio", str(run), "--host", "0.0.0.0"]) == 2
    assert "give --token_file" in capsys.readouterr().err
    (tmp_path / "token").write_text("secret\n")
    line = ("studio", run, "--host", "0.0.0.0", "--token_file", tmp_path / "token")
    with serving(launcher, tmp_path / "said", *line) as address:
        assert ask(address, "/")[0] == ask(address, "/?token=other")[0] == 401
        assert ask(address, "/api/listing", None, Cookie="iddpm_token=secret")[0] == 200
        browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        with browser.open(address + "/?token=secret") as answer:
            assert answer.url == address + "/" and b"iddpm studio" in answer.read()


def test_a_training_is_started_stopped_gone_on_with_and_finished(server, home):
    def now(state: str, seconds: float = 90) -> dict:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            row = next(t for t in got(server, "/api/listing")["trainings"] if t["name"] == "new")
            if row["state"] == state or row["state"] == "failed":
                break
            time.sleep(0.2)
        assert row["state"] == state, row
        return row

    offered = got(server, "/api/offered")
    settings = dict(image_size="8", num_channels=16, steps=100_000, batch_size=4, precision="fp32")
    got(server, "/api/train", dict(action="begin", run="new", data=offered["data"][0], preset="auto", **settings))
    assert ask(server, "/api/train", dict(action="begin", run="new", data=offered["data"][0]))[0] == 400  # it is there
    while not now("running")["row"].get("step"):
        time.sleep(0.2)
    got(server, "/api/train", dict(action="stop", run="new"))
    now("stopped")
    assert list((home / "new" / "checkpoints").iterdir())
    got(server, "/api/train", dict(action="resume", run="new"))
    while not now("running")["row"].get("step"):
        time.sleep(0.2)
    got(server, "/api/train", dict(action="finish", run="new", time="2s"))
    assert "iddpm train --run" in now("done")["command"]


def test_turns_go_round_and_nobody_waits_for_a_whole_work():
    turns, order = Turns(), []

    def work(name: str) -> None:
        me = object()
        turns.take(me)
        for _ in range(3):
            order.append(name)
            time.sleep(0.02)
            turns.next(me)
        turns.leave(me)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
        time.sleep(0.005)
    for thread in threads:
        thread.join()
    assert sorted(order) == sorted("abc" * 3) and set(order[1:4]) == set("abc"), order


def test_who_goes_away_is_not_drawn_for(server):
    asked = json.dumps(dict(kind="draw", model="good", seeds="0-15", solver="ddim", sampling_steps="20")).encode()
    for _ in range(12):  # more than may be drawn at a time: those before have ended
        with urllib.request.urlopen(urllib.request.Request(server + "/api/draw", asked)) as answer:
            answer.readline()
    code, content = ask(server, "/api/draw", dict(kind="draw", model="good", seeds="1", **HOW))
    assert code == 200 and events(content)[-1]["images"]
