"""Choices as they are read from the source text, against the tables themselves; numbers of rows; rows of a program's own."""

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import Tensor

from iddpm import build, fit
from iddpm.cli.main import main
from iddpm.config import Config, Data, Diffusion, Draw, Evaluate, Measure, Model, Sample, Train, Which, check, make
from iddpm.config import choices as table
from iddpm.config.choices import KINDS, Field, choices
from iddpm.config.fields import fields_of, own_numbers
from iddpm.diffusion.grid import Chain
from iddpm.diffusion.schedule import Cosine, Flow, Level
from iddpm.diffusion.solvers import State
from iddpm.errors import UserError

GROUPS = (Model, Diffusion, Data, Train, Sample, Which, Draw, Measure, Evaluate)


def imported(kind: str) -> dict[str, Any]:
    """The rows of a kind, by importing every module that may hold some."""
    where, name = KINDS[kind]
    module = import_module(f"iddpm.{where}")
    inside = [f"iddpm.{where}.{m.name}" for m in iter_modules(module.__path__)] if hasattr(module, "__path__") else []
    modules = [import_module(path) for path in sorted(inside)] or [module]
    return {key: row for module in modules for key, row in getattr(module, name, {}).items()}


ROWS = [(kind, name) for kind in KINDS for name in imported(kind)]
NUMBERS = [(kind, name, number) for kind, name in ROWS for number in choices(kind)[name].numbers]
CHOOSERS = [(group, name) for group in GROUPS for name, f in fields_of(group).items() if f.kind]
OWN = [(group, number) for group in GROUPS for number in own_numbers(group)]
each_row = pytest.mark.parametrize(("kind", "name"), ROWS)


@pytest.fixture
def add(monkeypatch):
    """`choices.add`, for the length of a test."""
    monkeypatch.setattr(table, "ADDED", {})
    return table.add


def help_of(verb: str, capsys) -> str:
    """The help of a verb, its lines joined."""
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    return " ".join(capsys.readouterr().out.split())


def another(number: Field) -> Any:
    """A value that a number may have, and that is not its default."""
    if number.type is str:
        return "something"
    if number.type is bool:
        return not number.default
    low = -math.inf if number.low is None else number.low
    up = math.inf if number.high is None else number.high
    near = (number.default + 1, number.default - 1, number.default * 1.01, number.default / 1.01, number.default + 0.1)
    found = [v for v in near if low <= v <= up and v != number.default]
    return number.type(found[0] if found else low)


# ---- the text against the tables


@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_of_a_kind_are_those_of_its_tables_in_their_order(kind):
    assert list(choices(kind)) == list(imported(kind)) != []


@each_row
def test_a_row_is_found_by_its_name(kind, name):
    assert table.row(kind, name) is imported(kind)[name]


@each_row
def test_the_help_of_a_row_is_the_first_line_of_its_docstring(kind, name):
    first = (imported(kind)[name].__doc__ or "").strip().splitlines()[0].rstrip(".")
    assert choices(kind)[name].help == first != ""


@each_row
def test_the_numbers_of_a_row_are_what_its_constructor_takes_unasked(kind, name):
    row = imported(kind)[name]
    hints = get_type_hints(row, include_extras=True) if isinstance(row, type) else {}
    found = {}
    for number, hint in hints.items():
        if get_origin(hint) is Annotated:
            type_, *about = get_args(hint)
            found[number] = Field(type_, inspect.signature(row).parameters[number].default, *about)
    assert choices(kind)[name].numbers == found
    assert all(type(number.default) is number.type for number in found.values())


@each_row
def test_what_a_row_knows_of_what_fields_ask_for_is_what_it_has(kind, name):
    row = imported(kind)[name]
    has = set(dir(row)) | (set() if isinstance(row, type) else set(inspect.signature(row).parameters))
    asked = {tuple(c.split(":")) for group in GROUPS for f in fields_of(group).values() for c in f.only.split() if ":" in c}
    assert {part for k, part in asked if k == kind} & choices(kind)[name].knows == {p for k, p in asked if k == kind} & has


@pytest.mark.parametrize(("kind", "name", "number"), NUMBERS)
def test_a_default_lies_in_its_range_and_has_words(kind, name, number):
    about = choices(kind)[name].numbers[number]
    assert about.help
    assert about.low is None or about.low <= about.default
    assert about.high is None or about.default <= about.high


def test_rows_that_share_a_number_agree_on_it():
    """It is one flag, whichever of them is chosen."""
    found: dict[str, Field] = {}
    for kind, name, number in NUMBERS:
        assert found.setdefault(number, choices(kind)[name].numbers[number]) == choices(kind)[name].numbers[number], (
            name,
            number,
        )


def test_no_name_stands_for_two_settings_of_a_run():
    names = [name for _, group in Config().groups() for name in fields_of(group)]
    assert len(names) == len(set(names))
    assert not set(names) & {number for _, _, number in NUMBERS}


# ---- what is offered


@pytest.mark.parametrize(("verb", "group", "chooser"), [
    *(("train", group, name) for group, name in CHOOSERS if group not in (Evaluate,)),
    *(("sample", group, name) for group, name in CHOOSERS if group is Sample),
    *(("evaluate", group, name) for group, name in CHOOSERS if group is Evaluate),
])  # fmt: skip
def test_help_offers_every_row_and_says_what_it_is(verb, group, chooser, capsys):
    text, f = help_of(verb, capsys), fields_of(group)[chooser]
    assert f"--{chooser} {(',' if f.many else '|').join((*f.choices, *choices(f.kind)))} " in text
    rows = choices(f.kind).items()
    assert len(rows) == 1 or all(f"{name} {' '.join(choice.help.split())}" in text for name, choice in rows)
    for _, choice in rows:
        for number, about in choice.numbers.items():
            assert f"--{number} " in text and " ".join(about.help.split()) in text


@pytest.mark.parametrize(("group", "chooser"), CHOOSERS)
def test_a_name_that_is_none_is_refused_with_all_that_there_are(group, chooser):
    with pytest.raises(UserError) as e:
        make(group, {chooser: "nonsense"})
    f = fields_of(group)[chooser]
    assert str(e.value) == f"--{chooser} 'nonsense' is not one of: {', '.join((*f.choices, *choices(f.kind)))}"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--eta 0.5", "--eta has no effect with --solver ancestral: it belongs to ddim"),
        ("--sigma_min 0.01", "--sigma_min has no effect with --noise_schedule linear: it belongs to ve"),
        ("--sigma_data 0.3", "no effect with --parametrization eps and --weighting uniform: it belongs to edm"),
        ("--P_mean 0.3", "--P_mean has no effect with --schedule_sampler uniform: it belongs to lognormal"),
        ("--solver ddim --eta 1.5", "--eta 1.5 is out of range: from 0 to 1"),
        ("--solver ddim --eta nan", "--eta nan is out of range: from 0 to 1"),
        ("--noise_schedule ve --sigma_min 1 --sigma_max 1 --parametrization edm --sampling_steps 9", "below sigma_max"),
        ("--network super_res", "that is now --task enlarge"),
        ("--network classifier", "that is now --task classify"),
    ],
)  # fmt: skip
def test_a_choice_or_a_number_out_of_place_is_one_line(argv, words, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(pictures), "--image_size", "8", "--steps", "1", *argv.split()]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line
    assert not list(tmp_path.iterdir())


def choosing(group: type, number: str, owners: bool) -> dict[str, str]:
    """Rows chosen, by the fields that choose among them: such as have the number, or such as have it not."""
    about = own_numbers(group)[number]
    found = {}
    for chooser, rows in about.rows.items():
        f = fields_of(group)[chooser]
        found[chooser] = rows[0] if owners else next(name for name in choices(f.kind) if name not in rows)
    return found


@pytest.mark.parametrize(("group", "number"), OWN)
def test_a_number_is_taken_where_a_row_has_it_and_else_refused(group, number):
    value = another(own_numbers(group)[number])
    if group is Evaluate:
        assert dict(make(group, {**choosing(group, number, owners=True), number: value}).own) == {number: value}
        with pytest.raises(UserError, match=f"--{number} has no effect"):
            make(group, {**choosing(group, number, owners=False), number: value})
        return
    others = dict(sampling_steps="50") | (dict(eval_every=5) if group is Train else {})
    assert check(Config().updated({**choosing(group, number, owners=True), number: value, **others})).numbers()[number] == value
    with pytest.raises(UserError, match=f"--{number} has no effect"):
        check(Config().updated({**choosing(group, number, owners=False), number: value, "sampling_steps": "50"}))


def test_another_row_drops_the_numbers_of_the_one_before():
    config = Config().updated(dict(solver="ddim", eta=0.5))
    assert check(config.updated(dict(solver="ancestral"))).own == ()
    assert check(config.updated(dict(clip_denoised=False))).numbers()["eta"] == 0.5


# ---- rows of a program


@dataclass(frozen=True)
class Half:
    """Goes half of the way at each step.

    More of it.
    """

    pull: Annotated[float, "how far", 0.0, 1.0] = 0.5

    def __call__(self, denoise: Any, x: Tensor, grid: Any, noise: Any) -> Iterator[State]:
        for step in grid:
            p = denoise(x, step)
            x = x + self.pull * (p.x0 - x)
            yield State(x, p.x0)


@dataclass(frozen=True)
class Shifted(Cosine):
    """A cosine that inherits what makes it a chain."""


def my_loss(denoiser, schedule, x0, eps, u, cond={}):
    """A loss without weighting."""
    return {"loss": x0.flatten(1).mean(1)}


def test_a_row_of_a_program_is_known_as_ours_are(add, capsys):
    assert add("solver", Half) == "Half"
    assert list(choices("solver"))[-1] == "Half"
    assert choices("solver")["Half"] == (
        "Goes half of the way at each step", {"pull": Field(float, 0.5, "how far", 0.0, 1.0)}, choices("solver")["Half"].knows,
    )  # fmt: skip
    text = help_of("train", capsys)
    assert f"--solver {'|'.join(choices('solver'))} " in text and "--pull X how far (solver Half) [0.5]" in text
    config = check(Config().updated(dict(solver="Half", pull=0.25)))
    assert Config.from_json(config.to_json()) == config
    assert build.solver(config) == Half(0.25)
    for wrong, words in ((dict(pull=0.25), "it belongs to Half"), (dict(solver="Half", pull=2.0), "from 0 to 1")):
        with pytest.raises(UserError, match=words):
            check(Config().updated(wrong))


def test_a_row_wins_over_ours_of_the_same_name_and_may_be_made_already(add):
    add("solver", Half(0.75), "ddim")
    assert build.solver(Config().updated(dict(solver="ddim"))) == Half(0.75)
    assert add("solver", Half(0.75)) == "Half"


def test_a_run_of_a_row_that_the_program_did_not_add_again_is_one_line(add, monkeypatch):
    add("solver", Half)
    text = Config().updated(dict(solver="Half", pull=0.25)).to_json()
    monkeypatch.setattr(table, "ADDED", {})
    with pytest.raises(UserError, match=r"'pull'.*the program that added it"):
        Config.from_json(text)


def test_a_schedule_that_inherits_its_betas_is_a_chain(add):
    config = Config().updated(dict(noise_schedule=add("noise_schedule", Shifted), diffusion_steps=20, sampling_steps="all"))
    made = build.schedule(check(config))
    assert isinstance(made, Chain)
    torch.testing.assert_close(made.betas, Cosine(20).betas(), rtol=0, atol=0)


def test_an_objective_that_takes_no_weighting_refuses_one(add):
    config = Config().updated(dict(objective=add("objective", my_loss)))
    assert build.objective(fit.require_fit(check(config))) is my_loss
    with pytest.raises(UserError, match="--weighting has no effect with --objective my_loss"):
        check(config.updated(dict(weighting="edm")))


def test_a_number_cannot_have_the_name_of_a_setting(add):
    @dataclass(frozen=True)
    class Slow(Flow):
        """Has a number called as a setting is."""

        lr: Annotated[float, "not the learning rate"] = 0.5

        def __call__(self, u: Tensor) -> Level:
            return super().__call__(u)

    add("noise_schedule", Slow)
    with pytest.raises(UserError, match="'lr', a number of --noise_schedule Slow"):
        check(Config())


def test_a_kind_that_is_none_is_refused(add):
    with pytest.raises(UserError, match=r"no choice is called 'sampler': there are solver, noise_schedule"):
        add("sampler", Half)
