"""An image given another one: whole runs, what is drawn with them, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import iddpm
from conftest import TINY, flags
from golden_rules import image_tensor
from iddpm import build
from iddpm.cli.main import main
from iddpm.config import Config, check
from iddpm.config.choices import choices
from iddpm.data import Images, Order
from iddpm.data.batches import make_batch, open_data
from iddpm.errors import UserError
from iddpm.store.log import read_rows

PAIRS = dict(TINY, task="translate", given_channels=3, image_size="8", sampling_steps="3", learn_sigma=False)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """9 grey pictures in two folders; with their sketches, which are in colour, beside them."""
    root, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(2)
    for k in range(9):
        kind = ("a", "b")[k % 2]
        for folder, shape in (("photos", (8, 8)), ("sketches", (8, 8, 3))):
            (root / folder / kind).mkdir(exist_ok=True, parents=True)
            Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(root / folder / kind / f"{k:02d}.png")
    return root / "photos"


@pytest.fixture(scope="module")
def sketches(photos):
    return photos.parent / "sketches"


def train(photos, sketches, run, **settings) -> int:
    return main(["train", str(photos), "--given", str(sketches), "--run", str(run), *flags(**dict(PAIRS, **settings))])


@pytest.fixture(scope="module")
def model(photos, sketches, tmp_path_factory) -> str:
    run = tmp_path_factory.mktemp("translate") / "run"
    assert train(photos, sketches, run, sample_interval=2) == 0
    return str(run)


@pytest.fixture(scope="module")
def dropping(photos, sketches, tmp_path_factory) -> str:
    """A run that knows classes, and was trained without class and sketch at times."""
    run = tmp_path_factory.mktemp("dropping") / "run"
    assert train(photos, sketches, run, class_cond=True, class_dropout=0.3, given_dropout=0.3, save_interval=2) == 0
    return str(run)


def drawn(run, sketches, out, *more) -> np.ndarray:
    assert main(["sample", str(run), "--given", str(sketches), "--out", str(out), "--device", "cpu", *more]) == 0
    with np.load(out) as file:
        return file["arr_0"]


# ---- the network and its batches


@pytest.mark.parametrize("network", ["unet", "dit"])
@pytest.mark.parametrize("channels", [1, 3, 7])
def test_the_network_sees_the_image_given_whatever_its_channels(config, network, channels):
    own = dict(patch_size=2, width=32, depth=1, heads=2) if network == "dit" else {}
    settings = dict(
        task="translate", network=network, given_channels=channels, class_cond=False, num_classes=0, learn_sigma=False
    )
    net = build.network(config.updated(settings | own))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.05)
    x, given, t = image_tensor(0, (2, 1, 8, 8)), image_tensor(1, (2, channels, 8, 8)), torch.tensor([3.0, 500.0])
    one = net(x, t, given=given)
    assert one.shape == x.shape
    for k in range(channels):  # every channel of every image, and of its image alone
        other = given.clone()
        other[1, k] += 0.5
        assert [torch.allclose(a, b, atol=1e-6) for a, b in zip(one, net(x, t, given=other))] == [True, False]


def test_a_share_of_sketches_is_dropped_with_the_class_and_not_in_validation(photos, sketches):
    settings = PAIRS | dict(path=str(photos), given=str(sketches), batch_size=400, given_dropout=0.3)
    for more, share in ((dict(class_cond=True, class_dropout=0.2), 0.2), ({}, 0)):
        data, config = open_data(check(Config().updated(settings | more)))
        batch = make_batch(config, data, Order(len(data), 0), 1, 0)
        dropped = (batch.cond["given"] == 0).flatten(1).all(1)
        assert 0.24 < dropped.float().mean() < 0.36
        if share:
            classless = batch.cond["y"] == config.model.num_classes
            assert 0.15 < classless.float().mean() < 0.25 and dropped[classless].all()
        kept = make_batch(config, data, Order(len(data), 0), 1, 0, train=False).cond["given"]
        assert torch.equal(kept[~dropped], batch.cond["given"][~dropped]) and (kept != 0).all()


def test_guidance_leads_away_from_what_is_drawn_without_sketch_and_class(config):
    """Of a network that says so much of x0 as its conditions are, the guess at scale W is W times that, W - 1 times none away."""
    settings = dict(task="translate", given_dropout=0.1, class_dropout=0.1, guidance=3.0, learn_sigma=False, parametrization="x0")

    def net(x, t, given, y):
        return 0.2 * given + torch.where(y == 3, 0.0, 0.1).view(-1, 1, 1, 1)

    cond = {"given": torch.full((2, 1, 8, 8), 0.5), "y": torch.tensor([0, 2])}
    x = image_tensor(0, (2, 1, 8, 8))
    for only, expected in (({}, 3 * 0.2), (dict(class_dropout=0.0), 0.1 + 3 * 0.1), (dict(given_dropout=0.0), 0.1 + 3 * 0.1)):
        changed = config.updated(settings | only)
        step = next(iter(build.grid(changed)))
        assert build.drawing(changed, net, cond)(x, step).x0.mean().item() == pytest.approx(expected, abs=1e-5)


# ---- whole runs


def test_a_run_that_was_stopped_ends_with_the_same_bits(photos, sketches, tmp_path):
    settings = dict(random_flip=True, random_crop=True, given_dropout=0.2, class_cond=True)
    for run, ends in (("whole", [4]), ("parted", [2, 4])):
        for steps in ends:
            assert train(photos, sketches, tmp_path / run, steps=steps, **settings) == 0
    a, b = (load_file(tmp_path / run / "checkpoints/step_00000004/weights.safetensors") for run in ("whole", "parted"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    one, two = ([row["loss"] for row in read_rows(tmp_path / run) if "loss" in row] for run in ("whole", "parted"))
    assert one == two and np.isfinite(one).all()


def test_a_run_goes_on_by_itself_and_says_where_it_is_given_others(photos, sketches, tmp_path, monkeypatch, capsys):
    """The same command finds its run, also where paths are relative; another folder of sketches begins another run."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sketches, tmp_path / "sketches")
    command = ["train", str(photos), "--given", "sketches", *flags(**PAIRS)]
    for _ in range(2):
        assert main(command) == 0
    assert len(list((tmp_path / "runs").iterdir())) == 1
    shutil.copytree(sketches, tmp_path / "others")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "others" / "a" / "00.png")
    assert main(["train", str(photos), "--given", "others", *flags(**PAIRS)]) == 0
    (run, _) = sorted((tmp_path / "runs").iterdir())
    capsys.readouterr()
    more = ["--given", "others", "--steps", "5"]
    assert main(["train", "--run", str(run), *more]) == 0
    said = capsys.readouterr().out
    assert "changed on resume: given" in said and "other given" in said
    assert main(["train", "--run", str(run), "--given_channels", "1"]) == 2


def test_a_sheet_shows_what_was_given_beside_what_is_drawn(model):
    from pathlib import Path

    with Image.open(Path(model) / "samples" / "step_00000002.png") as sheet:
        assert sheet.size == (3 * 100 + 4, 16 + 8 * 100 + 4)  # given, model, original; eight rows


def test_held_out_pairs_are_measured(photos, sketches, tmp_path):
    held = {}
    for name, source in (("validation", photos), ("validation_given", sketches)):
        held[name] = tmp_path / name
        shutil.copytree(source, held[name])
        for file in held[name].rglob("*.png"):  # other images, or they would not be held out
            Image.open(file).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(file)
    assert train(photos, sketches, tmp_path / "r", validation_interval=2, **held) == 0
    assert sum("val_loss" in row for row in read_rows(tmp_path / "r")) == 2


# ---- drawing


def test_each_sketch_is_drawn_once_whatever_the_batch_or_the_others(model, sketches, tmp_path):
    whole = drawn(model, sketches, tmp_path / "a.npz")
    assert whole.shape == (9, 8, 8, 1) and len({image.tobytes() for image in whole}) == 9
    parts = drawn(model, sketches, tmp_path / "b.npz", "--batch_size", "2")
    assert abs(whole.astype(int) - parts).max() <= 1
    some = drawn(model, sketches, tmp_path / "c.npz", "--seeds", "3-4")
    assert abs(whole[3:5].astype(int) - some).max() <= 1
    with Image.open(tmp_path / "a_compared.png") as sheet:
        assert sheet.size == (2 * 100 + 4, 16 + 9 * 100 + 4)
    before = (tmp_path / "a_compared.png").read_bytes()
    assert main(["sample", str(model), "--given", str(sketches), "--seeds", "3-4", "--out", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a_compared.png").read_bytes() == before  # that of a.npz; this one has its own
    with Image.open(tmp_path / "a_compared_2.png") as sheet:
        assert sheet.size == (2 * 100 + 4, 16 + 2 * 100 + 4)


def test_a_folder_an_archive_an_npz_and_the_library_give_the_same(model, sketches, tmp_path):
    data = Images.open(sketches, (8, 8), 3)
    arrays = np.ascontiguousarray(data.batch(range(9)).transpose(0, 2, 3, 1))
    np.savez(tmp_path / "s.npz", arrays)
    shutil.make_archive(str(tmp_path / "packed"), "zip", sketches)
    whole = drawn(model, sketches, tmp_path / "a.npz")
    for source in ("s.npz", "packed.zip"):
        assert np.array_equal(whole, drawn(model, tmp_path / source, tmp_path / "b.npz", "--batch_size", "64"))
        (tmp_path / "b.npz").unlink()
    assert np.array_equal(whole, iddpm.load(model).sample(9, given=arrays))
    single = drawn(model, sketches / "a" / "00.png", tmp_path / "one.npz")
    assert abs(single.astype(int) - whole[:1]).max() <= 1


def test_the_same_path_with_another_sketch_is_another_job(model, sketches, tmp_path):
    folder = tmp_path / "s"
    shutil.copytree(sketches, folder)
    one = drawn(model, folder, tmp_path / "x.npz")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "a" / "00.png")
    assert main(["sample", model, "--given", str(folder), "--out", str(tmp_path / "x.npz")]) == 2  # it holds other images
    two = drawn(model, folder, tmp_path / "y.npz")
    assert [np.array_equal(a, b) for a, b in zip(one, two)] == [False] + 8 * [True]


def test_larger_sketches_are_scaled_where_that_is_asked_for(model, sketches, tmp_path):
    (tmp_path / "large").mkdir()
    files = sorted(sketches.rglob("*.png"))
    for file in files:
        with Image.open(file) as image:
            image.resize((16, 16), Image.Resampling.NEAREST).save(tmp_path / "large" / f"{file.parent.name}_{file.name}")
    fitted = drawn(model, tmp_path / "large", tmp_path / "a.npz", "--fit")
    assert np.array_equal(fitted, drawn(model, sketches, tmp_path / "b.npz"))


def test_a_sketch_that_is_read_otherwise_than_it_lies_there_is_told(model, tmp_path, capsys):
    Image.new("RGBA", (8, 8), (200, 0, 0, 90)).save(tmp_path / "clear.png")
    drawn(model, tmp_path / "clear.png", tmp_path / "x.npz")
    assert "clear.png: taken otherwise than stored: 1 (transparency laid over white)" in capsys.readouterr().out


@pytest.mark.parametrize("solver", [name for name in choices("solver") if name != "consistency"])
def test_every_solver_draws_guided_by_sketch_and_class(dropping, sketches, solver, tmp_path):
    images = drawn(dropping, sketches, tmp_path / "x.npz", "--solver", solver, "--sampling_steps", "4", "--guidance", "3")
    assert images.shape == (9, 8, 8, 1) and images.std() > 0
    with np.load(tmp_path / "x.npz") as file:
        assert file["arr_1"].tolist() == [0] * 5 + [1] * 4  # the sketches' classes, which are their folders


def test_it_is_guided_by_an_earlier_checkpoint_and_by_a_classifier(dropping, model, photos, sketches, tmp_path, capsys):
    early = f"{dropping}/checkpoints/step_00000002"
    plain = drawn(dropping, sketches, tmp_path / "plain.npz")
    assert (drawn(dropping, sketches, tmp_path / "auto.npz", "--autoguide", early, "--autoguidance", "50") != plain).any()
    command = [
        "sample",
        dropping,
        "--given",
        str(sketches),
        "--out",
        str(tmp_path / "no.npz"),
        "--autoguide",
        str(tmp_path / "one"),
    ]
    assert train(photos, sketches, tmp_path / "one", given_channels=1, class_cond=True) == 0
    assert main(command) == 2 and "is given images of 1 channels, the model those of 3" in capsys.readouterr().err
    judge = dict(TINY, task="classify", class_cond=True, num_head_channels=8, learn_sigma=False)
    assert main(["train", str(photos), "--run", str(tmp_path / "judge"), *flags(**judge)]) == 0
    plain = drawn(model, sketches, tmp_path / "free.npz")
    guided = drawn(model, sketches, tmp_path / "j.npz", "--classifier", str(tmp_path / "judge"), "--classifier_scale", "500")
    assert (guided != plain).any()


# ---- measuring


def test_bits_per_dimension_are_those_given_the_sketch(model, photos, sketches, tmp_path, capsys):
    out, found = tmp_path / "nll.json", []
    shutil.copytree(sketches, tmp_path / "others")
    for k, file in enumerate(sorted((tmp_path / "others").rglob("*.png"))):
        Image.fromarray(np.full((8, 8, 3), 20 * k, np.uint8)).save(file)
    for given in (sketches, tmp_path / "others"):
        assert main(["nll", model, str(photos), "--given", str(given), "--sampling_steps", "5", "--out", str(out)]) == 0
        found.append(json.loads(out.read_text())["bits_per_dim"])
    assert 0.5 < found[0] < 60 and found[0] != found[1]
    ode = ["--ode", "--trace", "hutchinson", "--sampling_steps", "4", "--num_samples", "3", "--out", str(out)]
    assert main(["nll", model, str(photos), "--given", str(sketches), *ode]) == 0


def test_a_program_trains_on_pairs_of_its_own_and_draws_by_maps_of_seven_channels(tmp_path):
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (8, 8, 1), dtype=np.uint8) for _ in range(6)]
    maps = [rng.integers(0, 256, (8, 8, 7), dtype=np.uint8) for _ in range(6)]
    settings = {k: v for k, v in PAIRS.items() if k != "given_channels"} | dict(steps=2, sample_interval=2)
    run = iddpm.train(pictures, given=maps, given_channels=7, run=tmp_path / "r", **settings)
    loaded = iddpm.load(run)
    images = loaded.sample(2, given=np.stack(maps[:2]), seed=7)
    assert images.shape == (2, 8, 8, 1)
    x, given = torch.randn(2, 1, 8, 8), torch.randn(2, 7, 8, 8)
    step = next(iter(loaded.grid(3)))
    assert not torch.equal(loaded.denoise(x, step, given=given).x0, loaded.denoise(x, step, given=-given).x0)
    for wrong in (
        dict(),
        dict(given=np.stack(maps)),
        dict(given=np.zeros((2, 8, 8, 3), np.uint8)),
        dict(low_res=np.stack(maps[:2])),
    ):
        with pytest.raises(UserError):
            loaded.sample(2, **wrong)
    with pytest.raises(UserError, match="both are files, or both"):
        iddpm.train(pictures, given=str(tmp_path), run=tmp_path / "no", **settings)


# ---- what cannot be


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "DATA", "--task", "translate", "--steps", "1"], "which images is it given? --given FOLDER"),
        (["train", "DATA", "--given", "SKETCHES", "--steps", "1"], "belongs to --task translate"),
        (["train", "DATA", "--task", "translate", "--given", "DATA", "--steps", "1"], "is what the run is to draw"),
        (["train", "DATA", "--task", "translate", "--given", "DATA/a", "--steps", "1"], "without a partner"),
        (["train", "DATA", "--task", "translate", "--given", "nowhere", "--steps", "1"], "nowhere does not exist"),
        (
            ["train", "DATA", "--task", "translate", "--given", "SKETCHES", "--validation", "SKETCHES", "--steps", "1"],
            "--validation_given",
        ),
        (["sample", "MODEL"], "of which images? --given IMAGES"),
        (["sample", "MODEL", "--low_res", "SKETCHES"], "is for a model that enlarges"),
        (["sample", "RUN", "--given", "SKETCHES"], "--given is for a model of an image given another one"),
        (
            ["sample", "MODEL", "--given", "LARGE"],
            "has 16x16 pixels: 8x8 are needed; scale them, or have it done as in training: --fit",
        ),
        (["sample", "MODEL", "--given", "WRONG"], "N x 8 x 8 x 3"),
        (["sample", "MODEL", "--given", "BROKEN"], "is not a readable image"),
        (["sample", "MODEL", "--given", "SKETCHES", "--low_res", "SKETCHES"], "give one"),
        (["sample", "MODEL", "--fit"], "--fit has no effect without --given"),
        (["sample", "MODEL", "--given", "WRONG", "--fit"], "--fit scales files"),
        (["sample", "MODEL", "--given", "SKETCHES", "--seeds", "0-9"], "there are 9 images given"),
        (["sample", "MODEL", "--given", "SKETCHES", "--guidance", "2"], "--given_dropout 0.1"),
        (["sample", "MODEL", "--given", "SKETCHES", "--consistent"], "belongs to --task enlarge"),
        (["nll", "MODEL", "DATA"], "of images given which? --given FOLDER"),
        (["nll", "RUN", "DATA", "--given", "SKETCHES"], "--given has no effect"),
        (["nll", "MODEL", "DATA", "--given", "DATA/a"], "without a partner"),
        (["evaluate", "MODEL", "--reference", "DATA"], "draw some with iddpm sample --given"),
        (["edit", "MODEL", "DATA/a/00.png"], "cannot edit"),
    ],
)
def test_what_cannot_be_is_one_clear_line(argv, words, photos, sketches, run, model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "wrong.npz", np.zeros((2, 9, 9, 1), np.uint8))
    for name in ("large", "broken"):
        (tmp_path / name).mkdir()
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / "large" / "x.png")
    (tmp_path / "broken" / "x.png").write_bytes(b"no image")
    places = dict(DATA=photos, SKETCHES=sketches, MODEL=model, RUN=run, OUT=tmp_path / "out", WRONG=tmp_path / "wrong.npz")
    places |= dict(LARGE=tmp_path / "large", BROKEN=tmp_path / "broken")
    first = [a.partition("/") for a in argv]
    capsys.readouterr()
    assert main([f"{places[name]}{slash}{rest}" if name in places else name + slash + rest for name, slash, rest in first]) == 2
    err = capsys.readouterr().err.strip()
    assert words in err and len(err.splitlines()) == 1
    assert not (tmp_path / "runs").exists() and not (tmp_path / "out").exists()


def test_it_is_exported_and_imported_again(model, sketches, tmp_path, capsys):
    """As files of the original's form, of whose programs none knows what to do with them: that is said."""
    assert main(["export", model, "--out", str(tmp_path / "out")]) == 0
    assert "no counterpart of --task translate" in capsys.readouterr().out
    assert main(["import", str(tmp_path / "out" / "model000004.pt"), "--run", str(tmp_path / "back")]) == 0
    raw = ["--ema_rate", "0"]
    assert np.array_equal(
        drawn(model, sketches, tmp_path / "a.npz", *raw), drawn(tmp_path / "back", sketches, tmp_path / "b.npz", *raw)
    )


def test_a_plan_and_a_dry_run_know_what_is_given(photos, sketches, tmp_path, capsys):
    assert main(["plan", *flags(**PAIRS)]) == 0
    weights = sum(p.numel() for p in build.network(Config().updated(PAIRS)).parameters())
    assert f"{weights:,} weights" in capsys.readouterr().out
    command = ["train", str(photos), "--given", str(sketches), "--run", str(tmp_path / "r"), *flags(**PAIRS), "--dry_run"]
    assert main(command) == 0
    assert "given (6, 3, 8, 8)" in capsys.readouterr().out and not (tmp_path / "r").exists()
