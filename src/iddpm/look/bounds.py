"""What `iddpm nll` says, writes and draws of what it measured."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from iddpm.config import is_chain
from iddpm.data import Images
from iddpm.errors import UserError
from iddpm.look.charts import COLOURS, SOFT, Axis, Note, Panel, Series, counts, linear, logarithmic, page
from iddpm.measure import bound as measuring
from iddpm.measure.bound import Bound, parts
from iddpm.measure.figures import Figure, circumstances, record
from iddpm.measure.metrics.rows import Estimate
from iddpm.records import decode
from iddpm.sampling.open import Opened, beside
from iddpm.saying import say
from iddpm.store.remote import write_file
from iddpm.words import many

FIGURES = "metrics.json"  # beside the numbers


class Measured(NamedTuple):
    """What was measured of one run on one chain."""

    opened: Opened
    images: Images
    bound: Bound


def tell(done: Sequence[Measured], data: Path, out: Path) -> None:
    """A line for each run on a chain, and for their difference; the first one's figures join those of its folder."""
    for m in done:
        scalars = measuring.scalars(m.bound)
        say(_line(m), "bits_per_dim", run=_name(m), **scalars)
    if len(done) > 1:
        print(f"{_difference(done)} (paired: the same images and noise; negative where {_name(done[0])} is better)")
    record(out.parent / FIGURES, _figures(done[0], data))


def write(done: Sequence[Measured], out: Path, data: Path, per_image: Path | None) -> None:
    """All the files of the runs on one chain, and the line that says what they hold."""
    bound, against = done[0].bound, done[1].bound if len(done) > 1 else None
    numbers, note = {**_about(done[0]), "data": str(data), **measuring.summary(bound)}, ""
    if against:
        numbers["against"] = {**_about(done[1]), **measuring.scalars(against), **_paired(done)}
        note = _difference(done, sign="±")
    tables = measuring.write_tables(bound, out.parent, "" if out.stem == "nll" else f"{out.stem}_")
    title = f"{_where(data)}: {many(len(bound.total), 'image')}"
    title += f", a chain respaced to {k} steps" if (k := _respaced(bound)) else ""
    told = replaced(out, data)
    picture = _write(out, numbers, terms_and_sums([_name(m) for m in done], [m.bound for m in done], title, note))
    if per_image:
        measuring.write_per_image(per_image, bound, done[0].images, data, against)
        print(f"each image: {per_image}")
    text = f"every term: {out}{told}, {', '.join(p.name for p in tables)}; picture: {picture}; figures: {out.parent / FIGURES}"
    say(text, "wrote", path=out)


def write_curve(points: Sequence[Sequence[Measured]], out: Path, data: Path) -> None:
    """The numbers and the picture of the runs on several chains, from the shortest up."""
    points = sorted(points, key=lambda done: len(done[0].bound.kept))
    rows = [[{**_spec(m), **measuring.scalars(m.bound)} for m in done] for done in points]
    first, *others = points[0]
    numbers = {**_about(first), "data": str(data), "model": _model(first), "points": [row[0] for row in rows]}
    if others:
        paired = [{**row[1], **_paired(done)} for row, done in zip(rows, points)]
        numbers["against"] = {**_about(others[0]), "model": _model(others[0]), "points": paired}
    title = " against ".join([f"{_folder(first)}: {_model(first)}", *map(_folder, others)])
    names = [f"{_name(m)}: {_model(m)}" for m in points[0]]
    curves = [[m.bound for m in run] for run in zip(*points)]
    told = replaced(out, data)
    picture = _write(
        out, numbers, against_steps(names, curves, title, f"{_where(data)}: {many(len(first.bound.total), 'image')}")
    )
    print(f"curve: {out}{told}; picture: {picture}; figures: {out.parent / FIGURES}")


def replaced(out: Path, data: Path) -> str:
    """That what a file of numbers held was of other images, where it was; the figures of both are kept."""
    with suppress(OSError, UserError):
        before = decode(out.read_bytes(), dict[str, Any], out).get("data", str(data))
        return f" (in the place of what it held of {before}: --out keeps both)" if before != str(data) else ""
    return ""


def _write(out: Path, numbers: dict[str, Any], svg: str) -> Path:
    picture = out.with_suffix(".svg")
    write_file(out, json.dumps(numbers, indent=1))
    write_file(picture, svg)
    return picture


# ---- pictures


def terms_and_sums(names: Sequence[str], bounds: Sequence[Bound], title: str, note: str = "") -> str:
    """An SVG of each step's term (both axes logarithmic), and of their running sum from the data upwards."""
    steps = counts("step t (0: the data)", max(int(b.kept[-1]) for b in bounds))
    totals = [Estimate.mean(b.total) for b in bounds]
    sums = [np.r_[b.mean["vb"].cumsum(), total] for b, (total, _) in zip(bounds, totals)]  # at the end with the prior's term
    terms = logarithmic("bits/dim of each step", np.concatenate([b.mean["vb"] for b in bounds]))
    summed = linear("bits/dim up to each step", np.concatenate(sums), zero=True)
    left, right = [], []
    for k, (name, b, (total, error)) in enumerate(zip(names, bounds, totals)):
        name, colour = f"{name}: {total:.4f}{_margin(error, sign='±')} bits/dim", COLOURS[k % len(COLOURS)]
        left.append(Series(b.kept, b.mean["vb"], name, colour, b.error["vb"], dots=[0]))
        right.append(Series(np.r_[b.kept, steps.high], sums[k], name, colour, dots=[-1], fill=k == 0))
    b, total, prior = bounds[0], totals[0][0], float(bounds[0].prior.mean())
    decoder = float(b.mean["vb"][0])
    below = bool(terms.share(decoder) > 0.9)
    words = Note(0, decoder, f"decoder {decoder:.3f}", COLOURS[0], right=12, down=20 if below else -10)
    end = Note(steps.high, total, f"total {total:.3f}, of which prior {prior:.2g}", COLOURS[0], "end", -8, -10)
    half, notes = _half(b, sums[0], total / 2, steps)
    return page(title, [Panel(steps, terms, left, [words]), Panel(steps, summed, [*right, *half], [end, *notes])], note)


def _half(bound: Bound, sums: np.ndarray, half: float, steps: Axis) -> tuple[list[Series], list[Note]]:
    """A mark where half of the bits are in; none where the prior has them."""
    k = int(np.searchsorted(sums[:-1], half))
    if k == len(bound.kept) or not half > 0:
        return [], []
    t, y = int(bound.kept[k]), float(sums[k])
    line = Series(np.array([0, t, t]), np.array([y, y, 0]), colour=SOFT, dashed=True)
    share = y / (2 * half)  # more than half where one step holds much
    text = f"{share:.0%} of the bits lie in steps 0 to {t}" if t else f"{share:.0%} of it is the decoder's"
    beside = bool(steps.share(t) < 0.5)
    return [line], [Note(t, y / 2, text, anchor="start" if beside else "end", right=10 if beside else -10)]


def against_steps(names: Sequence[str], curves: Sequence[Sequence[Bound]], title: str, note: str = "") -> str:
    """An SVG of each run's bits/dim against the number of steps (logarithmic), with bars of one standard error."""
    series: list[Series] = []
    for k, (name, bounds) in enumerate(zip(names, curves)):
        bounds = sorted(bounds, key=lambda b: len(b.kept))
        totals, errors = zip(*(Estimate.mean(b.total) for b in bounds))
        steps, error = np.array([len(b.kept) for b in bounds]), np.array([e or 0.0 for e in errors])
        colour = COLOURS[k % len(COLOURS)]
        series.append(Series(steps, np.array(totals), name, colour, error, bars=True, dots=range(len(bounds))))
    ends = [s.y + sign * s.error for s in series if s.error is not None for sign in (-1, 1)]
    up = linear("bits/dim (bars: one standard error)", np.concatenate(ends))
    every = np.unique(np.concatenate([s.x for s in series]))
    room = (every[-1] / every[0]) if len(every) > 1 else 10.0
    low, high = every[0] * room**-0.05, every[-1] * room**0.09  # for what stands beside the first and the last point
    along = Axis("steps of the chain", low, high, [(n, str(n)) for n in every], log=True)
    upper = max(series, key=lambda s: float(s.y.mean()))  # whose values stand above it, and those of others below
    notes = []
    for s in series:
        anchor, right, down = ("start", 7, -9) if s is upper else ("end", -7, 19)
        notes += [Note(x, y, f"{y:.3f}", s.colour, anchor, right, down) for x, y in zip(s.x, s.y)]
    return page(title, [Panel(along, up, series, notes)], note)


# ---- the same as figures and words


def record_ode(found: Mapping[str, Any], opened: Opened, data: Path, out: Path, seconds: float) -> None:
    """What --ode found joins the figures of its folder."""
    kept = {name: found[name] for name in ("seed", "steps", "grid", "trace", "dequantization")}
    weights = opened.weights
    about: dict[str, Any] = dict(
        n=found["images"], solver=None, **kept, precision=opened.which.precision, extractor=None, reference=str(data),
        weights=str(weights.path), checkpoint_step=weights.about["step"], ema_rate=weights.about.get("ema_rate", 0),
        unit="bits/dim", seconds=round(seconds, 2), **circumstances(opened.device),
    )  # fmt: skip
    record(out.parent / FIGURES, [Figure("bits/dim by the ODE", found["bits_per_dim"], found["standard_error"], about)])


def _figures(m: Measured, data: Path) -> list[Figure]:
    """The bound and its two ends, under all that decides them."""
    b, sample = m.bound, m.opened.config.sample
    about: dict[str, Any] = dict(
        n=len(b.total), seed=b.seed, solver=None, steps=len(b.kept), chain_steps=b.schedule_steps, **_spec(m),
        clip_denoised=sample.clip_denoised, precision=m.opened.which.precision, extractor=None, reference=str(data),
        **_about(m, "checkpoint_step"), unit="bits/dim", seconds=round(b.seconds, 2), **circumstances(m.opened.device),
    )  # fmt: skip
    names = {"bits/dim": "total", "bits/dim prior": "prior", "bits/dim decoder": "decoder"}
    return [Figure(name, *parts(b)[part], about) for name, part in names.items()]


def _about(m: Measured, step: str = "step") -> dict[str, Any]:
    """Which weights; their step under the name that a file has for it."""
    weights = m.opened.weights
    return {"weights": str(weights.path), step: weights.about["step"], "ema_rate": weights.about.get("ema_rate", 0)}


def _spec(m: Measured) -> dict[str, Any]:
    """How the chain was respaced; a spec that keeps every step is the same as none."""
    sample = m.opened.config.sample
    return dict(sampling_steps=sample.sampling_steps if _respaced(m.bound) else "all", grid=sample.grid)


def _respaced(bound: Bound) -> int:
    """To how many steps the chain was respaced; 0 where it is whole."""
    return len(bound.kept) if len(bound.kept) < bound.schedule_steps else 0


def _paired(done: Sequence[Measured]) -> dict[str, float | None]:
    mean, error = Estimate.mean(done[0].bound.total - done[1].bound.total)
    return dict(difference=mean, difference_error=error)


def _difference(done: Sequence[Measured], sign: str = "+-") -> str:
    mean, error = _paired(done).values()
    return f"difference {mean:+.4f}{_margin(error, sign=sign)} bits/dim"


def _line(m: Measured) -> str:
    found, n = parts(m.bound), len(m.bound.total)
    (total, error), (prior, prior_error) = found["total"], found["prior"]
    ends = [f"{what} {v:.4f}{_margin(e)}" for what, (v, e) in zip(("decoder", "the rest"), (found["decoder"], found["rest"]))]
    chain = f", the bound of the chain respaced to {k} steps" if (k := _respaced(m.bound)) else ""
    words = ", ".join([f"prior {prior:.2g}{_margin(prior_error, '.1g')}", *ends])
    return f"{_name(m)}: {total:.4f}{_margin(error)} bits/dim{chain} ({many(n, 'image')}; {words})"


def _margin(error: float | None, form: str = ".4f", sign: str = "+-") -> str:
    return f" {sign} {error:{form}}" if error is not None else ""


def _folder(m: Measured) -> str:
    return beside(m.opened.weights.path).resolve().name


def _name(m: Measured) -> str:
    about = m.opened.weights.about
    return f"{_folder(m)} (step {about['step']}, {f'average {r}' if (r := about.get('ema_rate', 0)) else 'raw weights'})"


def _model(m: Measured) -> str:
    """What of the model decides how few steps will do."""
    d = m.opened.config.diffusion
    variances = "learned" if d.learn_sigma else f"fixed {'small' if d.sigma_small else 'large'}"
    steps = f", {d.diffusion_steps} steps" if is_chain(d) else ""
    return f"{variances} variances, {d.noise_schedule}{steps}"


def _where(data: Path) -> str:
    return "/".join(data.resolve().parts[-2:])
