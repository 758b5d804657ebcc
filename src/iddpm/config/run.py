"""The config of a run: its groups of settings, how flags change it, and the JSON it is kept as."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from iddpm.config.fields import Field, fields_of, own_numbers, unmet
from iddpm.config.groups import Data, Diffusion, Model, Sample, Train
from iddpm.config.tasks import TASK_OF, TASKS, Task
from iddpm.errors import UserError

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
        for _, group in self.groups():
            for name, about in own_numbers(group).items():
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
        """A copy in which what has no effect is at its default."""
        now = self.flat()
        idle = {n: f.default for _, g in self.groups() for n, f in fields_of(g).items() if any(unmet(f.only, now))}
        return self.updated(idle)

    def to_json(self) -> str:
        groups = {name: dataclasses.asdict(group) for name, group in self.groups()}
        return json.dumps({"version": VERSION, **groups, "own": self.numbers(), "preset": self.preset}, indent=1)

    @staticmethod
    def from_json(text: str, source: str = "this config") -> "Config":
        """The config that `to_json` wrote, also that of an earlier version.

        UserError where it is none, is of a newer version, or has an unknown field or one of the wrong type.
        """
        try:
            raw = json.loads(text)
            version = raw.get("version", 1)
            flat = {k: v for group in raw.values() if isinstance(group, dict) for k, v in group.items()}
            flat["preset"] = raw["preset"]
        except (ValueError, AttributeError, KeyError, TypeError) as e:
            raise UserError(f"{source} is not a config of iddpm ({e})") from None
        if version != 1 and version != VERSION:
            raise UserError(f"{source} is of version {version}, this iddpm reads up to {VERSION}: it needs a newer iddpm")
        if version == 1 and flat.get("network") in TASK_OF:
            flat |= dict(task=TASK_OF[flat["network"]], network="unet")
        fields = {name: f for _, group in Config().groups() for name, f in fields_of(group).items()}
        numbers = {name: about.number for _, group in Config().groups() for name, about in own_numbers(group).items()}
        for name, value in flat.items():
            if name != "preset" and name not in fields and name not in numbers:
                raise UserError(f"{source} has the unknown field {name!r}: it needs a newer iddpm")
            if name != "preset":
                flat[name] = _typed(name, value, fields.get(name) or numbers[name], source)
        config = Config().updated(flat)
        return config.updated(config.numbers()).effective() if version == 1 else config


def _replaced(group: Any, flat: Mapping[str, Any]) -> Any:
    return dataclasses.replace(group, **{k: v for k, v in flat.items() if k in fields_of(group)})


def _typed(name: str, value: Any, f: Any, source: str) -> Any:
    """A value of the JSON as the field has it: a list as a tuple, 1 as 1.0; UserError for another type."""
    if isinstance(value, list):
        return tuple(value)
    if f.type is float and type(value) is int:
        return float(value)
    if f.type in (int, float, str, bool) and type(value) is not f.type:
        raise UserError(f"{source}: {name} is {value!r}, which is no {f.type.__name__}: mend it, or restore the file")
    return value


def every_field() -> dict[str, Field]:
    """The fields of a run's config by name, and the numbers of its rows as fields: theirs are fixed but for a solver's."""
    groups = [group for _, group in Config().groups()]
    found = {name: f for group in groups for name, f in fields_of(group).items()}
    for group in groups:
        for name, about in own_numbers(group).items():
            found[name] = Field(*about.number, fixed=any(fields_of(group)[chooser].fixed for chooser in about.rows))
    return found
