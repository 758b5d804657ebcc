"""How tests read a page: by the standard library's parser, which knows nothing of how it was written."""

import json
from collections.abc import Iterator
from html.parser import HTMLParser

EMPTY = {"img", "input", "br", "meta"}


class Page(HTMLParser):
    """The elements and texts of a page; AssertionError where its elements do not nest."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        kind = self.open[-1] if self.open else ""
        (self.scripts if kind == "script" else self.texts if kind != "style" else []).append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def data(self) -> dict:
        return json.loads(self.scripts[0])

    def outside(self) -> Iterator[str]:
        """What a browser would load from elsewhere."""
        for tag, attributes in self.elements:
            for name in ("src", "href", "srcset", "action", "data", "poster"):
                if name in attributes and not (attributes[name] or "").startswith("data:image/"):
                    yield f"{tag} {name}={attributes[name]}"
            if tag in ("link", "iframe", "object", "embed", "base") or any(name.startswith("on") for name in attributes):
                yield tag
