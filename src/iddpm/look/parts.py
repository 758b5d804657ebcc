"""The sections of a run's page."""

import json
import math

import numpy as np
import safetensors

from iddpm.config import is_chain
from iddpm.errors import UserError, reason
from iddpm.look import pictures
from iddpm.look.dataset import Seen, see
from iddpm.look.diagnosis import diagnose
from iddpm.look.html import Html, el, table
from iddpm.look.runs import Row, Run, command, number
from iddpm.sampling.sheets import grid
from iddpm.store.files import open_tensors, step_dirs
from iddpm.store.remote import remote
from iddpm.words import duration, many, rate

SHEETS = 24  # of the slider, at most
SHOWN = 60  # training images of the contact sheet
ROWS = 12  # classes that it names


def look_at(run: Run) -> tuple[Seen | None, str]:
    """The run's training images, or why they are not to be seen."""
    try:
        return see(run.config), ""
    except (OSError, ValueError) as e:  # also a path that can be none
        return None, reason(e)


def value(cell: object) -> str:
    """A number or setting as people read it."""
    if cell is None:
        return "–"
    if isinstance(cell, float):
        return f"{cell:,.4g}" if 1e-4 <= abs(cell) < 1e6 or not cell else f"{cell:.3g}"
    if isinstance(cell, (list, tuple)):
        return many(len(cell), "entry").replace("entrys", "entries")
    return f"{cell:,}" if isinstance(cell, int) and not isinstance(cell, bool) else str(cell)


def warning(text: str) -> Html:
    return el("p", text, class_="warning", role="alert")


def what(run: Run) -> str:
    """In a line, what was trained."""
    m = run.config.model
    colour = {1: "grey", 3: "colour", 4: "with transparency"}.get(m.image_channels, f"{m.image_channels} channels")
    sides = m.image_size if "x" in m.image_size else f"{m.image_size}x{m.image_size}"
    small = f" from {m.small_size}" if m.small_size else ""
    classes = f", {len(run.config.data.classes)} classes" if m.class_cond else ""
    task = run.config.task.help.capitalize()
    return f"{task}: {sides.replace('x', ' × ')} pixels{small}, {colour}{classes}"


def progress(run: Run) -> str:
    if not run.end:
        return f"step {run.step:,}"
    done = "finished" if run.step >= run.end else f"{run.step / run.end:.0%} done"
    return f"step {run.step:,} of {run.end:,}, {done}"


def tiles(run: Run, seen: Seen | None) -> Html | None:
    """The numbers that one looks for first."""
    found = [("step" if not run.end else f"of {run.end:,} steps", f"{run.step:,}")]
    if seen and run.images:
        times = run.images / seen.n
        found.append((f"images seen, each {times:,.{times < 100:d}f} times", f"{run.images:,}"))
    elif run.images:
        found.append(("images seen", f"{run.images:,}"))
    if run.step and (hours := float(run.hours(np.array([run.step]))[0])):
        found.append(("of training", duration(hours * 3600)))
        found.append(("images a second", rate(run.images / hours / 3600)))
    for name, words in (("loss", "loss"), ("val_loss", "held-out loss")):
        if len(values := run.column(name)[1]):
            found.append((words, f"{values[-max(1, len(values) // 10) :].mean():.4g}"))
    if count := parameters(run):
        found.append(("parameters", _short(count)))
    return el("dl", *(el("div", el("dt", words), el("dd", number)) for words, number in found), class_="tiles")


def parameters(run: Run) -> int:
    """How many numbers the newest weights hold, by their file's header; 0 where there are none that can be read."""
    folders = [] if remote(run.path) else step_dirs(run.path)
    try:
        file = open_tensors(folders[-1] / "weights.safetensors")
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except (IndexError, OSError, safetensors.SafetensorError):
        return 0


def _short(n: int) -> str:
    for unit, name in ((1e9, " bn"), (1e6, " M"), (1e3, " k")):
        if n >= unit:
            return f"{n / unit:.3g}{name}"
    return str(n)


def findings(run: Run, seen: Seen | None) -> Html:
    """What the rules of the diagnosis say."""
    said = diagnose(run, seen)
    items = [
        el("li", el("div", el("b", f.says), el("p", f.evidence, class_="soft"), el("p", "Change: ", el("code", f.change))))
        for f in said.findings.values()
    ]
    held = el("ol", *items, class_="findings") if items else el("p", "Nothing stands out.", class_="well")
    fine = el("li", el("b", "well: "), ", ".join(said.fine) or "nothing")
    unknown = [el("li", el("b", f"{name}: "), why) for name, why in said.unknown.items()]
    asked = f"{len(said.fine)} other checks found nothing" + (f", {len(unknown)} cannot tell" if unknown else "")
    more = el("details", el("summary", asked), el("ul", fine, *unknown))
    return el("section", el("h2", "Findings"), held, more)


def samples(run: Run, budget: int) -> Html | None:
    """A slider over the sheets of samples; those that are damaged are named."""
    shown, faults = list[tuple[int, Html]](), list[str]()
    chosen = pictures.evenly(run.sheets, SHEETS)
    for step, path in chosen:
        try:
            picture = pictures.read(path)
        except (OSError, UserError) as e:
            faults.append(reason(e))
            continue
        shown.append((step, pictures.image(picture, budget // len(chosen), f"samples at step {step}")))
    if not shown and not faults:
        return None
    last = len(shown) - 1
    frames = [el("div", image, class_="frame", hidden=k != last, data_step=f"{step:,}") for k, (step, image) in enumerate(shown)]
    slider = el("input", type="range", min=0, max=last, value=last, step=1, aria_label="step of the samples")
    told = el("output", f"step {shown[-1][0]:,}") if shown else None
    kind = "made of the same given images" if run.config.task.inputs else "of the same seeds, none chosen"
    words = f"Averaged weights, {run.config.sample.solver} in {run.config.sample.sampling_steps} steps, {kind}."
    moves = el("div", slider, told, class_="slide") if last > 0 else None
    return el(
        "section", el("h2", "Samples"), el("p", words, class_="soft"), *map(warning, faults), moves,
        el("div", *frames, class_="sheet"), class_="samples",
    )  # fmt: skip


def newest(run: Run, budget: int) -> Html | None:
    """The newest sheet of samples that can be read."""
    for _, path in reversed(run.sheets):
        try:
            return el("div", pictures.image(pictures.read(path), budget, f"the newest samples of {run.name}"), class_="frame")
        except (OSError, UserError):  # which is told where all of them are shown
            continue
    return None


def images(run: Run, seen: Seen | None, unseen: str, budget: int) -> Html | None:
    """What it was trained on."""
    if seen is None:
        return el("section", el("h2", "Training images"), el("p", f"Not shown: {unseen}.", class_="soft"))
    named = bool(seen.counts) and len(seen.classes) <= ROWS
    few = np.arange(min(SHOWN, len(seen.some)))
    if named:  # the same number of each class, as far as they were looked at
        own = [[k for k, y in enumerate(seen.labels) if y == c][: SHOWN // len(seen.classes)] for c in range(len(seen.classes))]
        few = np.array([k for ks in own for k in ks])
    labels = [seen.labels[k] for k in few] if named else []
    sheet = pictures.image(grid(seen.some[few], labels, seen.classes), budget, "some of the training images")
    facts = [f"{many(seen.n, 'image')} of {run.config.data.path}", f"classes: {seen.rule}"]
    if seen.counts:
        least, most = min(seen.counts.values()), max(seen.counts.values())
        facts.append(
            f"{len(seen.counts)} classes of {least:,} to {most:,} images" if least != most else f"{least:,} images a class"
        )
    if seen.doubles:
        facts.append(f"{seen.doubles:,} of {seen.compared:,} files repeat another byte by byte")
    caption = el("p", "; ".join(facts), ". Some of them, by chance:", class_="soft")
    return el("section", el("h2", "Training images"), caption, el("div", el("div", sheet, class_="frame"), class_="sheet"))


def figures(run: Run, budget: int) -> list[Html]:
    """What was measured, with n and what real images get in the place of samples, and the nearest real images."""
    found: list[Html] = []
    if run.figures:
        head = ("figure", "value", "real images in their place", "n", "against", "weights", "drawn by")
        found.append(table(head, map(_figure, run.figures), class_="figures"))
    near = run.path / "neighbours.png"
    if near.exists():
        with_words = el("p", "The samples that lie nearest to a real image, and their nearest real images.", class_="soft")
        try:
            sheet = pictures.image(pictures.read(near), budget, "samples and their nearest real images")
            found += [el("h3", "Nearest neighbours"), with_words, el("div", el("div", sheet, class_="frame"), class_="sheet")]
        except (OSError, UserError) as e:
            found.append(warning(reason(e)))
    if not found:
        found.append(
            el("p", "Nothing is measured yet: ", el("code", f"iddpm evaluate {run.path} --reference DATA"), class_="soft")
        )
    return found


def _figure(row: Row) -> list[object]:
    error = f" ± {row['error']:.2g}" if number(row.get("error")) else ""
    held = row["value"] if number(row.get("value")) else None
    floor = row.get("floor")
    real = f"{value(floor.get('value'))} (n {value(floor.get('n'))})" if isinstance(floor, dict) else "–"
    against = " ".join(str(row[k]) for k in ("reference",) if row.get(k))
    against += f" ({value(row['reference_n'])})" if number(row.get("reference_n")) else ""
    weights = f"step {value(row.get('checkpoint_step'))}, {f'average {rate}' if (rate := row.get('ema_rate')) else 'raw'}"
    way = f"{row.get('solver') or 'the bound'}, {value(row.get('steps'))} steps"
    return [row["name"], f"{value(held)}{error}", real, value(row.get("n")), against, weights, way]


def remarks(run: Run) -> Html | None:
    """What the log remarks, as on settings that were changed on the way."""
    lines = [el("li", el("b", f"step {step:,}: "), text) for step, text in run.events]
    return el("details", el("summary", many(len(lines), "remark")), el("ul", *lines)) if lines else None


def recipe(run: Run) -> Html:
    """The command and the config that make it again."""
    config = json.dumps(json.loads(run.config.to_json()), indent=1, ensure_ascii=False)
    return el(
        "section", el("h2", "To do it again"), el("pre", el("code", command(run.config, str(run.path)))),
        el("p", "Or from the config below, kept as a file: ", el("code", "iddpm train DATA --config config.json"), class_="soft"),
        el("details", el("summary", "config.json"), el("pre", el("code", config))),
    )  # fmt: skip


def card(run: Run, seen: Seen | None) -> Html:
    """What whoever gets the weights should know."""
    d, s, config = run.config.diffusion, run.config.sample, run.config
    chain = f", {d.diffusion_steps:,} steps" if is_chain(d) else ""
    variances = ", learned variances" if d.learn_sigma else ""
    learned = f"predicts {d.parametrization}{variances}; {d.objective_name} loss"
    method = f"{d.noise_schedule} schedule{chain}; {learned}; {d.schedule_sampler} law of t"
    source = f"{many(seen.n, 'image')} of {config.data.path}" if seen else config.data.path or "unknown"
    rows = [
        ("Model", what(run)),
        ("Method", method),
        ("Drawn by", f"{s.solver}, {s.sampling_steps} steps, averaged weights" if not config.task.classifies else "–"),
        ("Trained on", f"{source}; {progress(run)}, batches of {config.train.batch_size}"),
        ("Meant for", "images like those it was trained on, and for study; what it draws is made up and shows nothing that was."),
        ("Licence", "iddpm is under the MIT licence. The weights are their maker's, within the rights in the training images: "
                    "name a licence, and these images' source, before you hand them on."),
        ("Limits", el("ul", *(el("li", limit) for limit in _limits(run, seen)))),
    ]  # fmt: skip
    body = [el("div", el("dt", name), el("dd", text)) for name, text in rows]
    return el("section", el("h2", "Model card"), el("dl", *body, class_="card"))


def _limits(run: Run, seen: Seen | None) -> list[str]:
    limits = [
        "It knows what its training images show, in their proportions, with their faults and their bias; nothing filters it."
    ]
    if run.end and run.step < run.end:
        limits.append(f"It is not trained to the end: {progress(run)}.")
    if seen and seen.n < 1000:
        limits.append(f"{many(seen.n, 'image')} are few: it may give them back as they are.")
    names = [str(row["name"]) for row in run.figures]
    if not any(name.startswith("near copies") for name in names):
        asks = f"iddpm evaluate {run.path} --reference {run.config.data.path}"
        limits.append(f"Whether it copies training images is not measured: {asks}")
    if not names:
        limits.append("How good its images are is not measured.")
    elif few := min((row["n"] for row in run.figures if number(row.get("n")) and row["n"] < 1000), default=0):
        limits.append(f"Some figures are of {few} images: read them beside those of real images.")
    return limits
