#!/usr/bin/env bash
# lsun_bedroom.pt of guided-diffusion.
# LSUN bedroom, 1000 steps: FID 1.90, precision 0.66, recall 0.51. Not run here: there was no access to the file.
set -euo pipefail
file=${1:-lsun_bedroom.pt}
[ -d runs/lsun_bedroom ] || iddpm import "$file" --published lsun_bedroom --run runs/lsun_bedroom
iddpm sample runs/lsun_bedroom --num_samples 50000 --out runs/lsun_bedroom/samples.npz  # its 1000 steps: 250 are worse
