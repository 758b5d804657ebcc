"""Bounds as pictures: their terms, and what they are on fewer steps. An SVG, for which a browser is enough."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

import numpy as np

WIDTH, HEIGHT, TOP, BOTTOM = 1120, 470, 118, 408
PANELS = ((76, 530), (636, 1090))  # left and right edge of each
COLOURS = ("#3b5bdb", "#e8590c", "#2b8a3e", "#9c36b5")
INK, SOFT, GRID = "#212529", "#868e96", "#edf0f3"
FONT = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', 'DejaVu Sans', Arial, sans-serif"
STEP = "step t (0: the data)"
DECADES = 7  # at most, below the largest term: smaller ones are rounding


class Curve(NamedTuple):
    """The bound of one run, in bits/dim."""

    name: str
    t: np.ndarray  # (K,) steps, ascending
    vb: np.ndarray  # (K,) the mean term of each
    error: np.ndarray  # (K,) and its standard error; nan where there is none
    prior: float
    total: float
    total_error: float | None


class Points(NamedTuple):
    """What one run gets on respaced chains of several lengths."""

    name: str
    steps: np.ndarray  # (P,) how many, ascending
    total: np.ndarray  # (P,) bits/dim
    error: np.ndarray  # (P,) and its standard error; nan where there is none


Scale = Callable[[np.ndarray], np.ndarray]  # values -> pixels
Marks = Sequence[tuple[float, str]]  # pixels along an axis, and what is written there


def bound(curves: Sequence[Curve], title: str, note: str = "") -> str:
    """An SVG of each step's term (both axes logarithmic), and of their running sum from the data upwards."""
    last = max(int(c.t[-1]) for c in curves)
    margins = [f" ± {c.total_error:.4f}" if c.total_error is not None else "" for c in curves]
    names = [f"{c.name}: {c.total:.4f}{margin} bits/dim" for c, margin in zip(curves, margins)]
    return _page(title, note, names, [*_terms(curves, last), *_sums(curves, last)])


def against_steps(curves: Sequence[Points], title: str, note: str = "") -> str:
    """An SVG of bits/dim against the number of steps (logarithmic), with bars of one standard error."""
    left, right = PANELS[0][0], PANELS[1][1]
    steps = np.unique(np.concatenate([c.steps for c in curves]))
    margins = [np.nan_to_num(c.error) for c in curves]
    low = min(float((c.total - e).min()) for c, e in zip(curves, margins))
    high = max(float((c.total + e).max()) for c, e in zip(curves, margins))
    _, unit = _round_up(max(high - low, 0.02 * high))
    low, high = unit * math.floor(low / unit - 0.2), unit * math.ceil(high / unit + 0.2)  # with some air
    span = math.log10(steps[-1] / steps[0]) or 1.0

    def x(n: np.ndarray) -> np.ndarray:
        return left + 40 + (right - left - 110) * np.log10(np.asarray(n) / steps[0]) / span

    def y(v: np.ndarray) -> np.ndarray:
        return BOTTOM - (BOTTOM - TOP) * (np.asarray(v) - low) / (high - low)

    ticks = _linear(y, low, high, unit)
    marks = _apart([(float(x(n)), str(n)) for n in steps])
    out = _frame(left, right, "bits/dim (bars: one standard error)", ticks, marks, "steps of the chain")
    upper = max(range(len(curves)), key=lambda k: float(curves[k].total.mean()))
    for k, c in reversed(list(enumerate(curves))):
        out += _with_bars(x(c.steps), y(c.total), y(c.total + margins[k]), c.total, COLOURS[k], above=k == upper)
    return _page(title, note, [c.name for c in curves], out)


def _with_bars(x: np.ndarray, y: np.ndarray, top: np.ndarray, values: np.ndarray, colour: str, above: bool) -> list[str]:
    """A curve of points with bars, symmetric, up to `top`, and their values beside them, where the curve does not run."""
    out = [_line(x, y, colour)]
    for at, middle, end, value in zip(x, y, top, values):
        bar = f"M{at - 4:.1f} {end:.1f}h8m-4 0V{2 * middle - end:.1f}m-4 0h8"
        out.append(f'<path d="{bar}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        out.append(_dot(at, middle, colour))
        right_of, below = (7, -9) if above else (-7, 19)
        out.append(_text(at + right_of, middle + below, f"{value:.3f}", fill=colour, anchor="start" if above else "end"))
    return out


def _page(title: str, note: str, names: Sequence[str], body: Sequence[str]) -> str:
    """The whole SVG: title, note, the curves' names, and what is drawn below them."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="{FONT}" font-size="12">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        _text(PANELS[0][0], 34, title, size=18, weight=600),
        *([_text(PANELS[1][1], 34, note, fill=SOFT, anchor="end", size=13)] if note else []),
    ]
    for k, name in enumerate(names):
        x, y = PANELS[min(k, 1)][0], 60
        lines.append(f'<line x1="{x}" y1="{y - 4}" x2="{x + 18}" y2="{y - 4}" stroke="{COLOURS[k]}" stroke-width="3"/>')
        lines.append(_text(x + 26, y, name, size=13))
    return "\n".join([*lines, *body, "</svg>"]) + "\n"


def _terms(curves: Sequence[Curve], last: int) -> list[str]:
    left, right = PANELS[0]
    top = max(float(c.vb.max()) for c in curves)
    seen = np.concatenate([c.vb[c.vb > 0] for c in curves])
    high = 10.0 ** math.ceil(math.log10(top)) if top > 0 else 1.0
    low = 10.0 ** math.floor(math.log10(seen.min())) if len(seen) else 0.0
    low = min(max(low, high / 10**DECADES), high / 10)
    x, y = _steps(left, right, last), _log(low, high)
    decades = round(math.log10(high / low))
    powers = range(round(math.log10(low)), round(math.log10(high)) + 1, 1 + decades // 6)
    ticks = [(float(y(np.array(10.0**k))), _power(k)) for k in powers]
    out = _frame(left, right, "bits/dim of each step", ticks, _along(x, last), STEP)
    for k, c in reversed(list(enumerate(curves))):  # the first on top
        at, value, error = (_thin(x(c.t), a) for a in (x(c.t), c.vb, c.error))
        value = value.clip(low, high)
        if np.isfinite(error).all():
            upper, lower = y((value + error).clip(low, high)), y((value - error).clip(low, high))
            out.append(
                f'<path d="{_path(np.r_[at, at[::-1]], np.r_[upper, lower[::-1]])}Z" fill="{COLOURS[k]}" fill-opacity="0.16"/>'
            )
        out.append(_line(at, y(value), COLOURS[k]))
        out.append(_dot(at[0], float(y(value[:1])[0]), COLOURS[k]))
    first = curves[0]
    dot = float(y(first.vb[:1].clip(low, high))[0])
    below = dot < TOP + 30
    out.append(_text(left + 12, dot + (20 if below else -10), f"decoder {first.vb[0]:.3f}", fill=COLOURS[0]))
    return out


def _sums(curves: Sequence[Curve], last: int) -> list[str]:
    left, right = PANELS[1]
    high, step = _round_up(max(max(c.total, float(c.vb.cumsum().max())) for c in curves))
    x = _steps(left, right, last)

    def y(v: np.ndarray) -> np.ndarray:
        return BOTTOM - (BOTTOM - TOP) * np.asarray(v) / high

    out = _frame(left, right, "bits/dim up to each step", _linear(y, 0.0, high, step), _along(x, last), STEP)
    for k, c in reversed(list(enumerate(curves))):
        summed = c.vb.cumsum()
        pixels = x(c.t)
        at, value = _thin(pixels, pixels), _thin(pixels, summed, last=True)
        if k == 0:
            half = int(np.searchsorted(summed, c.total / 2))
            if half < len(summed):
                out += _half(float(pixels[half]), float(y(summed[half : half + 1])[0]), left, right, int(c.t[half]))
        if k == 0:
            out.append(f'<path d="{_path(at, y(value))}V{BOTTOM}H{at[0]:.1f}Z" fill="{COLOURS[k]}" fill-opacity="0.06"/>')
        end = float(y(np.array([c.total]))[0])
        out.append(_line(np.r_[at, right], np.r_[y(value), end], COLOURS[k]))  # at the end the prior's term
        out.append(_dot(right, end, COLOURS[k]))
    c = curves[0]
    out.append(
        _text(
            right - 8,
            float(y(np.array([c.total]))[0]) - 10,
            f"total {c.total:.3f}, of which prior {c.prior:.2g}",
            fill=COLOURS[0],
            anchor="end",
        )
    )
    return out


def _half(x: float, y: float, left: float, right: float, t: int) -> list[str]:
    """A mark where half of the bits are in."""
    anchor, shift = ("start", 10) if x < (left + right) / 2 else ("end", -10)
    return [
        f'<path d="M{x:.1f} {BOTTOM}V{y:.1f}H{left}" fill="none" stroke="{SOFT}" stroke-dasharray="2 4"/>',
        _text(
            x + shift,
            (y + BOTTOM) / 2,
            f"half of the bits lie in steps 0 to {t}" if t else "more than half of it is the decoder's",
            fill=SOFT,
            anchor=anchor,
        ),
    ]


# ---- scales and strokes


def _steps(left: float, right: float, last: int) -> Scale:
    """Pixels of steps 0 .. last, by the logarithm of the number of steps."""
    span = math.log10(last + 1) or 1.0
    return lambda t: left + (right - left) * np.log10(np.asarray(t) + 1.0) / span


def _log(low: float, high: float) -> Scale:
    return lambda v: BOTTOM - (BOTTOM - TOP) * np.log10(np.asarray(v) / low) / math.log10(high / low)


def _round_up(value: float) -> tuple[float, float]:
    """A round number above a value, and the step that divides it into four to eight."""
    value = max(value, 1e-6) * 1.04
    unit = 10.0 ** math.floor(math.log10(value))
    step = next(unit * s for s in (0.2, 0.25, 0.5, 1, 2) if value / (unit * s) <= 7)
    return math.ceil(value / step) * step, step


def _thin(pixels: np.ndarray, values: np.ndarray, last: bool = False) -> np.ndarray:
    """The mean (or last) value of each pixel column that holds any: as much as can be seen."""
    column = np.round(pixels).astype(np.int64)
    starts = np.flatnonzero(np.r_[True, np.diff(column) > 0])
    counts = np.diff(np.r_[starts, len(column)])
    return values[starts + counts - 1] if last else np.add.reduceat(values, starts) / counts


def _linear(y: Scale, low: float, high: float, step: float) -> Marks:
    digits = next(d for d in range(20) if abs(step * 10**d - round(step * 10**d)) < 1e-6)
    values = [low + step * k for k in range(round((high - low) / step) + 1)]
    return [(float(y(np.array(v))), f"{v:.{digits}f}") for v in values]


def _along(x: Scale, last: int) -> Marks:
    """Steps 0, 1, 3, 10 and so on up to the last."""
    steps = [0] + [m * 10**k for k in range(5) for m in (1, 3) if m * 10**k < 0.75 * last] + [last] * (last > 0)
    return [(float(x(np.array(step))), str(step)) for step in steps]


def _apart(marks: Marks) -> Marks:
    """Those marks that can be read beside each other."""
    kept: list[tuple[float, str]] = []
    for at, name in marks:
        if not kept or at - kept[-1][0] > 34:
            kept.append((at, name))
    return kept


def _frame(left: float, right: float, title: str, ticks: Marks, marks: Marks, below: str) -> list[str]:
    """A panel: `ticks` up its left side, `marks` along its foot, and what these are."""
    out = [_text(left, TOP - 20, title, size=13, weight=600)]
    for at, name in ticks:
        out.append(f'<line x1="{left}" y1="{at:.1f}" x2="{right}" y2="{at:.1f}" stroke="{GRID}"/>')
        out.append(_text(left - 10, at + 4, name, fill=SOFT, anchor="end"))
    for at, name in marks:
        out.append(f'<line x1="{at:.1f}" y1="{TOP}" x2="{at:.1f}" y2="{BOTTOM}" stroke="{GRID}"/>')
        out.append(_text(at, BOTTOM + 20, name, fill=SOFT, anchor="middle"))
    out.append(f'<line x1="{left}" y1="{BOTTOM}" x2="{right}" y2="{BOTTOM}" stroke="#adb5bd"/>')
    out.append(_text((left + right) / 2, BOTTOM + 42, below, fill=SOFT, anchor="middle"))
    return out


def _power(k: int) -> str:
    """10^k in plain figures where they are short."""
    superscript = str(k).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return {0: "1", 1: "10", 2: "100"}.get(k, f"10{superscript}")


def _path(x: np.ndarray, y: np.ndarray) -> str:
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y))


def _line(x: np.ndarray, y: np.ndarray, colour: str) -> str:
    return (
        f'<path d="{_path(x, y)}" fill="none" stroke="{colour}" stroke-width="2" stroke-linejoin="round" stroke-linecap="round"/>'
    )


def _dot(x: float, y: float, colour: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}" stroke="#fff" stroke-width="1.5"/>'


def _text(x: float, y: float, text: str, fill: str = INK, anchor: str = "start", size: int = 12, weight: int = 400) -> str:
    style = f'fill="{fill}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'
