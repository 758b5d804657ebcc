#!/usr/bin/env bash
# EDM's own CIFAR-10 weights in few calls of the network: FID of 50,000 samples against the training images.
# Not run here: there was no access to the file, edm-cifar10-32x32-uncond-vp.pkl (NVlabs/edm names its address).
#
# 35 calls, EDM's own sampler: 1.97, the least of three draws (Karras et al. 2022).
# 10 calls, by a third party (zju-pi/diff-sampler): iPNDM-4 2.77, UniPC-3 2.89, DPM-Solver++ 3M 3.00, Euler 15.69, Heun 15.93.
# Their last call is at the level before the least noisy one, ours at that: sigma 0.002. Heun takes 9 calls here, 10 there.
set -euo pipefail
file=${1:-edm-cifar10-32x32-uncond-vp.pkl} run=runs/edm_cifar10
iddpm data cifar10 data/cifar10
[ -d $run ] || iddpm import "$file" --run $run

iddpm sample $run --num_samples 50000 --batch_size 500 --grid karras --solver edm --S_churn 0 --sampling_steps 18 --out $run/edm-35.npz
iddpm sample $run --num_samples 50000 --batch_size 500 --grid karras --solver ipndm --order 4 --sampling_steps 10 --out $run/ipndm4-10.npz
iddpm sample $run --num_samples 50000 --batch_size 500 --grid karras --solver unipc --order 3 --sampling_steps 10 --out $run/unipc3-10.npz
iddpm sample $run --num_samples 50000 --batch_size 500 --grid karras --solver dpmpp_3m --sampling_steps 10 --out $run/dpmpp3m-10.npz
iddpm sample $run --num_samples 50000 --batch_size 500 --grid karras --solver ddim --sampling_steps 10 --out $run/euler-10.npz
iddpm sample $run --num_samples 50000 --batch_size 500 --grid karras --solver edm --S_churn 0 --sampling_steps 5 --out $run/heun-9.npz

for drawn in $run/*.npz; do
  iddpm evaluate "$drawn" --reference data/cifar10/train --extractor inception --metrics fd --out "${drawn%.npz}.json"
done
