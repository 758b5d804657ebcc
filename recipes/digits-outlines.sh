#!/usr/bin/env bash
# Handwritten digits from their outlines, 8x8 grey, without classes (--task translate). What it got: docs/guides/translate.md.
set -euo pipefail
here=$(dirname "$0")
iddpm data digits data/digits
python "$here/outlines.py" draw data/digits/train data/outlines/train
python "$here/outlines.py" draw data/digits/test data/outlines/test
iddpm train data/digits/train --task translate --given data/outlines/train --preset digits --batch_size 128 --steps 1000 --class_cond False --run runs/outlines
iddpm sample runs/outlines --given data/outlines/test --out runs/outlines/drawn.npz
python "$here/outlines.py" measure runs/outlines/drawn.npz data/outlines/test data/digits runs/outlines/labelled.npz
python "$here/outlines.py" picture runs/outlines/drawn.npz data/outlines/test runs/outlines/picture.png
iddpm evaluate runs/outlines/labelled.npz --reference data/digits/train
iddpm nll runs/outlines data/digits/test --given data/outlines/test
