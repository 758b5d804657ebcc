#!/usr/bin/env bash
# upsample_cond_500K.pt of improved-diffusion.
# No published number is known to us. Not run here: there was no access to the file.
set -euo pipefail
file=${1:-upsample_cond_500K.pt}
[ -d runs/upsample_cond_500K ] || iddpm import "$file" --published upsample_cond_500K --run runs/upsample_cond_500K --sampling_steps 250
# enlarges what imagenet64_cond_270M_250K draws: its recipe makes that run
iddpm sample runs/imagenet64_cond_270M_250K --then runs/upsample_cond_500K --num_samples 64 --sampling_steps 250 --out runs/upsample_cond_500K/samples.npz
