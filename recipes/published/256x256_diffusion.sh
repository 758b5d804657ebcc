#!/usr/bin/env bash
# 256x256_diffusion.pt of guided-diffusion.
# ImageNet-256, 250 steps, guided at scale 1: FID 4.59, precision 0.82, recall 0.52. Not run here: there was no access to the file.
set -euo pipefail
file=${1:-256x256_diffusion.pt}
[ -d runs/256x256_diffusion ] || iddpm import "$file" --published 256x256_diffusion --run runs/256x256_diffusion
[ -d runs/256x256_classifier ] || iddpm import "${2:-256x256_classifier.pt}" --published 256x256_classifier --run runs/256x256_classifier
iddpm sample runs/256x256_diffusion --classifier runs/256x256_classifier --classifier_scale 1.0 \
  --num_samples 50000 --sampling_steps 250 --out runs/256x256_diffusion/samples.npz
