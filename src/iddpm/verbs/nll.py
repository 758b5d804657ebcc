"""`iddpm nll`: bits per dimension of a data set."""

import json
import os
from pathlib import Path
from typing import Any

from iddpm.config import Measure, Sample, Which
from iddpm.errors import UserError
from iddpm.flags import Parser, Verb, make
from iddpm.verbs.common import beside, open_weights


def _parser(parser: Parser) -> None:
    parser.add_argument("run", help="a run's folder, one of its checkpoints, or a .safetensors file of weights")
    parser.add_argument("data", help="a folder of images")
    parser.add_fields(Measure)
    parser.add_fields(Sample, "The chain (of which solver and eta have no effect here)", inherited=True)
    parser.add_fields(Which)


def _nll(run: str, data: str, **given: Any) -> None:
    measure = make(Measure, given)
    weights, config, net, device, which = open_weights(run, given)
    from tqdm import tqdm

    from iddpm import build, evaluate
    from iddpm.config import image_size
    from iddpm.data import Images

    images = Images.open(
        data,
        image_size=image_size(config.model),
        channels=config.model.image_channels,
        labels=config.data.labels if config.model.class_cond else "none",
        classes=config.data.classes if config.model.class_cond else None,
    )
    if config.model.class_cond and images.labels is None:
        raise UserError(f"{data} has no classes, and this model was trained with them")
    print(images.describe())
    total = build.chain(config.diffusion, config.sample.sampling_steps).steps
    count = min(measure.num_samples or len(images), len(images))
    with tqdm(total=total * count, unit="term", unit_scale=True, disable=None) as bar:
        result = evaluate.bits_per_dim(
            config, net, images, device,
            num_samples=count, batch_size=which.batch_size, seed=measure.seed, say=bar.write, tick=bar.update,
        )  # fmt: skip
    about = dict(weights=str(weights.path), data=data, step=weights.about["step"], ema_rate=weights.about.get("ema_rate", 0))
    out = Path(measure.out) if measure.out else beside(weights.path) / "nll.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name("." + out.name)
    aside.write_text(json.dumps(about | result, indent=1))
    os.replace(aside, out)
    name = "bits/dim" if total == result["chain_steps"] else f"bits/dim, the bound of the chain respaced to {total} steps"
    error = f" +- {result['standard_error']:.3f}" if result["standard_error"] is not None else ""
    print(f"{result['bits_per_dim']:.4f}{error} {name} ({result['images']} images; prior {result['prior']:.5f}, "
          f"decoder {result['vb'][0]:.4f}); every term: {out}")  # fmt: skip


VERB = Verb(_nll, _parser, "RUN DATA", "bits per dimension of a data set, and every term of the bound")
