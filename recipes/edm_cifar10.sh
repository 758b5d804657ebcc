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

fid() { # NAME FLAGS: draw, and compare
  local out=$run/$1
  shift
  iddpm sample $run --num_samples 50000 --batch_size 500 --grid karras --out "$out.npz" "$@"
  iddpm evaluate "$out.npz" --reference data/cifar10/train --extractor inception --metrics fd --out "$out.json"
}

fid edm-35 --solver edm --S_churn 0 --sampling_steps 18
fid ipndm4-10 --solver ipndm --order 4 --sampling_steps 10
fid unipc3-10 --solver unipc --order 3 --sampling_steps 10
fid dpmpp3m-10 --solver dpmpp_3m --sampling_steps 10
fid euler-10 --solver ddim --sampling_steps 10
fid heun-9 --solver edm --S_churn 0 --sampling_steps 5
