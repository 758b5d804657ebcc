#!/usr/bin/env bash
# 256x256_classifier.pt of guided-diffusion.
# No published number is known to us. Not run here: there was no access to the file.
set -euo pipefail
file=${1:-256x256_classifier.pt}
[ -d runs/256x256_classifier ] || iddpm import "$file" --published 256x256_classifier --run runs/256x256_classifier
# guides 256x256_diffusion, whose recipe samples with it; scale 0 is without
iddpm sample runs/256x256_diffusion --classifier runs/256x256_classifier --num_samples 64 --sampling_steps 250
