"""Settings: under which others each has an effect; the JSON they are kept as; which choices go together."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from iddpm import build, fit
from iddpm.cli.main import main
from iddpm.config import Config, check, every_field
from iddpm.config import choices as table
from iddpm.config.choices import Field, choices
from iddpm.config.fields import fields_of
from iddpm.config.run import VERSION, typed
from iddpm.config.tasks import TASK_OF, TASKS
from iddpm.diffusion.schedule import Flow, Level
from iddpm.errors import UserError

EARLIER = Path(__file__).parents[1] / "earlier"
FIELDS = {name: f for _, group in Config().groups() for name, f in fields_of(group).items()}
CONDITIONS = [(name, condition) for name, f in FIELDS.items() for condition in f.only.split()]

METHODS: dict[str, dict[str, Any]] = {
    "ddpm": dict(noise_schedule="linear"),
    "iddpm": dict(noise_schedule="cosine", learn_sigma=True, diffusion_steps=4000),
    "iddpm-vlb": dict(noise_schedule="cosine", learn_sigma=True, objective="vlb", schedule_sampler="loss-second-moment"),
    "v": dict(noise_schedule="cosine", parametrization="v", schedule_sampler="stratified", solver="ddim", eta=0.3),
    "previous": dict(parametrization="previous", sigma_small=True),
    "edm": dict(
        noise_schedule="ve", sigma_max=40.0, parametrization="edm", weighting="edm", sigma_data=0.4, schedule_sampler="lognormal",
        P_mean=-1, sampling_steps="18", solver="dpmpp_2m",
    ),
    "flow": dict(
        noise_schedule="flow", parametrization="flow", schedule_sampler="logit-normal", logit_std=0.8, sampling_steps="50",
        solver="dpmpp_2m",
    ),
    "x0-on-flow": dict(noise_schedule="flow", parametrization="x0", weighting="flow", sampling_steps="50"),
    "enlarge": dict(task="enlarge", small_size="16", low_res_noise=0.2, consistent=True),
    "classify": dict(task="classify", class_cond=True, num_classes=3, classes=("a", "b", "c"), noised=False),
    "measured": dict(eval_every=100, eval_extractor="inception", inception_weights="weights.pth", preset="cifar10"),
}  # fmt: skip
each_method = pytest.mark.parametrize("method", METHODS)


def made(method: str) -> Config:
    """The config of a method; 1 in the place of 1.0 among the settings, as a program may write it."""
    return fit.require_fit(check(Config().updated(METHODS[method])))


@pytest.fixture(autouse=True)
def another_network(monkeypatch):
    """A second row of networks, so that settings of ours can be given beside it."""
    monkeypatch.setattr(table, "ADDED", {})
    table.add("network", lambda asked: torch.nn.Identity(), "mine")


# ---- the rule `only`


def other(f: Field) -> Any:
    """A value that a field may have, and that is not its default."""
    if f.type is bool:
        return not f.default
    if f.type is str:
        widths = f is FIELDS["ema_power"]
        return next((name for name in f.allowed() if name != f.default), "0.1" if widths else "16")
    low, high = (-1e9 if f.low is None else f.low), (1e9 if f.high is None else f.high)
    return next(f.type(v) for v in (f.default + 1, f.default / 2, low, high) if low <= v <= high and v != f.default)


def values(condition: str, holds: bool) -> tuple[str, Any]:
    """A setting that meets a condition, or one that does not."""
    name, _, part = condition.partition(":")
    key, _, listed = name.partition("=")
    f = FIELDS[key]
    if part:
        return key, next(row for row, choice in choices(f.kind).items() if (part in choice.knows) == holds)
    if listed:
        allowed = f.allowed() or (f.default, other(f))
        return key, next(value for value in allowed if (str(value) in listed.split("|")) == holds)
    return key, other(f) if holds else f.default


def with_its_own(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings, and what these need in turn to have an effect, or at all."""
    found = dict(settings)
    for key, value in settings.items():
        if value != FIELDS[key].default:
            needed = dict(values(condition, holds=True) for condition in FIELDS[key].only.split())
            found = with_its_own({k: v for k, v in needed.items() if k not in found}) | found
    if TASKS[found.get("task", "images")].enlarges:
        found.setdefault("small_size", "16")
    if TASKS[found.get("task", "images")].classifies:
        found["class_cond"] = True
    if found.get("noise_schedule") in ("flow", "ve"):
        found["sampling_steps"] = "50"
    return found


@pytest.mark.parametrize("name", [name for name, f in FIELDS.items() if f.only])
def test_a_setting_is_taken_where_it_has_an_effect(name):
    config = check(Config().updated(with_its_own({name: other(FIELDS[name])})))
    assert config.flat()[name] == other(FIELDS[name])
    assert config.effective().flat() == config.flat()


@pytest.mark.parametrize(("name", "condition"), CONDITIONS)
def test_a_setting_is_refused_where_it_has_none(name, condition):
    key, value = values(condition, holds=False)
    without = with_its_own({key: value})
    check(Config().updated(without))
    settings = with_its_own({name: other(FIELDS[name])}) | without
    if not TASKS[settings.get("task", "images")].enlarges and name != "small_size":
        settings.pop("small_size", None)
    config = Config().updated(settings)
    with pytest.raises(UserError, match=f"^--{name} has no effect with(out)? --{key}.*; its default is") as e:
        check(config)
    assert "\n" not in str(e.value)
    assert config.effective().flat()[name] == FIELDS[name].default


def test_a_condition_names_settings_that_stand_before_its_field():
    """`Config.effective` relies on it."""
    names = list(FIELDS)
    for name, condition in CONDITIONS:
        assert names.index(values(condition, holds=True)[0]) < names.index(name)


# ---- settings as a program gives them


def test_a_program_may_write_numbers_lists_and_paths_where_flags_are_text():
    given = dict(image_size=64, lr=1, ema_rate=[0.9, 0.99], path_like=Path("x"), channel_mult=(1, 2), sigma_max=40)
    given["validation"] = given.pop("path_like")
    assert typed(given) == dict(image_size="64", lr=1.0, ema_rate="0.9,0.99", channel_mult="1,2", sigma_max=40.0, validation="x")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (dict(num_chanels=4), "did you mean 'num_channels'"),
        (dict(classes=("a",)), "no setting 'classes'"),
        (dict(steps="many"), "steps='many': give a whole number"),
        (dict(steps=True), "steps=True: give a whole number"),
        (dict(class_cond=1), "class_cond=1: give True or False"),
        (dict(solver=True), "solver=True: give text"),
    ],
)
def test_a_setting_of_a_program_that_is_none_is_one_line(setting, words):
    with pytest.raises(UserError, match=words) as e:
        typed(setting)
    assert "\n" not in str(e.value)


# ---- the JSON


@each_method
def test_a_config_comes_back_from_its_json(method):
    config = made(method)
    back = Config.from_json(config.to_json())
    assert back.flat() == config.flat()
    assert (back.data.classes, back.preset) == (config.data.classes, config.preset)
    assert Config.from_json(back.to_json()) == back
    assert check(back) == back
    assert json.loads(config.to_json())["version"] == VERSION == 2


@each_method
def test_a_config_is_a_key(method):
    config = Config.from_json(made(method).to_json())
    assert {config: 1}[Config.from_json(config.to_json())] == 1
    assert config != config.updated(dict(seed=5))


@pytest.mark.parametrize(("kind", "row"), [(kind, row) for kind in table.KINDS if kind in FIELDS for row in choices(kind)])
def test_every_row_is_kept_with_its_numbers(kind, row):
    """So that a later default does not change an earlier run."""
    config = Config().updated({kind: row})
    numbers = {number: about.default for number, about in choices(kind)[row].numbers.items()}
    assert json.loads(config.to_json())["own"] == numbers
    assert Config.from_json(config.to_json()).numbers() == numbers


# ---- configs of version 1


def first_version(**changes: Any) -> str:
    """A config as version 1 wrote it, with changed fields."""
    raw = json.loads((EARLIER / "classes" / "config.json").read_text())
    for group in raw.values():
        if isinstance(group, dict):
            group |= {k: v for k, v in changes.items() if k in group}
    return json.dumps(raw)


@pytest.mark.parametrize(("run", "task"), [("classes", "images"), ("enlarge", "enlarge"), ("judge", "classify")])
def test_the_config_of_an_earlier_run_is_brought_up_to_date(run, task):
    text = (EARLIER / run / "config.json").read_text()
    config = fit.require_fit(check(Config.from_json(text)))
    assert (config.model.task, config.model.network) == (task, "unet")
    assert Config.from_json(config.to_json()) == config
    raw = json.loads(text)
    kept = {k: v for group in raw.values() if isinstance(group, dict) for k, v in group.items()}
    now = {k: list(v) if isinstance(v, tuple) else v for k, v in config.flat().items()}
    assert {k: v for k, v in kept.items() if k in now and v != now[k]}.keys() <= {"network", "objective", "parametrization"}


def test_the_eta_of_version_1_is_now_a_number_of_its_solver():
    assert Config.from_json(first_version(solver="ddim", eta=0.5)).numbers() == {"eta": 0.5}
    assert Config.from_json(first_version(solver="ancestral", eta=0.5)).own == ()


@pytest.mark.parametrize(("network", "task"), TASK_OF.items())
def test_a_network_of_version_1_says_the_task(network, task):
    others = dict(network=network, small_size="4" if TASKS[task].enlarges else "")
    config = check(Config.from_json(first_version(**others)))
    assert (config.model.task, config.model.network) == (task, "unet")


def test_what_had_no_effect_in_version_1_is_dropped():
    config = Config.from_json(first_version(network="classifier", eval_every=5, eval_samples=7, parametrization="v"))
    assert check(config).effective() == config
    assert (config.train.eval_every, config.train.eval_samples, config.diffusion.learn_sigma) == (0, 256, False)


# ---- configs that are refused


def refusal(text: str) -> str:
    with pytest.raises(UserError) as e:
        Config.from_json(text, "runs/x/config.json")
    assert str(e.value).startswith("runs/x/config.json") and "\n" not in str(e.value)
    return str(e.value)


def changed(group: str, name: str, value: Any) -> str:
    raw = json.loads(made("v").to_json())
    (raw[group] if group else raw)[name] = value
    return json.dumps(raw)


@pytest.mark.parametrize("version", [999, 0, "2", None, 1.5, [2]])
def test_another_version_is_refused(version):
    said = refusal(changed("", "version", version))
    assert f"version {version}" in said and "newer iddpm" in said


@pytest.mark.parametrize(
    ("group", "name", "value", "kind"),
    [
        ("train", "steps", "40", "a whole number"),
        ("train", "steps", True, "a whole number"),
        ("train", "steps", [1], "a whole number"),
        ("train", "steps", 1.5, "a whole number"),
        ("train", "lr", "x", "a number"),
        ("train", "lr", None, "a number"),
        ("train", "lr", False, "a number"),
        ("own", "eta", "0.5", "a number"),
        ("model", "class_cond", 1, "True or False"),
        ("model", "image_size", 64, "text"),
        ("sample", "solver", ["ddim"], "text"),
        ("sample", "solver", {}, "text"),
        ("data", "classes", "abc", "a list of names"),
        ("data", "classes", [["a"]], "a list of names"),
        ("", "preset", 5, "text"),
    ],
)
def test_a_value_of_another_type_is_refused(group, name, value, kind):
    said = refusal(changed(group, name, value))
    assert f"{name} is {value!r}" in said and f"where {kind} must be" in said


@pytest.mark.parametrize("group", ["model", "own", "", "studio"])
def test_an_unknown_field_is_refused(group):
    raw = json.loads(made("v").to_json())
    (raw.setdefault(group, {}) if group else raw)["warp_factor"] = 9
    said = refusal(json.dumps(raw))
    assert "'warp_factor'" in said and "newer iddpm" in said


@pytest.mark.parametrize("absent", ["model", "diffusion", "data", "train", "sample", "preset"])
def test_half_a_config_is_refused(absent):
    raw = json.loads(Config().to_json())
    del raw[absent]
    assert f"not a config of iddpm (it has no {absent})" in refusal(json.dumps(raw))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", "5", '"text"', "\x00"])
def test_what_is_no_config_is_refused(text):
    assert "not a config of iddpm" in refusal(text)


def test_fields_that_a_stored_config_has_not_are_at_their_defaults():
    """As in a config that was written before there was such a field."""
    raw = json.loads(made("flow").to_json())
    del raw["diffusion"]["weighting"], raw["train"]["shard"]
    assert Config.from_json(json.dumps(raw)).flat() == made("flow").flat()


# ---- which choices go together

UNFIT: list[tuple[dict[str, Any], str, dict[str, Any]]] = [  # settings, words of the refusal, and what mends them as it says
    (dict(noise_schedule="flow", parametrization="v"), "take x0 or flow", dict(parametrization="flow")),
    (dict(noise_schedule="ve", parametrization="v"), "take eps or x0 or flow or edm", dict(parametrization="edm")),
    (dict(noise_schedule="flow", parametrization="eps"), "take x0 or flow", dict(parametrization="flow")),
    (dict(noise_schedule="flow", parametrization="edm"), "take x0 or flow", dict(parametrization="x0")),
    (dict(noise_schedule="flow", parametrization="previous"), "take x0 or flow", dict(parametrization="x0")),
    (dict(noise_schedule="ve", parametrization="previous"), "take eps or x0", dict(parametrization="eps")),
    (dict(noise_schedule="ve", objective="vlb"), "--objective vlb reads the steps of a chain", dict(noise_schedule="cosine")),
    (dict(noise_schedule="ve", objective="vlb_unscaled"), "--objective vlb_unscaled reads", dict(noise_schedule="linear")),
    (dict(noise_schedule="ve", objective="hybrid"), "--learn_sigma True", dict(noise_schedule="linear", learn_sigma=True)),
    (dict(noise_schedule="ve", learn_sigma=True), "belongs to linear, cosine", dict(noise_schedule="cosine")),
    (dict(noise_schedule="flow", learn_sigma=True), "belongs to linear, cosine", dict(noise_schedule="linear")),
    (dict(objective="simple", learn_sigma=True), "take hybrid or vlb", dict(objective="hybrid")),
    (dict(objective="simple", learn_sigma=True), "take hybrid or vlb", dict(objective="vlb")),
    (dict(objective="hybrid"), "needs --learn_sigma True", dict(learn_sigma=True)),
    (dict(objective="hybrid_unscaled"), "needs --learn_sigma True", dict(learn_sigma=True)),
    *((dict(noise_schedule=schedule, parametrization=name), "take x0 or v or flow", dict(parametrization="v"))
      for schedule in ("cosine_vp", "sigmoid") for name in ("eps", "edm", "previous")),
    (dict(zero_terminal_snr=True), "divides by alpha", dict(parametrization="v")),
    (dict(zero_terminal_snr=True, parametrization="v", diffusion_steps=1, sampling_steps="1"), "2 or more",
     dict(diffusion_steps=2)),
    (dict(noise_schedule="ve", snr_shift=2.0), "change --sigma_max", dict(snr_shift=1.0)),
    (dict(noise_schedule="ve", zero_terminal_snr=True), "linear, cosine", dict(zero_terminal_snr=False)),
    (dict(guidance=2.0), "--class_dropout 0.1", dict(class_cond=True, class_dropout=0.1)),
    (dict(guidance_low=5.0, guidance_high=1.0), "nothing would be guided", dict(guidance_high=6.0)),
    (dict(trained_guidance=3.0), "without --class_dropout", dict(class_cond=True, class_dropout=0.1)),
    (dict(class_dropout=0.1), "without --class_cond", dict(class_cond=True)),
    (dict(noise_candidates=4, learn_sigma=True, objective="vlb"), "take --objective simple", dict(noise_candidates=1)),
    (dict(solver="dpmpp_3m", sampling_steps="2"), "reads 3 steps, and there are 2", dict(sampling_steps="3")),
    (dict(grid="karras", sampling_steps="10,20"), "only counted", dict(sampling_steps="30")),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "words", "mended"), UNFIT)
def test_choices_that_do_not_go_together_are_one_line_that_mends_them(settings, words, mended, pictures, tmp_path, capsys):
    settings = dict(sampling_steps="50", image_size="8") | settings
    flags = [f"--{k}={v}" for k, v in settings.items()]
    assert main(["train", str(pictures), "--run", str(tmp_path / "r"), "--steps", "1", *flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line
    assert not (tmp_path / "r").exists()
    fit.require_fit(check(Config().updated(settings | mended)))


@pytest.mark.parametrize("schedule", choices("noise_schedule"))
@pytest.mark.parametrize("parametrization", choices("parametrization"))
def test_a_pair_that_is_not_refused_is_finite_at_every_level(schedule, parametrization):
    config = check(Config().updated(dict(noise_schedule=schedule, parametrization=parametrization, sampling_steps="50")))
    try:
        fit.require_fit(config)
    except UserError:
        assert (schedule, parametrization) in {
            (s["noise_schedule"], s.get("parametrization")) for s, _, _ in UNFIT if len(s) == 2 and "noise_schedule" in s
        }
        return
    meaning = build.parametrization(config)
    for step in build.grid(config):
        c = meaning(step)
        assert all(torch.isfinite(torch.as_tensor(x)).all() for x in c if x is not None)


class Circle(Flow):
    """A continuous schedule with alpha^2 + sigma^2 = 1."""

    def __call__(self, u: torch.Tensor) -> Level:
        return Level(1000 * u, torch.cos(u * math.pi / 2), torch.sin(u * math.pi / 2))


def test_v_goes_with_any_schedule_whose_squares_sum_to_one():
    table.add("noise_schedule", Circle)
    settings = dict(noise_schedule="Circle", parametrization="v", sampling_steps="50")
    fit.require_fit(check(Config().updated(settings)))


def test_a_resumed_run_may_change_a_number_only_where_it_may_change_the_choice():
    fields = every_field()
    assert not fields["eta"].fixed and not fields["inception_weights"].fixed
    assert fields["sigma_min"].fixed and fields["P_mean"].fixed and fields["sigma_data"].fixed


def test_every_field_has_help_a_default_that_is_allowed_and_a_type_that_flags_know():
    for name, f in every_field().items():
        assert f.help, name
        assert not f.allowed() or f.default in f.allowed() or (f.many and not f.default), name
        assert not f.flag or f.type in (int, float, str, bool), name


def test_a_config_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().train.lr = 1.0  # type: ignore[misc]
