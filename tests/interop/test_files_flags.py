"""The original's flags: their names and defaults as its documentation lists them, and what they mean here, there and back."""

import random

import pytest

from iddpm import build
from iddpm.config import ENDLESS, Config, check
from iddpm.errors import UserError
from iddpm.interop.openai.formats import flags
from iddpm.interop.openai.formats.flags import COMMANDS, NETWORKS, from_config, to_config
from iddpm.interop.openai.formats.published import PUBLISHED

LISTED = dict(  # name: default, in the words of the original's parser
    pair.split("=") for pair in """
    image_size=64 num_channels=128 num_res_blocks=2 num_heads=4 num_heads_upsample=-1 attention_resolutions=16,8 dropout=0.0
    learn_sigma=False sigma_small=False class_cond=False diffusion_steps=1000 noise_schedule=linear timestep_respacing=
    use_kl=False predict_xstart=False rescale_timesteps=True rescale_learned_sigmas=True use_checkpoint=False
    use_scale_shift_norm=True""".split()
)  # fmt: skip
LISTED_TRAIN = dict(
    pair.split("=") for pair in """
    data_dir= schedule_sampler=uniform lr=0.0001 weight_decay=0.0 lr_anneal_steps=0 batch_size=1 microbatch=-1 ema_rate=0.9999
    log_interval=10 save_interval=10000 resume_checkpoint= use_fp16=False fp16_scale_growth=0.001""".split()
)  # fmt: skip


def shown(table: dict) -> dict[str, str]:
    return {k: str(v) for k, v in table.items()}


def test_the_image_commands_have_the_documented_flags_and_defaults():
    assert shown(flags.IMAGE) == LISTED
    assert list(flags.IMAGE) == list(LISTED)
    assert shown(COMMANDS["improved"]["image_train"]) == LISTED_TRAIN | LISTED
    own = dict(clip_denoised="True", num_samples="10000", batch_size="16", use_ddim="False", model_path="")
    assert shown(COMMANDS["improved"]["image_sample"]) == own | LISTED
    own = dict(data_dir="", clip_denoised="True", num_samples="1000", batch_size="1", model_path="")
    assert shown(COMMANDS["improved"]["image_nll"]) == own | LISTED


def test_the_super_resolution_commands_have_two_sizes_instead_of_one():
    sizes = {k: v for k, v in LISTED.items() if k not in ("image_size", "sigma_small")} | dict(large_size="256", small_size="64")
    assert shown(COMMANDS["improved"]["super_res_train"]) == LISTED_TRAIN | sizes
    own = dict(clip_denoised="True", num_samples="10000", batch_size="16", use_ddim="False", base_samples="", model_path="")
    assert shown(COMMANDS["improved"]["super_res_sample"]) == own | sizes


def test_guided_diffusion_adds_flags_and_changes_two_defaults():
    added = dict(num_head_channels=-1, channel_mult="", resblock_updown=False, use_fp16=False, use_new_attention_order=False)
    changed = dict(rescale_timesteps=False, rescale_learned_sigmas=False)
    assert {k: v for k, v in flags.IMAGE.items() if k != "sigma_small"} | added | changed == flags.GUIDED_IMAGE
    train = COMMANDS["guided"]["classifier_train"]
    expected = dict(iterations=150000, anneal_lr=False, val_data_dir="", noised=True, eval_interval=5, lr=3e-4, batch_size=4)
    assert {k: train[k] for k in expected} == expected
    assert (train["classifier_width"], train["classifier_depth"], train["classifier_pool"]) == (128, 2, "attention")
    drawn = COMMANDS["guided"]["classifier_sample"]
    assert (drawn["classifier_path"], drawn["classifier_scale"]) == ("", 1.0)


# ---- what they mean


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (dict(predict_xstart=True), dict(parametrization="x0")),
        (dict(), dict(parametrization="eps", objective="simple", sampling_steps="all", solver="ancestral", num_classes=0)),
        (dict(learn_sigma=True), dict(objective="hybrid", learn_sigma=True)),
        (dict(learn_sigma=True, rescale_learned_sigmas=False), dict(objective="hybrid_unscaled")),
        (dict(learn_sigma=True, use_kl=True), dict(objective="vlb")),
        (dict(use_kl=True), dict(objective="vlb", learn_sigma=False)),
        (dict(timestep_respacing="ddim50", use_ddim=True), dict(sampling_steps="ddim50", solver="ddim", eta=0.0)),
        (dict(class_cond=True), dict(class_cond=True, num_classes=1000, labels="original")),
        (dict(use_fp16=True), dict(precision="fp16")),
        (dict(use_new_attention_order=True), dict(new_attention_order=True)),
        (dict(lr_anneal_steps=500), dict(lr_anneal_steps=500, steps=500)),
        (dict(lr_anneal_steps=0), dict(lr_anneal_steps=0, steps=ENDLESS)),
        (dict(ema_rate="0.9,0.99"), dict(ema_rate="0.9,0.99", ema_warmup=False, keep=0)),
        (dict(data_dir="pictures"), dict(path="pictures")),
    ],
    ids=str,
)
def test_a_flag_of_the_originals_means_this_here(given, meant):
    now = to_config("images", given).flat()
    assert {k: now[k] for k in meant} == meant


def test_the_batch_is_that_of_each_process():
    assert to_config("images", dict(batch_size=4), processes=3).train.batch_size == 12


def test_the_upsampler_to_512_is_as_wide_as_that_to_256():
    wide = to_config("enlarge", dict(large_size=512, small_size=128), "guided")
    assert wide.model.channel_mult == "1,1,2,2,4,4"
    assert to_config("enlarge", dict(large_size=256, small_size=64), "guided").model.channel_mult == ""


def test_a_classifiers_flags_do_not_mix_with_those_of_the_model_it_guides():
    command = COMMANDS["guided"]["classifier_sample"] | dict(image_size=128, num_channels=256, dropout=0.3, learn_sigma=True)
    judge, model = to_config("classify", command, "guided"), to_config("images", command, "guided")
    assert (judge.model.num_channels, judge.model.dropout, judge.model.class_cond) == (128, 0.0, True)
    assert (model.model.num_channels, model.model.dropout, model.model.class_cond) == (256, 0.3, False)
    assert judge.model.image_size == model.model.image_size == "128"
    for config in (judge, model):
        build.grid(check(config))


def test_a_classifier_is_trained_as_the_original_trains_it():
    given = dict(COMMANDS["guided"]["classifier_train"], val_data_dir="held-out", iterations=700, anneal_lr=True)
    config = check(to_config("classify", given, "guided"))
    t, d = config.train, config.data
    assert (t.steps, t.lr_anneal_steps, t.ema_rate, d.validation, t.validation_interval) == (700, -1, "", "held-out", 5)
    assert (d.random_crop, d.random_flip, config.diffusion.rescale_timesteps) == (True, True, False)


@pytest.mark.parametrize(("program", "command"), [(p, c) for p, commands in COMMANDS.items() for c in commands])
def test_every_command_with_its_defaults_is_a_config_that_can_work(program, command):
    network = "enlarge" if "super_res" in command else "classify" if "classifier_train" in command else "images"
    check(to_config(network, COMMANDS[program][command], program))


# ---- and back


def drawn(network: str, program: str, seed: int) -> dict:
    """Flags at random, of those whose every combination means something else."""
    r = random.Random(seed)
    out = dict(NETWORKS[program][network])
    choices = dict(
        num_channels=[32, 64], num_res_blocks=[1, 3], num_heads=[1, 2], num_heads_upsample=[-1, 2], dropout=[0.0, 0.3],
        attention_resolutions=["16", "16,8"], learn_sigma=[True, False], class_cond=[True, False], diffusion_steps=[100, 4000],
        noise_schedule=["linear", "cosine"], timestep_respacing=["", "50"], predict_xstart=[True, False],
        rescale_timesteps=[True, False], use_checkpoint=[True, False], use_scale_shift_norm=[True, False],
        num_head_channels=[-1, 16], resblock_updown=[True, False], use_fp16=[True, False],
        use_new_attention_order=[True, False], channel_mult=["", "1,2", "1,3,2"], classifier_depth=[1, 2],
        classifier_pool=["attention", "adaptive", "spatial"], classifier_width=[32, 64], classifier_use_fp16=[True, False],
        classifier_resblock_updown=[True, False], classifier_use_scale_shift_norm=[True, False],
    )  # fmt: skip
    out |= {k: r.choice(v) for k, v in choices.items() if k in out}
    if network == "classify":
        return out | dict(learn_sigma=False, predict_xstart=False, rescale_timesteps=False)
    if out["learn_sigma"]:
        out["use_kl"], out["rescale_learned_sigmas"] = r.choice([(False, True), (False, False)])
    else:
        out["use_kl"] = r.choice([True, False])
        out |= dict(sigma_small=r.choice([True, False])) if "sigma_small" in out else {}
    return out


@pytest.mark.parametrize(("program", "network"), [(p, n) for p, networks in NETWORKS.items() for n in networks])
def test_flags_come_back_from_the_config_they_mean(program, network):
    for seed in range(25):
        given = drawn(network, program, seed)
        config = to_config(network, given, program)
        said, back = from_config(config)
        again = to_config(network, back, said)
        assert (again.model, again.diffusion, again.sample) == (config.model, config.diffusion, config.sample)
        if said == program:
            assert back == given
        else:
            assert (program, said) == ("guided", "improved")  # what both can say is said in the older one's words


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_flags_of_a_published_file_come_back(name):
    row = PUBLISHED[name]
    said, back = from_config(row.config())
    assert said == row.program
    assert back == NETWORKS[row.program][row.task] | row.flags


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(parametrization="v"), "--parametrization v"),
        (dict(objective="vlb_unscaled", learn_sigma=True), "--objective vlb_unscaled"),
        (dict(image_channels=1), "--image_channels 1"),
        (dict(image_size="8"), "--image_size 8"),
        (dict(image_size="64x96"), "--image_size"),
        (dict(channel_mult="1,1.5,2"), "--channel_mult 1,1.5,2"),
        (dict(attention_resolutions=""), "--attention_resolutions none"),
    ],
    ids=str,
)
def test_what_the_original_has_no_flag_for_is_named(change, said):
    with pytest.raises(UserError, match="no counterpart") as e:
        from_config(Config().updated(change))
    assert said in str(e.value)


def test_a_native_config_becomes_the_originals_command():
    config = Config().updated(dict(learn_sigma=True, objective="auto", diffusion_steps=4000, noise_schedule="cosine"))
    program, said = from_config(config.updated(dict(image_size="32", channel_mult="1,2,2,2", sampling_steps="250")))
    line = flags.line(said, NETWORKS[program]["images"])
    wanted = "--image_size 32 --learn_sigma True --diffusion_steps 4000 --noise_schedule cosine --timestep_respacing 250"
    assert (program, line) == ("improved", wanted)
