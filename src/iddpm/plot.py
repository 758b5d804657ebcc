"""The terms of a bound as a picture: an SVG, for which a browser is enough."""

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


Scale = Callable[[np.ndarray], np.ndarray]  # values -> pixels


def bound(curves: Sequence[Curve], title: str, note: str = "") -> str:
    """An SVG of each step's term (both axes logarithmic), and of their running sum from the data upwards."""
    last = max(int(c.t[-1]) for c in curves)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="{FONT}" font-size="12">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        _text(PANELS[0][0], 34, title, size=18, weight=600),
        *([_text(PANELS[1][1], 34, note, fill=SOFT, anchor="end", size=13)] if note else []),
        *_legend(curves),
        *_terms(curves, last),
        *_sums(curves, last),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _legend(curves: Sequence[Curve]) -> list[str]:
    out, y = [], 60
    for k, c in enumerate(curves):
        x = PANELS[min(k, 1)][0]
        margin = f" ± {c.total_error:.4f}" if c.total_error is not None else ""
        out.append(f'<line x1="{x}" y1="{y - 4}" x2="{x + 18}" y2="{y - 4}" stroke="{COLOURS[k]}" stroke-width="3"/>')
        out.append(_text(x + 26, y, f"{c.name}: {c.total:.4f}{margin} bits/dim", size=13))
    return out


def _terms(curves: Sequence[Curve], last: int) -> list[str]:
    left, right = PANELS[0]
    top = max(float(c.vb.max()) for c in curves)
    seen = np.concatenate([c.vb[c.vb > 0] for c in curves])
    high = 10.0 ** math.ceil(math.log10(top)) if top > 0 else 1.0
    low = 10.0 ** math.floor(math.log10(seen.min())) if len(seen) else 0.0
    low = min(max(low, high / 10**DECADES), high / 10)
    x, y = _steps(left, right, last), _log(low, high)
    decades = round(math.log10(high / low))
    ticks = [(float(10.0**k), _power(k)) for k in range(round(math.log10(low)), round(math.log10(high)) + 1, 1 + decades // 6)]
    out = [*_frame(left, right, "bits/dim of each step", x, y, last, ticks)]
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

    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    ticks = [(step * k, f"{step * k:.{digits}f}") for k in range(round(high / step) + 1)]
    out = [*_frame(left, right, "bits/dim up to each step", x, y, last, ticks)]
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


def _frame(left: float, right: float, title: str, x: Scale, y: Scale, last: int, ticks: Sequence[tuple[float, str]]) -> list[str]:
    out = [_text(left, TOP - 20, title, size=13, weight=600)]
    for value, name in ticks:
        at = float(y(np.array([value]))[0])
        out.append(f'<line x1="{left}" y1="{at:.1f}" x2="{right}" y2="{at:.1f}" stroke="{GRID}"/>')
        out.append(_text(left - 10, at + 4, name, fill=SOFT, anchor="end"))
    steps = [0] + [m * 10**k for k in range(5) for m in (1, 3) if m * 10**k < 0.75 * last] + [last] * (last > 0)
    for step in steps:
        at = float(x(np.array([step]))[0])
        out.append(f'<line x1="{at:.1f}" y1="{TOP}" x2="{at:.1f}" y2="{BOTTOM}" stroke="{GRID}"/>')
        out.append(_text(at, BOTTOM + 20, str(step), fill=SOFT, anchor="middle"))
    out.append(f'<line x1="{left}" y1="{BOTTOM}" x2="{right}" y2="{BOTTOM}" stroke="#adb5bd"/>')
    out.append(_text((left + right) / 2, BOTTOM + 42, "step t (0: the data)", fill=SOFT, anchor="middle"))
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
