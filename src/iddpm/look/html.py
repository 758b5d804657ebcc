"""HTML from Python: what is put into an element is escaped, unless it is an element itself."""

from collections.abc import Iterable
from html import escape

EMPTY = {"img", "input", "br", "meta"}  # elements that hold nothing and are not closed


class Html(str):
    """Text that is HTML already."""


def el(tag: str, *inside: object, **attributes: object) -> Html:
    """An element. Attributes that are False or None are left out, those that are True have no value; class_ stands for class."""
    told = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items() if value is not None}
    head = "".join(
        f" {name}" if value is True else f' {name}="{text(value, quote=True)}"'
        for name, value in told.items()
        if value is not False
    )
    return Html(f"<{tag}{head}>" if tag in EMPTY else f"<{tag}{head}>{join(inside)}</{tag}>")


def join(parts: Iterable[object]) -> Html:
    """Parts one after another, those escaped that are no HTML; None is nothing."""
    return Html("".join(part if isinstance(part, Html) else text(part) for part in parts if part is not None))


def text(value: object, quote: bool = False) -> str:
    """A value as escaped text: control characters and halves of letters, as file names may hold, are shown as �."""
    plain = str(value)
    if not plain.isprintable():
        plain = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in plain)
    return escape(plain, quote=quote)


def table(head: Iterable[object], rows: Iterable[Iterable[object]], **attributes: object) -> Html:
    """A table that scrolls by itself where it is too wide; the first cell of a row is its heading."""
    body = [el("tr", el("th", first, scope="row"), *(el("td", cell) for cell in rest)) for first, *rest in rows]
    top = el("thead", el("tr", *(el("th", cell, scope="col") for cell in head)))
    return el("div", el("table", top, el("tbody", *body), **attributes), class_="scroll", tabindex="0")
