#!/usr/bin/env bash
# A model of digits without classes, guided to them by a classifier of noisy digits (Dhariwal & Nichol 2021, section 4).
# Read by a support vector machine, 200 samples: 10 % as asked without guidance, 72 % at scale 1, 96 % at scale 3 (docs/log.md).
set -euo pipefail
iddpm data digits data/digits
iddpm train data/digits/train --preset digits --batch_size 128 --steps 1000 --class_cond False --run runs/digits-plain
iddpm train data/digits/train --preset digits-classifier --validation data/digits/test --run runs/digits-classifier
iddpm sample runs/digits-plain --classifier runs/digits-classifier --classifier_scale 3
