#!/usr/bin/env bash
# Any training on several nodes of a Slurm cluster:  sbatch recipes/slurm.sh PHOTOS --preset imagenet64 --run runs/photos
# srun starts one torchrun a node, torchrun one process for each GPU, and starts them again where one dies. Five minutes before
# its time is over, or when it is preempted, the job saves, ends, and puts itself back into the queue, where it goes on from there.
# When a node dies, Slurm itself does the latter. Images and run must lie where every node sees them.
#SBATCH --job-name=iddpm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # each restart meets anew, wherever its first process is then
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240   # seconds that torchrun leaves the processes to save; its own 30 may be too few
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" --max-restarts 10 \
    --rdzv-backend c10d --rdzv-endpoint "$first:29400" --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    -m -- iddpm train "$@" &
step=$!

again() {
    kill -TERM "$step" # srun hands it on, and torchrun: every process finishes its step, and all is saved
    wait "$step" || true
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap again USR1 TERM
wait "$step"
