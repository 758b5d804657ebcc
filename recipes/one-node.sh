#!/usr/bin/env bash
# The same on all GPUs of one machine:  recipes/one-node.sh PHOTOS runs/mine
# A process that dies ends the others, and all go on from the newest checkpoint, three times at most. Not run on CUDA.
set -euo pipefail
data=${1:?which images?} run=${2:-runs/mine}
torchrun --standalone --nproc-per-node "${GPUS:-gpu}" --max-restarts 3 -m -- iddpm train "$data" --time 8h --run "$run"
torchrun --standalone --nproc-per-node "${GPUS:-gpu}" -m -- iddpm evaluate "$run" --reference "$data"
