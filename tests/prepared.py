"""What the pages assume to be there, in small: images made of handwritten digits, runs of two steps, files of other projects.

Each is made the first time that a page names it, in a folder from which pages take copies.
"""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

Command = Callable[[Path, str], None]  # runs a line of the shell in a folder

CLASSES = ("cat", "dog", "owl")
NETWORK = (
    "--image_size 8 --num_channels 32 --num_res_blocks 1 --channel_mult 1,2 --attention_resolutions 4 --num_head_channels 32 "
    "--batch_size 4 --num_workers 1 --sampling_steps 3"
)
MODEL = f"{NETWORK} --diffusion_steps 300 --noise_schedule cosine --class_cond True --class_dropout 0.1 --ema_power 0.05,0.10"
FLAGS = {  # as the original's pages have them set before
    "MODEL_FLAGS": "--image_size 16 --num_channels 32 --num_res_blocks 1",
    "DIFFUSION_FLAGS": "--diffusion_steps 8 --noise_schedule cosine",
    "TRAIN_FLAGS": "--lr 1e-4 --batch_size 4",
}


def digits() -> Iterator[Image.Image]:
    """Handwritten digits, coloured by what they show."""
    from sklearn.datasets import load_digits

    pixels, shown = load_digits(return_X_y=True)
    for image, digit in zip(pixels.reshape(-1, 8, 8, 1), shown):
        tint = np.array([255, 100 + 15 * digit, 255 - 20 * digit])
        yield Image.fromarray((image / 16 * tint).astype(np.uint8))


def folder(path: Path, count: int = 48, size: int = 8, first: int = 0, classes: tuple[str, ...] = CLASSES) -> None:
    """Images under names that are the same in every such folder, a folder for each class where there are some."""
    for k, image in enumerate(digits()):
        if first <= k < first + count:
            file = path / (classes[k % len(classes)] if classes else "") / f"{k:04d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            image.resize((size, size), Image.Resampling.BICUBIC).save(file)


def splits(path: Path) -> None:
    folder(path / "train")
    folder(path / "test", first=48)


def sketches(path: Path) -> None:
    folder(path)
    for file in path.rglob("*.png"):
        Image.open(file).convert("L").point(lambda level: 255 * (level > 127)).save(file)


def celeba(path: Path) -> None:
    folder(path / "img_align_celeba", classes=())
    files = sorted(file.name for file in path.rglob("*.png"))
    rows = [f"{name} {1 - 2 * (k % 2)} {1 - 2 * (k // 2 % 2)} 1" for k, name in enumerate(files)]
    (path / "list_attr_celeba.txt").write_text("\n".join([str(len(files)), "Male Smiling Young", *rows]) + "\n")


def samples(path: Path) -> None:
    np.savez(path, np.stack([np.asarray(image) for image, _ in zip(digits(), range(40))]))


def picture(path: Path) -> None:
    next(digits()).save(path)


def mask(path: Path) -> None:
    pixels = np.zeros((8, 8), np.uint8)
    pixels[2:6, 2:6] = 255
    Image.fromarray(pixels).save(path)


def inception(path: Path) -> None:
    import torch

    from inception_oracles import weights_by_rule
    from measure.extractors.test_inception import published

    with path.open("wb") as file:
        torch.save(weights_by_rule(published()), file)


def published(path: Path) -> None:
    """Of the shapes of the original's file, which cannot be fetched here."""
    import torch

    from iddpm.interop.openai.formats.published import PUBLISHED
    from interop.written import network

    row = PUBLISHED[path.stem]
    torch.save(network(row.flags, row.task, row.program).state_dict(), path)


def logs(path: Path) -> None:
    from interop.written import write

    flags = dict(image_size=16, num_channels=32, num_res_blocks=1, diffusion_steps=8, noise_schedule="cosine")
    write(path, 10000, 3, rates=(0.9999,), settings=flags)


def edm(path: Path) -> None:
    from interop import test_edm

    test_edm.written(path, test_edm.edm("ddpmpp"))


def edm2(path: Path) -> None:
    from interop import test_edm, test_edm2

    test_edm.written(path, test_edm2.edm2("plain"))


def of_wang(path: Path) -> None:
    import torch

    from interop import test_ddpm_pytorch

    torch.save(test_ddpm_pytorch.checkpoint(process="pred_v, sigmoid"), path)


def of_crowson(path: Path) -> None:
    from interop import test_k_diffusion

    test_k_diffusion.save(path, test_k_diffusion.checkpoint())


def scripts(path: Path) -> None:
    from interop.test_python_scripts import HEAD, SCRIPTS

    path.mkdir()
    (path / "image_train.py").write_text(HEAD + SCRIPTS["image_train"])


TRAINED = f"iddpm train my_photos --run {{}} --steps 2 {MODEL}"

# A name of the pages: a function of its path, or a line of the shell, that makes it; and what that line needs, by names in it.
MADE: dict[str, Callable[[Path], None] | str] = {
    **dict.fromkeys(("my_photos", "PHOTOS", "photos", "DATA", "D", "cifar_train"), folder),
    **dict.fromkeys(("my_other_photos", "held_out_photos", "TEST_SET", "TEST_PHOTOS"), lambda path: folder(path, first=48)),
    "OTHER_PHOTOS": lambda path: folder(path, first=48, size=16),
    "SMALL_PHOTOS": lambda path: folder(path, first=48),
    "cifar_test": lambda path: folder(path, first=48),
    "SKETCHES": sketches,
    "OTHER_SKETCHES": sketches,
    "TEST_SKETCHES": lambda path: folder(path, first=48),
    "animals": lambda path: folder(path, classes=("bird", "cat", "dog")),
    "celeba": celeba,
    "data/emoji": splits,
    "data/cifar10": splits,
    **dict.fromkeys(("photo.png", "a.png", "b.png"), picture),
    "mask.png": mask,
    "x.npz": samples,
    "samples.npz": samples,
    "FILE": inception,
    "cifar10_uncond_50M_500K.pt": published,
    "logs": logs,
    "edm-cifar10-32x32-uncond-vp.pkl": edm,
    "edm2-img64-s-1073741-0.075.pkl": edm2,
    "edm2-img64-xs-0134217-0.110.pkl": edm2,
    "results/model-100.pt": of_wang,
    "cifar10_00400000.pth": of_crowson,
    "scripts": scripts,
    **{name: TRAINED.format(name) for name in ("RUN", "runs/mine", "runs/mine16", "runs/b", "runs/c", "runs/digits")},
    "runs/cats": TRAINED.format("runs/cats").partition(" --class_cond")[0],
    "runs/a": f"{TRAINED.format('runs/a')} --lr 1e-3",
    "ddpm-cifar10-32": "iddpm export runs/cats --to diffusers --out ddpm-cifar10-32",
}


def named(text: str) -> list[str]:
    """Those of the names above that a text has as words, or as the beginning of a path."""
    return [name for name in MADE if re.search(rf"(?<![\w./-]){re.escape(name)}(?![\w.-])", text)]


def make(name: str, world: Path, command: Command) -> Path:
    """Where a thing lies, which is made if it is not there yet."""
    path, how = world / name, MADE[name]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(how, str):
            for needed in named(how):
                if needed != name:
                    make(needed, world, command)
            command(world, how)
        else:
            how(path)
    assert path.exists(), name
    return path


def bring(name: str, world: Path, page: Path, command: Command) -> None:
    """A thing into the folder of a page."""
    source, target = make(name, world, command), page / name
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copyfile(source, target)
