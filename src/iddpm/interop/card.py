"""A model card: the README.md beside weights that are written for others, in the form that Hugging Face shows."""

import iddpm
from iddpm.config import image_size, is_chain
from iddpm.sampling.open import beside
from iddpm.store.weights import Weights


def card(weights: Weights, library: str, use: str) -> str:
    """What the model is, by the config and the record of its weights; `use` tells how to draw with the files beside it."""
    c, about = weights.config, weights.about
    m, d = c.model, c.diffusion
    height, width = image_size(m)
    steps = f"{d.diffusion_steps} steps" if is_chain(d) else "continuous"
    average = f", average {about['ema_rate']}" if about.get("ema_rate") else ""
    classes = f", of {m.num_classes} classes" if m.class_cond else ""
    lines = [
        "---",
        f"library_name: {library}",
        *([f"tags: [{'class-conditional' if m.class_cond else 'unconditional'}-image-generation, diffusion]"] * c.task.draws),
        "---",
        "",
        f"# {beside(weights.path).name}",
        "",
        f"{c.task.help.capitalize()}: {width} x {height} pixels, {m.image_channels} channels{classes}, made by iddpm "
        f"{about.get('iddpm', iddpm.__version__)}.",
        "",
        "| | |",
        "|---|---|",
        f"| network | {m.network}, {sum(t.numel() for t in weights.tensors.values()):,} weights |",
        f"| schedule | {d.noise_schedule}, {steps} |",
        f"| predicts | {d.parametrization}{', and the variance' if d.learn_sigma else ''} |",
        f"| trained | {about.get('step', 0):,} steps, {about.get('images', 0):,} images{average} |",
    ]
    if m.class_cond and c.data.classes:
        lines.append(f"| classes | {', '.join(f'{k} {_cell(name)}' for k, name in enumerate(c.data.classes[:1000]))} |")
    if m.class_dropout:
        lines.append(f"| guidance | class {m.num_classes} stands for no class |")
    return "\n".join([*lines, "", use])


def _cell(text: str) -> str:
    """A name as it may stand in a table of Markdown."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
