#!/usr/bin/env bash
# 128x128_classifier.pt of guided-diffusion.
# No published number is known to us. Not run here: there was no access to the file.
set -euo pipefail
file=${1:-128x128_classifier.pt}
[ -d runs/128x128_classifier ] || iddpm import "$file" --published 128x128_classifier --run runs/128x128_classifier
# guides 128x128_diffusion, whose recipe samples with it; scale 0 is without
iddpm sample runs/128x128_diffusion --classifier runs/128x128_classifier --num_samples 64 --sampling_steps 250
