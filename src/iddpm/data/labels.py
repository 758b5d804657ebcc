"""Which class each image belongs to: from a label file, from folders, or from file names."""

import csv
import difflib
import io
import re
from collections.abc import Callable, Sequence
from pathlib import PurePath, PurePosixPath
from typing import Any
from unicodedata import normalize

import numpy as np

from iddpm.config import names
from iddpm.data.sources.source import ATTRIBUTE_FILES, LABEL_FILES, Ranked, Source, is_image
from iddpm.errors import UserError, readable
from iddpm.records import decode

Label = str | int
Found = tuple[list[Label] | Ranked | None, str]  # a label per image, or None where the rule does not apply; in words

KEYS = ("label", "cls", "class", "class_name")  # of a .json beside an image, in this order
ATTRIBUTES = "attributes:"  # before the names of columns, in the place of a rule
AUTO = ("file", "beside", "folder", "prefix")  # in this order
SPLITS = set("train training test testing val valid validation dev eval holdout held_out heldout".split())
CAMERAS = set(
    "img dsc dscn dscf dcim pxl vid mvimg pano burst screenshot photo image images picture pic frame scan file sample".split()
)


def label(source: Source, rule: str, classes: Sequence[str] | None = None) -> Found:
    """Labels by one rule, or under 'auto' by the first of `AUTO` that applies; and a sentence on which.

    Under 'auto', what is unlikely to be classes is left, with the reason in the sentence, unless all are among `classes`, a
    run's; 'any' is 'auto' without such doubts, for a model that needs labels and knows how many.
    """
    if rule == "none":
        return None, "none"
    if rule.startswith(ATTRIBUTES):
        return from_attributes(source, names(rule.removeprefix(ATTRIBUTES)))
    if rule not in ("auto", "any", *RULES):
        raise UserError(f"labels={rule!r} is not known: use one of auto, {', '.join(RULES)}, {ATTRIBUTES}NAME, none")
    if source.rows and rule in ("auto", "any", "file") and (told := source.labelled()) is not None:
        return told, "the table's own"
    below = "" if rule == "folder" else wrapper(source, classes, rule == "any")
    doubts = ""
    for key in (rule,) if rule in RULES else AUTO:
        found, words = RULES[key](source, below)
        if found is not None:
            assert not isinstance(found, Ranked)
            doubt = doubtful(key, found, words) if rule == "auto" and not set(map(str, found)) <= set(classes or ()) else ""
            if not doubt:
                return found, words
            doubts = doubts or doubt
        if rule in RULES:
            raise UserError(f"labels={rule!r} does not fit {source.path}: {words}; use auto or none")
    return None, f"none ({doubts})" if doubts else "none"


def wrapper(source: Source, classes: Sequence[str] | None = None, needed: bool = False) -> str:
    """The folders around all images, as a prefix of their names: "images/"; "" where there are none.

    A folder of a run's classes is none. Nor is, where a run's classes are known or labels `needed`, one with images right in it,
    which is told as a class that the run does not know. A label file names images from where it lies.
    """
    below = ""
    while not any(source.has(below + file) for file in LABEL_FILES):
        top, _, rest = source.names[0][len(below) :].partition("/")
        around = all(name.startswith(f"{below}{top}/") for name in source.names)
        if not (rest and around) or top in (classes or ()) or ((classes or needed) and "/" not in rest):
            break
        below += f"{top}/"
    return below


def splits(source: Source, names: Sequence[str]) -> dict[str, PurePath]:
    """What looks like parts of one set, to be kept apart, where there are several: folders, and files of tables or shards."""
    tops = () if source.rows else {name.partition("/")[0] for name in names}
    found: dict[str, PurePath] = {top: source.path / top for top in tops}
    for file in source.files:  # train-00000-of-00002.parquet
        word = re.split(r"[\W_]", file.name)[0]
        found[word] = file.with_name(f"{word}*{file.suffix}")
    parts = sorted(name for name in found if name.lower() in SPLITS)
    return {name: found[name] for name in parts} if len(parts) > 1 else {}


def doubtful(rule: str, found: list[Label], words: str) -> str:
    """Why labels are hardly classes; "" where they may be."""
    distinct = {str(value) for value in found}
    asked = f"--labels {rule} takes them as such"
    if rule in ("file", "beside"):
        return ""  # somebody wrote it
    if len(found) > 3 and len(distinct) == len(found):
        return f"{words} differ for every image, so they are hardly classes; {asked}"
    if rule == "folder" and {name.lower() for name in distinct} <= SPLITS:
        return f"the sub-folders {' and '.join(sorted(distinct))} look like splits, not classes; {asked}"
    if rule == "prefix":
        if odd := sorted(name for name in distinct if name.lower() in CAMERAS or re.fullmatch(r"\d{6,}", name)):
            return f"file names begin with {odd[0]}_ as a camera or a program makes them, so hardly with a class; {asked}"
        if len(distinct) == 1 and len(found) > 1:
            return f"all file names begin with {distinct.pop()}_, which is one class; {asked}"
    return ""


def from_file(source: Source, below: str) -> Found:
    """Labels of a labels.json, labels.csv or EDM's dataset.json; a file that says null means no labels."""
    file = next((below + name for name in LABEL_FILES if source.has(below + name)), None)
    if file is None:
        return None, f"there is no {' or '.join(LABEL_FILES)}"
    path = source.path / file
    pairs = read_pairs(str(path), source.read(file))
    if pairs is None:
        return [], f"none, says {path.name}"
    table: dict[str, Label] = {}
    for name, value in pairs:
        if type(value) not in (str, int) or value == "":
            raise UserError(f"{path} holds the label {value!r}: a label must be a text or a whole number")
        name = _plain(name)
        if table.setdefault(name, value) != value:
            raise UserError(f"{path} says {table[name]!r} and {value!r} of {name}: remove one")
    wanted = [_plain(name[len(below) :]) for name in source.names]
    missing = [name for name in wanted if name not in table]
    if missing:
        raise UserError(f"{path} has no label for {missing[0]} ({len(missing)} such): add or remove them")
    extra = len(table.keys() - set(wanted))
    return [table[name] for name in wanted], path.name + (f" ({extra} of its entries have no image)" if extra else "")


def from_attributes(source: Source, wanted: Sequence[str]) -> Found:
    """Some columns of a table of attributes as classes, of CelebA's form: "Male" where it is 1, "not_Male" where it is -1 or 0.

    Several are joined, as "Male+not_Smiling"; other values than these are classes of their own, as "Male=unsure".
    """
    folders = ["", *(source.names[0][: k + 1] for k, letter in enumerate(source.names[0]) if letter == "/")]
    file = next((folder + name for folder in folders for name in ATTRIBUTE_FILES if source.has(folder + name)), "")
    if not file:
        raise UserError(f"{source.path} holds no {' or '.join(ATTRIBUTE_FILES)}: put it beside the images, or give its folder")
    text, path = source.read(file).decode("utf-8-sig", "surrogateescape"), source.path / file
    with readable(path, "is no table"):
        rows = list(csv.reader(io.StringIO(text))) if file.endswith(".csv") else [line.split() for line in text.splitlines()]
    rows = [[cell.strip() for cell in row] for row in rows if row]
    rows = rows[1:] if rows and len(rows[0]) == 1 and rows[0][0].isdecimal() else rows  # CelebA's .txt begins with their number
    if len(rows) < 2 or len({len(row) for row in rows[1:]}) > 1 or not 0 <= len(rows[1]) - len(rows[0]) <= 1:
        raise UserError(f"{path} is no table: write a line of names, and for each image its name and a value for each")
    head = rows[0][len(rows[0]) - len(rows[1]) + 1 :]  # CelebA's .txt names no first column
    if unknown := next((name for name in wanted if name not in head), ""):
        near = difflib.get_close_matches(unknown, head, n=3, cutoff=0.4) or head[:10]
        raise UserError(f"{path} has no attribute {unknown!r}; near it are {', '.join(near)}")
    columns = [(name, 1 + head.index(name)) for name in wanted]
    words = {"1": "{}", "-1": "not_{}", "0": "not_{}"}
    table = dict[str, str]()
    for row in rows[1:]:
        parts = [words[row[k]].format(column) if row[k] in words else f"{column}={row[k]}" for column, k in columns]
        image, value = _plain(row[0]), "+".join(parts)
        if table.setdefault(image, value) != value:
            raise UserError(f"{path} says {table[image]} and {value} of {image}: remove one")
    folder, found = file[: file.rfind("/") + 1], list[Label]()
    for name in map(_plain, source.names):
        told = table.get(name[len(folder) :], table.get(name.rpartition("/")[2]))
        if told is None:
            raise UserError(f"{path} says nothing of {name}: add it, or take the image out")
        found.append(told)
    return found, f"{path.name}, {', '.join(wanted)}"


def _plain(name: str) -> str:
    """A name as label files and folders may write it differently: its separators, and the form of its accents."""
    return normalize("NFC", PurePosixPath(name.replace("\\", "/")).as_posix())


def read_pairs(path: str, content: bytes) -> list[tuple[str, Label]] | None:
    """(relative path, label) pairs of the content of a label file; None where it says that there are no labels."""
    try:
        wide = content[:2] in (b"\xff\xfe", b"\xfe\xff")  # as spreadsheets write "Unicode text"
        text = content.decode("utf-16") if wide else content.decode("utf-8-sig", "surrogateescape")  # as names on the disk are
        if path.endswith(".csv"):
            # the whole text, for a quoted name may hold a line's end
            rows = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
            head = [cell.strip().lower() for cell in rows.pop(0)] if rows and not is_image(rows[0][0].strip()) else []
            column = next((head.index(key) for key in KEYS if key in head), 1)  # a table of attributes may have one so called
            if head and len(head) > 2 and head[column] not in KEYS:
                raise ValueError(f"of its {len(head)} columns none is called {' or '.join(KEYS)}, so call the wanted one so")
            if head and not column:
                raise ValueError(
                    f"its first column is called {head[0]}, and the names of the files stand there: change them round"
                )
            columns = len(head) or 2
            if long := next((row for row in rows if any(row[columns:])), None):
                how = f"of {columns}" if head else "without a line that calls the wanted one label"
                raise ValueError(f"{','.join(long)!r} has {len(long)} columns {how}; quote a label with a comma in it")
            if short := next((row for row in rows if len(row) <= column), None):
                raise ValueError(f"{','.join(short)!r} has no comma before a label")
            pairs = [(row[0].strip(), row[column].strip()) for row in rows]
            if all(value.isdecimal() and str(int(value)) == value for _, value in pairs):
                return [(name, int(value)) for name, value in pairs]
            return list(pairs)
        held: Any = decode(text, object, path)
        if isinstance(held, dict) and "labels" in held:
            held = held["labels"]
        if held is None:
            return None
        return [(str(name), value) for name, value in (held.items() if isinstance(held, dict) else held)]
    except (ValueError, TypeError, IndexError, csv.Error) as error:
        raise UserError(f'{path}: {error}; write {{"a/b.png": "label"}} or lines of path,label, in UTF-8') from error


def from_beside(source: Source, below: str) -> Found:
    """WebDataset's rule: beside each image a .cls of its name, or a .json with one of `KEYS`."""
    stems = [name.rpartition("/")[0] + "/" * ("/" in name) + name.rpartition("/")[2].partition(".")[0] for name in source.names]
    ending = next((ending for ending in (".cls", ".json") if source.has(stems[0] + ending)), "")
    if not ending:
        return None, f"there is no .cls or .json beside {source.names[0]}"
    out, key = list[Label](), ""
    for stem in stems:
        file = source.path / (stem + ending)
        if not source.has(stem + ending):
            raise UserError(f"{file} is missing, and other images have one: add it, or take the image out")
        content = source.read(stem + ending)
        if ending == ".cls":
            value: Any = content.decode("utf-8", "surrogateescape").strip()
        else:
            held = decode(content, dict[str, Any], file)
            key = key or next((name for name in KEYS if name in held), "")
            if not key:
                return None, f"{file.name} says no {' or '.join(KEYS)}"
            value = held.get(key)
        if type(value) not in (str, int) or value == "":
            raise UserError(f"{file} holds the label {value!r}: a label must be a text or a whole number")
        out.append(value)
    if all(str(value).isdecimal() and str(int(value)) == str(value) for value in out):
        out = [int(value) for value in out]
    return out, f"the {ending} beside each image" + (f", {key}" if key else "")


def from_folder(source: Source, below: str) -> Found:
    """The first folder below the root, or below the folders around all images, if every image lies in one."""
    names = [name[len(below) :] for name in source.names]
    loose = next((name for name in names if "/" not in name), None)
    if loose is not None:
        return None, f"{below}{loose} lies in no sub-folder"
    return [name.split("/")[0] for name in names], f"sub-folder names{f' below {below}' * bool(below)}"


def from_prefix(source: Source, below: str) -> Found:
    """The file name before its first underscore, if every name has one (improved-diffusion's rule)."""
    stems = [PurePosixPath(name).name for name in source.names]
    bare = next((name for name in stems if not name.partition("_")[0] or "_" not in name), None)
    if bare is not None:
        return None, f"{bare} has no underscore" if "_" not in bare else f"{bare} has nothing before its underscore"
    return [stem.split("_")[0] for stem in stems], "file names before the first underscore"


def from_prefix_or_folder(source: Source, below: str) -> Found:
    """Prefixes if every file name has one, else sub-folders: what its users expect of the original's commands."""
    found, words = from_prefix(source, below)
    return (found, words) if found is not None else from_folder(source, below)


def number(found: list[Label] | Ranked, classes: Sequence[str] | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as int64 (N,) ranks among `classes`, or among their own sorted values; and the class names."""
    if isinstance(found, Ranked):
        ranks, known = number(found.values, classes)
        return ranks[found.ranks], known
    distinct = set(found)
    kind = int if all(isinstance(value, int) for value in distinct) else str
    known = tuple(classes or dict.fromkeys(map(str, sorted(distinct, key=kind))))  # 1 and "1" are one
    rank = {normalize("NFC", name): index for index, name in enumerate(known)}
    rank |= {name: index for index, name in enumerate(known)}
    own = {value: str(value) if str(value) in rank else normalize("NFC", str(value)) for value in distinct}
    if unknown := sorted(set(own.values()) - set(rank)):
        shown = ", ".join(known[:10]) + (", ..." if len(known) > 10 else "")
        raise UserError(f"class {unknown[0]!r} is not among the run's classes ({shown}): rename or remove it")
    return np.array([rank[own[value]] for value in found], np.int64), known


def chosen(
    found: list[Label] | Ranked | None, wanted: Sequence[str], source: Source, rule: str, strict: bool
) -> tuple[Ranked, np.ndarray]:
    """The labels of the wanted classes alone, and which images have them (n,); `strict`: each of the classes must be there."""
    if found is None or not len(found.ranks if isinstance(found, Ranked) else found):
        raise UserError(f"--only_classes: {source.path} has no classes ({rule}): put each in a sub-folder, or add labels.csv")
    values = found.values if isinstance(found, Ranked) else list(dict.fromkeys(found))
    rank = {value: k for k, value in enumerate(values)}
    ranks = found.ranks if isinstance(found, Ranked) else np.array([rank[v] for v in found])
    known = [normalize("NFC", str(value)) for value in values]
    forms = [normalize("NFC", name) for name in wanted]
    absent = [name for name in forms if name not in known]
    if absent and (strict or len(absent) == len(forms)):
        near = difflib.get_close_matches(absent[0], known, n=3, cutoff=0.5) or sorted(known)[:10]
        more = ", ..." if len(near) == 10 < len(known) else ""
        raise UserError(f"--only_classes {absent[0]}: {source.path} has no such class; there are {', '.join(near)}{more}")
    places = [k for k, name in enumerate(known) if name in forms]
    kept = np.flatnonzero(np.isin(ranks, places))
    return Ranked(np.searchsorted(places, ranks[kept]), [values[k] for k in places]), kept


RULES: dict[str, Callable[[Source, str], Found]] = {
    "file": from_file,
    "beside": from_beside,
    "folder": from_folder,
    "prefix": from_prefix,
    "original": from_prefix_or_folder,
}
