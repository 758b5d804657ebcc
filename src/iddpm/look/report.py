"""A page of HTML on one run or several, complete in itself: what was trained, on what, how it went, how good it is."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import iddpm
from iddpm.errors import UserError, reason
from iddpm.look import comparison, curves, parts
from iddpm.look.html import Html, el, join, table
from iddpm.look.parts import value
from iddpm.look.runs import Run, read_run
from iddpm.store.remote import write_file
from iddpm.words import many

NAME = "report.html"  # in the run's folder
PICTURES = 3_300_000  # bytes of a page's pictures, before base64 makes 4 of 3
CURVES = 2400  # points of a curve, shared among the runs


def write(paths: Sequence[Path], out: Path, table: Path | None = None) -> list[str]:
    """Write the page of some runs, and their table as .csv; returns a sentence for each left out. UserError where all are."""
    runs, faults = list[Run](), list[str]()
    for path in paths:
        try:
            runs.append(read_run(path))
        except (UserError, OSError) as e:
            faults.append(f"{path} is left out: {reason(e).removeprefix(f'{path} ')}")
    if not runs:
        raise UserError(faults[0].replace(" is left out:", ":") if faults else "which run? iddpm report RUN")
    runs = told_apart(runs)
    try:
        text = page(runs, faults)
    except Exception:  # of one among several: the others are shown
        if len(runs) == 1:
            raise
        runs = [run for run in runs if _can_be_shown(run, faults)]
        if not runs:
            raise
        text = page(runs, faults)
    write_file(out, text)
    if table:
        write_file(table, comparison.as_csv(runs))
    return faults


def _can_be_shown(run: Run, faults: list[str]) -> bool:
    """Whether a page of a run alone can be made; where not, the fault joins the others."""
    try:
        page([run])
    except Exception as e:
        faults.append(f"{run.path} is left out: {reason(e)}")
        return False
    return True


def keep(run: Path) -> None:
    """Make the page of a run in its folder, as is done by itself: an error in it is a line, and lets nothing else fail."""
    try:
        if (run / "config.json").exists():  # else it is the folder of a lone file of weights
            write([run], run / NAME)
    except Exception as e:  # whatever it is: what was trained or measured is worth more than a page
        print(f"{run / NAME} is not made: {reason(e)}")


def body(runs: Sequence[Run], faults: Sequence[str] = ()) -> tuple[Html, dict[str, Any]]:
    """What a page shows of some runs, and the numbers of its charts."""
    together = len(runs) > 1
    data = numbers(runs)
    charts = data["charts"]
    sections = [parts.warning(fault) for fault in faults]
    if together:
        sections += _compared(runs, charts)
    for k, run in enumerate(runs):
        inside = _one(run, k, charts, PICTURES // len(runs) // (1 + together))
        if together:
            name = el("summary", _dot(k), run.name, el("small", parts.progress(run)))
            sections.append(el("details", name, *inside, class_="run"))
        else:
            sections += inside
    return join([el("header", el("h1", _title(runs)), *_subtitle(runs)), *sections]), data


def numbers(runs: Sequence[Run]) -> dict[str, Any]:
    """The curves of some runs, as the page's script reads them; which charts show them is yet to be said."""
    return {"runs": [curves.numbers(r, CURVES // max(4, len(runs))) for r in runs], "charts": []}


def page(runs: Sequence[Run], faults: Sequence[str] = ()) -> str:
    """The whole page."""
    shown, data = body(runs, faults)
    head = [
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", f"{_title(runs)} · iddpm"),
        Html(f"<style>{asset('uplot.css')}\n{asset('page.css')}</style>"),
    ]
    foot = el("footer", f"Made by iddpm {iddpm.__version__}. This file is complete in itself and loads nothing.")
    held = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # so that no name ends the script
    scripts = [
        Html(f'<script type="application/json" id="data">{held}</script>'),
        Html(f"<script>/*\n{asset('uplot-LICENSE')}*/\n{asset('uplot.js')}</script><script>{asset('page.js')}</script>"),
    ]
    whole = el("body", el("main", shown, foot), *scripts)
    return f'<!doctype html>\n<html lang="en">{el("head", *head)}{whole}</html>\n'


def _one(run: Run, k: int, charts: list[dict[str, Any]], budget: int) -> list[Html]:
    """The sections of one run, the charts of which are added to those of the page."""
    own = curves.charts_of(run, k)
    seen, unseen = parts.look_at(run)
    found: list[Html | None] = [
        *(parts.warning(note) for note in run.notes),
        parts.tiles(run, seen),
        parts.findings(run, seen) if run.rows else None,
        _beside(parts.samples(run, budget // 2), parts.images(run, seen, unseen, budget // 4)),
        _section("How it went", *_charts(own, charts, controls=True), parts.remarks(run))
        if run.rows
        else parts.warning("No step is logged yet."),
        _section("Figures", *parts.figures(run, budget // 4), *_charts(curves.bits(run), charts)),
        parts.recipe(run),
        parts.card(run, seen),
    ]
    return [part for part in found if part]


def _compared(runs: Sequence[Run], charts: list[dict[str, Any]]) -> list[Html]:
    head, body = comparison.rows(runs)
    body = [[join([_dot(k), row[0]]), *map(value, row[1:])] for k, row in enumerate(body)]
    words = "The settings in which they differ come first, then how far they came. Losses are means over the last tenth of a run."
    each = PICTURES // 3 // len(runs)
    last = [(k, run, parts.newest(run, each)) for k, run in enumerate(runs)]
    shown = [el("figure", el("figcaption", _dot(k), run.name), sheet) for k, run, sheet in last if sheet]
    found = [
        _section("Side by side", el("p", words, class_="soft"), table(head, body, class_="wide")),
        _section("How they went", *_charts(curves.charts_together(runs), charts, controls=True)),
        _section("Newest samples", el("div", *shown, class_="lasts") if shown else None),
    ]
    return [part for part in found if part]


def _charts(own: Sequence[dict[str, Any]], charts: list[dict[str, Any]], controls: bool = False) -> list[Html]:
    """Where the page's script draws charts, with the choice of what lies along them."""
    if not own:
        return []
    boxes = [
        el("figure", el("figcaption", chart["title"]), el("div", class_="plot", data_chart=len(charts) + n), class_="chart")
        for n, chart in enumerate(own)
    ]
    charts += own
    choice = [
        el("button", name, type="button", data_x=key, aria_pressed="true" if key == "step" else "false")
        for key, name in (("step", "steps"), ("images", "images"), ("hours", "hours"))
    ]
    bar = (
        el("div", el("span", "against"), *choice, class_="choice", role="group", aria_label="what the charts lie against")
        if controls
        else None
    )
    none = el("noscript", el("p", "The charts need JavaScript; the same numbers are in progress.csv.", class_="soft"))
    return [join([bar, none]), el("div", *boxes, class_="charts")]


def _beside(*sections: Html | None) -> Html:
    return el("div", *sections, class_="beside")


def _section(title: str, *inside: Html | None) -> Html | None:
    held = [part for part in inside if part]
    return el("section", el("h2", title), *held) if held else None


def _title(runs: Sequence[Run]) -> str:
    return runs[0].name if len(runs) == 1 else f"{many(len(runs), 'run')} compared"


def _subtitle(runs: Sequence[Run]) -> list[Html]:
    return [el("p", parts.what(runs[0]), class_="soft")] if len(runs) == 1 else []


def _dot(k: int) -> Html:
    return el("i", class_=f"dot c{k % 8}")


def told_apart(runs: list[Run]) -> list[Run]:
    """Runs of the same name under as much of their paths as tells them apart; one that is given twice once."""
    unlike = list({run.path.resolve(): run for run in runs}.values())
    names = [run.name for run in unlike]
    return [replace(r, name="/".join(r.path.resolve().parts[-2:])) if names.count(r.name) > 1 else r for r in unlike]


@cache
def asset(name: str) -> str:
    """A file of the page."""
    return (resources.files("iddpm.look") / "page" / name).read_text("utf-8")
