"""The config of a run: its groups of settings, how flags change it, and the JSON it is kept as."""

import dataclasses
import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iddpm.config.choices import add
from iddpm.config.fields import WORDS, Field, check_range, fields_of, own_numbers, unmet
from iddpm.config.groups import Data, Diffusion, Model, Sample, Train
from iddpm.config.tasks import TASK_OF, TASKS, Task
from iddpm.errors import UserError
from iddpm.records import decode, fits

VERSION = 2  # of the JSON. 1 (without a number) knew no tasks, and the solver's eta was a field


@dataclass(frozen=True)
class Config:
    """All of a run. Names are unique across the groups, so a flat name finds its group.

    `own` holds the numbers of the rows chosen, as (name, value) pairs.
    """

    model: Model = Model()
    diffusion: Diffusion = Diffusion()
    data: Data = Data()
    train: Train = Train()
    sample: Sample = Sample()
    own: tuple[tuple[str, Any], ...] = ()
    preset: str = ""

    @property
    def task(self) -> Task:
        """What the run is to learn."""
        return TASKS[self.model.task]

    def groups(self) -> Iterator[tuple[str, Any]]:
        return ((name, getattr(self, name)) for name in ("model", "diffusion", "data", "train", "sample"))

    def numbers(self) -> dict[str, Any]:
        """The numbers of the rows chosen: as given, else their defaults."""
        given, found = dict(self.own), {}
        settings = {name for _, group in self.groups() for name in fields_of(group)}
        for _, group in self.groups():
            for name, about in own_numbers(group).items():
                if name in settings:  # only a program's row can have it
                    rows = " or ".join(f"--{chooser} {'|'.join(rows)}" for chooser, rows in about.rows.items())
                    raise UserError(f"{name!r}, a number of {rows}, is a setting's name already: give it another name")
                if about.is_read(group):
                    found[name] = given.get(name, about.number.default)
        return found

    def flat(self) -> dict[str, Any]:
        """Every setting of every group by its name, with the numbers of the rows chosen."""
        return {name: getattr(group, name) for _, group in self.groups() for name in fields_of(group)} | self.numbers()

    def updated(self, flat: Mapping[str, Any]) -> "Config":
        """A copy with the named settings changed, whichever group they belong to.

        Where `flat` chooses another row, the numbers of the row before are dropped, but for those that `flat` names: of these
        `check` says that they have no effect.
        """
        groups = {name: _replaced(group, flat) for name, group in self.groups()}
        known = {name for _, group in self.groups() for name in (*fields_of(group), *own_numbers(group))}
        assert not (unknown := set(flat) - known - {"preset"}), unknown
        changed = dataclasses.replace(self, **groups, preset=flat.get("preset", self.preset))
        own = {k: about.rows for _, group in self.groups() for k, about in own_numbers(group).items()}
        kept = {k: v for k, v in self.own if k in changed.numbers() or not set(own[k]) & set(flat)}
        given = {k: v for k, v in flat.items() if k in own}
        return dataclasses.replace(changed, own=tuple(sorted((kept | given).items())))

    def effective(self) -> "Config":
        """A copy in which what has no effect is at its default, and the numbers of rows that are not chosen are dropped."""
        now = self.flat()
        for name, f in ((name, f) for _, group in self.groups() for name, f in fields_of(group).items()):
            if any(unmet(f.only, now)):  # which name settings that stand before the field
                now[name] = f.default
        changed = dataclasses.replace(self, **{name: _replaced(group, now) for name, group in self.groups()})
        return dataclasses.replace(changed, own=tuple(sorted(changed.numbers().items())))

    def to_json(self) -> str:
        groups = {name: dataclasses.asdict(group) for name, group in self.groups()}
        return json.dumps({"version": VERSION, **groups, "own": self.numbers(), "preset": self.preset}, indent=1)

    @staticmethod
    def from_json(text: str, source: str = "this config") -> "Config":
        """The config that `to_json` wrote, also that of an earlier version.

        UserError where it is none, is of a newer version, or has an unknown field or one of the wrong type.
        """
        raw = decode(text, dict[str, Any], f"{source} is not a config of iddpm: it")
        version = raw.pop("version", 1)
        if type(version) is not int or version not in range(1, VERSION + 1):
            raise UserError(f"{source} is of version {version}, this iddpm reads up to {VERSION}: it needs a newer iddpm")
        fields: dict[str, Any] = {name: f for _, group in Config().groups() for name, f in fields_of(group).items()}
        fields |= {name: about.number for _, group in Config().groups() for name, about in own_numbers(group).items()}
        fields["preset"] = Field(str, "", "")
        if absent := {"preset", *(name for name, _ in Config().groups())} - set(raw):
            raise UserError(f"{source} is not a config of iddpm (it has no {min(absent)})")
        flat: dict[str, Any] = {}
        for name, group in raw.items():
            flat |= group if isinstance(group, dict) else {name: group}
        if version == 1 and flat.get("network") in TASK_OF:
            flat |= dict(task=TASK_OF[flat["network"]], network="unet")
        for name, value in flat.items():
            if name not in fields:
                raise UserError(f"{source} has the unknown field {name!r}: it needs a newer iddpm, or the program that added it")
            try:
                flat[name] = fits(value, fields[name].type)
            except ValueError:
                wanted = WORDS.get(fields[name].type, "a list of names")
                raise UserError(f"{source}: {name} is {value!r}, where {wanted} must be: mend it, or restore the file") from None
            try:
                check_range(name, flat[name], fields[name])
            except UserError as e:
                raise UserError(f"{source}: {e}") from None
        config = Config().updated(flat)
        return config.effective() if version == 1 else config


def _replaced(group: Any, flat: Mapping[str, Any]) -> Any:
    return dataclasses.replace(group, **{k: v for k, v in flat.items() if k in fields_of(group)})


def every_field() -> dict[str, Field]:
    """The fields of a run's config by name, and the numbers of its rows as fields: theirs are fixed but for a solver's."""
    groups = [group for _, group in Config().groups()]
    found = {name: f for group in groups for name, f in fields_of(group).items()}
    for group in groups:
        for name, about in own_numbers(group).items():
            found[name] = Field(*about.number, fixed=any(fields_of(group)[chooser].fixed for chooser in about.rows))
    return found


def typed(settings: Mapping[str, Any], *groups: type) -> dict[str, Any]:
    """A program's settings as the fields hold them: 64 as "64" where a flag is text, a function as its name.

    UserError for a setting that no group has (without groups: of a run), naming the nearest one, and for a value of another type.
    """
    fields = {n: f for group in groups for n, f in fields_of(group).items()} or every_field()
    rows = {n: add(fields[n].kind, value) for n, value in settings.items() if n in fields and fields[n].kind and callable(value)}
    settings = {**settings, **rows}
    fields = every_field()  # with the numbers of the rows just added
    if groups:
        own = {n: Field(*about.number) for group in groups for n, about in own_numbers(group).items()}
        fields = own | {n: f for group in groups for n, f in fields_of(group).items()}
    return {name: _as_field(name, value, fields) for name, value in settings.items()}


def _as_field(name: str, value: Any, fields: Mapping[str, Field]) -> Any:
    if name not in fields or not fields[name].flag:
        near = difflib.get_close_matches(name, [n for n, f in fields.items() if f.flag], n=1)
        raise UserError(f"there is no setting {name!r}" + (f": did you mean {near[0]!r}?" if near else ""))
    f = fields[name]
    if f.type is str and isinstance(value, (int, float, Path)) and not isinstance(value, bool):
        return str(value)
    if f.type is str and isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    if f.type is float and type(value) is int:
        return float(value)
    if not isinstance(value, f.type) or (f.type is int and isinstance(value, bool)):
        raise UserError(f"{name}={value!r}: give {WORDS[f.type]}")
    return value
