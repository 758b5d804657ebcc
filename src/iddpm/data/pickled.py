"""Pickles of others, as data sets and statistics come in: plain containers and arrays of numbers, and nothing else.

numpy's own functions are not called: ndarray and dtype, given a file's arguments, read memory at any address.
"""

import pickle
from typing import IO, Any

import numpy as np


class Kind:
    """A type of numbers, in the place of numpy.dtype."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.dtype = np.dtype(name if isinstance(name, str) else "O")
        if self.dtype.kind not in "biuf":
            raise pickle.UnpicklingError(f"it holds arrays of {name!r}, not of numbers")

    def __setstate__(self, state: Any) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class Array:
    """An array of numbers, in the place of numpy.ndarray; numpy takes it for one."""

    def __init__(self, *_: Any) -> None:
        self.held = np.zeros(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, raw = state
        if not isinstance(kind, Kind):
            raise pickle.UnpicklingError("it holds an array without a type")
        content = raw.encode("latin1") if isinstance(raw, str) else raw  # of Python 2
        self.held = np.frombuffer(content, kind.dtype).reshape(shape, order="F" if fortran else "C")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.held, dtype)


def _bytes(text: str, encoding: str) -> bytes:
    """As numpy's bytes stand in a pickle of the old protocols."""
    return text.encode("latin1")


ALLOWED: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _bytes,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): Array for core in ("core", "_core")},  # numpy 1's name, and 2's
    ("numpy", "ndarray"): Array,
    ("numpy", "dtype"): Kind,
}


class _Unpickler(pickle._Unpickler):  # in Python: the one in C makes a list as long as a file's largest number says
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array of numbers needs")
        return ALLOWED[module, name]


def unpickle(file: IO[bytes]) -> Any:
    """What a pickle holds, its arrays as what np.asarray takes; any exception where it holds something else or is damaged."""
    return _Unpickler(file, encoding="latin1").load()
