"""Charts as SVG, which every browser shows: a page of panels beside each other, each with two axes, lines, bands and words."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

import numpy as np

WIDTH, HEIGHT, TOP, BOTTOM = 1120, 470, 118, 408  # pixels of the page; upper and lower edge of the panels
LEFT, RIGHT, BETWEEN = 76, 30, 106  # room beside and between panels, for what is written at their axes
COLOURS = ("#3b5bdb", "#e8590c", "#2b8a3e", "#9c36b5")
INK, SOFT, GRID, FOOT = "#212529", "#868e96", "#edf0f3", "#adb5bd"
FONT = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', 'DejaVu Sans', Arial, sans-serif"
DECADES = 7  # of a logarithmic axis, at most: what lies further below the largest value is rounding


class Axis(NamedTuple):
    """From `low` to `high`; a value beyond is drawn at the end."""

    title: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]  # a value, and what is written there
    log: bool = False
    shift: float = 0.0  # added before the logarithm is taken: 1 for counts that begin with 0

    def share(self, values: np.ndarray | float) -> np.ndarray:
        """Where values lie: 0 at the low end, 1 at the high one."""
        v, a, b = np.clip(np.asarray(values, dtype=float), self.low, self.high), self.low, self.high
        if self.log:
            v, a, b = (np.log10(n + self.shift) for n in (v, a, b))
        return (v - a) / (b - a)


class Series(NamedTuple):
    """A line through points; the legend tells its name, if it has one."""

    x: np.ndarray  # (n,) ascending
    y: np.ndarray  # (n,)
    name: str = ""
    colour: str = COLOURS[0]
    error: np.ndarray | None = None  # (n,) drawn to both sides, as a band or as bars
    bars: bool = False
    dots: Sequence[int] = ()  # points that are marked
    fill: bool = False  # down to the foot
    dashed: bool = False


class Note(NamedTuple):
    """Words beside a point of a panel, from which they stand off by some pixels."""

    x: float
    y: float
    text: str
    colour: str = SOFT
    anchor: str = "start"
    right: float = 0
    down: float = 0


class Panel(NamedTuple):
    """Lines between two axes, the first line on top."""

    x: Axis
    y: Axis
    series: Sequence[Series]
    notes: Sequence[Note] = ()


def linear(title: str, values: np.ndarray, zero: bool = False) -> Axis:
    """An axis with some air about the values, from 0 if that is asked for, with ticks at round numbers."""
    high = float(values.max())
    low = 0.0 if zero else float(values.min())
    span = max(high - low, 0.02 * abs(high), 1e-6)
    unit = 10.0 ** math.floor(math.log10(span))
    step = next(unit * s for s in (0.2, 0.25, 0.5, 1, 2) if span / (unit * s) <= 7)
    first, last = (0 if zero else math.floor(low / step - 0.2)), math.ceil(high / step + 0.2)
    digits = next(d for d in range(20) if abs(step * 10**d - round(step * 10**d)) < 1e-6)
    ticks = [(k * step, f"{k * step:.{digits}f}") for k in range(first, last + 1)]
    return Axis(title, first * step, last * step, ticks)


def logarithmic(title: str, values: np.ndarray) -> Axis:
    """An axis of whole decades about the values above 0, at most DECADES of them."""
    seen = values[values > 0]
    high = math.ceil(math.log10(seen.max())) if len(seen) else 0
    low = min(max(math.floor(math.log10(seen.min())), high - DECADES), high - 1) if len(seen) else high - 1
    ticks = [(10.0**k, _power(k)) for k in range(low, high + 1, 1 + (high - low) // 6)]
    return Axis(title, 10.0**low, 10.0**high, ticks, log=True)


def counts(title: str, last: int) -> Axis:
    """A logarithmic axis of 0 .. last."""
    ticks = [0, *(m * 10**k for k in range(9) for m in (1, 3) if m * 10**k < 0.6 * last), *([last] if last else [])]
    return Axis(title, 0, last or 9, [(k, str(k)) for k in ticks], log=True, shift=1)


def page(title: str, panels: Sequence[Panel], note: str = "") -> str:
    """The SVG: the title, a note at its right, the legend, the panels."""
    width = (WIDTH - LEFT - RIGHT - BETWEEN * (len(panels) - 1)) / len(panels)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="{FONT}" font-size="12">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        _text(LEFT, 34, title, size=18, weight=600),
        *([_text(WIDTH - RIGHT, 34, note, SOFT, "end", size=13)] if note else []),
    ]
    legend = {s.name: s.colour for panel in panels for s in panel.series if s.name}
    for k, (name, colour) in enumerate(legend.items()):  # two columns
        x, y = LEFT + k % 2 * (WIDTH // 2), 60 + k // 2 * 18
        out += [_stroke(f"M{x} {y - 4}h18", colour, 3), _text(x + 26, y, name, size=13)]
    for k, panel in enumerate(panels):
        out += _panel(panel, LEFT + k * (width + BETWEEN), width)
    return "\n".join([*out, "</svg>"]) + "\n"


def _panel(panel: Panel, left: float, width: float) -> list[str]:
    def across(x: np.ndarray | float) -> np.ndarray:
        return left + width * panel.x.share(x)

    def up(y: np.ndarray | float) -> np.ndarray:
        return BOTTOM - (BOTTOM - TOP) * panel.y.share(y)

    out, right, free = [_text(left, TOP - 20, panel.y.title, size=13, weight=600)], left + width, -math.inf
    for value, name in panel.y.ticks:
        y = float(up(value))
        out += [_stroke(f"M{left:.1f} {y:.1f}H{right:.1f}", GRID, 1), _text(left - 10, y + 4, name, SOFT, "end")]
    for value, name in panel.x.ticks:
        if (x := float(across(value))) > free:  # names that would run into the one before are left out
            out += [_stroke(f"M{x:.1f} {TOP}V{BOTTOM}", GRID, 1), _text(x, BOTTOM + 20, name, SOFT, "middle")]
            free = x + 34
    out += [_stroke(f"M{left:.1f} {BOTTOM}H{right:.1f}", FOOT, 1)]
    out += [_text((left + right) / 2, BOTTOM + 42, panel.x.title, SOFT, "middle")]
    for s in reversed(panel.series):
        out += _series(s, across(s.x), up)
    lines = np.concatenate([_points(across(s.x), up(s.y)) for s in panel.series]) if panel.series else np.zeros((0, 2))
    for n in panel.notes:
        x, y = float(across(n.x)) + n.right, _clear(n, float(across(n.x)) + n.right, float(up(n.y)) + n.down, lines)
        out.append(_text(x, y, n.text, n.colour, n.anchor))
    return out


def _points(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Points of a line (n, 2) that lie at most some 2 pixels apart."""
    along = np.r_[0, np.hypot(np.diff(x), np.diff(y)).cumsum()]
    at = np.linspace(0, along[-1], int(along[-1] / 2) + 2)
    return np.stack([np.interp(at, along, x), np.interp(at, along, y)], axis=1)


def _clear(note: Note, x: float, y: float, lines: np.ndarray) -> float:
    """The height nearest to y at which a note crosses no line; y itself where every height does."""
    width = 7 * len(note.text)  # at a size of 12, at most
    left = x - {"start": 0, "middle": width / 2, "end": width}[note.anchor]
    near = lines[(lines[:, 0] > left - 4) & (lines[:, 0] < left + width + 4), 1]
    for off in sorted(range(-120, 121, 4), key=abs):
        top, foot = y + off - 14, y + off + 6
        if top > TOP and foot < BOTTOM and not ((near > top) & (near < foot)).any():
            return y + off
    return y


def _series(s: Series, pixels: np.ndarray, up: Callable[[np.ndarray], np.ndarray]) -> list[str]:
    """A line and what belongs to it; `pixels` (n,) are those of its x, `up` gives those of a y."""
    x, y, error = (_thin(pixels, v) for v in (pixels, s.y, np.zeros(len(s.y)) if s.error is None else s.error))
    line, upper, lower = up(y), up(y + error), up(y - error)
    out = []
    if s.fill:
        out.append(f'<path d="{_path(x, line)}V{BOTTOM}H{x[0]:.1f}Z" fill="{s.colour}" fill-opacity="0.06"/>')
    if s.bars:
        ends = zip(x, upper, lower)
        out += [_stroke(f"M{a - 4:.1f} {b:.1f}h8m-4 0V{c:.1f}m-4 0h8", s.colour, 1.5) for a, b, c in ends]
    elif s.error is not None and np.isfinite(error).all():
        around = _path(np.r_[x, x[::-1]], np.r_[upper, lower[::-1]])
        out.append(f'<path d="{around}Z" fill="{s.colour}" fill-opacity="0.16"/>')
    out.append(_stroke(_path(x, line), s.colour, 1 if s.dashed else 2, s.dashed))
    for k in s.dots:
        at = f'cx="{pixels[k]:.1f}" cy="{up(s.y[k]):.1f}"'
        out.append(f'<circle {at} r="4" fill="{s.colour}" stroke="#fff" stroke-width="1.5"/>')
    return out


def _thin(pixels: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The mean value of each pixel column that holds any, as much as can be seen; the last value as it is."""
    column = np.round(pixels).astype(np.int64)
    column[-1] += 1
    starts = np.flatnonzero(np.r_[True, np.diff(column) != 0])
    return np.add.reduceat(values, starts) / np.diff(np.r_[starts, len(column)])


def _power(k: int) -> str:
    """10^k, in plain figures where they are short."""
    superscript = str(k).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return {0: "1", 1: "10", 2: "100"}.get(k, f"10{superscript}")


def _path(x: np.ndarray, y: np.ndarray) -> str:
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y))


def _stroke(path: str, colour: str, width: float, dashed: bool = False) -> str:
    dashes = ' stroke-dasharray="2 4"' if dashed else ""
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-linejoin="round"{dashes}/>'


def _text(x: float, y: float, text: str, fill: str = INK, anchor: str = "start", size: int = 12, weight: int = 400) -> str:
    style = f'fill="{fill}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'
