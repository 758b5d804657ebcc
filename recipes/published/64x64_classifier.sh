#!/usr/bin/env bash
# 64x64_classifier.pt of guided-diffusion.
# No published number is known to us. Not run here: there was no access to the file.
set -euo pipefail
file=${1:-64x64_classifier.pt}
[ -d runs/64x64_classifier ] || iddpm import "$file" --published 64x64_classifier --run runs/64x64_classifier
# guides 64x64_diffusion, whose recipe samples with it; scale 0 is without
iddpm sample runs/64x64_diffusion --classifier runs/64x64_classifier --num_samples 64 --sampling_steps 250
