"""`iddpm nll`: bits per dimension of a data set, alone or against another run on the same images and noise."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from iddpm.config import Config, Measure, Sample, Which
from iddpm.errors import UserError
from iddpm.flags import Parser, Verb, make
from iddpm.places import place
from iddpm.verbs.common import Opened, beside, open_weights

if TYPE_CHECKING:
    import torch

    from iddpm.data import Images
    from iddpm.nll import Bound
    from iddpm.plot import Curve


class Measured(NamedTuple):
    """What was measured of one run."""

    opened: Opened
    images: "Images"
    bound: "Bound"


def _parser(parser: Parser) -> None:
    parser.add_argument("run", help="a run's folder, one of its checkpoints, or a .safetensors file of weights")
    parser.add_argument("data", help="a folder of images")
    parser.add_fields(Measure)
    parser.add_fields(Sample, "The chain (of which solver and eta have no effect here)", inherited=True)
    parser.add_fields(Which, "Which weights (of both runs), and on what they run")


def _nll(run: str, data: str, **given: Any) -> None:
    measure, which = make(Measure, given), make(Which, given)
    _check_names(measure)
    from iddpm import build, distributed

    with distributed.session(build.device(which.device)) as device:
        given = {**given, "device": str(device)}
        runs = [open_weights(source, given) for source in (run, measure.against) if source]
        _check_networks(runs)
        out = place(measure.out) if measure.out else beside(runs[0].weights.path) / "nll.json"
        every_class = bool(measure.per_image)
        images = [_open_images(opened.config, data, every_class, measure.num_samples == 0) for opened in runs]
        states = [out.with_name(out.name + end) for end in (".partial", ".against.partial")]
        leads = distributed.rank() == 0
        if leads:
            print(images[0].describe() + _scaling(images[0]))
            for path in filter(None, (out, place(measure.per_image) if measure.per_image else None)):
                path.parent.mkdir(parents=True, exist_ok=True)
        done = [Measured(o, i, _measure(o, i, measure, device, p, leads)) for o, i, p in zip(runs, images, states)]
        if leads:
            _write(done, out, data, measure.per_image)
            for path in states:
                path.unlink(missing_ok=True)


def _check_names(measure: Measure) -> None:
    out, per_image = place(measure.out), place(measure.per_image)
    if measure.out and (out.suffix not in (".json", "") or out.is_dir()):
        raise UserError(f"--out {out}: the numbers are one file of JSON: give a name that ends in .json")
    if measure.per_image and (per_image.suffix not in (".csv", ".npz") or per_image.is_dir()):
        raise UserError(f"--per_image {per_image}: give a name that ends in .csv or .npz")


def _check_networks(runs: list[Opened]) -> None:
    """UserError where a run has no likelihood, or two of them cannot see the same images."""
    from iddpm.config import image_size

    for opened in runs:
        if opened.config.model.network == "classifier":
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
    from iddpm.data import decode

    (width, height), wanted = decode(images.files[0], images.channels).size, images.image_size
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


def _measure(opened: Opened, images: "Images", measure: Measure, device: "torch.device", state: Path, leads: bool) -> "Bound":
    from tqdm import tqdm

    from iddpm import build, nll

    config, n = opened.config, min(measure.num_samples or len(images), len(images))
    total = build.chain(config.diffusion, config.sample.sampling_steps).steps
    names = hashlib.sha256("\n".join(map(str, images.files)).encode()).hexdigest()
    identity = dict(weights=str(opened.weights.path), about=opened.weights.about, files=names, precision=opened.which.precision)
    with tqdm(total=total * n, unit="term", unit_scale=True, disable=None if leads else True) as bar:
        return nll.measure(
            config, opened.net, images, device,
            num_samples=n, batch_size=opened.which.batch_size, seed=measure.seed,
            state=state, identity=identity, say=bar.write, tick=bar.update,
        )  # fmt: skip


def _write(done: list[Measured], out: Path, data: str, per_image: str) -> None:
    """All the files, and the lines that say what they hold."""
    from iddpm import nll, plot

    main, other = done[0], done[1] if len(done) > 1 else None
    numbers, note = dict(_about(main), data=data, **nll.summary(main.bound)), ""
    for m in done:
        print(_line(m))
    if other:
        mean, error = nll.mean_and_error(main.bound.total - other.bound.total)
        summary = {k: v for k, v in nll.summary(other.bound).items() if not isinstance(v, list)}
        numbers["against"] = {**_about(other), **summary, "difference": mean, "difference_error": error}
        note = f"difference {mean:+.4f}{_margin(error)} bits/dim"
        print(f"{note} (paired: the same images and noise; negative where {_name(main)} is better)")
    nll.replace(out, lambda file: file.write(json.dumps(numbers, indent=1).encode()))
    tables = nll.write_tables(main.bound, out.parent, "" if out.stem == "nll" else f"{out.stem}_")
    picture, where = out.with_suffix(".svg"), "/".join(place(data).resolve().parts[-2:])
    title = f"{where}: {len(main.bound.total)} images{_respaced(main.bound)}".replace("the bound of the ", "")
    svg = plot.bound([_curve(m) for m in done], title, note.replace("+-", "±"))
    nll.replace(picture, lambda file: file.write(svg.encode()))
    if per_image:
        against = other.bound if other else None
        nll.write_per_image(place(per_image), main.bound, main.images, place(data), against)
        print(f"each image: {per_image}")
    print(f"every term: {out}, {', '.join(p.name for p in tables)}; picture: {picture}")


def _curve(m: Measured) -> "Curve":
    from iddpm.nll import mean_and_error
    from iddpm.plot import Curve

    b = m.bound
    return Curve(_name(m), b.kept, b.mean["vb"], b.error["vb"], float(b.prior.mean()), *mean_and_error(b.total))


def _about(m: Measured) -> dict[str, Any]:
    weights = m.opened.weights
    return dict(weights=str(weights.path), step=weights.about["step"], ema_rate=weights.about.get("ema_rate", 0))


def _name(m: Measured) -> str:
    about = m.opened.weights.about
    rate = about.get("ema_rate", 0)
    return (
        f"{beside(m.opened.weights.path).resolve().name} (step {about['step']}, {f'average {rate}' if rate else 'raw weights'})"
    )


def _margin(error: float | None, form: str = ".4f") -> str:
    return f" +- {error:{form}}" if error is not None else ""


def _line(m: Measured) -> str:
    from iddpm.nll import mean_and_error

    (total, error), (prior, prior_error), (decoder, decoder_error) = map(
        mean_and_error, (m.bound.total, m.bound.prior, m.bound.decoder)
    )
    parts = f"prior {prior:.2g}{_margin(prior_error, '.1g')}, decoder {decoder:.4f}{_margin(decoder_error)}"
    return f"{_name(m)}: {total:.4f}{_margin(error)} bits/dim{_respaced(m.bound)} ({len(m.bound.total)} images; {parts})"


def _respaced(bound: "Bound") -> str:
    steps = len(bound.kept)
    return f", the bound of the chain respaced to {steps} steps" if steps < bound.schedule_steps else ""


VERB = Verb(_nll, _parser, "RUN DATA", "bits per dimension of a data set, and every term of the bound")
