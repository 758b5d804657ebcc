"""Pickles of EDM's kind: their tensors and settings are taken, and nothing that they name is imported, called or run.

A pickle is a program. Of this one's words only those of OPS are obeyed, and what it asks to have called is looked up in CALLS,
by name. An object of EDM's own classes, which brings along the source of its module, becomes a `Record` without it.
"""

import io
import math
import mmap
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from iddpm.data.pickled import ALLOWED, Array, Kind
from iddpm.errors import UserError, reason

OPS = (  # what Python 3 writes by itself; nothing that makes room for a size it only claims, or names things by number
    "PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 "
    "TUPLE3 EMPTY_DICT SETITEM SETITEMS EMPTY_SET ADDITEMS BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL "
    "REDUCE NEWOBJ BUILD"
).split()


class Named(NamedTuple):
    """Something in a module of Python, by its name alone."""

    name: str


class Record:
    """An object by the name of its class, and what it holds."""

    __slots__ = ("held", "kind")

    def __init__(self, kind: str, held: dict[str, Any]):
        self.kind, self.held = kind, held

    def __setstate__(self, state: Any) -> None:
        self.held = {**self.held, **_dict(state)}


def _dict(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise pickle.UnpicklingError(f"it keeps an object's state as {type(value).__name__}")
    return value


def _persistent(meta: Any) -> Record:
    """As torch_utils.persistence keeps an object: its class, the source of its module, which is not read, and its state."""
    name = _dict(meta).get("class_name")
    if not isinstance(name, str) or not name.isidentifier() or len(name) > 80:
        raise pickle.UnpicklingError("it keeps an object without the name of its class")
    return Record(name, _dict(meta.get("state")))


def _tensor(flat: Any, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    if not isinstance(flat, Tensor) or flat.ndim != 1 or math.prod(size) > len(flat):
        raise pickle.UnpicklingError("it holds a tensor larger than its numbers")
    return torch.as_strided(flat, size, stride, offset)  # refuses what lies outside


def _number(kind: Any, raw: Any) -> float | int:
    """A number of numpy's, such as EDM's square root of a half."""
    found: float | int = np.frombuffer(raw, kind.dtype)[0].item()
    return found


def _set(items: Any = ()) -> set[str]:
    return set(_plain(list(items)))


def _plain(keys: list[Any]) -> list[Any]:
    """Keys, if plain: Python's own hash of tuples in tuples ends the process where they are deep enough."""
    if not {type(key) for key in keys} <= {str, int}:
        raise pickle.UnpicklingError("it has something else where a name belongs")
    return keys


CALLS: dict[str, Callable[..., Any]] = {
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "collections.OrderedDict": lambda: {},  # noqa: PIE807  (dict would take, and hash, what it is given)
    **{f"{builtins}.set": _set for builtins in ("builtins", "__builtin__")},
    **{f"numpy.{core}.multiarray.scalar": _number for core in ("core", "_core")},
    **{f"{module}.{name}": call for (module, name), call in ALLOWED.items()},
}
STORAGE = "torch.storage._load_from_bytes"
NEW: dict[str, Callable[[], Any]] = {  # made empty, and filled by the words that follow
    "dnnlib.util.EasyDict": dict,
    "torch.nn.modules.container.ModuleDict": lambda: Record("ModuleDict", {}),
}


class _Words(dict[int, Any]):
    def __missing__(self, word: int) -> Any:
        raise pickle.UnpicklingError(f"byte {word:#04x} where a word of a pickle of plain values belongs")


class _Reader(pickle._Unpickler):
    """In Python, since the one in C makes lists as long as a file's largest number says."""

    stack: list[Any]  # of Python's own
    pop_mark: Callable[[], list[Any]]

    dispatch = _Words({getattr(pickle, op)[0]: pickle._Unpickler.dispatch[getattr(pickle, op)[0]] for op in OPS})

    def __init__(self, file: Any, size: int):
        super().__init__(file)
        self.left = size  # bytes that storages may still take: a small file could name one of its texts many times

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full not in CALLS and full not in NEW and full != STORAGE:
            raise pickle.UnpicklingError(f"it asks for {ascii(full[:80])[1:-1]}, which neither tensors nor settings need")
        return Named(full)

    def call(self) -> None:
        args, what = self.stack.pop(), self.stack.pop()
        name = what.name if isinstance(what, Named) else ""
        if type(args) is not tuple or (name not in CALLS and name != STORAGE):
            raise pickle.UnpicklingError("it calls what is no function of its own kind")
        self.stack.append(self.storage(*args) if name == STORAGE else CALLS[name](*args))

    def new(self) -> None:
        args, what = self.stack.pop(), self.stack.pop()
        if args != () or not isinstance(what, Named) or what.name not in NEW:
            raise pickle.UnpicklingError("it makes an object of a kind that it does not need")
        self.stack.append(NEW[what.name]())

    def build(self) -> None:
        state, what = self.stack.pop(), self.stack[-1]
        if type(what) not in (Record, Kind, Array):
            raise pickle.UnpicklingError(f"it changes a {type(what).__name__}")
        what.__setstate__(state)

    def items(self) -> None:
        pairs = self.pop_mark()
        _dict(self.stack[-1]).update(zip(_plain(pairs[::2]), pairs[1::2], strict=True))

    def item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _dict(self.stack[-1])[_plain([key])[0]] = value

    def members(self) -> None:
        found = self.pop_mark()
        if type(self.stack[-1]) is not set:
            raise pickle.UnpicklingError("it adds to what is no set")
        self.stack[-1].update(_plain(found))

    def storage(self, content: Any) -> Tensor:
        """The numbers of one or several tensors, of which a file of torch.save holds nothing else."""
        self.left -= len(content)
        if self.left < 0:
            raise pickle.UnpicklingError("its tensors are larger than the file")
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if not isinstance(found, torch.storage.TypedStorage):
            raise pickle.UnpicklingError("it keeps tensors as something else")
        return torch.empty(0, dtype=found.dtype).set_(found)

    dispatch |= {pickle.REDUCE[0]: call, pickle.NEWOBJ[0]: new, pickle.BUILD[0]: build, pickle.ADDITEMS[0]: members}
    dispatch |= {pickle.SETITEM[0]: item, pickle.SETITEMS[0]: items}


def unpickle(path: Path) -> Any:
    """What a pickle holds, as Records, tensors and plain values; UserError where it asks for more than that, or is damaged."""
    try:
        with (
            open(path, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):  # reads no more than is there
            return _Reader(content, len(content)).load()
    except Exception as e:
        fix = "nothing in it was run; if it should be EDM's, fetch it anew"
        raise UserError(f"{path} is cut short, damaged or no pickle of EDM's ({ascii(reason(e)[:200])[1:-1]}): {fix}") from None


def record(found: Any, *names: str) -> Mapping[str, Any]:
    """The plain dict at a path of names through records and dicts; an empty one where there is none."""
    for name in names:
        found = found.held if isinstance(found, Record) else found
        found = found.get(name) if isinstance(found, dict) else None
    found = found.held if isinstance(found, Record) else found
    return found if isinstance(found, dict) else {}
