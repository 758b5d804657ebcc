"""`iddpm nll`: bits per dimension of a data set, alone or against another run on the same images and noise."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iddpm.cli.flags import Parser, Verb
from iddpm.config import Config, Measure, Sample, Which, make, settings_of
from iddpm.errors import UserError
from iddpm.store.remote import place

if TYPE_CHECKING:
    from iddpm.data import Images
    from iddpm.diffusion.grid import Grid
    from iddpm.measure.bound import Bound
    from iddpm.sampling.open import Opened


def _parser(parser: Parser) -> None:
    parser.add_argument("run", help="a run's folder, one of its checkpoints, or a .safetensors file of weights")
    parser.add_argument("data", help="a folder of images")
    parser.add_fields(Measure)
    parser.add_fields(Sample, "The chain (of which solver and eta have no effect here)", inherited=True)
    parser.add_fields(Which, "Which weights (of both runs), and on what they run")


def _nll(run: str, data: str, **given: Any) -> None:
    measure, which = make(Measure, given), make(Which, given)
    _check_names(measure, given)
    from iddpm import build
    from iddpm.look import bounds as report
    from iddpm.measure import figures
    from iddpm.parallel import processes
    from iddpm.sampling.open import open_weights

    with processes.session(build.device(which.device)):
        changes = {k: v for k, v in given.items() if k in settings_of(Sample)}
        runs = [open_weights(place(source), which, changes) for source in (run, measure.against) if source]
        _check_networks(runs)
        chains = _chains(measure.curve, runs)
        name = "nll_curve.json" if measure.curve else "nll.json"
        out = place(measure.out) if measure.out else runs[0].home / name
        per_image = place(measure.per_image) if measure.per_image else None
        figures.read(out.parent / report.FIGURES)  # a file that is none of ours is refused now, not after hours
        images = [_open_images(opened.config, data, bool(per_image), measure.num_samples == 0) for opened in runs]
        leads = processes.rank() == 0
        if leads:
            print(images[0].describe() + _scaling(images[0]))
            for path in filter(None, (out, per_image)):
                path.parent.mkdir(parents=True, exist_ok=True)
        points: list[list[report.Measured]] = []
        states: list[Path] = []
        for spec, chain in chains.items():
            own = [out.with_name(f"{out.name}{spec}{end}.partial") for end in ("", ".against")]
            bounds = [_measure(o, grid, i, measure, p) for (o, grid), i, p in zip(chain, images, own)]
            points.append([report.Measured(o, i, bound) for (o, _), i, bound in zip(chain, images, bounds)])
            states += own
            if leads:
                report.say(points[-1], place(data), out)
        if leads:
            if measure.curve:
                report.write_curve(points, out, place(data))
            else:
                report.write(points[0], out, place(data), per_image)
            for path in states:
                path.unlink(missing_ok=True)


def _check_names(measure: Measure, given: dict[str, Any]) -> None:
    out, per_image = place(measure.out), place(measure.per_image)
    if measure.out and (out.suffix not in (".json", "") or out.is_dir()):
        raise UserError(f"--out {out}: the numbers are one file of JSON: give a name that ends in .json")
    if measure.per_image and (per_image.suffix not in (".csv", ".npz") or per_image.is_dir()):
        raise UserError(f"--per_image {per_image}: give a name that ends in .csv or .npz")
    if measure.curve and "sampling_steps" in given:
        raise UserError("--curve and --sampling_steps both say how many steps: give one")
    if measure.curve and measure.per_image:
        raise UserError("--per_image is of one chain, and --curve of several: give one")


def _chains(curve: str, runs: "list[Opened]") -> "dict[str, list[tuple[Opened, Grid]]]":
    """The runs on each chain of --curve, by what is added to the name of its state; on their own where that is empty.

    UserError where an entry is none of --sampling_steps, does not fit a run's chain, or repeats another.
    """
    from iddpm import build

    if not curve:
        return {"": [(opened, build.grid(opened.config)) for opened in runs]}
    chains: dict[str, list[tuple[Opened, Grid]]] = {}
    taken: list[dict[int, str]] = [{} for _ in runs]  # of each run: the entry that so many steps are of
    for spec in map(str.strip, curve.split(",")):
        if not spec:
            raise UserError(f"--curve {curve!r} has an empty entry: give it as 10,50,ddim100,all")
        chains[f".{spec}"] = []
        for opened, seen in zip(runs, taken):
            config = opened.config.updated({"sampling_steps": spec})
            try:
                grid = build.grid(config)
            except UserError as e:
                raise UserError(str(e).replace("--sampling_steps", f"--curve {curve}:", 1)) from None
            if grid.steps in seen:
                raise UserError(f"--curve {curve}: {seen[grid.steps]} and {spec} are both {grid.steps} steps: leave one out")
            seen[grid.steps] = spec
            chains[f".{spec}"].append((opened._replace(config=config), grid))
    return chains


def _check_networks(runs: "list[Opened]") -> None:
    """UserError where a run has no likelihood, or two of them cannot see the same images."""
    from iddpm.config import image_size

    for opened in runs:
        if opened.config.task.classifies:
            raise UserError(f"{opened.weights.path} is a classifier: bits/dim are those of a model of images")
    (size, channels), *others = [(image_size(o.config.model), o.config.model.image_channels) for o in runs]
    for other in others:
        if other != (size, channels):
            sizes = [f"{h}x{w} with {c} channels" for (h, w), c in ((size, channels), other)]
            raise UserError(f"--against: {runs[1].weights.path} models images of {sizes[1]}, and the run {sizes[0]}")


def _open_images(config: Config, path: str, every_class: bool, keep: bool) -> "Images":
    """The images with the classes of the run; for a run without classes, with the data's own where `every_class`.

    Nothing stands in for a broken file, whose likelihood nobody knows. `keep`: decode them all at once, as far as memory goes.
    """
    from iddpm.config import image_size
    from iddpm.data import Images

    m = config.model

    def open_with(labels: str, classes: tuple[str, ...] | None = None) -> Images:
        size, channels, cache = image_size(m), m.image_channels, (2 << 30) * keep
        return Images.open(path, size, channels, on_broken="fail", cache_bytes=cache, labels=labels, classes=classes)

    if m.class_cond:
        images = open_with(config.data.labels, config.data.classes or None)
        if images.labels is None:
            raise UserError(f"{path} has no classes, and this model was trained with them")
        return images if config.data.classes else _numbered(images, m.num_classes, path)
    if every_class:
        try:
            return open_with("auto")
        except UserError:  # labels that make no sense do not matter here; whatever else is wrong comes again
            pass
    return open_with("none")


def _scaling(images: "Images") -> str:
    """A remark where the first file has not the model's size: its likelihood is then that of what was made of it."""
    (width, height), wanted = images.picture(0).size, images.image_size
    if (height, width) == wanted:
        return ""
    return (
        f"\nthe first has {height}x{width} pixels, scaled to {wanted[0]}x{wanted[1]}: the bits/dim are those of the scaled images"
    )


def _numbered(images: "Images", known: int, path: str) -> "Images":
    """The labels for a model whose classes have numbers and no names: the numbers themselves, or the ranks of all its classes."""
    import numpy as np

    names = images.classes
    if all(name.isdecimal() for name in names):
        if beyond := [name for name in names if int(name) >= known]:
            raise UserError(f"{path} has the label {beyond[0]}, and this model knows 0 to {known - 1}")
        images.labels = np.array([int(name) for name in names], np.int64)[images.labels]
        images.classes = tuple(map(str, range(known)))
    elif len(names) != known:
        raise UserError(
            f"{path} has {len(names)} classes ({names[0]} ...), and this model knows {known} by number: "
            f"label the images 0 to {known - 1}"
        )
    return images


def _measure(opened: "Opened", grid: "Grid", images: "Images", measure: Measure, state: Path) -> "Bound":
    """The bound of a run's weights on the images, with a bar that shows what is left."""
    from tqdm import tqdm

    from iddpm.measure.bound import bits_per_dim
    from iddpm.parallel import processes

    n, which = min(measure.num_samples or len(images), len(images)), opened.which
    names = hashlib.sha256("\n".join(map(str, images.files)).encode()).hexdigest()
    identity = dict(weights=str(opened.weights.path), about=opened.weights.about, files=names, precision=which.precision)
    quiet = True if processes.rank() else None
    with tqdm(total=grid.steps * n, unit="term", unit_scale=True, disable=quiet) as bar:
        return bits_per_dim(
            opened.config, opened.net, images, opened.device,
            grid=grid, num_samples=n, batch_size=which.batch_size, seed=measure.seed,
            state=state, identity=identity, say=bar.write, tick=bar.update,
        )  # fmt: skip


VERB = Verb(_nll, _parser, "RUN DATA", "bits per dimension of a data set, and every term of the bound", resumes=True)
