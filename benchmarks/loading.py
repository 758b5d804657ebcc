"""Loading images: JPEGs beside other loaders (WebDataset's where installed); packed sets beside a step, and large ones."""

import argparse
import io
import json
import resource
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import machine, table
from PIL import Image

SIDE, ROWS = 64, 1 << 18  # of the images prepared; images of a part of the made set


def photo(k: int) -> bytes:
    """A smooth picture of 256 pixels with some grain, as a JPEG."""
    rng = np.random.default_rng(k)
    smooth = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).resize((256, 256), Image.Resampling.BICUBIC)
    grain = np.asarray(smooth, np.int16) + rng.integers(-12, 13, (256, 256, 3))
    file = io.BytesIO()
    Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=92)
    return file.getvalue()


def original(content: bytes) -> np.ndarray:
    """As improved-diffusion's loader prepares one: halved by boxes, bicubic, cut from the centre."""
    image = Image.open(io.BytesIO(content))
    image.load()
    while min(image.size) >= 2 * SIDE:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = SIDE / min(image.size)
    size = round(image.width * scale), round(image.height * scale)
    pixels = np.array(image.resize(size, Image.Resampling.BICUBIC).convert("RGB"))
    top, left = (pixels.shape[0] - SIDE) // 2, (pixels.shape[1] - SIDE) // 2
    return pixels[top : top + SIDE, left : left + SIDE].astype(np.float32) / 127.5 - 1


def decoding(root: Path, n: int, rounds: int) -> str:
    """Images a second of one core, in turns: ours from a folder, from shards and from a pack; the original's; WebDataset's."""
    from iddpm.data import Images
    from iddpm.data.pack import pack

    files = {f"{k:05d}": photo(k) for k in range(n)}
    (root / "folder").mkdir()
    for name, content in files.items():
        (root / "folder" / f"{name}.jpg").write_bytes(content)
    with tarfile.open(root / "set-0.tar", "w") as held:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{name}.jpg")
            info.size = len(content)
            held.addfile(info, io.BytesIO(content))
    pack(root / "folder", root / "pack", (SIDE, SIDE))

    def ours(place: Path) -> Callable[[], object]:
        data = Images.open(place, (SIDE, SIDE), cache_bytes=0)
        return lambda: [data.load(k) for k in range(n)]

    calls = {
        "ours, a folder": ours(root / "folder"),
        "ours, shards": ours(root / "set-*.tar"),
        "ours, packed": ours(root / "pack"),
        "the original's way": lambda: [original((root / "folder" / f"{name}.jpg").read_bytes()) for name in files],
    }
    try:
        import webdataset

        def theirs() -> object:
            pictures = webdataset.WebDataset(str(root / "set-0.tar"), shardshuffle=False).decode("pil").to_tuple("jpg")
            return [np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for (image,) in pictures]

        calls["WebDataset's, bicubic"] = theirs
    except ImportError:
        pass
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.process_time()  # of this core's work, whatever else the machine does
            call()
            seconds[name].append(time.process_time() - began)
    base = statistics.median(seconds["the original's way"])
    rows = [(name, f"{n / (took := statistics.median(all_)):.0f}", f"{base / took:.2f}") for name, all_ in seconds.items()]
    return table(("loader, one core", "images/s", "times the original's"), rows)


def large(root: Path, n: int) -> str:
    """Open a packed set of n images, made by rule: seconds and the memory that opening adds."""
    from iddpm.data import Images
    from iddpm.data.order import Order
    from iddpm.data.sources.pixels import INDEX

    side, rows = 8, -(-n // 38)
    for k in range(-(-n // rows)):
        shape = (min(rows, n - k * rows), side, side, 3)
        np.lib.format.open_memmap(root / f"part-{k:05d}.npy", "w+", np.uint8, shape).flush()  # a file of holes
    np.save(root / "labels.npy", np.arange(n) % 1000)
    parts = [[k, min(rows, n - k * rows)] for k in range(-(-n // rows))]
    index = dict(shape=[side, side, 3], parts=parts, classes=[f"c{k}" for k in range(1000)], rule="", sealed="x")
    (root / INDEX).write_text(json.dumps(index))
    memory, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    data = Images.open(root, (side, side), cache_bytes=0)
    opened = time.perf_counter() - began
    data.describe(), data.identity()
    told = time.perf_counter() - began
    added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    began = time.perf_counter()
    Order(n, 0).indices(10**9, 64)
    found = time.perf_counter() - began
    return (
        f"a packed set of {n:,} images: opened in {opened:.2f} s, described and identified after {told:.2f} s, "
        f"{added:.0f} MiB more; position 10^9 of its order found in {found:.2f} s"
    )


def packed(root: Path, rounds: int) -> str:
    """What the batches of a packed set cost beside the steps of the smallest preset, in turns: seconds of each, and the share."""
    import torch

    from iddpm.config import Config, check
    from iddpm.config.presets import recipes
    from iddpm.data.batches import make_batch, open_data, order_of
    from iddpm.data.pack import pack
    from iddpm.training.trial import timed

    rng = np.random.default_rng(0)
    for k in range(400):
        path = root / "photos" / str(k % 10) / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(path)
    pack(root / "photos", root / "pack", (8, 8), 1)
    settings = recipes("digits")[0] | dict(path=str(root / "pack"), cache_gb=0)  # read anew each time
    data, config = open_data(check(Config().updated(settings)))
    order, n = order_of(config, data), config.train.batch_size
    took: dict[str, list[float]] = {"a batch": [], "a step": []}
    for _ in range(rounds):
        began = time.perf_counter()
        batches = [make_batch(config, data, order, k, k * n) for k in range(20)]
        took["a batch"].append((time.perf_counter() - began) / len(batches))
        took["a step"].append(timed(config, torch.device("cpu"), iter(batches[:4]))[1])
    batch, step = (statistics.median(seconds) for seconds in took.values())
    return f"preset digits, packed: {1e3 * batch:.2f} ms for a batch of {n}, {1e3 * step:.0f} ms for a step: {batch / step:.1%}"


MEASURES: dict[str, Callable[[Path, argparse.Namespace], str]] = {
    "large": lambda root, args: large(root, args.entries),
    "packed": lambda root, args: packed(root, args.rounds),
    "decoding": lambda root, args: decoding(root, args.images, args.rounds),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200, help="JPEGs of 256 pixels [%(default)s]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--entries", type=int, default=10_000_000, help="of the large packed set [%(default)s]")
    parser.add_argument("--what", default=",".join(MEASURES))
    args = parser.parse_args(argv)
    print(machine())
    for what in args.what.split(","):
        with tempfile.TemporaryDirectory() as root:
            print(MEASURES[what](Path(root), args))


if __name__ == "__main__":
    sys.exit(main())
