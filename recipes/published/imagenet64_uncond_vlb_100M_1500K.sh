#!/usr/bin/env bash
# imagenet64_uncond_vlb_100M_1500K.pt of improved-diffusion.
# ImageNet-64: 3.53 bits/dim; FID 40.1 of 10,000 samples. Not run here: there was no access to the file.
set -euo pipefail
file=${1:-imagenet64_uncond_vlb_100M_1500K.pt}
images="${2:?and where are the validation images of ImageNet, 64 x 64?}"
[ -d runs/imagenet64_uncond_vlb_100M_1500K ] || iddpm import "$file" --published imagenet64_uncond_vlb_100M_1500K --run runs/imagenet64_uncond_vlb_100M_1500K
iddpm nll runs/imagenet64_uncond_vlb_100M_1500K "$images"
iddpm sample runs/imagenet64_uncond_vlb_100M_1500K --num_samples 10000 --out runs/imagenet64_uncond_vlb_100M_1500K/samples.npz
