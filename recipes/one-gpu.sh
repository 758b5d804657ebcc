#!/usr/bin/env bash
# A model of your own images on one GPU, overnight:  recipes/one-gpu.sh PHOTOS runs/mine
# The recipe is chosen for the images, the GPU and the time; started again, it goes on. Not run on CUDA.
set -euo pipefail
data=${1:?which images?} run=${2:-runs/mine}
iddpm data check "$data" "$run-images.png"
iddpm train "$data" --time 8h --run "$run" --validation 2% --validation_interval 500
iddpm evaluate "$run" --reference "$data"
iddpm diagnose "$run"
