"""The pictures of bounds: well-formed, and their curves lie where the tick marks say their values are."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from iddpm.look import bounds
from iddpm.measure.bound import Bound

SVG = "{http://www.w3.org/2000/svg}"
POWERS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")


def measured(kept, total, error, vb=None, prior=0.0, vb_error=0.0):
    """A bound of two images, whose mean and standard error are given; of one where there is no error."""
    each = np.array([total]) if np.isnan(error) else np.array([total - error, total + error])
    vb = np.zeros(len(kept)) if vb is None else np.asarray(vb, dtype=float)
    blank = np.zeros(len(each))
    return Bound(
        np.arange(len(each)), each, blank + prior, blank, np.asarray(kept), max(kept) + 1, 0,
        {"vb": vb}, {"vb": vb * vb_error}, 0.0,
    )  # fmt: skip


def curve(t, vb, name="a", prior=0.01, error=0.0):
    return name, measured(t, float(np.sum(vb)) + prior, 0.01, vb, prior, error)


def bound(curves, title, note=""):
    return bounds.terms_and_sums(*zip(*curves), title, note)


def texts(root):
    return [(float(e.get("x")), float(e.get("y")), e.text, e.get("text-anchor")) for e in root.iter(f"{SVG}text")]


def ticks(root, left, right):
    """(pixels, value) pairs of the vertical and of the horizontal axis whose labels lie about a panel."""

    def number(text):
        return float(re.sub(r"^10(?=[⁻⁰¹²³⁴⁵⁶⁷⁸⁹])", "1e", text).translate(POWERS))

    up, along = [], []
    for x, y, text, anchor in texts(root):
        if anchor == "end" and x == left - 10:
            up.append((y - 4, number(text)))
        if anchor == "middle" and left <= x <= right and text.isdigit():
            along.append((x, int(text)))
    return np.array(sorted(up)).T, np.array(sorted(along)).T


def strokes(root):
    """The curves drawn, as arrays (2, n) of pixels."""
    paths = [e.get("d") for e in root.iter(f"{SVG}path") if e.get("fill") == "none" and e.get("stroke-width") == "2"]
    return [np.array([[float(n) for n in point.split()] for point in d[1:].split("L")]).T for d in paths]


VB = 2.0 * (np.arange(40) + 1.0) ** -2


def test_the_curves_lie_where_the_ticks_say():
    root = ET.fromstring(bound([curve(range(40), VB)], "title"))
    terms, sums = strokes(root)
    for pixels, values, left, logarithmic in ((terms, VB, 76, True), (sums, VB.cumsum(), 636, False)):
        (y, v), (x, t) = ticks(root, left, left + 454)
        at = np.interp(pixels[0], x, np.log(t + 1.0))  # log(t + 1) is linear in pixels
        assert np.abs(np.exp(at[:8]) - np.arange(1, 9)).max() < 0.02
        axis = np.log(v) if logarithmic else v
        slope, offset = np.polyfit(y, axis, 1)
        assert np.abs(slope * y + offset - axis).max() < 0.01 * np.ptp(axis)
        shown = slope * pixels[1][:8] + offset
        assert np.abs((np.exp(shown) if logarithmic else shown) / values[:8] - 1).max() < 0.02
    (y, v), _ = ticks(root, 636, 1090)
    assert np.polyval(np.polyfit(y, v, 1), sums[1, -1]) == pytest.approx(VB.sum() + 0.01, abs=0.01)


def test_all_that_is_drawn_stays_inside():
    rng = np.random.default_rng(0)
    cases = [
        [curve(range(4000), rng.lognormal(-9, 2, 4000), error=0.5)],
        [curve([0], [3.0])],
        [curve(range(5), [0.0] * 5, prior=0.0)],
        [curve(range(10), [2, 1, -1e-9, 0, 1e-30, 1e-3, 1, 1, 1, 1])],
        [curve(range(0, 1000, 111), [1e3] * 10), curve(range(0, 4000, 400), [1e-3] * 10, name="<b> & co")],
    ]
    for curves in cases:
        text = bound(curves, "a < b")
        root = ET.fromstring(text)
        assert "nan" not in text and "inf" not in text
        for pixels in strokes(root):
            assert pixels[0].min() >= 0 and pixels[0].max() <= 1120
            assert pixels[1].min() >= 117 and pixels[1].max() <= 409
        assert len(text) < 100_000


def test_it_says_what_it_shows():
    words = " ".join(
        t[2] for t in texts(ET.fromstring(bound([curve(range(40), VB), curve(range(40), 2 * VB, "b")], "the title")))
    )
    total, half = VB.sum() + 0.01, int(np.searchsorted(VB.cumsum(), (VB.sum() + 0.01) / 2))
    assert half == 0
    for part in (
        "the title",
        f"a: {total:.4f} ± 0.0100",
        f"b: {2 * VB.sum() + 0.01:.4f}",
        "decoder 2.000",
        "62% of it is the decoder's",
    ):
        assert part in words
    even = " ".join(t[2] for t in texts(ET.fromstring(bound([curve(range(10), [1.0] * 10, prior=0)], "x"))))
    assert "steps 0 to 4" in even


def points(steps, total, error=0.1, name="a"):
    return name, [measured(range(n), t, error) for n, t in zip(steps, total)]


def against_steps(curves, title, note=""):
    return bounds.against_steps(*zip(*curves), title, note)


def bars(root):
    """Upper and lower end of each error bar, in pixels."""
    found = [e.get("d") for e in root.iter(f"{SVG}path") if e.get("stroke-width") == "1.5"]
    numbers = [[float(n) for n in re.findall(r"-?[0-9.]+", d)] for d in found]  # M x top h8 m-4 0 V bottom m-4 0 h8
    return np.array([[row[1], row[5]] for row in numbers])


def test_bits_per_dim_against_steps_lie_where_the_ticks_say_and_so_do_their_bars():
    steps, total = [10, 25, 100, 4000], np.array([6.2, 5.1, 4.4, 3.75])
    root = ET.fromstring(against_steps([points(steps, total)], "learned variances"))
    (y, v), (x, n) = ticks(root, 76, 1090)
    assert n.tolist() == steps
    spacing = np.diff(x) / np.diff(np.log(n))
    assert np.ptp(spacing) < 0.01 * spacing.mean()  # the logarithm of the steps
    slope, offset = np.polyfit(y, v, 1)
    assert np.abs(slope * y + offset - v).max() < 1e-3
    (curve,) = strokes(root)
    np.testing.assert_allclose(curve[0], x, atol=0.1)
    np.testing.assert_allclose(slope * curve[1] + offset, total, atol=0.01)
    np.testing.assert_allclose(slope * bars(root) + offset, np.stack([total + 0.1, total - 0.1], axis=1), atol=0.01)
    words = " ".join(t[2] for t in texts(root))
    assert all(part in words for part in ("learned variances", "6.200", "3.750", "steps of the chain"))


@pytest.mark.parametrize(
    "curves",
    [
        [points([20], [3.0], np.nan)],
        [points([1, 2], [3.0, 3.0], 0.0)],
        [points([10, 11, 12, 4000], [30, 29, 5, 4], 3.0), points([1, 1000], [8, 3], name="<b> & co")],
    ],
    ids=["one point of one image", "no difference", "two runs, steps close to each other"],
)
def test_bits_per_dim_against_steps_stay_inside_and_can_be_read(curves):
    text = against_steps(curves, "a < b", "c & d")
    root = ET.fromstring(text)
    assert "nan" not in text and "inf" not in text
    for x, y in strokes(root):
        assert x.min() >= 76 and x.max() <= 1090 and y.min() >= 118 and y.max() <= 408
    assert bars(root).min() >= 118 and bars(root).max() <= 408
    along = sorted(x for x, y, text, anchor in texts(root) if anchor == "middle" and y == 428)
    assert len(along) > 0 and np.diff(along).min(initial=99) > 34


@pytest.mark.parametrize("high", [1.0, 1.3, 2.2, 3.9])
def test_the_ticks_say_exactly_where_they_are(high):
    (y, v), _ = ticks(ET.fromstring(bound([curve([0, 1], [high, 0.0], prior=0)], "x")), 636, 1090)
    slope, offset = np.polyfit(y, v, 1)
    assert np.abs(slope * y + offset - v).max() < 1e-3 * v.max()


def test_words_beside_a_point_cross_no_line():
    """The box of each note, as wide as its letters, against every point of the lines."""
    from iddpm.look.charts import Axis, Note, Panel, Series, counts, page

    x = np.arange(200)
    y = 0.2 + 0.7 * np.exp(-x / 40) * (1 + 0.3 * np.sin(x / 7))
    notes = [
        Note(float(x[k]), float(y[k]), f"a note of step {k}", anchor=anchor)
        for k in (5, 40, 90, 150)
        for anchor in ("start", "end")
    ]
    chart = ET.fromstring(page("t", [Panel(counts("step", 199), Axis("y", 0, 1, []), [Series(x, y)], notes)]))
    paths = [p.get("d") for p in chart.iter(f"{SVG}path") if "L" in p.get("d")]
    points = np.array([[float(v) for v in part.split()] for part in paths[0][1:].split("L")])
    shown = [t for t in chart.iter(f"{SVG}text") if (t.text or "").startswith("a note")]
    assert len(shown) == 8
    for text in shown:
        right, foot, width = float(text.get("x")), float(text.get("y")), 6 * len(text.text)
        left = right - (width if text.get("text-anchor") == "end" else 0)
        inside = (points[:, 0] > left) & (points[:, 0] < left + width) & (points[:, 1] > foot - 10) & (points[:, 1] < foot + 3)
        assert not inside.any(), text.text
