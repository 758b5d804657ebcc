"""Images that have a number instead of a name: rows of tables and of arrays. A row is read by its number, in any order."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from iddpm.data.sources.source import Ranked, Source, require_small
from iddpm.errors import UserError, readable


class RowNames(Sequence[str]):
    """The names of n rows, made when they are asked for: ten million texts would take a gigabyte."""

    def __init__(self, n: int, ending: str) -> None:
        self.n, self.ending = n, ending

    def __len__(self) -> int:
        return self.n

    @overload
    def __getitem__(self, k: int) -> str: ...

    @overload
    def __getitem__(self, k: slice) -> Sequence[str]: ...

    def __getitem__(self, k: int | slice) -> str | Sequence[str]:
        if isinstance(k, slice):
            return [self[i] for i in range(*k.indices(self.n))]
        if not -self.n <= k < self.n:
            raise IndexError(k)
        return f"{k % self.n:09d}.{self.ending}"

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(self.n))

    def row(self, name: str) -> int:
        """The number in a name; -1 where it is of none."""
        number = name.partition(".")[0]
        return int(number) if number.isdecimal() and int(number) < self.n and self[int(number)] == name else -1


class Rows(Source):
    """n images, and what the table itself says of their classes. UserError where it is empty."""

    rows = True

    def __init__(self, path: Path, n: int, labelled: Callable[[], Ranked | None] = lambda: None, ending: str = "png") -> None:
        if not n:
            raise UserError(f"{path} holds no images: it has no rows")
        self.path, self.home = path, path.parent
        self.names = self._names = RowNames(n, ending)
        self.left_out = Counter()
        self._labelled = labelled

    def labelled(self) -> Ranked | None:
        return self._labelled()

    def row(self, k: int) -> Any:
        """The content of row k, as bytes."""
        raise NotImplementedError

    def read(self, name: str) -> bytes:
        if (k := self._names.row(name)) < 0:
            raise UserError(f"{self.path} has no row {name}")
        with readable(self.path / name):
            content = self.row(k)
        if not isinstance(content, bytes):
            raise UserError(f"{self.path / name} holds no image, perhaps only its place: make the table with the images in it")
        require_small(self.path / name, len(content))
        return content

    def has(self, name: str) -> bool:
        return self._names.row(name) >= 0

    def size(self, name: str) -> int:
        return -1


def ranked(path: Path, values: "Sequence[Any] | np.ndarray", names: Sequence[str] = ()) -> Ranked:
    """The labels of rows, whole numbers or texts, which may number `names`; UserError for others."""
    distinct, ranks = np.unique(np.asarray(values), return_inverse=True)
    found = distinct.tolist()
    if not all(type(value) in (int, str) and value != "" for value in found):
        raise UserError(f"{path}: labels are whole numbers or texts, not {found[0]!r}; --labels none takes none of them")
    if names and (odd := [v for v in found if type(v) is str or not 0 <= v < len(names)]):
        raise UserError(
            f"{path} has the label {odd[0]} of {len(names)} classes: labels are numbers from 0; --labels none takes none"
        )
    if twice := next((name for name, n in Counter(names).items() if n > 1), ""):
        raise UserError(f"{path} calls two classes {twice}: rename one, or --labels none takes none")
    return Ranked(ranks.reshape(-1).astype(np.int64), [names[value] for value in found] if names else found)
