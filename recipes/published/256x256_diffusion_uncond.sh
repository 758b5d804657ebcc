#!/usr/bin/env bash
# 256x256_diffusion_uncond.pt of guided-diffusion.
# No published number is known to us. Not run here: there was no access to the file.
set -euo pipefail
file=${1:-256x256_diffusion_uncond.pt}
[ -d runs/256x256_diffusion_uncond ] || iddpm import "$file" --published 256x256_diffusion_uncond --run runs/256x256_diffusion_uncond
[ -d runs/256x256_classifier ] || iddpm import "${2:-256x256_classifier.pt}" --published 256x256_classifier --run runs/256x256_classifier
iddpm sample runs/256x256_diffusion_uncond --classifier runs/256x256_classifier --classifier_scale 10.0 \
  --num_samples 50000 --sampling_steps 250 --out runs/256x256_diffusion_uncond/samples.npz
