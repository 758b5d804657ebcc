#!/usr/bin/env bash
# CIFAR-10 in about a quarter of an hour on two CPU cores. See docs/log.md for what it got.
set -euo pipefail
iddpm data cifar10 data/cifar10
iddpm train data/cifar10/train --preset cifar10-tiny --run runs/tiny
iddpm sample runs/tiny
iddpm evaluate runs/tiny --reference data/cifar10/train --num_samples 2000 --num_reference 2000 --solver ddim --sampling_steps 50
iddpm nll runs/tiny data/cifar10/test --num_samples 256 --sampling_steps 50
