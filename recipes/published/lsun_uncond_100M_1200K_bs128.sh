#!/usr/bin/env bash
# lsun_uncond_100M_1200K_bs128.pt of improved-diffusion.
# LSUN bedroom: FID 4.24, sFID 8.21 (one of the two files; which is not said). Not run here: there was no access to the file.
set -euo pipefail
file=${1:-lsun_uncond_100M_1200K_bs128.pt}
[ -d runs/lsun_uncond_100M_1200K_bs128 ] || iddpm import "$file" --published lsun_uncond_100M_1200K_bs128 --run runs/lsun_uncond_100M_1200K_bs128
iddpm sample runs/lsun_uncond_100M_1200K_bs128 --num_samples 50000 --out runs/lsun_uncond_100M_1200K_bs128/samples.npz
