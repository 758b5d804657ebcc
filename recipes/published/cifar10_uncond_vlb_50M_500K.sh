#!/usr/bin/env bash
# cifar10_uncond_vlb_50M_500K.pt of improved-diffusion.
# CIFAR-10: 2.94 bits/dim; FID 11.47 of 50,000 samples. Not run here: there was no access to the file.
set -euo pipefail
file=${1:-cifar10_uncond_vlb_50M_500K.pt}
iddpm data cifar10 data/cifar10
[ -d runs/cifar10_uncond_vlb_50M_500K ] || iddpm import "$file" --published cifar10_uncond_vlb_50M_500K --run runs/cifar10_uncond_vlb_50M_500K
iddpm nll runs/cifar10_uncond_vlb_50M_500K data/cifar10/test
iddpm sample runs/cifar10_uncond_vlb_50M_500K --num_samples 50000 --out runs/cifar10_uncond_vlb_50M_500K/samples.npz
