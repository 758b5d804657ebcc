"""`iddpm sample`: draw images from a run."""

from pathlib import Path
from typing import Any

from iddpm.config import Draw, Sample, Which, fields_of, seed_list
from iddpm.errors import UserError
from iddpm.flags import Parser, Verb, make
from iddpm.verbs.common import beside, open_weights


def _parser(parser: Parser) -> None:
    parser.add_argument("run", help="a run's folder, one of its checkpoints, or a .safetensors file of weights")
    parser.add_fields(Draw)
    parser.add_fields(Sample, "How to draw them", inherited=True)
    parser.add_fields(Which)


def _sample(run: str, **given: Any) -> None:
    draw = make(Draw, given)
    if draw.seeds and draw.num_samples:
        raise UserError("--seeds and --num_samples both say how many: give one")
    seeds = seed_list(draw.seeds) if draw.seeds else None
    weights, config, net, device, which = open_weights(run, given)
    from tqdm import tqdm

    from iddpm import build, sample

    if seeds is None:
        shown = len([part for part in draw.labels.split(",") if part.strip()]) or config.model.num_classes
        seeds = list(range(draw.num_samples or (10 * shown if config.model.class_cond else 64)))
    job = sample.job(config, seeds, draw.labels)
    step, rate = weights.about["step"], weights.about.get("ema_rate", 0)
    identity = dict(
        weights=str(weights.path), step=step, ema_rate=rate, seeds=list(job.seeds), labels=list(job.labels),
        **{k: getattr(config.sample, k) for k in fields_of(Sample)},
    )  # fmt: skip
    out = Path(draw.out) if draw.out else beside(weights.path) / "samples" / f"sample_{step:08d}_{len(seeds)}.png"
    writer = sample.writer(out, config, job, identity)
    if writer.done:
        print(f"{writer.done} of {len(seeds)} images are there already")
    rest = sample.Job(job.seeds[writer.done :], job.labels[writer.done :])
    steps = build.chain(config.diffusion, config.sample.sampling_steps).steps
    batches = -(-len(rest.seeds) // which.batch_size)
    with tqdm(total=steps * batches, unit="step", desc=f"{len(rest.seeds)} images", disable=None) as bar:
        for batch in sample.images(config, net, rest, device, which.batch_size, bar.update):
            writer.write(batch)
    writer.close()
    whose = f"average {rate}" if rate else "raw weights"
    print(f"{len(seeds)} images of step {step} ({config.sample.solver}, {steps} steps, {whose}): {out}")


VERB = Verb(_sample, _parser, "RUN", "draw images from a run")
