"""The command line: whatever a user mistypes is one clear line and exit code 2, and destroys nothing."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from conftest import TINY, flags
from iddpm.cli.flags import Parser
from iddpm.cli.main import VERBS, main
from iddpm.config import Config, check, every_field
from iddpm.config.choices import choices
from iddpm.config.presets import PRESETS

SMALL = flags(**TINY)


def refused(capsys, *argv) -> str:
    """The one line with which a command is refused."""
    assert main([str(a) for a in argv]) == 2
    err = capsys.readouterr().err.strip()
    assert len(err.splitlines()) == 1
    assert err.startswith("iddpm: ")
    return err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["tarin"], "did you mean train"),
        (["train", "DATA", "--num_chanels", "4", "--steps", "1"], "did you mean --num_channels"),
        (["train", "DATA", "--num-res-block=4", "--steps", "1"], "did you mean --num_res_blocks"),
        (["train", "DATA", "--steps", "ten"], "--steps"),
        (["train", "DATA", "--class_cond=perhaps", "--steps", "1"], "neither True nor False"),
        (["train", "DATA", "--dropout", "1.5", "--steps", "1"], "from 0 to 0.999"),
        (["train", "DATA", "--lr", "nan", "--steps", "1"], "out of range"),
        (["train", "DATA", "--num_channels", "0", "--steps", "1"], "from 1 to 65536"),
        (["train", "DATA", "--noise_schedule", "quadratic", "--steps", "1"], "linear, cosine"),
        (["train", "DATA", "--image_size", "12x", "--steps", "1"], "height x width"),
        (["train", "DATA", "--image_size", "4", "--steps", "1"], "from 8 to 1024"),
        (["train", "DATA", "--image_size", "20", "--channel_mult", "1,2,2,2", "--steps", "1"], "multiple"),
        (["train", "DATA", "--channel_mult", "a,b", "--steps", "1"], "numbers separated by commas"),
        (["train", "DATA", "--preset", "cifar11"], "cifar10"),
        (["train", "DATA"], "say when to stop"),
        (["train", "DATA", "--steps", "1", "--images", "5"], "give one"),
        (["train"], "which images"),
        (["train", "DATA", "--sampling_steps", "ddimm", "--steps", "1"], "give a count"),
        (["train", "DATA", "--sampling_steps", "2000", "--steps", "1"], "only 1000 steps"),
        (["train", "DATA", "--eta", "0.5", "--steps", "1"], "no effect"),
        (["train", "DATA", "--sigma_data", "0.3", "--steps", "1"], "with --parametrization eps and --weighting uniform"),
        (["train", "DATA", "--sigma_small", "--learn_sigma", "--steps", "1"], "no effect"),
        (["train", "DATA", "--objective", "hybrid", "--steps", "1"], "--learn_sigma True"),
        (["train", "DATA", "--ema_rate", "1.5", "--steps", "1"], "[0, 1)"),
        (["train", "DATA", "--device", "cuda:7", "--steps", "1"], "--device cpu"),
        (["train", "MISSING", "--steps", "1"], "missing"),
        (["train", "EMPTY", "--steps", "1"], "png"),
        (["train", "TEXT", "--steps", "1"], "notes.png"),
        (["train", "DATA", "--run", "FILLED", "--steps", "1"], "not empty"),
        (["train", "DATA", "--run", "/proc/read_only", *SMALL], "/proc/read_only"),
        (["sample", "MISSING"], "no such run"),
        (["sample", "EMPTY"], "no complete checkpoint"),
        (["sample", "RUN", "--labels", "horse"], "across, disc, down"),
        (["sample", "RUN", "--checkpoint_step", "9"], "it has: 4"),
        (["sample", "RUN", "--ema_rate", "0.7"], "0.9, 0.99"),
        (["sample", "RUN", "--sampling_steps", "ddim19"], "no whole stride"),
        (["sample", "RUN", "--sampling_steps", "21"], "only 20 steps"),
        (["sample", "RUN", "--seeds", "5-2"], "0-63"),
        (["sample", "RUN", "--seeds", "1", "--num_samples", "4"], "give one"),
        (["sample", "RUN", "--out", "x.jpg"], ".png"),
        (["nll", "RUN", "MISSING"], "missing"),
        (["nll", "RUN", "EMPTY"], "png"),
        (["data", "imagenet", "x"], "cifar10, digits"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_in_one_line(capsys, tmp_path, monkeypatch, pictures, run, argv, words):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "text", "filled"):
        (tmp_path / name).mkdir()
    (tmp_path / "text" / "notes.png").write_text("not a picture")
    (tmp_path / "filled" / "thesis.txt").write_text("years of work")
    places = dict(DATA=pictures, RUN=run, MISSING="missing", EMPTY="empty", TEXT="text", FILLED="filled")
    before = sorted(p for p in tmp_path.rglob("*"))
    assert words in refused(capsys, *(places.get(a, a) for a in argv))
    assert sorted(p for p in tmp_path.rglob("*")) == before, "a refused command writes nothing"


def test_a_resumed_run_keeps_what_is_fixed_and_says_which_field(capsys, pictures, tmp_path):
    run = tmp_path / "r"
    assert main(["train", str(pictures), "--run", str(run), *SMALL]) == 0
    assert "--num_channels 32" in refused(capsys, "train", "--run", run, "--num_channels", 32)
    assert "--preset digits" in refused(capsys, "train", "--run", run, "--preset", "digits")
    assert main(["train", "--run", str(run), "--steps", "6", "--lr", "0.5"]) == 0
    stored = Config.from_json((run / "config.json").read_text())
    assert (stored.train.lr, stored.train.steps, stored.model.num_channels) == (0.5, 6, 16)


def test_a_finished_run_says_so(capsys, pictures, tmp_path):
    command = ["train", str(pictures), "--run", str(tmp_path / "r"), *SMALL]
    assert main(command) == 0
    capsys.readouterr()
    assert main(command) == 0
    assert "step 4 of 4 already" in capsys.readouterr().out


def test_a_config_of_a_newer_version_names_the_field(tmp_path):
    from iddpm.errors import UserError

    raw = json.loads(Config().to_json())
    raw["train"]["warp"] = 1
    with pytest.raises(UserError, match="'warp'"):
        Config.from_json(json.dumps(raw), "config.json")


def test_booleans_take_words_and_pairs_and_hyphens():
    parser = Parser(prog="iddpm x")
    for _, group in Config().groups():
        parser.add_fields(type(group))
    argv = "--class-cond --no-rescale-timesteps --learn_sigma False --sigma_small=yes --random_flip --microbatch -1".split()
    assert parser.read(argv) == dict(
        class_cond=True, rescale_timesteps=False, learn_sigma=False, sigma_small=True, random_flip=True, microbatch=-1
    )


def test_help_answers_without_loading_torch():
    code = "import sys; from iddpm.cli.main import main; main(['train', '--help'])"
    check = f"try:\n    {code.replace('; ', chr(10) + '    ')}\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    out = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    told = subprocess.run([sys.executable, "-m", "iddpm", "--help"], capture_output=True, text=True).stdout
    assert all(verb in told for verb in VERBS)


def test_help_names_every_flag_and_preset(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())  # lines are wrapped
    assert all(f"--{name} " in text for name, field in every_field().items() if field.flag)
    for kind in ("solver", "noise_schedule", "parametrization", "weighting", "schedule_sampler", "objective"):
        assert all(name in text and choice.help in text for name, choice in choices(kind).items())
    assert all(name in text for name in PRESETS)


@pytest.mark.parametrize("chooser", ["parametrization", "weighting"])
def test_a_number_that_two_choices_share_is_read_for_each_of_them(chooser):
    config = check(Config().updated({chooser: "edm", "sigma_data": 0.3}))
    assert config.numbers()["sigma_data"] == 0.3
    assert Config.from_json(config.to_json()) == config


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_config_whose_network_can_be_built(name):
    import torch

    from iddpm import build, fit
    from iddpm.config import total_steps

    config = check(Config().updated({**PRESETS[name][1], "num_classes": 10}))
    assert name in (*METHODS, "auto", "none") or total_steps(config.train) > 0
    with torch.device("meta"):
        build.network(config)
    build.solver(fit.require_fit(config))


# Of DESIGN's table of methods: the schedule, what is predicted, the loss and its weighting, the law of t.
METHODS = {
    "ddpm": ("linear", "eps", "simple", "uniform", "uniform"),
    "iddpm": ("cosine", "eps", "hybrid", "uniform", "uniform"),
    "iddpm-vlb": ("cosine", "eps", "vlb", "uniform", "loss-second-moment"),
    "v": ("cosine", "v", "simple", "uniform", "stratified"),
    "edm": ("ve", "edm", "simple", "edm", "lognormal"),
    "flow": ("flow", "flow", "simple", "uniform", "logit-normal"),
    "jit": ("flow", "x0", "simple", "flow", "logit-normal"),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("before", ["digits", "cifar10-vlb", *METHODS])
def test_the_preset_of_a_method_leaves_nothing_of_the_mathematics_before_it(before, method):
    from iddpm import fit
    from iddpm.training.start import new

    config = fit.require_fit(check(new(f"{before},{method}", {"num_classes": 10})))
    d = config.diffusion
    assert (d.noise_schedule, d.parametrization, d.objective_name, d.weighting, d.schedule_sampler) == METHODS[method]
    alone = new(method, {"num_classes": 10})
    sample = dataclasses.replace(alone.sample, guidance=config.sample.guidance)  # which goes with the network's classes
    assert (d, config.sample, config.own) == (alone.diffusion, sample, alone.own)
    assert config.model == new(before, {"num_classes": 10}).model  # the network stays that of the recipe


def test_of_several_presets_each_must_exist(capsys):
    assert "--preset emd is not one of" in refused(capsys, "train", "DATA", "--preset", "digits,emd")


@pytest.mark.parametrize("settings", [dict(image_size="16x8", channel_mult="1,2"), dict(image_channels=3), dict(class_cond=True)])
def test_a_run_from_start_to_pictures(pictures, tmp_path, capsys, settings):
    run = tmp_path / "r"
    assert main(["train", str(pictures), "--run", str(run), *SMALL, *flags(**settings)]) == 0
    out = capsys.readouterr().out
    assert "22 images" in out
    assert f"next: iddpm sample {run}" in out
    assert main(["sample", str(run), "--num_samples", "3", "--out", str(tmp_path / "x.npz"), "--device", "cpu"]) == 0
    with np.load(tmp_path / "x.npz") as file:
        assert file["arr_0"].shape[1:3] == ((16, 8) if "image_size" in settings else (8, 8))
    capsys.readouterr()
    assert main(["nll", str(run), str(pictures), "--num_samples", "5", "--sampling_steps", "4", "--device", "cpu"]) == 0
    assert "respaced to 4 steps" in capsys.readouterr().out
    result = json.loads((run / "nll.json").read_text())
    assert result["images"] == 5
    assert result["bits_per_dim"] == pytest.approx(sum(result["vb"]) + result["prior"], rel=1e-5)


def test_a_single_image_and_a_folder_smaller_than_a_batch_train(tmp_path, capsys):
    (tmp_path / "one").mkdir()
    Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save(tmp_path / "one" / "eye.png")
    assert main(["train", str(tmp_path / "one"), "--run", str(tmp_path / "r"), *SMALL]) == 0
