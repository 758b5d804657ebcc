"""The config of a run: its groups of settings, how flags change it, and the JSON it is kept as."""

import dataclasses
import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iddpm.config.choices import Field, add
from iddpm.config.fields import check_range, conditions, fields_of, is_read, own_numbers, settings_of, unmet, values_of
from iddpm.config.groups import Data, Diffusion, Model, Sample, Train
from iddpm.config.tasks import TASK_OF, TASKS, Task
from iddpm.errors import UserError
from iddpm.records import decode, fits

VERSION = 2  # of the JSON. 1 (without a number) knew no tasks, and the solver's eta was a field
WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}


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

    @property
    def parts(self) -> list[Any]:
        """The groups without their names."""
        return [group for _, group in self.groups()]

    def numbers(self) -> dict[str, Any]:
        """The numbers of the rows chosen: as given, else their defaults."""
        given, fields, now, found = dict(self.own), fields_of(*self.parts), values_of(*self.parts), {}
        for name, f in own_numbers(*self.parts).items():
            if name in fields:  # only a program's row can have it
                owner = conditions(f, fields)
                raise UserError(f"{name!r}, a number of --{owner}, is a setting's name already: give it another name")
            if is_read(f, fields, now):
                found[name] = given.get(name, f.default)
        return found

    def flat(self) -> dict[str, Any]:
        """Every setting of every group by its name, with the numbers of the rows chosen."""
        return values_of(*self.parts) | self.numbers()

    def updated(self, flat: Mapping[str, Any]) -> "Config":
        """A copy with the named settings changed, whichever group they belong to.

        Where `flat` chooses another row, the numbers of the row before are dropped, but for those that `flat` names: of these
        `check` says that they have no effect.
        """
        assert not (unknown := flat.keys() - settings_of(*self.parts).keys() - {"preset"}), unknown
        changed, own = dataclasses.replace(self._with(flat), preset=flat.get("preset", self.preset)), own_numbers(*self.parts)
        kept = {k: v for k, v in self.own if k in changed.numbers() or not own[k].rows.keys() & flat.keys()}
        given = {k: v for k, v in flat.items() if k in own}
        return dataclasses.replace(changed, own=tuple(sorted((kept | given).items())))

    def effective(self) -> "Config":
        """A copy in which what has no effect is at its default, and the numbers of rows that are not chosen are dropped."""
        now = self.flat()
        for name, f in fields_of(*self.parts).items():
            if any(unmet(f.only, now)):  # which name settings that stand before the field
                now[name] = f.default
        changed = self._with(now)
        return dataclasses.replace(changed, own=tuple(sorted(changed.numbers().items())))

    def _with(self, flat: Mapping[str, Any]) -> "Config":
        """A copy with the fields changed that are named."""
        changed = {n: dataclasses.replace(g, **{k: flat[k] for k in fields_of(g) if k in flat}) for n, g in self.groups()}
        return dataclasses.replace(self, **changed)

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
        fields = every_field() | {"preset": Field(str, "", "")}
        if absent := {"preset", *(name for name, _ in Config().groups())} - set(raw):
            raise UserError(f"{source} is not a config of iddpm (it has no {min(absent)})")
        flat: dict[str, Any] = {}
        for name, group in raw.items():
            flat |= group if isinstance(group, dict) else {name: group}
        if version == 1 and flat.get("network") in TASK_OF:
            flat |= dict(task=TASK_OF[flat["network"]], network="unet")
        if flat.pop("tensorboard", False) is True:  # of configs before --log_to
            flat["log_to"] = "tensorboard"
        for name, value in flat.items():
            if name not in fields:
                raise UserError(f"{source} has the unknown field {name!r}: it needs a newer iddpm, or the program that added it")
            try:
                flat[name] = fits(value, fields[name].type)
                check_range(name, flat[name], fields[name])
            except UserError as e:
                raise UserError(f"{source}: {e}") from None
            except ValueError:
                wanted = WORDS.get(fields[name].type, "a list of names")
                raise UserError(f"{source}: {name} is {value!r}, where {wanted} must be: mend it, or restore the file") from None
        config = Config().updated(flat)
        return config.effective() if version == 1 else config


def every_field() -> dict[str, Field]:
    """The fields of a run's config by name, and the numbers of its rows."""
    return settings_of(*Config().parts)


def typed(settings: Mapping[str, Any], *groups: type) -> dict[str, Any]:
    """A program's settings as the fields hold them: 64 as "64" where a flag is text, a function as its name.

    UserError for a setting that no group has (without groups: of a run), naming the nearest one, and for a value of another type.
    """
    kinds = {name: f.kind for name, f in settings_of(*groups or Config().parts).items()}
    rows = {n: add(kinds[n], value) for n, value in settings.items() if kinds.get(n) and callable(value)}
    fields = {n: f for n, f in settings_of(*groups or Config().parts).items() if f.flag}  # with the numbers of these rows
    found = {}
    for name, value in {**settings, **rows}.items():
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            raise UserError(f"there is no setting {name!r}" + (f": did you mean {near[0]!r}?" if near else ""))
        kind = fields[name].type
        if kind is str and isinstance(value, (list, tuple)):
            value = ",".join(map(str, value))
        elif kind is str and isinstance(value, (int, float, Path)) and not isinstance(value, bool):
            value = str(value)
        try:
            found[name] = fits(value.item() if hasattr(value, "item") else value, kind)  # also a number of numpy's
        except ValueError:
            raise UserError(f"{name}={value!r}: give {WORDS[kind]}") from None
    return found
