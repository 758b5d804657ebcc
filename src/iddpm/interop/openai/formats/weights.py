"""What the names and shapes of the original's weights tell of their network, and where flags contradict them."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from iddpm import build, fit
from iddpm.config import Config, Model, check, image_size, settings_of
from iddpm.config.tasks import TASKS
from iddpm.errors import UserError
from iddpm.interop.openai.formats.flags import KINDS, NETWORKS, PREFIXED, TWINS, line, plain, to_config
from iddpm.interop.openai.formats.published import PUBLISHED, Published
from iddpm.nn import attention_rates, channel_mult_for

Shapes = Mapping[str, tuple[int, ...]]  # by name, in the file's order


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def network_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a config's network, in its order; nothing is allocated."""
    with torch.device("meta"):
        return shapes_of(build.network(config).state_dict())


OTHERS = {  # parts of names by which the networks of others are known
    "down_blocks.": "diffusers: give its folder, with config.json",
    **dict.fromkeys(
        ("inner_model.", "u_net.d_blocks.", "patch_in.proj."),
        "k-diffusion: give the .pth of its train.py or the .safetensors of its convert_for_inference.py, with the config in it",
    ),
    "init_conv.": "denoising-diffusion-pytorch: give the whole file of its Trainer, which holds the noise levels besides",
    "map_layer0.": "EDM: give its .pkl, which holds the settings besides the weights",
}


def whose(names: Iterable[str]) -> str:
    """Of which other program's network these are the names, and what to do about it; "" where that is not known."""
    text = "\n".join(names)
    return next((kind for sign, kind in OTHERS.items() if sign in text), "")


class Told(NamedTuple):
    """What shapes tell: fields of a Config, and, in levels counted from the image's size, widths and attention."""

    fields: dict[str, Any]
    mult: tuple[float, ...]
    attention: tuple[int, ...]

    def at(self, side: int) -> dict[str, Any]:
        """The fields of a config for images whose shorter side has so many pixels."""
        sizes = ",".join(str(side // 2**level) for level in self.attention)
        mult = "" if self.mult == channel_mult_for(side) else ",".join(f"{m:g}" for m in self.mult)
        return self.fields | dict(attention_resolutions=sizes, channel_mult=mult)

    def usual_sizes(self) -> list[int]:
        """The sizes for which networks of these widths are usual."""
        return [side for side in (32, 64, 128, 256, 512) if channel_mult_for(side) == self.mult]


FIRST = (
    "time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.1.qkv.weight", "input_blocks.1.0.emb_layers.1.weight",
    "input_blocks.1.0.in_layers.2.weight",
)  # fmt: skip


def tell(shapes: Shapes, source: str) -> Told:
    """Read a network off its shapes; UserError where they are not those of one of the original's.

    Not to be seen are the number of heads, the order of attention's channels, and anything of the process.
    """
    for name, rank in dict(zip(FIRST, (2, 4, 3, 2, 4))).items():
        if len(shapes.get(name, ())) != rank or not all(shapes[name]):
            kind = f": it is of {kind}" if (kind := whose(shapes)) else f" of {rank} dimensions" * (name in shapes)
            raise UserError(f"{source} holds no network of improved- or guided-diffusion: it has no {name}{kind}")
    # The time is embedded in as many numbers as the first level has channels; all other widths are multiples of that.
    width, first = shapes["time_embed.0.weight"][1], shapes["input_blocks.0.0.weight"][1]
    depth, strided, levels = _levels(shapes, source)
    # With scale and shift, the embedding gives two numbers for each channel, else one.
    emb, out = shapes["input_blocks.1.0.emb_layers.1.weight"], shapes["input_blocks.1.0.in_layers.2.weight"]
    fields = dict(num_channels=width, num_res_blocks=depth, use_scale_shift_norm=emb[0] == 2 * out[0])
    if len(levels) > 1:  # a single level changes no size, either way
        fields["resblock_updown"] = not strided
    draws = any(k.startswith("output_blocks.") for k in shapes)
    fields |= _ends(shapes, first) if draws else _judge(shapes, first, len(levels))
    attention = tuple(k for k, level in enumerate(levels) if level.attention)
    return Told(fields, tuple(level.width / width for level in levels), attention)


class Block(NamedTuple):
    """A stage of the way down: the channels that come out, and what it has."""

    width: int
    attention: bool = False
    strided: bool = False  # a convolution that halves the size, and no residual block


def _levels(shapes: Shapes, source: str) -> tuple[int, bool, list[Block]]:
    """Residual blocks per level, whether strided convolutions part the levels, and a block of each.

    A level is `depth` residual blocks alike and, but for the last, a stage that halves the size. Where several depths fit, they
    are wide alike: then the fewest levels. Where residual blocks also double the size, the first stage of the way up that has
    two of them tells: a level ends there in one, beside its depth + 1 others.
    """
    numbered = {k.split(".")[1] for k in shapes if k.startswith("input_blocks.")}
    if numbered != set(map(str, range(len(numbered)))):  # before anything counts up to one of them
        last = len(numbered) - 1
        raise UserError(f"{source} holds no network of improved- or guided-diffusion: its input blocks are not 0 to {last}")
    blocks = []
    for k in range(1, len(numbered)):
        name = f"input_blocks.{k}"
        strided = shapes.get(f"{name}.0.op.weight")
        out = strided or shapes.get(f"{name}.0.in_layers.2.weight", (0,))
        blocks.append(Block(out[0], f"{name}.1.qkv.weight" in shapes, strided is not None))
    double = re.compile(r"output_blocks\.(\d+)\.[12]\.in_layers\.2\.weight$")
    doubling = [int(match[1]) for k in shapes if (match := double.match(k))]
    parted = any(block.strided for block in blocks)
    for depth in [min(doubling)] if doubling else range(len(blocks), 0, -1):
        found = [blocks[k : k + depth + 1] for k in range(0, len(blocks), depth + 1)]
        levels = [group[0] for group in found]
        whole = [[Block(x.width, x.attention)] * depth + [Block(x.width, False, parted)] for x in levels]
        whole[-1].pop()
        if found == whole:
            return depth, parted, levels
    raise UserError(f"{source} holds no network of improved- or guided-diffusion: its input blocks do not form levels")


def _ends(shapes: Shapes, first: int) -> dict[str, Any]:
    """What the first and the last convolution tell: channels, learned variance, a second image; and the classes."""
    last, rows = shapes.get("out.2.weight", (first,))[0], shapes.get("label_emb.weight", (0,))[0]
    # First twice the channels: a small image beside the noisy one. Last twice: a learned variance.
    # Where several numbers of channels fit, the more usual one is taken.
    usual = [c for c in (1, 3, 4, 2) if first in (c, 2 * c) and last in (c, 2 * c)]
    channels = usual[0] if usual else min(first, last)
    task = "enlarge" if usual and first == 2 * channels else "images"
    return dict(task=task, image_channels=channels, learn_sigma=last == 2 * channels, class_cond=rows > 0, num_classes=rows)


def _judge(shapes: Shapes, first: int, levels: int) -> dict[str, Any]:
    """What a classifier's last layers tell: its pool, its classes, and with attention the image's size."""
    fields: dict[str, Any] = dict(task="classify", image_channels=first, class_cond=True)
    if (place := shapes.get("out.2.positional_embedding")) is not None:
        # one position for each pixel of the smallest level, and one for their mean
        side = round((place[1] - 1) ** 0.5) * 2 ** (levels - 1)
        return fields | dict(classifier_pool="attention", image_size=str(side), num_classes=shapes["out.2.c_proj.bias"][0])
    if "out.2.bias" in shapes:
        return fields | dict(classifier_pool="spatial", num_classes=shapes["out.2.bias"][0])
    pool = "adaptive" if len(shapes.get("out.3.weight", ())) == 4 else "spatial_v2"
    return fields | dict(classifier_pool=pool, num_classes=shapes.get("out.3.bias", (0,))[0])


# ---- do they fit a config?

SHOWN = (  # told by shapes and set by flags, in the order in which a contradiction is best understood
    "image_channels", "num_channels", "num_res_blocks", "channel_mult", "attention_resolutions", "learn_sigma", "class_cond",
    "use_scale_shift_norm", "resblock_updown", "classifier_pool", "image_size",
)  # fmt: skip


def check_fit(shapes: Shapes, config: Config, source: str) -> None:
    """Raise UserError where tensors are not those of a config's network: the first three, and the flags that would fit."""
    wanted = network_shapes(config)
    faults = [
        f"{name} is {_text(shapes[name])}, not {_text(shape)}" if name in shapes else f"{name} is missing"
        for name, shape in wanted.items() if shapes.get(name) != shape
    ]  # fmt: skip
    faults += [f"{name} {_text(shape)} is not of that network" for name, shape in shapes.items() if name not in wanted]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        needs = ", ".join(cures(tell(shapes, source), config)) or "another program: its shapes are those of no flags"
        raise UserError(f"{source} does not fit the flags: {'; '.join(faults[:3])}{more}. It needs {needs}")


def _text(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))})"


def cures(told: Told, config: Config) -> list[str]:
    """The flags that a config would need to have the network that was told; none where it has it."""
    m, task = config.model, told.fields["task"]
    if task != m.task:
        return [f"--task {task}, for it is {KINDS[task].words}, not {KINDS[m.task].words}"]
    side = min(image_size(m))
    try:
        rates = attention_rates(plain(config)["attention_resolutions"], side, len(told.mult))
    except ValueError:
        rates = (0,)  # which no level has
    has = config.flat() | {"channel_mult": plain(config)["channel_mult"], "attention_resolutions": rates}
    is_ = told.at(side) | {"channel_mult": told.mult, "attention_resolutions": tuple(2**level for level in told.attention)}
    different = [name for name in SHOWN if name in is_ and is_[name] != has[name]]
    found = []
    for name in different:
        shown = PREFIXED.get(name, name) if config.task.classifies else name
        if name == "channel_mult":
            mult = f"--channel_mult {','.join(f'{x:g}' for x in told.mult)}"
            usual = [f"--{KINDS[task].size} {s}" for s in told.usual_sizes()]
            found.append(f"{' or '.join(usual)} (or {mult})" if usual else mult)
        elif name != "attention_resolutions":
            found.append(f"--{shown} {is_[name]}")
        elif "channel_mult" not in different:  # else the size is in doubt, and with it where the levels are
            found.append(f"--{shown} {told.at(side)[name] or 'none'}")
    if told.fields["num_classes"] != m.num_classes and "class_cond" not in different:
        found.append(f"a network of {told.fields['num_classes']} classes, not {m.num_classes}")
    return found


# ---- the config of a file: what its shapes tell, and what a user says of the rest

SIGNS = ("num_head_channels", "channel_mult", "use_new_attention_order", "new_attention_order")  # of guided-diffusion
ALONE = ("image_channels", "num_classes", "channel_mult")  # what no flag of the original's always says


class Settled(NamedTuple):
    """The config of a file, what of it neither its shapes nor the user told, and the published files of the same shapes."""

    config: Config
    program: str
    assumed: dict[str, Any]  # by the original's names
    alike: list[str]


def settle(shapes: Shapes, given: Mapping[str, Any], source: str, published: str = "") -> Settled:
    """The config of weights: of a published file, or told by shapes and `given` flags, the original's and ours alike.

    What neither tells has the program's default. UserError where flags and shapes contradict each other, and where there is
    nothing to go by for the image size, the chain's length or its schedule.
    """
    told = tell(shapes, source)
    task = TASKS[told.fields["task"]]
    if twice := [(k, v) for k, v in TWINS.items() if k in given and v in given]:
        raise UserError(f"--{twice[0][0]} and --{twice[0][1]} say the same in two ways: give one")
    if published:  # its row says all; flags given beside it win, and are checked against the shapes below
        row = row_of(published)
        program, assumed = row.program, {}
        config = to_config(row.task, row.flags | dict(given), program)
    else:
        guided = task.classifies or told.fields.get("resblock_updown") or any(m % 1 for m in told.mult)
        guided = guided or any(given.get(k) not in (None, False, -1, "") for k in SIGNS)
        program = "guided" if guided else "improved"
        size = given.get("large_size") or given.get("image_size") or told.fields.get("image_size")
        wanted = ["small_size"] * task.enlarges + ["diffusion_steps", "noise_schedule"]
        missing = [name for name in wanted + ["low_res_noise"] * ("level_embed.0.weight" in shapes) if name not in given]
        if not size or missing:
            raise UserError(_question(told, program, missing if size else [KINDS[told.fields["task"]].size, *missing], source))
        fields = told.at(min(image_size(Model(image_size=str(size)))))
        named = {PREFIXED.get(k, k): v for k, v in fields.items()} if task.classifies else fields
        config = to_config(told.fields["task"], named | dict(given), program)
        config = config.updated({k: v for k, v in fields.items() if k in ALONE and k not in given})
        assumed = {k: v for k, v in _assumed(told, config, program).items() if k not in given and TWINS.get(k) not in given}
    void = ("learn_sigma",) if task.classifies else ()  # a classifier's recipes pass it, to no effect
    # Our own flags last: they say what the original's cannot.
    ours = settings_of(*config.parts)
    config = config.updated({k: v for k, v in given.items() if k in ours and k not in void})
    check_fit(shapes, config, source)
    return Settled(fit.require_fit(check(config)), program, assumed, [] if published else alike(told))


def row_of(published: str) -> Published:
    """The row of a published file, named with or without .pt."""
    name = published.removesuffix(".pt")
    if name not in PUBLISHED:
        near = difflib.get_close_matches(name, PUBLISHED, n=1)
        raise UserError(f"--published {name}: " + (f"did you mean {near[0]}?" if near else f"one of {', '.join(PUBLISHED)}"))
    return PUBLISHED[name]


def alike(told: Told) -> list[str]:
    """The published files whose networks have these shapes."""
    return [name for name, row in PUBLISHED.items() if not cures(told, row.config())]


def _question(told: Told, program: str, missing: list[str], source: str) -> str:
    """What to ask for, with all that helps to answer."""
    kind, sizes, names_alike = KINDS[told.fields["task"]], told.usual_sizes(), alike(told)
    seen = ", ".join(f"{k} {told.fields[k]}" for k in SHOWN if told.fields.get(k))
    names = [f"--{name}" for name in missing]
    if missing[0] == kind.size and sizes:
        names[0] += f" ({' or '.join(map(str, sizes))}, by its widths)"
    rest = line(_assumed(told, None, program), {})
    taken = f" (what else they do not tell is taken to be as by default in {program}-diffusion: {rest})" if rest else ""
    rows = f", or, if it is the published file, --published {' or '.join(names_alike)}" if names_alike else ""
    return f"{source} is {kind.words} ({seen}); its shapes do not tell {', '.join(names)}: give these{taken}{rows}"


def _assumed(told: Told, config: Config | None, program: str) -> dict[str, Any]:
    """What shapes cannot tell, of the network and the process, and its default; with a config, only what matters there."""
    if TASKS[told.fields["task"]].classifies:
        return {}
    matters = dict(
        num_heads=config is None or config.model.num_head_channels <= 0,
        num_head_channels=True,
        use_new_attention_order=True,
        predict_xstart=True,
        rescale_timesteps=config is None or config.diffusion.diffusion_steps != 1000,  # there the network sees the same times
        sigma_small=not told.fields["learn_sigma"],
    )
    defaults = NETWORKS[program][told.fields["task"]]
    return {name: defaults[name] for name, does in matters.items() if does and name in defaults}
