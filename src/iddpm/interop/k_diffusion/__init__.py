"""Checkpoints of k-diffusion (K. Crowson, github.com/crowsonkb/k-diffusion), as its own programs write them."""
