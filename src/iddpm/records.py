"""JSON from files, which anybody may have written: decoded into a type, within its bounds, or refused in one line."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

import msgspec

from iddpm.errors import readable

T = TypeVar("T")
LARGEST = 1 << 28  # bytes of a record: more than any that is written here
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]  # as far as every reader of JSON counts exactly
Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]  # a sha256


def once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; ValueError where it says two things of one name, of which readers take the last."""
    found = dict(pairs)
    if len(found) < len(pairs) and (twice := next((name for name, value in pairs if found[name] != value), None)) is not None:
        raise ValueError(f"it says two things of {twice!r}")
    return found


def decode(content: bytes | str, kind: type[T], what: object, fix: str = "bring it back from a copy, or delete it") -> T:
    """A value of `kind` (a TypedDict, dataclass or NamedTuple, with bounds in its annotations) from JSON; else UserError.

    Parsed by json, which takes what file names in other encodings become (lone surrogates) and msgspec does not. NaN and
    infinities, as earlier versions of this project wrote them, are read as null.
    """
    with readable(what, "is damaged", fix):
        if len(content) > LARGEST:
            raise ValueError(f"{len(content)} bytes")
        found: T = msgspec.convert(json.loads(content, parse_constant=lambda name: None, object_pairs_hook=once), kind)
        return found


def fits(value: Any, kind: Any) -> Any:
    """The value as `kind`: a list as a tuple, 1 as 1.0; ValueError, in words, where it is of another type or out of bounds."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as e:
        raise ValueError(str(e)) from None


def encode(record: Mapping[str, Any], **how: Any) -> bytes:
    """A record as strict JSON: what is not finite is null, and its name is under "not_finite"."""
    bad = [name for name, value in record.items() if isinstance(value, float) and value * 0 != 0]
    told = {**record, **dict.fromkeys(bad), "not_finite": bad} if bad else record
    return json.dumps(told, allow_nan=False, **how).encode()
