#!/usr/bin/env bash
# lsun_horse_nodropout.pt of guided-diffusion.
# No published number is known to us. Not run here: there was no access to the file.
set -euo pipefail
file=${1:-lsun_horse_nodropout.pt}
[ -d runs/lsun_horse_nodropout ] || iddpm import "$file" --published lsun_horse_nodropout --run runs/lsun_horse_nodropout
iddpm sample runs/lsun_horse_nodropout --num_samples 50000 --out runs/lsun_horse_nodropout/samples.npz  # its 1000 steps: 250 are worse
