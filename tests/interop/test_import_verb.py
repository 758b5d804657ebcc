"""`iddpm import` and `iddpm export`: a run from the original's files, and such files from a run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import flags as typed
from iddpm import build, rng
from iddpm.cli.main import main
from iddpm.config import Config
from iddpm.diffusion.solvers import run as walk
from iddpm.interop.openai.formats import files
from iddpm.interop.openai.formats import flags as original
from iddpm.sampling import draw, job
from iddpm.sampling.images import as_pixels
from iddpm.sampling.open import restore
from iddpm.store import checkpoint
from iddpm.store.weights import read_weights
from iddpm.training.state import TrainState
from interop.written import FLAGS, network, same, write

CPU = torch.device("cpu")


@pytest.fixture
def command(capsys):
    """Run a command line: its exit code, what it printed, and its error."""

    def run(*args: object) -> tuple[int, str, str]:
        code = main([str(a) for a in args])
        out, err = capsys.readouterr()
        assert err.count("\n") == (code == 2)
        return code, out, err

    return run


def drawn(source: Path, rate: float | None = None, count: int = 3) -> np.ndarray:
    weights = read_weights(source, ema_rate=rate)
    painter = draw.painter(weights.config, restore(weights, CPU), CPU)
    return np.concatenate(list(draw.images([painter], job.job(weights.config, range(count)))))


# ---- the original's files


def test_a_run_made_of_the_originals_files_draws_what_its_network_draws(tmp_path, command):
    """The images of the source: its weights in the network, walked down the chain its flags name, without any file of ours."""
    source = write(tmp_path / "files")
    code, out, _ = command("import", source.model, "--run", tmp_path / "run", *typed(**FLAGS))
    assert code == 0
    config = original.to_config("images", FLAGS)

    def noise(k: int) -> torch.Tensor:
        return rng.normal(0, rng.SAMPLE, k, range(3), (3, 32, 32))

    for rate, weights in ((0, source.weights), (0.9, source.averages[0.9]), (0.99, source.averages[0.99])):
        source.net.load_state_dict(weights)
        denoise = build.sampling_denoiser(config, source.net.eval())
        with torch.inference_mode():
            expected = as_pixels(walk(build.solver(config)(denoise, noise(0), build.grid(config), noise))).numpy()
        assert np.array_equal(drawn(tmp_path / "run", rate), expected)
    assert "next: iddpm sample" in out


def test_a_run_made_of_them_goes_on_where_they_are(tmp_path, command):
    source = write(tmp_path / "files")
    command("import", source.model, "--run", tmp_path / "run", *typed(**FLAGS, batch_size=8, lr=0.003))
    step = tmp_path / "run" / "checkpoints" / "step_00000011"  # modelN of the original's holds N + 1 updates
    saved, config = checkpoint.load(step), Config.from_json((tmp_path / "run" / "config.json").read_text())
    assert {k: torch.equal(v, source.weights[k]) for k, v in saved.weights.items()} == dict.fromkeys(source.weights, True)
    assert (config.train.ema_rate, config.train.lr, config.train.ema_warmup) == ("0.99,0.9", 0.003, False)
    state = TrainState(config, CPU)
    state.restore(saved, config)
    assert (state.step, state.images) == (11, 88)
    for (name, p), theirs in zip(state.params.items(), source.net.parameters()):
        assert torch.equal(state.optimizer.state[p]["exp_avg"], source.optimizer.state[theirs]["exp_avg"]), name


def test_training_goes_on_by_the_command_that_is_printed(tmp_path, command, pictures):
    tiny = dict(FLAGS, image_size=32, diffusion_steps=10)
    source = write(tmp_path / "files", updates=3, settings=tiny)
    run = tmp_path / "run"
    _, out, _ = command("import", source.model, "--run", run, *typed(**tiny, batch_size=2, device="cpu", sample_interval=0))
    assert f"iddpm train DATA --run {run} --steps N" in out
    code, out, _ = command("train", pictures, "--run", run, "--steps", 4, "--sampling_steps", 2)
    assert (code, "resuming" in out) == (0, True)
    after = checkpoint.load(run / "checkpoints" / "step_00000004")
    assert {float(v) for k, v in after.optimizer.items() if k.endswith(".step")} == {4.0}


def test_no_flags_are_needed_after_an_import(tmp_path, command, pictures):
    source = write(tmp_path / "files")
    command("import", source.model, "--run", tmp_path / "run", *typed(**FLAGS))
    assert command("sample", tmp_path / "run", "--num_samples", 2, "--device", "cpu")[0] == 0
    assert command("nll", tmp_path / "run", pictures, "--num_samples", 2, "--device", "cpu")[0] == 0
    assert np.isfinite(json.loads((tmp_path / "run" / "nll.json").read_text())["bits_per_dim"])
    few = ("--num_samples", 6, "--num_reference", 6, "--metrics", "kd", "--device", "cpu")
    assert command("evaluate", tmp_path / "run", "--reference", pictures, *few)[0] == 0
    names = [figure["name"] for figure in json.loads((tmp_path / "run" / "metrics.json").read_text())["figures"]]
    assert names == ["bits/dim", "bits/dim prior", "bits/dim decoder", "KD-lite0-128"]


def test_weights_by_themselves_are_sampled_and_begun_from_but_not_resumed(tmp_path, command, pictures):
    torch.save(network(FLAGS).state_dict(), tmp_path / "some_weights.pt")
    code, out, _ = command("import", tmp_path / "some_weights.pt", "--run", tmp_path / "run", *typed(**FLAGS))
    assert (code, "no optimizer" in out) == (0, True)
    assert len(drawn(tmp_path / "run")) == 3
    code, _, err = command("train", pictures, "--run", tmp_path / "run", "--steps", 1, "--device", "cpu")
    assert (code, "--init_from" in err) == (2, True)
    line = f"iddpm train DATA --run NEW --init_from {tmp_path / 'run'} --steps N"
    assert line in out
    words = line.replace("DATA", str(pictures)).replace("NEW", str(tmp_path / "new")).replace("steps N", "steps 1").split()[1:]
    few = typed(batch_size=2, device="cpu", sampling_steps=2)
    assert command(*words, *few)[0] == 0
    assert (tmp_path / "new" / "checkpoints" / "step_00000001").is_dir()


@pytest.mark.parametrize("alone", [False, True])
def test_a_lone_average_is_the_weights(tmp_path, command, alone):
    source = write(tmp_path / "files")
    if not alone:
        for name in ("model000010.pt", "opt000010.pt", "ema_0.9_000010.pt"):
            (source.folder / name).unlink()
    run = tmp_path / "run"
    given = typed(**FLAGS) + ["--alone"] * alone
    assert command("import", source.folder / "ema_0.99_000010.pt", "--run", run, *given)[0] == 0
    weights = read_weights(run)
    assert all(torch.equal(weights.tensors[k], v) for k, v in source.averages[0.99].items())
    assert weights.about["step"] == 10
    assert [p.name for p in weights.path.parent.glob("*.safetensors")] == ["weights.safetensors"]


def test_the_average_that_is_given_is_the_one_sampled_from(tmp_path, command):
    source = write(tmp_path / "files")
    command("import", source.folder / "ema_0.9_000010.pt", "--run", tmp_path / "run", *typed(**FLAGS))
    assert read_weights(tmp_path / "run").about["ema_rate"] == 0.9


@pytest.mark.parametrize(
    ("given", "missing", "said"),
    [
        ("model000010.pt", ["ema_0.9_000010.pt", "ema_0.99_000010.pt"], "ema_RATE_000010.pt is missing"),
        ("ema_0.9_000010.pt", ["model000010.pt"], "model000010.pt is missing"),
    ],
)
def test_an_incomplete_family_is_refused_unless_the_file_alone_is_wanted(tmp_path, command, given, missing, said):
    source = write(tmp_path / "files")
    for name in missing:
        (source.folder / name).unlink()
    line = ["import", source.folder / given, "--run", tmp_path / "run", *typed(**FLAGS)]
    code, _, err = command(*line)
    assert (code, said in err) == (2, True)
    assert command(*line, "--alone")[0] == 0


def test_a_rate_asked_for_that_is_not_there_is_named(tmp_path, command):
    source = write(tmp_path / "files")
    code, _, err = command("import", source.model, "--run", tmp_path / "run", *typed(**FLAGS, ema_rate="0.9999"))
    assert (code, "ema_0.9999_000010.pt is missing" in err) == (2, True)


def test_an_average_of_another_network_is_named(tmp_path, command):
    source = write(tmp_path / "files")
    torch.save(network(FLAGS | {"num_channels": 32}).state_dict(), source.folder / "ema_0.9_000010.pt")
    code, _, err = command("import", source.model, "--run", tmp_path / "run", *typed(**FLAGS))
    assert (code, "average 0.9 does not fit" in err, "--num_channels 32" in err) == (2, True, True)


def test_flags_that_contradict_the_weights_are_named(tmp_path, command):
    source = write(tmp_path / "files")
    given = typed(**FLAGS | {"learn_sigma": False, "num_res_blocks": 2})
    code, _, err = command("import", source.model, "--run", tmp_path / "run", *given)
    assert code == 2
    assert err.rstrip().endswith("It needs --num_res_blocks 1, --learn_sigma True")


def test_what_shapes_tell_need_not_be_given(tmp_path, command):
    source = write(tmp_path / "files")
    code, _, err = command("import", source.model, "--run", tmp_path / "run")
    assert (code, "do not tell --image_size (32, by its widths), --diffusion_steps, --noise_schedule" in err) == (2, True)
    few = dict(image_size=32, num_heads=2, diffusion_steps=20, noise_schedule="cosine")
    code, out, _ = command("import", source.model, "--run", tmp_path / "run", *typed(**few))
    assert code == 0
    assert "taken as by default in improved-diffusion: --predict_xstart False --rescale_timesteps True" in out
    command("import", source.model, "--run", tmp_path / "whole", *typed(**FLAGS))
    assert (tmp_path / "run" / "config.json").read_text() == (tmp_path / "whole" / "config.json").read_text()


def test_trained_classes_are_named_or_counted_or_those_of_a_folder(tmp_path, command, pictures):
    source = write(tmp_path / "files", settings=FLAGS | {"class_cond": True})
    line = ["import", source.model, "--alone", *typed(**FLAGS, class_cond=True)]
    assert command(*line, "--run", tmp_path / "a", "--classes", "cat, dog")[0] == 0
    config = read_weights(tmp_path / "a").config
    assert (config.data.classes, config.model.num_classes) == (("cat", "dog"), 1000)
    assert job.job(config, range(3)).labels == [0, 1, 0]
    assert command(*line, "--run", tmp_path / "b", "--classes", "10")[0] == 0
    assert job.trained_classes(read_weights(tmp_path / "b").config) == 10
    assert command(*line, "--run", tmp_path / "c")[0] == 0
    assert job.trained_classes(read_weights(tmp_path / "c").config) == 1000
    assert command(*line, "--run", tmp_path / "e", "--classes", pictures)[0] == 0
    assert read_weights(tmp_path / "e").config.data.classes == ("across", "disc", "down")
    assert "room for 1000" in command(*line, "--run", tmp_path / "d", "--classes", "1001")[2]


@pytest.mark.parametrize(("kind", "program"), [("enlarge", "improved"), ("classify", "guided")])
def test_upsamplers_and_classifiers_are_imported_too(tmp_path, command, kind, program):
    settings = {
        "enlarge": dict(FLAGS, large_size=32, small_size=8),
        "classify": dict(image_size=64, classifier_width=32, classifier_depth=1, classifier_attention_resolutions="8",
                           diffusion_steps=20, noise_schedule="cosine"),
    }[kind]  # fmt: skip
    settings.pop("image_size") if kind == "enlarge" else None
    heads = dict(num_head_channels=64) if kind == "classify" else {}
    rates = (0.9,) if kind == "enlarge" else ()  # the original's classifier_train keeps no averages
    source = write(tmp_path / "files", settings=settings, kind=kind, program=program, rates=rates, updates=2)
    code, out, _ = command("import", source.model, "--run", tmp_path / "run", *typed(**settings, **heads))
    assert (code, "the optimizer after 2 steps" in out) == (0, True)
    weights = read_weights(tmp_path / "run", ema_rate=0)
    assert weights.config.model == original.to_config(kind, settings, program).model
    assert all(torch.equal(weights.tensors[k], v) for k, v in source.weights.items())


def test_a_folder_that_holds_something_is_not_written_to(tmp_path, command):
    source = write(tmp_path / "files")
    code, _, err = command("import", source.model, "--run", source.folder, *typed(**FLAGS))
    assert (code, "is not empty" in err) == (2, True)


def test_the_originals_whole_recipe_is_taken(tmp_path, command):
    """Training and sampling flags too, as they stand together in its notes."""
    source = write(tmp_path / "files")
    recipe = "--lr 1e-4 --batch_size 128 --schedule_sampler uniform --use_kl False --rescale_learned_sigmas True --use_fp16 False"
    words = recipe.split() + ["--timestep_respacing", "ddim10", "--use_ddim", "True", "--dropout", "0.3"]
    assert command("import", source.model, "--run", tmp_path / "run", *typed(**FLAGS), *words)[0] == 0
    config = read_weights(tmp_path / "run").config
    assert (config.sample.solver, config.sample.sampling_steps) == ("ddim", "ddim10")
    assert (config.diffusion.objective, config.train.batch_size, config.model.dropout) == ("hybrid", 128, 0.3)


# ---- ours, there and back


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported")
    assert main(["export", str(run), "--to", "openai", "--out", str(out)]) == 0
    return out


def test_a_run_comes_back_from_its_export_bit_for_bit(run, exported, tmp_path, command):
    code, out, _ = command("import", exported / "model000004.pt", "--run", tmp_path / "back")
    assert (code, "iddpm000004.json" in out) == (0, True)
    before, after = (
        checkpoint.load(run / "checkpoints" / "step_00000004"),
        checkpoint.load(tmp_path / "back" / "checkpoints" / "step_00000004"),
    )
    plain = [name for name in before.weights if not name.startswith("label_emb")]
    assert all(torch.equal(before.weights[k], after.weights[k]) for k in plain)
    assert torch.equal(after.weights["label_emb.weight"][:3], before.weights["label_emb.weight"])
    assert not after.weights["label_emb.weight"][3:].any()
    assert before.state == after.state
    assert np.array_equal(drawn(run), drawn(tmp_path / "back"))


def test_an_export_writes_over_that_of_its_own_run_alone(run, exported, tmp_path, command):
    there = tmp_path / "there"
    shutil.copytree(exported, there)
    assert command("export", run, "--out", there)[0] == 0
    assert "of another run, or of other flags" in command("export", run, "--out", there, "--label_rows", 0)[2]
    (there / "iddpm000004.json").unlink()  # as the original leaves them
    before = (there / "model000004.pt").read_bytes()
    assert "of another run, or of other flags" in command("export", run, "--out", there)[2]
    assert (there / "model000004.pt").read_bytes() == before
    lone = run / "checkpoints" / "step_00000004" / "weights.safetensors"
    shutil.copy(lone, tmp_path / "lone.safetensors")
    assert command("export", tmp_path / "lone.safetensors", "--out", there)[0] == 2
    assert (there / "model000004.pt").read_bytes() == before
    assert "or -1 for the newest" in command("export", run, "--checkpoint_step", -7)[2]


def test_exported_files_are_the_originals(run, exported):
    """Plain torch reads them into a network of a thousand classes, and into its AdamW."""
    names = sorted(p.name for p in exported.iterdir())
    assert names == ["ema_0.99_000004.pt", "ema_0.9_000004.pt", "iddpm000004.json", "model000004.pt", "opt000004.pt"]
    net = build.network(read_weights(run).config.updated({"num_classes": 1000}))
    weights = torch.load(exported / "ema_0.9_000004.pt", weights_only=True)
    assert list(weights) == list(net.state_dict())
    net.load_state_dict(weights)
    optimizer = torch.optim.AdamW(net.parameters())
    optimizer.load_state_dict(torch.load(exported / "opt000004.pt", weights_only=True))
    state = optimizer.state[net.label_emb.weight]
    assert (state["exp_avg_sq"].shape[0], int(state["step"])) == (1000, 4)


def test_without_further_rows_the_export_is_bit_for_bit(run, tmp_path, command):
    code, out, _ = command("export", run, "--out", tmp_path / "out", "--label_rows", 0)
    assert (code, "zeros" in out) == (0, False)
    before = checkpoint.load(run / "checkpoints" / "step_00000004")
    after, config = files.load_run(tmp_path / "out" / "model000004.pt")
    assert config == read_weights(run).config
    assert all(torch.equal(before.optimizer[k], v) for k, v in after.optimizer.items())
    assert set(before.optimizer) == set(after.optimizer)
    assert all(torch.equal(before.weights[k], v) for k, v in after.weights.items())


def test_an_imported_run_exports_the_files_it_came_from(tmp_path, command):
    source = write(tmp_path / "files", number=11, updates=11)
    command("import", source.model, "--run", tmp_path / "run", *typed(**FLAGS))
    code, out, _ = command("export", tmp_path / "run", "--out", tmp_path / "out")
    assert code == 0
    assert f"image_sample.py --model_path {tmp_path / 'out' / 'ema_0.99_000011.pt'} --image_size 32 --num_channels 16" in out
    for name in ("model000011.pt", "ema_0.9_000011.pt", "ema_0.99_000011.pt"):
        assert same(files.read(tmp_path / "out" / name), torch.load(source.folder / name, weights_only=True))
    ours = torch.load(tmp_path / "out" / "opt000011.pt", weights_only=True)["state"]
    theirs = source.optimizer.state_dict()["state"]
    assert all(torch.equal(ours[k][slot], value) for k, slots in theirs.items() for slot, value in slots.items())


def test_what_the_original_cannot_run_is_said(run, exported, tmp_path, command):
    _, out, _ = command("export", run, "--out", tmp_path / "out")
    assert "no counterpart of --image_size 8" in out


def test_a_lone_file_of_weights_is_exported_by_itself(run, tmp_path, command):
    lone = tmp_path / "lone.safetensors"
    shutil.copy(run / "checkpoints" / "step_00000004" / "weights-ema-0.99.safetensors", lone)
    assert command("export", lone, "--out", tmp_path / "out")[0] == 0
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["ema_0.99_000004.pt"]


def test_an_average_of_ours_alone_keeps_its_config(run, exported, tmp_path, command):
    assert command("import", exported / "ema_0.99_000004.pt", "--run", tmp_path / "a", "--alone")[0] == 0
    assert np.array_equal(drawn(tmp_path / "a"), drawn(run, 0.99))
    assert command("export", tmp_path / "a", "--out", tmp_path / "files")[0] == 0  # weights, and no optimizer to go with them
    assert sorted(p.name for p in (tmp_path / "files").iterdir()) == ["iddpm000004.json", "model000004.pt"]
    assert command("import", tmp_path / "files" / "model000004.pt", "--run", tmp_path / "b")[0] == 0
    assert np.array_equal(drawn(tmp_path / "b"), drawn(run, 0.99))


def test_a_file_of_ours_takes_flags_that_do_not_contradict_it(exported, tmp_path, command):
    line = ["import", exported / "model000004.pt", "--run", tmp_path / "run"]
    code, _, err = command(*line, "--diffusion_steps", 50)
    assert (code, "--diffusion_steps 50 contradicts" in err) == (2, True)
    assert command(*line, "--published", "lsun_cat")[0] == 2
    assert command(*line, "--sampling_steps", 3, "--diffusion_steps", 20)[0] == 0
    assert read_weights(tmp_path / "run").config.sample.sampling_steps == "3"


def test_the_help_answers_without_torch(command):
    import subprocess
    import sys

    code = "import sys; from iddpm.cli.main import main; main(['import', '--help'])"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True)
    assert "--published NAME" in done.stdout
    assert "--use_kl" in done.stdout
    assert "| torch\n" not in done.stderr
