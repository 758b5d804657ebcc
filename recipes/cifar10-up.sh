#!/usr/bin/env bash
# CIFAR-10 from 16 to 32 pixels; 256 test images, 3 steps: PSNR 26.61 dB and SSIM 0.881, bicubic 26.56 dB and 0.876 (docs/log.md).
set -euo pipefail
iddpm data cifar10 data/cifar10
iddpm train data/cifar10/train --preset cifar10-up --run runs/up
iddpm sample runs/up --high_res data/cifar10/test --num_samples 256 --out runs/up/test.npz
