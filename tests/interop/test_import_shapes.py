"""What shapes tell of a network, held against the published digests; and what is said where flags contradict them."""

import hashlib
import json
from functools import cache

import pytest

from golden_rules import load
from iddpm.config import Config, check
from iddpm.errors import UserError
from iddpm.interop.openai.formats.flags import NETWORKS, to_config
from iddpm.interop.openai.formats.published import PUBLISHED
from iddpm.interop.openai.formats.weights import check_fit, cures, network_shapes, settle, tell

ROWS = {file.removesuffix(".pt"): row for row in load("published_shapes.json")["rows"] for file in row["file"].split(", ")}


def parsed(flags: str) -> dict:
    """ "--a 1 --b True" as {"a": "1", "b": "True"}."""
    words = flags.split()
    return {name.removeprefix("--"): word for name, word in zip(words[::2], words[1::2])}


@cache
def published_shapes(name: str) -> dict[str, tuple[int, ...]]:
    return network_shapes(check(PUBLISHED[name].config()))


# ---- the published files


def test_every_published_file_has_a_row():
    assert len(PUBLISHED) == 8 + 15
    assert set(PUBLISHED) == set(ROWS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_row_of_a_published_file_has_its_flags(name):
    row = PUBLISHED[name]
    ours = {k: str(v) for k, v in (NETWORKS[row.program][row.task] | row.flags).items()}
    wanted = {k: str(v) for k, v in NETWORKS[row.program][row.task].items()} | parsed(ROWS[name]["flags"])
    if name == "64x64_classifier":
        wanted["noise_schedule"] = "cosine"  # as the model that it guides has it; its own command has no such flag
    assert ours == wanted


@pytest.mark.parametrize("name", PUBLISHED)
def test_flags_config_and_network_of_a_published_file_give_its_digest(name):
    shapes = published_shapes(name)
    digest = hashlib.sha256(json.dumps([[k, list(shape)] for k, shape in shapes.items()]).encode()).hexdigest()
    assert digest == ROWS[name]["sha256"]
    assert len(shapes) == ROWS[name]["tensors"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_alone_tell_the_network_of_a_published_file(name):
    row = PUBLISHED[name]
    config = row.config()
    told = tell(published_shapes(name), name)
    assert cures(told, config) == []
    fields = told.at(int(config.model.image_size))
    for field in ("task", "num_channels", "num_res_blocks", "channel_mult", "use_scale_shift_norm", "num_classes"):
        assert fields[field] == getattr(config.model, field)
    assert fields.get("resblock_updown", False) == config.model.resblock_updown
    assert fields.get("learn_sigma", False) == config.diffusion.learn_sigma
    assert set(fields["attention_resolutions"].split(",")) == set(config.model.attention_resolutions.split(","))
    if row.task == "classify":
        assert fields["image_size"] == config.model.image_size


# ---- networks at random


@pytest.mark.parametrize("pool", ["attention", "adaptive", "spatial", "spatial_v2"])
@pytest.mark.parametrize("updown", [True, False])
@pytest.mark.parametrize("depth", [1, 3])
def test_a_classifier_is_told_by_its_shapes(pool, updown, depth):
    shape = dict(width=32, depth=depth, pool=pool, resblock_updown=updown, use_scale_shift_norm=not updown)
    given = {f"classifier_{k}": v for k, v in shape.items()} | {"classifier_attention_resolutions": "16"}
    config = to_config("classify", given, "guided")
    config = config.updated({"num_head_channels": 32})
    shapes = network_shapes(config)
    told = tell(shapes, "f")
    assert cures(told, config) == []
    known = dict(diffusion_steps=1000, noise_schedule="linear", num_head_channels=32)
    if pool != "attention":
        with pytest.raises(UserError, match=r"do not tell --image_size \(64, by its widths\)"):
            settle(shapes, known, "f")
        known["image_size"] = "64"
    assert settle(shapes, known, "f").config.model == config.model


@pytest.mark.parametrize("change", [
    dict(), dict(learn_sigma=True), dict(class_cond=True, num_classes=7), dict(resblock_updown=True),
    dict(use_scale_shift_norm=False), dict(num_res_blocks=3), dict(num_res_blocks=1, resblock_updown=True),
    dict(channel_mult="1,1.5"), dict(channel_mult="1"), dict(channel_mult="1,1,1", resblock_updown=True),
    dict(attention_resolutions=""), dict(attention_resolutions="32,8"), dict(image_channels=1),
    dict(image_channels=4, learn_sigma=True), dict(task="enlarge", small_size="8", learn_sigma=True),
    dict(task="enlarge", small_size="16", image_channels=1), dict(image_size="48", attention_resolutions="12"),
], ids=str)  # fmt: skip
def test_a_model_is_told_by_its_shapes(change):
    config = check(Config().updated(dict(num_channels=32, image_size="32", attention_resolutions="16") | change))
    shapes = network_shapes(config)
    assert cures(tell(shapes, "f"), config) == []
    given = dict(image_size=config.model.image_size, diffusion_steps=1000, noise_schedule="linear")
    given |= {"small_size": config.model.small_size} if config.model.small_size else {}
    found = settle(shapes, given, "f").config.model
    assert network_shapes(Config().updated({"learn_sigma": config.diffusion.learn_sigma}).updated(vars(found))) == shapes
    assert (found.task, found.image_channels) == (config.model.task, config.model.image_channels)


# ---- contradictions

BASE = dict(image_size=32, num_channels=32, num_res_blocks=2, attention_resolutions="16,8", diffusion_steps=100)


@pytest.mark.parametrize(
    ("file", "flags", "said"),
    [
        (dict(learn_sigma=True), dict(), "--learn_sigma True"),
        (dict(), dict(learn_sigma=True), "--learn_sigma False"),
        (dict(class_cond=True), dict(), "--class_cond True"),
        (dict(), dict(num_channels=64), "--num_channels 32"),
        (dict(num_res_blocks=3), dict(), "--num_res_blocks 3"),
        (dict(attention_resolutions="16"), dict(), "--attention_resolutions 16"),
        (dict(attention_resolutions="16,8,4"), dict(), "--attention_resolutions 16,8,4"),
        (dict(use_scale_shift_norm=False), dict(), "--use_scale_shift_norm False"),
        (dict(resblock_updown=True), dict(), "--resblock_updown True"),
        (dict(image_size=64), dict(), "--image_size 64 (or --channel_mult 1,2,3,4)"),
        (dict(channel_mult="1,2,5"), dict(), "--channel_mult 1,2,5"),
    ],
    ids=str,
)
def test_the_flag_that_would_fit_is_named(file, flags, said):
    shapes = network_shapes(to_config("images", BASE | file, "guided"))
    with pytest.raises(UserError) as e:
        check_fit(shapes, to_config("images", BASE | flags, "guided"), "f.pt")
    assert str(e.value).startswith("f.pt does not fit the flags: ")
    assert str(e.value).endswith(f"It needs {said}")


def test_the_first_three_mismatches_are_named():
    shapes = network_shapes(to_config("images", BASE | dict(learn_sigma=True, class_cond=True, num_channels=64)))
    with pytest.raises(UserError) as e:
        check_fit(shapes, to_config("images", BASE), "f.pt")
    message = str(e.value)
    assert (
        "time_embed.0.weight is (256, 64), not (128, 32); time_embed.0.bias is (256), not (128); time_embed.2.weight" in message
    )
    assert " more. It needs --num_channels 64, --learn_sigma True, --class_cond True" in message
    one = network_shapes(to_config("images", BASE | dict(learn_sigma=True)))
    with pytest.raises(
        UserError, match=r"out.2.weight is \(6, 32, 3, 3\), not \(3, 32, 3, 3\); out.2.bias is \(6\), not \(3\)\."
    ):
        check_fit(one, to_config("images", BASE), "f.pt")
    with pytest.raises(UserError, match=r"; label_emb.weight \(1000, 256\) is not of that network\. It needs --learn_sigma"):
        check_fit(shapes, to_config("images", BASE | dict(num_channels=64)), "f.pt")
    with pytest.raises(UserError, match=r"flags: label_emb.weight is missing; out.2.weight is"):
        check_fit(one, to_config("images", BASE | dict(class_cond=True)), "f.pt")


@pytest.mark.parametrize("kinds", [("enlarge", "images"), ("images", "enlarge"), ("classify", "images"), ("images", "classify")])
def test_a_network_of_another_kind_is_called_what_it_is(kinds):
    made, asked = (to_config(kind, dict(image_size=64, large_size=64, small_size=16), "guided") for kind in kinds)
    words = dict(images="a model of images", enlarge="a super-resolution model", classify="a classifier")
    with pytest.raises(UserError, match=f"it is {words[kinds[0]]}, not {words[kinds[1]]}"):
        check_fit(network_shapes(made), asked, "f.pt")


@pytest.mark.parametrize("shapes", [
    {"weight": (2, 2)},
    {"time_embed.0.weight": (8, 2), "input_blocks.0.0.weight": (2, 3, 3, 3)},
    {**network_shapes(to_config("images", BASE)), "input_blocks.2.0.in_layers.2.weight": (7, 7, 3, 3)},
])  # fmt: skip
def test_weights_of_another_program_are_refused(shapes):
    with pytest.raises(UserError, match="holds no network of improved- or guided-diffusion"):
        settle(shapes, {}, "f.pt")


# ---- what is asked

TOLD = published_shapes("cifar10_uncond_50M_500K")


def test_only_what_shapes_cannot_tell_is_asked():
    with pytest.raises(UserError) as e:
        settle(TOLD, {}, "f.pt")
    message = str(e.value)
    assert "num_channels 128, num_res_blocks 3, learn_sigma True" in message
    assert "do not tell --image_size (32, by its widths), --diffusion_steps, --noise_schedule: give these" in message
    assert "by default in improved-diffusion: --num_heads 4 --predict_xstart False --rescale_timesteps True" in message
    assert "--published cifar10_uncond_50M_500K or cifar10_uncond_vlb_50M_500K" in message
    with pytest.raises(UserError, match="do not tell --noise_schedule: give"):
        settle(TOLD, dict(image_size="32", diffusion_steps=4000), "f.pt")


def test_the_rest_is_as_by_default_in_the_original_and_said():
    known = dict(image_size="32", diffusion_steps=4000, noise_schedule="cosine")
    found = settle(TOLD, known, "f.pt")
    assert found.program == "improved"
    assert found.assumed == dict(num_heads=4, predict_xstart=False, rescale_timesteps=True)
    row = PUBLISHED["cifar10_uncond_50M_500K"].config()
    assert (found.config.model, found.config.diffusion) == (row.updated({"dropout": 0.0}).model, row.diffusion)
    assert found.alike == ["cifar10_uncond_50M_500K", "cifar10_uncond_vlb_50M_500K"]
    assert settle(TOLD, known | dict(num_heads=2, rescale_timesteps=False), "f.pt").assumed == dict(predict_xstart=False)
    assert "predict_xstart" not in settle(TOLD, known | dict(parametrization="x0"), "f.pt").assumed


def test_the_program_shows_in_what_only_guided_diffusion_has():
    shapes = published_shapes("64x64_diffusion")
    found = settle(shapes, dict(image_size="64", diffusion_steps=2000, noise_schedule="cosine"), "f.pt")
    assert found.program == "guided"
    assert found.assumed["rescale_timesteps"] is False
    again = settle(TOLD, dict(image_size="32", diffusion_steps=2000, noise_schedule="cosine", num_head_channels=64), "f.pt")
    assert again.program == "guided"
    assert "num_heads" not in again.assumed


def test_a_published_name_answers_everything():
    found = settle(TOLD, {}, "f.pt", "cifar10_uncond_vlb_50M_500K.pt")
    assert found.config == PUBLISHED["cifar10_uncond_vlb_50M_500K"].config()
    assert settle(TOLD, dict(sampling_steps="50"), "f.pt", "cifar10_uncond_50M_500K").config.sample.sampling_steps == "50"
    with pytest.raises(UserError, match=r"It needs --image_size 32 \(or --channel_mult 1,2,2,2\)"):
        settle(TOLD, {}, "f.pt", "imagenet64_uncond_100M_1500K")
    with pytest.raises(UserError, match="did you mean cifar10_uncond_50M_500K"):
        settle(TOLD, {}, "f.pt", "cifar10_uncond_50M_500k")


def test_the_same_said_in_two_ways_is_refused():
    with pytest.raises(UserError, match="--predict_xstart and --parametrization say the same"):
        settle(TOLD, dict(predict_xstart=True, parametrization="eps"), "f.pt")


def test_our_names_and_the_originals_mean_the_same():
    known = dict(image_size="32", diffusion_steps=100, noise_schedule="linear")
    theirs = settle(TOLD, known | dict(use_kl=True, predict_xstart=True, timestep_respacing="10", use_ddim=True), "f.pt").config
    ours = dict(objective="vlb", parametrization="x0", sampling_steps="10", solver="ddim")
    assert settle(TOLD, known | ours, "f.pt").config == theirs
