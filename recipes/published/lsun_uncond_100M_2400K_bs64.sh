#!/usr/bin/env bash
# lsun_uncond_100M_2400K_bs64.pt of improved-diffusion.
# LSUN bedroom: FID 4.24, sFID 8.21 (one of the two files; which is not said). Not run here: there was no access to the file.
set -euo pipefail
file=${1:-lsun_uncond_100M_2400K_bs64.pt}
[ -d runs/lsun_uncond_100M_2400K_bs64 ] || iddpm import "$file" --published lsun_uncond_100M_2400K_bs64 --run runs/lsun_uncond_100M_2400K_bs64
iddpm sample runs/lsun_uncond_100M_2400K_bs64 --num_samples 50000 --out runs/lsun_uncond_100M_2400K_bs64/samples.npz
