"""Steps of recipes/digits-outlines.sh: the outlines of drawings, and how many images drawn from them are of their class.

python recipes/outlines.py draw DIGITS OUTLINES      # an outline for each image of a folder, under the same name
python recipes/outlines.py measure DRAWN.npz OUTLINES DIGITS LABELLED.npz
python recipes/outlines.py picture DRAWN.npz OUTLINES PICTURE.png        # the first two of each class
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image


def outline(image: np.ndarray) -> np.ndarray:
    """The pixels (H, W) uint8, white, that touch a light stroke of the image and are none of it; all others are black."""
    stroke = image >= 128
    around, (height, width) = np.pad(stroke, 1), image.shape
    touched = np.any([around[i : i + height, j : j + width] for i in range(3) for j in range(3)], axis=0)
    return np.where(touched & ~stroke, 255, 0).astype(np.uint8)


def grey(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file).convert("L"))


def draw(images: Path, out: Path) -> None:
    """Write OUT/NAME.png for every IMAGES/NAME.png."""
    files = sorted(images.rglob("*.png"))
    for file in files:
        place = out / file.relative_to(images)
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(outline(grey(file))).save(place)
    print(f"{len(files)} outlines: {out}")


def read(folder: Path) -> tuple[np.ndarray, list[str]]:
    """The images (N, H, W) of a folder in the order of their names, and their classes: the folders that they lie in."""
    files = sorted(folder.rglob("*.png"), key=lambda file: file.relative_to(folder).as_posix())
    return np.stack([grey(file) for file in files]), [file.parent.name for file in files]


def measure(drawn: Path, outlines: Path, digits: Path, labelled: Path) -> None:
    """Say in how many drawn images a support vector machine, fitted on digits of 8x8 pixels, sees the class of their outline.

    Image k was drawn from outline k, in the order of the names; the folder is the class. Writes the images with these classes.
    """
    from sklearn.svm import SVC

    (known, classes_known), (unknown, classes_unknown) = read(digits / "train"), read(digits / "test")
    judge = SVC(C=10).fit(known.reshape(len(known), -1), classes_known)
    images, (_, wanted) = np.load(drawn)["arr_0"], read(outlines)
    right = judge.predict(images.reshape(len(images), -1)) == wanted
    real = judge.score(unknown.reshape(len(unknown), -1), classes_unknown)
    print(f"{right.sum()} of {len(right)} drawn digits ({right.mean():.1%}) are of their outline's class")
    print(f"of real digits it sees the class of {real:.1%}")
    classes = sorted(set(wanted))
    np.savez(labelled, images, [classes.index(name) for name in wanted], classes=np.array(classes))


def picture(drawn: Path, outlines: Path, out: Path) -> None:
    """Outlines above, what was drawn of them below."""
    images, (given, classes) = np.load(drawn)["arr_0"][..., 0], read(outlines)
    chosen = [k for name in sorted(set(classes)) for k in np.flatnonzero(np.array(classes) == name)[:2]]
    rows = [np.concatenate([np.pad(row[k], 1, constant_values=128) for k in chosen], axis=1) for row in (given, images)]
    Image.fromarray(np.concatenate(rows).repeat(5, 0).repeat(5, 1)).save(out)


if __name__ == "__main__":
    {"draw": draw, "measure": measure, "picture": picture}[sys.argv[1]](*map(Path, sys.argv[2:]))
