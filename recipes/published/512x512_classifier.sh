#!/usr/bin/env bash
# 512x512_classifier.pt of guided-diffusion.
# No published number is known to us. Not run here: there was no access to the file.
set -euo pipefail
file=${1:-512x512_classifier.pt}
[ -d runs/512x512_classifier ] || iddpm import "$file" --published 512x512_classifier --run runs/512x512_classifier
# guides 512x512_diffusion, whose recipe samples with it; scale 0 is without
iddpm sample runs/512x512_diffusion --classifier runs/512x512_classifier --num_samples 64 --sampling_steps 250
