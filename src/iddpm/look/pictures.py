"""Pictures inside a page, as small as they must be."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from PIL import Image

from iddpm.data import decode
from iddpm.look.html import Html, el
from iddpm.store.remote import opened

T = TypeVar("T")
LONGEST = 65_500  # pixels of a side, more than which JPEG cannot hold


def image(picture: Image.Image, most: int, alt: str, **attributes: object) -> Html:
    """A picture of at most so many bytes as an element: as PNG where that fits, else as JPEG, smaller if it must be."""
    # A PNG is not even tried of what is sure to be too large: to save a sheet of 30 million pixels takes seconds.
    kind, content = "png", _saved(picture, "PNG") if picture.width * picture.height < 16 * most else b" " * (most + 1)
    small = picture
    while max(small.size) > LONGEST:
        small = small.resize((max(1, small.width * 3 // 4), max(1, small.height * 3 // 4)), Image.Resampling.BOX)
    while len(content) > most and min(small.size) > 32:
        kind, content = "jpeg", _saved(small.convert("RGB"), "JPEG")
        small = small.resize((small.width * 3 // 4, small.height * 3 // 4), Image.Resampling.BOX)
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return el("img", src=source, alt=alt, width=picture.width, height=picture.height, **attributes)


def read(path: Path) -> Image.Image:
    """A picture of a run's folder; UserError where it is damaged."""
    with opened(path) as file:
        file = io.BytesIO(file.read())
    file.name = str(path)
    return decode(file, 3)


def evenly(items: Sequence[T], most: int) -> list[T]:
    """At most so many of a sequence, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(k * (len(items) - 1) / (most - 1))] for k in range(most)]


def _saved(picture: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **({"quality": 86} if kind == "JPEG" else {}))
    return file.getvalue()
