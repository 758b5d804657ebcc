"""Damage to the files of a run, of data and of samples, and what a verb then may and may not do."""

import contextlib
import hashlib
import io
import json
import shutil
import signal
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from conftest import flags
from iddpm.cli.main import main

SECONDS = 10  # after which a verb hangs
VALUES: list[Any] = [
    None, True, -1, 0, 10**9, 2**63, 10**400, -5, 1.5, 1e308, "", "x", "../../x", "/dev/zero", "inf", [], [1], [[]], {}, {"a": 1},
    "9" * 5000, "\ud800", "\x00",
]  # fmt: skip


class Hang(BaseException):
    """A verb took too long."""


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    def hang(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Room(NamedTuple):
    """A folder with a run, its data, samples, a reference, and beside them what no verb may touch."""

    root: Path

    def verbs(self) -> dict[str, list[object]]:
        run, few, out = self.root / "run", flags(num_samples=2, device="cpu"), self.root / "out"
        small = flags(sampling_steps=2)
        lite = flags(metrics="kd", device="cpu")
        return {
            "train": ["train", "--run", run, *flags(steps=5, device="cpu")],
            "train on the data": ["train", self.root / "data", "--run", run, *flags(steps=5, device="cpu")],
            "train anew": ["train", self.root / "data", "--run", self.root / "new", *flags(init_from=run, steps=1, device="cpu")],
            "sample": ["sample", run, "--out", out / "x.npz", *few, *small],
            "sample into a folder": ["sample", run, "--out", out / "pics", *few, *small],
            "nll": ["nll", run, self.root / "data", "--out", out / "nll.json", *few, *small],
            "evaluate": ["evaluate", self.root / "s.npz", "--reference", self.root / "data", "--out", out / "m.json", *lite],
            "evaluate a zip": [
                "evaluate", self.root / "data.zip", "--reference", self.root / "s.npz", "--out", out / "m.json", *lite,
            ],
            "export": ["export", run, "--out", out / "export"],
            "plan": ["plan", "--run", run],
        }  # fmt: skip

    def files(self) -> list[Path]:
        """What may be damaged."""
        kept = [p for p in sorted(self.root.rglob("*")) if p.is_file() and "out" not in p.parts and p.name != "precious.txt"]
        return [p for p in kept if not p.name.startswith(".lock")]

    def precious(self) -> str:
        """A digest of what lies outside of what verbs write."""
        digest = hashlib.sha256()
        for path in [self.root / "precious.txt", *sorted((self.root / "data").rglob("*"))]:
            if path.is_file() and ".iddpm" not in path.parts:
                digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()


def furnished(root: Path, run: Path, pictures: Path) -> Room:
    """A room whose every file is whole."""
    shutil.copytree(run, root / "run")
    shutil.copytree(pictures, root / "data")
    shutil.make_archive(str(root / "data"), "zip", root / "data")
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1), np.uint8)
    np.savez(root / "s.npz", pixels, np.arange(6) % 3)
    (root / "data" / "labels.csv").write_text(
        "".join(f"{p.relative_to(root / 'data').as_posix()},{p.parent.name}\n" for p in (root / "data").rglob("*.png"))
    )
    (root / "precious.txt").write_text("years of work")
    (root / "out").mkdir()
    return Room(root)


def spoil(path: Path, rng: np.random.Generator) -> str:
    """Damage a file in one of many ways; returns which."""
    ways: list[Callable[[Path, np.random.Generator], None]] = [_cut, _flip, _empty, _other, _deleted, _noise, _folder]
    if path.suffix in (".json", ".jsonl"):
        ways += [_field] * 8 + [_deep]
    if path.suffix == ".safetensors":
        ways += [_header] * 4
    if path.suffix == ".png":
        ways += [_claims]
    way = ways[int(rng.integers(len(ways)))]
    way(path, rng)
    return way.__name__


def _cut(path: Path, rng: np.random.Generator) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(rng.integers(len(content) + 1))])


def _flip(path: Path, rng: np.random.Generator) -> None:
    content = np.frombuffer(path.read_bytes(), np.uint8).copy()
    if len(content):
        at = rng.integers(0, len(content), int(rng.integers(1, 9)))
        content[at] = rng.integers(0, 256, len(at))
    path.write_bytes(content.tobytes())


def _empty(path: Path, rng: np.random.Generator) -> None:
    path.write_bytes(b"")


def _other(path: Path, rng: np.random.Generator) -> None:
    others = [b"[]", b"null", b"5", b"{}", b'"x"', b"\xff\xfe", b"\x00" * 100, b"PK\x03\x04", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe"]
    path.write_bytes(others[int(rng.integers(len(others)))])


def _deleted(path: Path, rng: np.random.Generator) -> None:
    path.unlink()


def _noise(path: Path, rng: np.random.Generator) -> None:
    path.write_bytes(rng.bytes(int(rng.integers(1, 5000))))


def _folder(path: Path, rng: np.random.Generator) -> None:
    path.unlink()
    path.mkdir()


def _deep(path: Path, rng: np.random.Generator) -> None:
    path.write_text("[" * 100_000)


def _changed(value: Any, rng: np.random.Generator) -> Any:
    """A value of JSON with one of its parts, at any depth, taken away or put in the place of another."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = keys[int(rng.integers(len(keys)))]
        made = value.copy()
        if isinstance(made, dict) and rng.random() < 0.15:
            del made[key]
        else:
            made[key] = _changed(value[key], rng)
        return made
    return VALUES[int(rng.integers(len(VALUES)))]


def _field(path: Path, rng: np.random.Generator) -> None:
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    at = int(rng.integers(len(lines)))
    lines[at] = json.dumps(_changed(json.loads(lines[at]), rng))
    path.write_text("\n".join(lines))
    if path.name == "state.json":  # so that the manifest does not tell already
        manifest = path.parents[1] / "manifest.json"
        held = json.loads(manifest.read_text())
        held["state/state.json"] = [path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()]
        manifest.write_text(json.dumps(held))


def _header(path: Path, rng: np.random.Generator) -> None:
    """Another header of a .safetensors file, which the manifest vouches for."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    about = header.get("__metadata__", {})
    if "config" in about and rng.random() < 0.6:
        name = "config" if rng.random() < 0.8 else "iddpm"
        about[name] = json.dumps(_changed(json.loads(about[name]), rng))
    else:
        header = _changed(header, rng)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    folder = path.parent.parent if path.parent.name == "state" else path.parent
    manifest = folder / "manifest.json"
    held = json.loads(manifest.read_text())
    held[path.relative_to(folder).as_posix()] = [path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()]
    manifest.write_text(json.dumps(held))


def _claims(path: Path, rng: np.random.Generator) -> None:
    """A PNG of few bytes that claims any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    width, height = (int(2 ** rng.integers(0, 31)) for _ in range(2))
    head = struct.pack(">IIBBBBB", width, height, 8, int(rng.choice([0, 2, 3, 4, 6])), 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def outcome(argv: list[object]) -> str:
    """What is wrong with how a verb took its input; "" where it worked, or was refused in one line."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with limited(SECONDS), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([str(a) for a in argv])
    except Hang:
        return f"took longer than {SECONDS} s"
    except BaseException as e:
        return f"{type(e).__name__}: {e}"
    lines = [line for line in err.getvalue().splitlines() if line.startswith("iddpm: ")]
    if code == 0:
        return ""
    if code != 2:
        return f"exit {code}: {err.getvalue()}"
    return "" if len(lines) == 1 else f"{len(lines)} lines: {err.getvalue()}"
