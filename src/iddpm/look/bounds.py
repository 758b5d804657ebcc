"""What `iddpm nll` says, writes and draws of what it measured."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from iddpm.data import Images
from iddpm.look import charts as plot
from iddpm.measure import bound as nll
from iddpm.measure.bound import Bound, mean_and_error
from iddpm.measure.figures import Figure, circumstances, record
from iddpm.sampling.open import Opened, beside
from iddpm.store.remote import place, replace

FIGURES = "metrics.json"  # beside the numbers


class Measured(NamedTuple):
    """What was measured of one run on one chain."""

    opened: Opened
    images: Images
    bound: Bound


def say(done: list[Measured], data: str, out: Path) -> None:
    """A line for each run on a chain, and for their difference; the first one's figures join those of its folder."""
    for m in done:
        print(_line(m), flush=True)
    if len(done) > 1:
        print(f"{_words(_difference(done))} (paired: the same images and noise; negative where {_name(done[0])} is better)")
    record(out.parent / FIGURES, _figures(done[0], data))


def write(done: list[Measured], out: Path, data: str, per_image: str) -> None:
    """All the files of the runs on one chain, and the line that says what they hold."""
    main, other = done[0], done[1] if len(done) > 1 else None
    numbers, note = dict(_about(main), data=data, **nll.summary(main.bound)), ""
    if other:
        numbers["against"] = {**_about(other), **nll.scalars(other.bound), **_difference(done)}
        note = _words(_difference(done)).replace("+-", "±")
    tables = nll.write_tables(main.bound, out.parent, "" if out.stem == "nll" else f"{out.stem}_")
    title = f"{_where(data)}: {len(main.bound.total)} images{_respaced(main.bound)}".replace("the bound of the ", "")
    picture = _write(out, numbers, plot.bound([_curve(m) for m in done], title, note))
    if per_image:
        against = other.bound if other else None
        nll.write_per_image(place(per_image), main.bound, main.images, place(data), against)
        print(f"each image: {per_image}")
    print(f"every term: {out}, {', '.join(p.name for p in tables)}; picture: {picture}; figures: {out.parent / FIGURES}")


def write_curve(points: list[list[Measured]], out: Path, data: str) -> None:
    """The numbers and the picture of the runs on several chains, from the shortest up."""
    points = sorted(points, key=lambda done: len(done[0].bound.kept))
    rows = [[{**_spec(m), **nll.scalars(m.bound)} for m in done] for done in points]
    first, *others = points[0]
    numbers = dict(_about(first), data=data, model=_model(first), points=[row[0] for row in rows])
    if others:
        paired = [{**row[1], **_difference(done)} for row, done in zip(rows, points)]
        numbers["against"] = dict(_about(others[0]), model=_model(others[0]), points=paired)
    title = " against ".join([f"{_folder(first)}: {_model(first)}", *map(_folder, others)])
    curves = [_points(list(run)) for run in zip(*points)]
    svg = plot.against_steps(curves, title, f"{_where(data)}: {len(first.bound.total)} images")
    print(f"curve: {out}; picture: {_write(out, numbers, svg)}; figures: {out.parent / FIGURES}")


def _write(out: Path, numbers: dict[str, Any], svg: str) -> Path:
    picture = out.with_suffix(".svg")
    replace(out, lambda file: file.write(json.dumps(numbers, indent=1).encode()))
    replace(picture, lambda file: file.write(svg.encode()))
    return picture


# ---- the same as figures, curves and words


def _figures(m: Measured, data: str) -> list[Figure]:
    """The bound and its two ends, under all that decides them."""
    b, weights = m.bound, m.opened.weights
    about: dict[str, Any] = dict(
        n=len(b.total), seed=b.seed, solver=None, steps=len(b.kept), chain_steps=b.schedule_steps, **_spec(m),
        clip_denoised=m.opened.config.sample.clip_denoised, precision=m.opened.which.precision, extractor=None, reference=data,
        weights=str(weights.path), checkpoint_step=weights.about["step"], ema_rate=weights.about.get("ema_rate", 0),
        unit="bits/dim", seconds=round(b.seconds, 2), **circumstances(m.opened.device),
    )  # fmt: skip
    names = {"bits/dim": "total", "bits/dim prior": "prior", "bits/dim decoder": "decoder"}
    measured = nll.parts(b)
    return [Figure(name, *measured[part], about) for name, part in names.items()]


def _points(run: list[Measured]) -> plot.Points:
    totals = [mean_and_error(m.bound.total) for m in run]
    error = np.array([np.nan if e is None else e for _, e in totals])
    steps = np.array([len(m.bound.kept) for m in run])
    order = np.argsort(steps)
    return plot.Points(f"{_name(run[0])}: {_model(run[0])}", steps[order], np.array([t for t, _ in totals])[order], error[order])


def _curve(m: Measured) -> plot.Curve:
    b = m.bound
    return plot.Curve(_name(m), b.kept, b.mean["vb"], b.error["vb"], float(b.prior.mean()), *mean_and_error(b.total))


def _about(m: Measured) -> dict[str, Any]:
    weights = m.opened.weights
    return dict(weights=str(weights.path), step=weights.about["step"], ema_rate=weights.about.get("ema_rate", 0))


def _spec(m: Measured) -> dict[str, Any]:
    """How the chain was respaced; a spec that keeps every step is the same as none."""
    whole = len(m.bound.kept) == m.bound.schedule_steps
    return dict(sampling_steps="all" if whole else m.opened.config.sample.sampling_steps)


def _difference(done: list[Measured]) -> dict[str, float | None]:
    mean, error = mean_and_error(done[0].bound.total - done[1].bound.total)
    return dict(difference=mean, difference_error=error)


def _words(difference: dict[str, float | None]) -> str:
    return f"difference {difference['difference']:+.4f}{_margin(difference['difference_error'])} bits/dim"


def _folder(m: Measured) -> str:
    return beside(m.opened.weights.path).resolve().name


def _name(m: Measured) -> str:
    about = _about(m)
    return f"{_folder(m)} (step {about['step']}, {f'average {r}' if (r := about['ema_rate']) else 'raw weights'})"


def _model(m: Measured) -> str:
    """What of the model decides how few steps will do."""
    d = m.opened.config.diffusion
    variances = "learned" if d.learn_sigma else f"fixed {'small' if d.sigma_small else 'large'}"
    return f"{variances} variances, {d.noise_schedule}, {d.diffusion_steps} steps"


def _where(data: str) -> str:
    return "/".join(place(data).resolve().parts[-2:])


def _margin(error: float | None, form: str = ".4f") -> str:
    return f" +- {error:{form}}" if error is not None else ""


def _line(m: Measured) -> str:
    measured = nll.parts(m.bound)
    total, error = measured.pop("total")
    prior, prior_error = measured.pop("prior")
    others = {"decoder": measured["decoder"], "the rest": measured["rest"]}
    words = [f"prior {prior:.2g}{_margin(prior_error, '.1g')}", *(f"{k} {v:.4f}{_margin(e)}" for k, (v, e) in others.items())]
    n = len(m.bound.total)
    return f"{_name(m)}: {total:.4f}{_margin(error)} bits/dim{_respaced(m.bound)} ({n} images; {', '.join(words)})"


def _respaced(bound: Bound) -> str:
    steps = len(bound.kept)
    return f", the bound of the chain respaced to {steps} steps" if steps < bound.schedule_steps else ""
