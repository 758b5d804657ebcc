#!/usr/bin/env bash
# Handwritten digits, 8x8 grey, class-conditional: what `make demo` runs. See docs/log.md for what it got.
set -euo pipefail
iddpm data digits data/digits
iddpm train data/digits/train --preset digits --run runs/digits
iddpm sample runs/digits
iddpm evaluate runs/digits --reference data/digits/train --num_samples 500
iddpm nll runs/digits data/digits/test
