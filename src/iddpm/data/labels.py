"""Which class each image belongs to: from a label file, from folders, or from file names."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from iddpm.data.sources.source import LABEL_FILES, Source
from iddpm.errors import UserError

Label = str | int
Found = tuple[list[Label] | None, str]  # a label per image, or None where the rule does not apply; in words


def label(source: Source, names: list[str], rule: str) -> Found:
    """Labels by one rule, or under 'auto' by the first of `RULES` that applies; and a sentence on which."""
    if rule == "none":
        return None, "none"
    if rule not in ("auto", *RULES):
        raise UserError(f"labels={rule!r} is not known: use one of auto, {', '.join(RULES)}, none")
    for key in RULES if rule == "auto" else (rule,):
        found, words = RULES[key](source, names)
        if found is not None:
            return found, words
        if rule != "auto":
            raise UserError(f"labels={rule!r} does not fit {source.path}: {words}; use auto or none")
    return None, "none"


def from_file(source: Source, names: list[str]) -> Found:
    """Labels of a labels.json, labels.csv or EDM's dataset.json; a file that says null means no labels."""
    file = next((name for name in LABEL_FILES if source.has(name)), None)
    if file is None:
        return None, f"there is no {' or '.join(LABEL_FILES)}"
    path = source.path / file
    pairs = read_pairs(path, source.read(file))
    if pairs is None:
        return [], f"none, says {path.name}"
    table = {PurePosixPath(str(name).replace("\\", "/")).as_posix(): value for name, value in pairs}
    missing = [name for name in names if name not in table]
    if missing:
        raise UserError(f"{path} has no label for {missing[0]} ({len(missing)} such): add or remove them")
    labels = [table[name] for name in names]
    odd = next((value for value in labels if type(value) not in (str, int)), None)
    if odd is not None:
        raise UserError(f"{path} holds the label {odd!r}: a label must be a text or a whole number")
    extra = len(table) - len(labels)
    return labels, path.name + (f" ({extra} of its entries have no image)" if extra else "")


def read_pairs(path: Path, content: bytes) -> list[tuple[str, Label]] | None:
    """(relative path, label) pairs of the content of a label file; None where it says that there are no labels."""
    try:
        text = content.decode("utf-8-sig")
        if path.suffix == ".csv":
            pairs = [(row[0].strip(), row[1].strip()) for row in csv.reader(text.splitlines()) if row]
            if pairs and not PurePosixPath(pairs[0][0]).suffix:
                pairs = pairs[1:]  # the header
            if all(value.isdecimal() and str(int(value)) == value for _, value in pairs):
                return [(name, int(value)) for name, value in pairs]
            return list(pairs)
        held = json.loads(text)
        if isinstance(held, dict) and "labels" in held:
            held = held["labels"]
        return None if held is None else [(name, value) for name, value in dict(held).items()]
    except UserError:
        raise
    except (OSError, ValueError, TypeError, IndexError) as error:
        raise UserError(f'{path}: {error}; write {{"a/b.png": "label"}} or lines of path,label') from error


def from_folder(source: Source, names: list[str]) -> Found:
    """The first folder below the root, if every image lies in one."""
    loose = next((name for name in names if "/" not in name), None)
    if loose is not None:
        return None, f"{loose} lies in no sub-folder"
    return [name.split("/")[0] for name in names], "sub-folder names"


def from_prefix(source: Source, names: list[str]) -> Found:
    """The file name before its first underscore, if every name has one (improved-diffusion's rule)."""
    stems = [PurePosixPath(name).name for name in names]
    bare = next((name for name in stems if "_" not in name), None)
    if bare is not None:
        return None, f"{bare} has no underscore"
    return [stem.split("_")[0] for stem in stems], "file names before the first underscore"


def from_prefix_or_folder(source: Source, names: list[str]) -> Found:
    """Prefixes if every file name has one, else sub-folders: what its users expect of the original's commands."""
    found, words = from_prefix(source, names)
    return (found, words) if found is not None else from_folder(source, names)


def number(found: list[Label], classes: Sequence[str] | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as int64 (N,) ranks among `classes`, or among their own sorted values; and the class names."""
    distinct = set(found)
    if classes:
        known = tuple(classes)
    elif all(isinstance(value, int) for value in distinct):
        known = tuple(str(value) for value in sorted(distinct, key=int))
    else:
        known = tuple(sorted({str(value) for value in distinct}))
    rank = {name: index for index, name in enumerate(known)}
    unknown = sorted({str(value) for value in distinct} - set(rank))
    if unknown:
        shown = ", ".join(known[:10]) + (", ..." if len(known) > 10 else "")
        raise UserError(f"class {unknown[0]!r} is not among the run's classes ({shown}): rename or remove it")
    return np.array([rank[str(value)] for value in found], np.int64), known


RULES: dict[str, Callable[[Source, list[str]], Found]] = {
    "file": from_file,
    "folder": from_folder,
    "prefix": from_prefix,
    "original": from_prefix_or_folder,
}
