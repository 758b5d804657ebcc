#!/usr/bin/env bash
# CIFAR-10 from 16 to 32 pixels. See docs/log.md for what it got beside bicubic enlargement.
set -euo pipefail
iddpm data cifar10 data/cifar10
iddpm train data/cifar10/train --preset cifar10-up --run runs/up
iddpm sample runs/up --high_res data/cifar10/test --num_samples 256 --out runs/up/test.npz
