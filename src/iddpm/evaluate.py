"""Measuring a model: bits per dimension of a data set, term by term."""

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iddpm import build, rng
from iddpm.config import Config
from iddpm.data import Images, Order
from iddpm.diffusion.denoiser import Network
from iddpm.diffusion.likelihood import bound_terms, prior_term
from iddpm.log import duration


@torch.inference_mode()
def bits_per_dim(
    config: Config,
    net: Network,
    data: Images,
    device: torch.device,
    *,
    num_samples: int = 0,
    batch_size: int = 64,
    seed: int = 0,
    say: Callable[[str], None] = print,
    tick: Callable[[int], Any] = lambda k: None,
) -> dict[str, Any]:
    """The variational bound on -log2 p of images, in bits/dim: total, prior and the term of each step, means over images.

    `num_samples` images (0: all) are a draw of the seed, each once. The noise of an image depends on the seed, its place in the
    draw and the step. Terms are listed from step 0 (the decoder's) upwards. On a respaced chain the bound is that chain's own.
    """
    denoiser = build.denoiser(config.diffusion, net, config.sample.sampling_steps, config.sample.clip_denoised)
    chain, n = denoiser.chain, min(num_samples or len(data), len(data))
    chosen = Order(len(data), seed).indices(0, n)
    totals, priors = [], []
    vb, x0_mse, eps_mse = (np.zeros(chain.steps) for _ in range(3))
    for a in range(0, n, batch_size):
        places = range(a, min(a + batch_size, n))
        x0 = torch.from_numpy(data.batch(chosen[places])).to(device).float() / 127.5 - 1
        labelled = config.model.class_cond and data.labels is not None
        cond = {"y": torch.from_numpy(data.labels[chosen[places]]).to(device)} if labelled else {}  # type: ignore[index]

        def noise(k: int, places: range = places, shape: torch.Size = x0.shape[1:]) -> Tensor:
            return rng.normal(seed, rng.LIKELIHOOD, k, places, shape).to(device)

        if a == 0:
            at, began = torch.zeros(len(x0), dtype=torch.int64, device=device), time.monotonic()
            for _ in range(2):  # the first call also warms up
                began = time.monotonic()
                denoiser(noise(0), at, cond).x0.sum().item()
            once = time.monotonic() - began
            say(f"{n} images, {chain.steps} steps each: about {duration(once * chain.steps * n / len(x0))}")
        prior = prior_term(chain, x0).cpu().double()
        total = prior.clone()
        for term in bound_terms(denoiser, x0, noise, cond):
            total += term.vb.cpu().double()
            for table, value in ((vb, term.vb), (x0_mse, term.x0_mse), (eps_mse, term.eps_mse)):
                table[term.i] += value.cpu().double().sum().item() / n
            tick(len(x0))
        totals.append(total)
        priors.append(prior)
    each = torch.cat(totals)
    return {
        "bits_per_dim": each.mean().item(),
        "standard_error": each.std().item() / math.sqrt(n) if n > 1 else None,
        "prior": torch.cat(priors).mean().item(),
        "images": n,
        "steps": chain.steps,
        "chain_steps": chain.schedule_steps,
        "seed": seed,
        "kept_steps": chain.kept,
        "vb": vb.tolist(),
        "x0_mse": x0_mse.tolist(),
        "eps_mse": eps_mse.tolist(),
    }
