"""Sources of images: names and bytes. What trains and what measures reads through the same ones, so that they cannot differ."""

from collections.abc import Callable
from pathlib import Path

from iddpm.data.sources.archive import ENDINGS, Archive
from iddpm.data.sources.folder import Folder
from iddpm.data.sources.pixels import INDEX, Pixels, arrays, batches, packed
from iddpm.data.sources.shards import Shards, matching
from iddpm.data.sources.source import Ranked, Source
from iddpm.data.sources.tables import Arrow, Lmdb, Parquet, parts
from iddpm.errors import UserError

__all__ = ["ENDINGS", "Archive", "Folder", "Pixels", "Ranked", "Source", "open_source"]


def open_source(path: Path) -> Source:
    """The images below a folder, of one file, or in any container that the tables below know; UserError where there are none."""
    if not path.exists():
        if shards := matching(path):
            return _several(path, shards)
        kinds = ", ".join(FILES)
        raise UserError(f"{path} does not exist: give a folder of images, a file ({kinds}) of them, or a pattern of such files")
    if not path.is_dir():
        opening = next((row for ending, row in FILES.items() if path.name.lower().endswith(ending)), Folder)
        return opening(path)
    for mark, row in FOLDERS.items():
        if (path / mark).is_file():
            return row(path)
    for pattern, several in SEVERAL.items():
        if (files := sorted(path.glob(pattern))) or (files := sorted((path / "data").glob(pattern))):
            return several(path, files)
    return Folder(path)


def _several(path: Path, files: list[Path]) -> Source:
    if missing := next((file for file in files if not file.exists()), None):
        raise UserError(f"{missing}, which {path.name} names, does not exist")
    several = next((row for pattern, row in SEVERAL.items() if all(file.match(pattern) for file in files)), None)
    if several is None:
        raise UserError(f"{path.name} names {files[0].name}: a pattern names {', '.join(SEVERAL)}")
    return several(path, files)


FILES: dict[str, Callable[[Path], Source]] = {
    **dict.fromkeys(ENDINGS, Archive), ".npz": arrays, ".npy": arrays, ".parquet": lambda path: Parquet(path, [path]),
    ".mdb": Lmdb, ".lmdb": Lmdb,
}  # fmt: skip
FOLDERS: dict[str, Callable[[Path], Source]] = {
    INDEX: packed, "state.json": Arrow, "dataset_dict.json": parts, "data.mdb": Lmdb,
}  # by a file in them  # fmt: skip
SEVERAL: dict[str, Callable[[Path, list[Path]], Source]] = {
    "*.tar": Shards, "*.tar.gz": Shards, "*.tgz": Shards, "*.parquet": Parquet, "train_data_batch_*.npz": batches,
}  # fmt: skip
